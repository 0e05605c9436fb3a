"""Masks through clips, against what the official video path gave (``sa2va_tiny_video``)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va.propagation import propagate_frames

CLIPS = ('short', 'long')


@pytest.fixture(scope='module')
def arrays(shared_dir):
    path = shared_dir / 'fixtures/sa2va_tiny_video/golden.npz'
    if not path.exists():
        pytest.skip(f'{path} is not there')
    with np.load(path) as content:
        return {key: torch.as_tensor(content[key]) for key in content}


@pytest.fixture(scope='module')
def model(arrays, golden_folder, golden_ids):
    """The golden checkpoint, its memory's weights rescaled so that memory and pointers matter."""
    model = VideoLLaVASAMModel.from_pretrained(golden_folder, special_token_ids=golden_ids)
    weights = {
        key.removeprefix('weight/'): value
        for key, value in arrays.items()
        if key.startswith('weight/')
    }
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    return model.eval()


@pytest.fixture(params=CLIPS)
def clip(request, arrays):
    prefix = f'{request.param}/'
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def propagate(model, clip, **options):
    with torch.no_grad():
        return model.propagate(clip['frames'], clip['seg_embeddings'], **options)


@pytest.mark.parametrize(
    ('dtype', 'key'),
    [(torch.bfloat16, 'mask_logits'), (torch.float32, 'mask_logits_fp32_memory')],
)
def test_masks_are_the_official_ones(model, clip, dtype, key):
    assert int(clip['num_cond_frames']) == 5
    found = propagate(model, clip, memory_dtype=dtype)
    expected = clip[key]
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_final_masks_are_the_official_ones_bit_for_bit(model, clip):
    low_res = propagate(model, clip)
    image = F.interpolate(low_res, clip['frames'].shape[-2:], mode='bilinear', align_corners=False)
    size = clip['ori_size'].tolist()
    masks = F.interpolate(image, size, mode='bilinear', align_corners=False).sigmoid() > 0.5
    expected = np.unpackbits(clip['pred_masks'].numpy(), axis=-1, count=size[1]).astype(bool)
    assert np.array_equal(masks.numpy(), expected)


def test_objects_at_once_are_objects_one_by_one(model, arrays):
    clip = {key: arrays[f'short/{key}'] for key in ('frames', 'seg_embeddings')}
    together = propagate(model, clip)
    for n, embedding in enumerate(clip['seg_embeddings']):
        alone = propagate(model, {**clip, 'seg_embeddings': embedding[None]})
        assert (together[n] - alone[0]).abs().max() < 1e-5 * together.std()


def test_frames_from_an_iterator_are_the_tensors(model, clip):
    def frames():
        yield from clip['frames']

    expected = propagate(model, clip)
    assert torch.equal(propagate(model, {**clip, 'frames': frames()}), expected)


def test_each_frame_is_encoded_once_and_masks_come_as_frames_do(model, arrays, monkeypatch):
    encoded = []
    forward = type(model.grounding_encoder).levels
    monkeypatch.setattr(
        type(model.grounding_encoder),
        'levels',
        lambda self, frames: encoded.append(len(frames)) or forward(self, frames),
    )
    with torch.no_grad():
        masks = propagate_frames(
            model.grounding_encoder, iter(arrays['short/frames']), arrays['short/seg_embeddings']
        )
        next(masks)
        assert encoded == [1]
        assert len(list(masks)) == 7
    assert encoded == [1] * 8


def test_what_no_later_frame_looks_back_at_is_let_go(model, arrays, monkeypatch):
    """Of 24 frames: five that were prompted, six memories, fifteen pointers."""
    looked_up = []
    sam = model.grounding_encoder.sam2_model
    recall = sam._prepare_memory_conditioned_features

    def watch(**options):
        kept = options['output_dict']
        propagated = kept['non_cond_frame_outputs']
        looked_up.append(
            (
                len(kept['cond_frame_outputs']),
                sum('maskmem_features' in frame for frame in propagated.values()),
                len(propagated),
            )
        )
        return recall(**options)

    monkeypatch.setattr(sam, '_prepare_memory_conditioned_features', watch)
    propagate(model, {key: arrays[f'long/{key}'] for key in ('frames', 'seg_embeddings')})
    assert looked_up == [(5, min(n, 6), min(n, 15)) for n in range(19)]


def test_nothing_is_dropped_out_of_the_memory_while_the_policy_trains(model, clip):
    expected = propagate(model, clip)
    model.train()
    try:
        assert torch.equal(propagate(model, clip), expected)
    finally:
        model.eval()


def test_a_clip_of_one_frame_is_a_picture(model, arrays):
    frame, prompts = arrays['short/frames'][:1], arrays['short/seg_embeddings']
    with torch.no_grad():
        found = model.propagate(frame, prompts)
        features = model.grounding_encoder.encode(frame)
        expected, _, _ = model.grounding_encoder.decode(features, prompts, torch.tensor([0, 0]))
    assert torch.equal(found, expected)


def test_what_cannot_be_propagated_is_named(model, arrays):
    frames, prompts = arrays['short/frames'], arrays['short/seg_embeddings']
    with pytest.raises(ValueError, match='the clip has no frame'):
        model.propagate(frames[:0], prompts)
    with pytest.raises(ValueError, match=r'frame 1: g_pixel_values are \(64, 128\)'):
        model.propagate([frames[0], frames[1, :, :64]], prompts)
    with pytest.raises(ValueError, match=r'seg_embeddings are \(2, 32\), expected \(objects, 64\)'):
        model.propagate(frames, prompts[:, :32])
    with pytest.raises(ValueError, match='num_cond_frames=0'):
        model.propagate(frames, prompts, num_cond_frames=0)
