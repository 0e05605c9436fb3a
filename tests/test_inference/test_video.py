"""Sa2VA on clips: generated scenes, as arrays, folders and MP4."""

from __future__ import annotations

import importlib.util
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import GeneratedScenes
from projects.llava_sam2_rl.inference import Sa2VA, read_frames, video
from projects.llava_sam2_rl.inference.clips import frames_per_second
from projects.llava_sam2_rl.inference.video import VideoSegmentation
from projects.llava_sam2_rl.rewards.meteor import meteor

MODEL = 'llava_sam2_rl://assets/sa2va_tiny'


@pytest.fixture(scope='module')
def model():
    return Sa2VA.from_pretrained(MODEL, device='cpu')


@pytest.fixture(scope='module')
def scenes():
    plain = GeneratedScenes(length=6, split='val')
    return [plain[i]['sample'] for i in range(6)]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_finds_in_the_prompted_frames_what_the_text_names(model, scenes):
    """The tiny model was never taught clips, yet three frames alike are as good as one."""
    found = [model.segment_video([scene.image] * 3, scene.caption) for scene in scenes]
    assert all(len(one) == 3 and one.found for one in found)
    values = [
        iou(one.mask(f), scene.mask)
        for one, scene in zip(found, scenes, strict=True)
        for f in range(3)
    ]
    assert np.mean(values) > 0.6
    assert '[SEG]' in found[0].answer
    assert '<|end|>' not in found[0].answer
    assert np.array_equal(found[0].masks[1], found[0].mask(1))


def test_the_language_model_sees_five_frames_and_sam_all(model, scenes, monkeypatch):
    asked, carried = [], []
    monkeypatch.setattr(
        type(model.policy),
        'generate',
        lambda self, data, *_: asked.append(data) or torch.tensor([[self.seg_token_id] * 2]),
    )
    propagate = video.propagate_frames

    def watch(encoder, frames, prompts):
        carried.append(prompts.shape)
        return propagate(encoder, frames, prompts)

    monkeypatch.setattr(video, 'propagate_frames', watch)
    found = model.segment_video([scenes[0].image] * 8, scenes[0].caption)
    policy = model.policy
    (data,) = asked
    contexts = data['input_ids'] == policy.special_token_ids['<IMG_CONTEXT>']
    assert data['features'].num_tiles == (5,)
    assert int(contexts.sum()) == 5 * policy.num_image_tokens
    assert len(found) == 8
    assert found.object_masks(7).shape == (2, *scenes[0].image.shape[:2])
    assert carried == [(2, policy.grounding_encoder.hidden_dim)]


@pytest.mark.parametrize(
    ('text', 'asked'),
    [
        ('a red circle.', 'Please segment a red circle.'),
        ('What is red?', ' What is red? Please respond with a segmentation mask.'),
        # Told by a question mark anywhere; then its last period stays.
        (
            'What is red? Take the first.',
            ' What is red? Take the first. Please respond with a segmentation mask.',
        ),
    ],
)
def test_texts_are_asked_as_officially(model, scenes, monkeypatch, text, asked):
    seen = []
    real = video.encode_prompt
    monkeypatch.setattr(
        video, 'encode_prompt', lambda _, prompt: seen.append(prompt) or real(_, prompt)
    )
    model.segment_video([scenes[0].image] * 2, text, max_new_tokens=2)
    image = f'<img>{"<IMG_CONTEXT>" * model.policy.num_image_tokens}</img>\n'
    assert image + image + asked in seen[0]


def test_an_answer_that_points_at_nothing_is_empty(model, scenes, monkeypatch):
    nothing = torch.tensor([[model.policy.pad_token_id]])
    monkeypatch.setattr(type(model.policy), 'generate', lambda *_: nothing)
    found = model.segment_video([scenes[0].image] * 2, 'a red circle')
    assert not found.found
    assert len(found) == 2
    assert found.masks.shape == (2, *scenes[0].image.shape[:2])
    assert not found.masks.any()


def test_texts_about_one_clip_share_its_frames(model, scenes, monkeypatch):
    """Each text finds what it finds alone; SAM 2 encodes every frame once for all of them."""
    frames = [scenes[0].image] * 7
    texts = [scenes[0].caption, scenes[0].distractor]
    alone = [model.segment_video(frames, text) for text in texts]
    encoded = []
    levels = type(model.policy.grounding_encoder).levels
    monkeypatch.setattr(
        type(model.policy.grounding_encoder),
        'levels',
        lambda self, images: encoded.append(len(images)) or levels(self, images),
    )
    together = video.segment_texts(model.policy, frames, texts)
    assert encoded == [1] * 7
    for one, other in zip(alone, together, strict=True):
        assert one.answer == other.answer
        assert (one.masks ^ other.masks).mean() < 1e-3
    assert iou(together[0].mask(0), together[1].mask(0)) < 0.5


def test_of_several_seg_the_first_ones_are_followed(model, scenes, monkeypatch):
    """One answer points at nothing, one at two objects: each keeps its own."""
    seg, pad = model.policy.seg_token_id, model.policy.pad_token_id
    answers = torch.tensor([[pad, pad], [seg, seg]])
    monkeypatch.setattr(type(model.policy), 'generate', lambda *_: answers)
    frames = [scenes[0].image] * 6
    for most, counts in ((None, [0, 2]), (1, [0, 1])):
        found = video.segment_texts(model.policy, frames, ['a', 'b'], max_objects=most)
        assert [len(one.rles[5]) for one in found] == counts
        assert [len(one) for one in found] == [6, 6]


def test_masks_of_run_lengths():
    first = np.zeros((2, 3), np.uint8)
    first[0, 1] = 1
    second = np.zeros((2, 3), np.uint8)
    second[1] = 1
    rles = [[coco_mask.encode(np.asfortranarray(m)) for m in (first, second)], []]
    found = VideoSegmentation('', True, (2, 3), rles)
    assert np.array_equal(found.mask(0), [[False, True, False], [True, True, True]])
    assert np.array_equal(found.object_masks(0), [first.astype(bool), second.astype(bool)])
    assert not found.mask(1).any()


# ------------------------------------------------------------------------------ regions of a clip


def test_describes_what_the_mask_covers_in_its_frame(model, scenes):
    """Nearer to the region's own description than to that of another one, as on photographs.

    Of two frames: the tiny model never saw several, and does not know its way among five.
    """
    own, other = [], []
    for scene in scenes:
        caption = model.describe_video([scene.image] * 2, [scene.mask])
        assert '<|' not in caption
        own.append(meteor(scene.caption, caption))
        other.append(meteor(scene.distractor, caption))
    assert np.mean(own) > np.mean(other) + 0.1


def test_one_frame_is_a_photograph(model, scenes):
    scene = scenes[0]
    assert model.describe_video([scene.image], [scene.mask]) == model.describe(
        scene.image, scene.mask
    )


def test_five_frames_are_shown_from_the_first_one_with_a_mask(model, scenes, monkeypatch):
    asked = []
    generate = type(model.policy).generate
    monkeypatch.setattr(
        type(model.policy),
        'generate',
        lambda self, data, *args, **options: (
            asked.append(data) or generate(self, data, *args, **options)
        ),
    )
    empty = np.zeros_like(scenes[0].mask)
    masks = [None, empty, scenes[2].mask, scenes[0].mask]
    model.describe_video([scene.image for scene in scenes] + [scenes[0].image] * 4, masks)
    (data,) = asked
    policy = model.policy
    expected = [scenes[i].image for i in (2, 3, 4, 5)] + [scenes[0].image]
    tiles = video.frame_tiles(policy, expected)
    features = policy.encode_images({'pixel_values': [tiles]}, grounding=False)
    assert torch.equal(data['features'].vit, features.vit)
    # The region's tokens are cells of the third frame of the clip, and stand behind all frames.
    (grid,) = data['prompt_masks']
    embeds = policy.embed(
        data['input_ids'],
        data['features'],
        prompt_masks=data['prompt_masks'],
        image_index=[0],
    )[0]
    ids = data['input_ids'][0]
    vp = policy.special_token_ids['<vp>']
    start = int((ids == vp).nonzero()) + 1
    cells = policy.project(features)[0][grid.flatten()]
    assert torch.equal(embeds[start : start + len(cells)], cells)
    assert int((ids[:start] == policy.image_token_id).sum()) == 5 * policy.num_image_tokens
    text = policy.tokenizer.decode(ids)
    image = f'<img>{"<IMG_CONTEXT>" * policy.num_image_tokens}</img>\n'
    marked = f'region1<vp>{"<IMG_CONTEXT>" * len(cells)}</vp>.\n'
    assert f'{5 * image}There are 1 part regions in the picture: {marked}Please describe' in text


def test_masks_of_clips_that_say_nothing_are_errors(model, scenes):
    image, mask = scenes[0].image, scenes[0].mask
    with pytest.raises(ValueError, match='none of the masks of 2 frames has a pixel'):
        model.describe_video([image] * 3, [None, np.zeros_like(mask)])
    with pytest.raises(ValueError, match='none of the masks of 0 frames'):
        model.describe_video([image], [])
    with pytest.raises(ValueError, match=r'mask of frame 1 is \d+ x \d+ pixels, the frame'):
        model.describe_video([image] * 2, [None, mask[:-1]])


# ---------------------------------------------------------------------------- clips as people have


def write_video(path, count, size=(64, 48)):
    """A clip whose frames get brighter."""
    video_file = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), 5.0, size)
    for number in range(count):
        video_file.write(np.full((size[1], size[0], 3), 20 * number, np.uint8))
    video_file.release()
    return path


def test_frames_of_a_video_a_folder_and_arrays(tmp_path):
    path = write_video(tmp_path / 'clip.mp4', 6)
    frames = list(read_frames(path))
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 6
    assert np.allclose([frame.mean() for frame in frames], [0, 20, 40, 60, 80, 100], atol=4)
    assert frames_per_second(path) == pytest.approx(5)
    folder = tmp_path / 'frames'
    folder.mkdir()
    for number in (1, 0, 2):
        Image.fromarray(frames[number]).save(folder / f'{number:05d}.png')
    (folder / 'notes.txt').write_text('no picture')
    assert all(map(np.array_equal, read_frames(folder), frames[:3]))
    assert len(list(read_frames(folder))) == 3
    assert frames_per_second(folder) is None
    assert np.array_equal(next(read_frames(iter(frames))), frames[0])


def test_clips_that_cannot_be_read_are_named(tmp_path, model):
    with pytest.raises(ValueError, match=r'there is no clip .*nowhere\.mp4'):
        model.segment_video(tmp_path / 'nowhere.mp4', 'a dog')
    (tmp_path / 'text.mp4').write_text('no video')
    with pytest.raises(ValueError, match=r'text\.mp4 is damaged or no video'):
        list(read_frames(tmp_path / 'text.mp4'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty has no frame'):
        list(read_frames(tmp_path / 'empty'))
    two = [np.zeros((4, 6, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]
    with pytest.raises(ValueError, match='frame 1 is 5 x 4 pixels, the first one 6 x 4'):
        list(read_frames(two))
    with pytest.raises(ValueError, match='names nothing'):
        model.segment_video(two[:1], ' . ')


def test_a_video_that_ends_early_is_an_error(tmp_path, monkeypatch):
    path = write_video(tmp_path / 'clip.mp4', 4)
    capture = cv2.VideoCapture

    class Longer:
        """Not a subclass: those of cv2's classes corrupt the heap when they are freed."""

        def __init__(self, *args):
            self.video = capture(*args)

        def __getattr__(self, name):
            return getattr(self.video, name)

        def get(self, key):
            return 9 if key == cv2.CAP_PROP_FRAME_COUNT else self.video.get(key)

    monkeypatch.setattr(cv2, 'VideoCapture', Longer)
    with pytest.raises(ValueError, match='ends after frame 4 of 9'):
        list(read_frames(path))


# ---------------------------------------------------------------------------------------- the tool


@pytest.fixture
def predict(root):
    spec = importlib.util.spec_from_file_location('predict', root / 'tools/predict.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_tool_writes_masks_run_lengths_and_a_clip(predict, scenes, tmp_path, capsys):
    folder = tmp_path / 'clip'
    folder.mkdir()
    for number in range(3):
        Image.fromarray(scenes[0].image).save(folder / f'{number}.png')
    out = tmp_path / 'out'
    text = scenes[0].caption
    assert predict([MODEL, str(folder), '--text', text, '--out', str(out)]) == 0
    said = capsys.readouterr().out
    assert f'“{text}”: in 3 of 3 frames' in said
    masks = [np.asarray(Image.open(file)) for file in sorted((out / 'clip_1').iterdir())]
    assert len(masks) == 3
    assert set(np.unique(masks[0])) == {0, 255}
    assert iou(masks[0] > 0, scenes[0].mask) > 0.6
    content = json.loads((out / 'clip_1.json').read_text())
    assert np.array_equal(coco_mask.decode(content['frames'][2]).any(2), masks[2] > 0)
    drawn = list(read_frames(out / 'clip_1_overlay.mp4'))
    assert len(drawn) == 3
    assert drawn[0].shape == scenes[0].image.shape


def test_the_tool_describes_no_regions_of_clips(predict, tmp_path, capsys):
    with pytest.raises(SystemExit):
        predict([MODEL, str(tmp_path), '--box', '1,1,5,5'])
    assert 'of clips only --text can be asked' in capsys.readouterr().err
