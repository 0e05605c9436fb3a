"""GRPO over clips: who looks at which frame, what the masks are scored by, and what it costs."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedMovingScenes, GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective
from projects.llava_sam2_rl.models.captioning import caption_loss
from projects.llava_sam2_rl.models.objectives import grpo_caption_to_mask
from projects.llava_sam2_rl.models.segmentation import segment_clips
from projects.llava_sam2_rl.rewards import MaskIoUReward
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid
from test_models.batches import encode, randomize_lora

G = 3
PROPAGATE = dict(
    mask_to_caption=dict(return_trip='propagate'), caption_to_mask=dict(return_trip='propagate')
)


class Seen(MaskIoUReward):
    """The IoU; keeps what it was shown."""

    def __init__(self):
        self.rollouts = None

    def __call__(self, rollouts):
        self.rollouts = rollouts
        return super().__call__(rollouts)


def build(
    tiny_model, return_trip='propagate', beta=0.1, max_new_tokens=5, **options
) -> DualLoopModel:
    """Both directions by the IoU of the masks, or as ``options`` say."""
    trips = PROPAGATE if return_trip == 'propagate' else {}
    directions = {key: {'reward': Seen(), **trips.get(key, {})} for key in PROPAGATE}
    for key in PROPAGATE:
        directions[key].update(options.pop(key, {}))
    objective = GRPOObjective(num_generations=G, beta=beta, **directions, **options)
    return DualLoopModel(tiny_model.policy, objective, max_new_tokens=max_new_tokens)


def clip(count, index=0, transform=None, **options):
    return GeneratedMovingScenes(9, num_frames=count, split='val', transforms=transform, **options)[
        index
    ]


@pytest.fixture(scope='module')
def still(tiny_transform) -> dict:
    """Two images and a pair without clips."""
    plain = GeneratedScenes(length=8, split='val', transforms=tiny_transform)
    return sa2va_collate([plain[0], plain[1]])


@pytest.fixture(scope='module')
def mixed(tiny_transform) -> dict:
    """A clip of four frames, an image, a pair, a clip of three without a caption."""
    plain = GeneratedScenes(length=8, split='val', transforms=tiny_transform)
    paired = GeneratedScenes(length=8, split='val', paired=True, transforms=tiny_transform)
    items = [clip(4, 0, tiny_transform), plain[0], paired[0], clip(3, 1, tiny_transform)]
    batch = sa2va_collate(items)
    batch['data']['captions'][3] = None
    return batch


def rollouts(model, batch, seed=0):
    torch.manual_seed(seed)
    return model.rollout(encode(model, batch))


def test_images_are_the_same_either_way_to_the_bit(tiny_model, still):
    randomize_lora(tiny_model.policy, 0.1)
    found = {}
    for trip in ('propagate', None):
        model = build(tiny_model, trip)
        drawn = rollouts(model, still)
        torch.manual_seed(1)
        found[trip] = drawn, model(**still, mode='loss')
    (carried, losses), (alone, expected) = found['propagate'], found[None]
    for direction, rollout in alone.items():
        assert rollout.captions == carried[direction].captions
        assert torch.equal(rollout.rewards.rewards, carried[direction].rewards.rewards)
        for a, b in zip(
            rollout.reward_inputs.pred_mask_logits,
            carried[direction].reward_inputs.pred_mask_logits,
            strict=True,
        ):
            assert torch.equal(a, b)
    for key, value in expected.items():
        assert torch.equal(losses[key], value), key


def test_the_reward_is_the_mean_over_the_frames(tiny_model, mixed):
    """By the definition: each frame's intersection over union, 1 where both masks are empty."""
    model = build(tiny_model)
    for direction, rollout in rollouts(model, mixed).items():
        reward = model.objective.__dict__[direction].reward
        shown = reward.rollouts
        counts = [len(track) for track in shown.gt_tracks]
        assert counts == [
            n
            for n in ([4, 1, 2, 3] if direction == 'mask_to_caption' else [4, 1, 2])
            for _ in range(G)
        ]
        for n, value in enumerate(rollout.rewards.rewards.tolist()):
            ious = []
            for gt, pred in zip(shown.gt_tracks[n], shown.pred_tracks[n], strict=True):
                gt, pred = gt.numpy(), pred.numpy()
                union = (gt | pred).sum()
                ious.append((gt & pred).sum() / union if union else 1.0)
            assert value == pytest.approx(np.mean(ious), abs=1e-6)
        data = mixed['data']
        first = data['masks'][0]
        assert torch.equal(shown.gt_tracks[0][0], first)
        # The target frame is the second frame of the batch, and one of the frames of the clip.
        assert torch.equal(shown.gt_masks[0], data['pair']['masks'][0])
        assert torch.equal(
            shown.pred_mask_logits[0] > 0, shown.pred_tracks[0][int(data['pair']['frame'][0])]
        )


def test_tracks_are_those_of_propagate_on_the_clips_frames(tiny_model, mixed):
    """Frames in their order, prompted on the first alone, whatever else is in the batch."""
    model = build(tiny_model)
    encoded = encode(model, mixed)
    torch.manual_seed(0)
    embeddings = 3 * torch.randn(5, tiny_model.policy.grounding_encoder.hidden_dim)
    samples, num_segs = [0, 1, 3], [2, 1, 2]
    with torch.no_grad():
        found = segment_clips(tiny_model.policy, encoded, samples, embeddings, num_segs)
    data = mixed['data']
    for k, (sample, rows) in enumerate(((0, [0, 1]), (1, [2]), (3, [3, 4]))):
        frames = {0: data['g_pixel_values'][sample]}
        for part in (data['pair'], data['clip']):
            for n, i in enumerate(part['index'].tolist()):
                if i == sample:
                    frames[int(part['frame'][n])] = part['g_pixel_values'][n]
        ordered = torch.stack([frames[t] for t in range(len(frames))])
        with torch.no_grad():
            expected = tiny_model.policy.propagate(ordered, embeddings[rows], num_cond_frames=1)
        assert found[k].shape == expected.shape
        torch.testing.assert_close(found[k], expected, atol=1e-4, rtol=1e-4)


def test_a_batch_of_clips_is_one_by_one(tiny_model, tiny_transform):
    items = [clip(4, 0, tiny_transform), clip(3, 1, tiny_transform)]
    model = build(tiny_model)
    together = encode(model, sa2va_collate(items))
    torch.manual_seed(0)
    embeddings = 3 * torch.randn(2 * G, tiny_model.policy.grounding_encoder.hidden_dim)
    with torch.no_grad():
        found = segment_clips(model.policy, together, [0, 1], embeddings, [G, G])
        for i, item in enumerate(items):
            alone = encode(model, sa2va_collate([item]))
            rows = embeddings[i * G : (i + 1) * G]
            expected = segment_clips(model.policy, alone, [0], rows, [G])[0]
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


def count_calls(monkeypatch, policy):
    """Images that each encoder, and masks that the memory encoder, was given."""
    counted = dict.fromkeys(('vit', 'sam', 'memory', 'memory_calls'), 0)
    sam = policy.grounding_encoder.sam2_model
    for name, module in (
        ('vit', policy.vision_model),
        ('sam', sam.image_encoder),
        ('memory', sam.memory_encoder),
    ):

        def counting(*args, name=name, forward=module.forward, **kwargs):
            counted[name] += len(args[0] if args else kwargs['pixel_values'])
            if name == 'memory':
                counted['memory_calls'] += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, 'forward', counting)
    return counted


def test_a_frame_is_encoded_once_a_step(tiny_model, mixed, monkeypatch):
    counted = count_calls(monkeypatch, tiny_model.policy)
    losses = build(tiny_model)(**mixed, mode='loss')
    assert set(losses) == {'loop1/grpo_loss', 'loop2/grpo_loss', 'loop2/mask_loss'}
    # SAM 2: 4 + 1 + 2 + 3 frames, shared by G rollouts of both directions. InternViT: four first
    # frames and three second ones.
    assert (counted['sam'], counted['vit']) == (10, 7)
    # All rollouts of a clip at once: the memory of each frame of the two clips and the pair, of
    # the one direction and, but for the clip without a caption, of the other.
    assert counted['memory_calls'] == (4 + 2 + 3) + (4 + 2)
    assert counted['memory'] == G * counted['memory_calls']


def test_memory_stays_frozen_and_the_mask_loss_is_of_the_first_frame(tiny_model, mixed):
    model = build(tiny_model, beta=0.0)
    torch.manual_seed(0)
    losses = model(**mixed, mode='loss')
    torch.manual_seed(0)
    expected = build(tiny_model, None, beta=0.0)(**mixed, mode='loss')
    assert torch.equal(losses['loop2/mask_loss'], expected['loop2/mask_loss'])
    model.zero_grad()
    sum(losses.values()).backward()
    memory = ('memory_attention', 'memory_encoder', 'obj_ptr_proj', 'maskmem_tpos_enc')
    named = [
        (name, p)
        for name, p in tiny_model.policy.named_parameters()
        if any(m in name for m in memory)
    ]
    assert named
    assert all(p.grad is None and not p.requires_grad for _, p in named)
    decoder = tiny_model.policy.grounding_encoder.mask_decoder
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in decoder.parameters())


def test_the_teacher_describes_the_track_on_the_later_frame(tiny_model, mixed, monkeypatch):
    """It is shown the second frame, and the cells of the mask that was carried there."""
    asked = {}

    def write(policy, batch, max_new_tokens, *, images, prompt_masks, names):
        asked.update(images=images, prompt_masks=prompt_masks)
        return ['a dot'] * len(images)

    monkeypatch.setattr(grpo_caption_to_mask, 'write_captions', write)
    model = build(tiny_model, caption_to_mask={'reward': {'type': 'MeteorReward'}})
    rollout = rollouts(model, mixed)['caption_to_mask']
    encoded = encode(model, mixed)
    assert asked['images'] == [i for i in encoded.target_image[:3] for _ in range(G)]
    masks = rollout.reward_inputs.pred_mask_logits
    for grid, mask in zip(asked['prompt_masks'], masks, strict=True):
        assert bool(grid.any()) is bool((mask > 0).any())


def test_likelihoods_are_asked_on_the_later_frame(tiny_model, mixed):
    """As of the cross-entropy of the caption where that frame is an image of its own."""
    reward = {'type': 'CaptionLikelihoodReward'}
    model = build(tiny_model, max_new_tokens=40, caption_to_mask={'reward': reward})
    shown = rollouts(model, mixed)['caption_to_mask'].reward_inputs
    pair, data = mixed['data']['pair'], mixed['data']
    position = pair['index'].tolist().index(2)  # the pair is the third sample
    keys = ('pixel_values', 'g_pixel_values', 'masks', 'prompt_masks')
    alone = {key: [pair[key][position]] for key in keys}
    alone |= {'vp_overall_mask': torch.tensor([True]), 'captions': [data['captions'][2]]}
    single = encode(model, {'data': alone, 'data_samples': mixed['data_samples'][2:3]})
    asked = [n for n in range(2 * G, 3 * G) if shown.caption_logps[n] is not None]
    assert asked
    for n in asked:
        grid = prompt_mask_grid(shown.pred_mask_logits[n] > 0, model.policy.grid_size)
        with torch.no_grad():
            expected = caption_loss(model.policy.eval(), single, [0], prompt_masks=[grid])
        assert float(-shown.caption_logps[n].mean()) == pytest.approx(
            float(expected.value), abs=1e-4
        )


def test_a_region_that_nothing_fits_is_empty_in_every_frame(tiny_model, tiny_transform):
    images = [np.full((60, 80, 3), 60 * t, np.uint8) for t in range(3)]
    masks = [np.zeros((0, 60, 80), bool)] * 3
    sample = RegionSample.of_clip(images, masks, caption='a dog that is not there')
    batch = sa2va_collate([tiny_transform(sample), clip(3, 0, tiny_transform)])
    model = build(tiny_model)
    rollout = rollouts(model, batch)['caption_to_mask']
    assert all(float(r) in (0.0, 1.0) for r in rollout.rewards.rewards[:G])
    model(**batch, mode='loss')


@pytest.mark.parametrize('direction', ['mask_to_caption', 'caption_to_mask'])
def test_a_way_back_that_there_is_not_is_refused(direction):
    with pytest.raises(ValueError, match=f"{direction}.return_trip .* got 'there'"):
        GRPOObjective(**{direction: dict(return_trip='there')})


def test_refilled_groups_keep_their_tracks(tiny_model, mixed):
    class Flat(Seen):
        """No group varies at first."""

        calls = 0

        def __call__(self, shown):
            self.calls += 1
            values = super().__call__(shown)
            return (
                [0.5] * len(values) if self.calls == 1 else [n % G / G for n in range(len(values))]
            )

    model = build(
        tiny_model,
        mask_to_caption={'reward': Flat()},
        caption_to_mask={'reward': Flat()},
        max_refills=1,
    )
    found = rollouts(model, mixed)['mask_to_caption']
    assert [len(t) for t in found.reward_inputs.gt_tracks] == [
        n for n in (4, 1, 2, 3) for _ in range(G)
    ]


def test_a_step_with_four_frames_costs_a_part_of_four_steps(tiny_model, tiny_transform):
    """At most 1 + 0.9 T times the step of the same clips' first frames, in this process's time."""
    model = build(tiny_model)
    seconds = {}
    for count in (1, 4):
        batch = sa2va_collate([clip(count, i, tiny_transform) for i in range(2)])
        times = []
        for _ in range(3):
            started = time.process_time()
            torch.manual_seed(0)
            sum(model(**batch, mode='loss').values()).backward()
            times.append(time.process_time() - started)
        seconds[count] = min(times)
    print(f'T = 4 costs {seconds[4] / seconds[1]:.2f} times T = 1')
    assert seconds[4] <= (1 + 0.9 * 4) * seconds[1]


def test_masks_are_carried_under_autocast(tiny_model, mixed):
    """As mixed precision training runs it: the same masks but for the rounding."""
    model = build(tiny_model)
    encoded = encode(model, mixed)
    embeddings = torch.randn(2, tiny_model.policy.grounding_encoder.hidden_dim)
    with torch.no_grad():
        expected = segment_clips(tiny_model.policy, encoded, [0], embeddings, [2])[0]
        with torch.autocast('cpu', torch.bfloat16):
            encoded = encode(model, mixed)
            found = segment_clips(tiny_model.policy, encoded, [0], embeddings, [2])[0]
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.1 * expected.std()
