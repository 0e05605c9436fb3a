"""Both tasks one behind the other, as validation runs them."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedMovingScenes, sa2va_collate
from projects.llava_sam2_rl.models.captioning import write_captions
from projects.llava_sam2_rl.models.cycle import run_cycles
from projects.llava_sam2_rl.models.sa2va.masks import upsample_masks
from projects.llava_sam2_rl.models.segmentation import seg_embeddings, segment_descriptions
from projects.llava_sam2_rl.prompts import clean_caption, strip_final_period
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid
from test_models.batches import encode


def test_prediction_gives_masks_of_original_size_for_each_text(tiny_model, batch):
    results = tiny_model(**batch, mode='predict')
    assert [set(r['masks']) for r in results] == [{'generated', 'reference', 'distractor'}] * 4
    for result in results:
        for mask in result['masks'].values():
            assert mask.shape == (128, 128)
            assert mask.dtype == torch.bool
    assert results[1]['reference'] is None


def test_prediction_with_policy_or_teacher(tiny_model, batch):
    before = tiny_model.predict(**batch)
    with torch.no_grad():
        for parameter in tiny_model.policy.text_hidden_fcs.parameters():
            parameter.zero_()

    def same(a, b):
        return all(
            torch.equal(x['masks']['generated'], y['masks']['generated'])
            for x, y in zip(a, b, strict=True)
        )

    assert not same(tiny_model.predict(**batch), before)
    tiny_model.predict_with = 'teacher'
    assert same(tiny_model.predict(**batch), before)


def test_the_cycle_ends_with_a_caption_of_the_mask_that_was_found(tiny_model, batch):
    policy, encoded = tiny_model.policy, encode(tiny_model, batch)
    results = run_cycles(policy, encoded, batch['data_samples'], 24)
    grids = [prompt_mask_grid(r['masks']['reference'][None], policy.grid_size) for r in results]
    expected = write_captions(policy, encoded, 24, prompt_masks=grids)
    assert [result['caption_return'] for result in results] == expected
    assert [r['caption'] for r in results] == write_captions(policy, encoded, 24)


def test_without_references_the_generated_caption_alone_is_segmented(tiny_model, batch):
    results = run_cycles(tiny_model.policy, encode(tiny_model, batch), None, 24)
    assert [set(r['masks']) for r in results] == [{'generated'}] * 4
    assert {r['caption_return'] for r in results} == {None}


def test_a_clip_is_followed_from_its_first_frame(tiny_model, tiny_transform):
    clips = GeneratedMovingScenes(length=4, num_frames=3, split='val', transforms=tiny_transform)
    pairs = GeneratedMovingScenes(length=4, num_frames=2, split='val', transforms=tiny_transform)
    batch = sa2va_collate([clips[0], pairs[1], clips[2]])
    policy, encoded = tiny_model.policy, encode(tiny_model, batch)
    results = run_cycles(policy, encoded, batch['data_samples'], 24)
    assert [set(r['tracks']) for r in results] == [
        {'gt', 'generated', 'reference'},
        set(),
        {'gt', 'generated', 'reference'},
    ]
    for i in (0, 2):
        tracks = results[i]['tracks']
        assert [len(track) for track in tracks.values()] == [3, 3, 3]
        assert torch.equal(tracks['gt'][0], results[i]['gt_mask'])
        later = encoded.clip[i].index(encoded.target_image[i])
        assert torch.equal(tracks['gt'][later], results[i]['target_mask'])
        # The first frame is prompted as an image is.
        assert torch.equal(tracks['reference'][0], results[i]['masks']['reference'])
        written = strip_final_period(clean_caption(results[i]['caption']))
        low_res, _ = segment_descriptions(policy, encoded, [written], [i], ['one'])
        first = upsample_masks(low_res[None], (128, 128))[0, 0]
        assert torch.equal(tracks['generated'][0], first)
        # SAM 2's memory carries both through the frames in their order.
        asked = {'generated': written, 'reference': clean_caption(encoded.captions[i]).lower()}
        for what, text in asked.items():
            with torch.no_grad():
                prompt, _ = seg_embeddings(policy, encoded, [text], [i], ['one'])
                frames = [encoded.frames.select(slice(k, k + 1)) for k in encoded.clip[i]]
                (carried,) = policy.propagate(iter(frames), prompt, num_cond_frames=1)
            masks = upsample_masks(carried[:, None], (128, 128))[:, 0]
            assert torch.equal(torch.stack(tracks[what]), masks)
            assert not torch.equal(masks[1], masks[2])


def test_the_cycle_is_not_measured_on_conversations(tiny_model, mixed):
    with pytest.raises(ValueError, match='needs regions'):
        tiny_model.predict(**mixed)
