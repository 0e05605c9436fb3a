"""Several objects of one image, and captions that nothing in their image fits."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedScenes, Sa2VAFinetuneDataset, sa2va_collate
from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective, GumbelObjective
from projects.llava_sam2_rl.models import segmentation_losses as segmentation_module
from projects.llava_sam2_rl.models.batch import encode_batch
from projects.llava_sam2_rl.models.likelihoods import CaptionLikelihoods
from projects.llava_sam2_rl.models.objectives.grpo_caption_to_mask import SampledMasks, SegActions
from projects.llava_sam2_rl.models.prompting import segmentation_prompts
from projects.llava_sam2_rl.models.segmentation import caption_seg_embeddings, seg_embeddings
from projects.llava_sam2_rl.models.shared_prefix import SharedPrefixForward
from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils.modules import eval_mode
from test_models.batches import encode

SIZE = (64, 96)


def square(top, left):
    mask = np.zeros(SIZE, bool)
    mask[top : top + 20, left : left + 20] = True
    return mask


LEFT, RIGHT = square(5, 5), square(30, 60)


@pytest.fixture(scope='module')
def several(tiny_transform) -> dict:
    """An ordinary scene; two objects with a text each; a text that nothing fits."""
    image = np.full((*SIZE, 3), 90, np.uint8)
    image[LEFT], image[RIGHT] = (200, 0, 0), (0, 0, 200)
    scene = GeneratedScenes(length=8, split='val', transforms=tiny_transform)[0]
    two = RegionSample(
        image=image,
        mask=np.stack([LEFT, RIGHT]),
        region_captions=('the red square.', 'the blue square'),
        source='own',
        sample_id='two',
    )
    none = RegionSample(
        image=image,
        mask=np.zeros((0, *SIZE), bool),
        caption='an elephant',
        source='own',
        sample_id='none',
    )
    return sa2va_collate([scene, tiny_transform(two), tiny_transform(none)])


def test_a_record_with_several_texts_becomes_several_samples(tiny_model, several):
    encoded = encode(tiny_model, several)
    scene = several['data_samples'][0]
    assert encoded.names == [scene.name, 'own/two region 1', 'own/two region 2', 'own/none']
    assert encoded.captions == [
        scene.caption,
        'the red square.',
        'the blue square',
        'an elephant',
    ]
    assert encoded.image == encoded.target_image == [0, 1, 1, 2]
    assert encoded.dialogues == [0, 1, 1, 2]
    assert [len(grid) for grid in encoded.prompt_masks] == [1, 1, 1, 0]
    for sample, mask in ((1, LEFT), (2, RIGHT), (3, LEFT & RIGHT)):
        assert torch.equal(encoded.gt_masks[sample], torch.from_numpy(mask))
        assert torch.equal(encoded.target_masks[sample], torch.from_numpy(mask))
    assert encoded.describable == [0, 1, 2]
    assert encoded.captioned == encoded.regions == [0, 1, 2, 3]
    # Each image once.
    assert len(encoded.features.num_tiles) == 3


def test_texts_and_masks_that_differ_in_number_are_an_error(tiny_model, several):
    data = {**several['data'], 'region_captions': [None, ('a', 'b', 'c'), None]}
    with pytest.raises(ValueError, match=r"'own/two' has 2 masks but 3 region_captions"):
        encode_batch(tiny_model.policy, data, ['x', 'own/two', 'y'])


def test_the_texts_of_an_image_are_turns_of_one_conversation(tiny_model, several):
    policy, encoded = tiny_model.policy, encode(tiny_model, several)
    prompts = segmentation_prompts(
        policy,
        encoded,
        ['the red square', 'the blue square', 'an elephant'],
        [1, 1, 2],
        ['a', 'b', 'c'],
        dialogues=[1, 1, 2],
    )
    assert prompts.num_masks == [2, 1]
    assert prompts.images == [1, 2]
    tokens = '<IMG_CONTEXT>' * policy.num_image_tokens
    pieces = [
        (f'<|user|>\n<img>{tokens}</img>\n', 0),
        ('Please segment the red square in this image.<|end|>\n<|assistant|>\n', 0),
        ('It is [SEG].<|end|>', 1),
        ('\n', 0),
        ('<|user|>\nPlease segment the blue square in this image.<|end|>\n<|assistant|>\n', 0),
        ('It is [SEG].<|end|>', 1),
        ('\n', 0),
    ]
    pieces[:2] = [(pieces[0][0] + pieces[1][0], 0)]
    ids, labels = [], []
    for text, said in pieces:
        new = policy.tokenizer.encode(text, add_special_tokens=False)
        ids += new
        labels += new if said else [-100] * len(new)
    real = prompts.attention_mask[0]
    assert prompts.input_ids[0][real].tolist() == ids
    assert prompts.labels[0][real].tolist() == labels


def test_a_turn_reads_the_turns_before_it_and_no_later_one(tiny_model, several):
    policy, encoded = tiny_model.policy, encode(tiny_model, several)
    texts, names = ['the red square', 'the blue square'], ['a', 'b']
    with eval_mode(policy), torch.no_grad():
        together, _ = seg_embeddings(policy, encoded, texts, [1, 1], names, dialogues=[1, 1])
        apart, _ = seg_embeddings(policy, encoded, texts, [1, 1], names)
        swapped, _ = seg_embeddings(policy, encoded, texts[::-1], [1, 1], names, dialogues=[1, 1])
    assert together.shape == apart.shape
    torch.testing.assert_close(together[0], apart[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(swapped[0], apart[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together[1], apart[1], atol=1e-3)


def test_shared_prefixes_give_the_same(tiny_model, several):
    policy, encoded = tiny_model.policy, encode(tiny_model, several)
    with eval_mode(policy), torch.no_grad():
        plain = caption_seg_embeddings(policy, encoded, [1, 2, 3])
        shared = SharedPrefixForward(policy, encoded)
        handles = shared.add_descriptions(
            ['the red square', 'the blue square', 'an elephant', 'a star'],
            [1, 1, 2, 1],
            ['a', 'b', 'c', 'd'],
            dialogues=[1, 1, 2, 3],
        )
        shared.forward()
        found = shared.seg_embeddings(handles)
    torch.testing.assert_close(found[:3].float(), plain, atol=1e-5, rtol=1e-4)


def test_another_number_of_seg_than_of_masks_is_an_error(tiny_model, several):
    policy, encoded = tiny_model.policy, encode(tiny_model, several)
    shared = SharedPrefixForward(policy, encoded)
    handles = shared.add_descriptions(
        ['a', 'b', 'c'], [1, 1, 2], ['x/1', 'x/2', 'x/3'], dialogues=[1, 1, 2]
    )
    shared.forward()
    handles.ids[0][handles.ids[0] == policy.seg_token_id] = policy.pad_token_id
    with pytest.raises(ValueError, match=r"sample 'x/1' and 'x/2': expected 2 \[SEG\].*found 0"):
        shared.seg_embeddings(handles)


def test_a_conversation_has_one_image_and_texts(tiny_model, several):
    policy, encoded = tiny_model.policy, encode(tiny_model, several)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are turns .* images \[0, 1\]"):
        segmentation_prompts(policy, encoded, ['x', 'y'], [0, 1], ['a', 'b'], dialogues=[5, 5])
    given = torch.zeros(2, 8)
    with pytest.raises(ValueError, match='takes texts, not embeddings'):
        segmentation_prompts(policy, encoded, [given, 'y'], [1, 1], ['a', 'b'], dialogues=[5, 5])


# ------------------------------------------------------------------------------- SFT


def test_sft_learns_a_mask_of_every_seg_and_an_empty_one(tiny_model, several, monkeypatch):
    seen = []

    def spy(logits, masks, **options):
        seen.append([mask.clone() for mask in masks])
        return mask_loss(logits, masks, **options)

    mask_loss = segmentation_module.mask_loss
    monkeypatch.setattr(segmentation_module, 'mask_loss', spy)
    encoded = encode(tiny_model, several)
    losses, metrics = tiny_model.losses(encoded, tiny_model.rollout(encoded))
    counts = {key: int(loss.count) for key, loss in losses.items() if 'caption_loss' not in key}
    assert counts == {
        'loop1/mask_loss': 3,
        'loop1/answer_loss': 3,
        'loop2/mask_loss': 4,
        'loop2/answer_loss': 4,
    }
    first, second = seen
    scene = torch.as_tensor(several['data']['masks'][0][0])
    for found, expected in zip(second, (scene, LEFT, RIGHT, LEFT & RIGHT), strict=True):
        assert torch.equal(found, torch.as_tensor(expected))
    assert [bool(mask.any()) for mask in first] == [True] * 3
    assert all(torch.isfinite(loss.value) for loss in losses.values())
    assert metrics['loop1/empty_captions'] == 0


def test_a_batch_of_nothing_but_no_targets_trains_one_way_alone(tiny_model, several):
    encoded = encode(tiny_model, several).subset([3])
    rollouts = tiny_model.rollout(encoded)
    assert rollouts == {}
    losses, _ = tiny_model.losses(encoded, rollouts)
    assert set(losses) == {'loop2/mask_loss', 'loop2/answer_loss'}


def test_sft_learns_that_nothing_is_there(tiny_model, several):
    """From a mask with pixels to an empty one in a few steps, and no further: the others stay."""
    encoded = encode(tiny_model, several)
    model = tiny_model

    def pixels():
        with eval_mode(model.policy), torch.no_grad():
            prompts = caption_seg_embeddings(model.policy, encoded, [0, 3])
            low_res, _, _ = model.policy.segment(prompts, encoded.features, [0, 2])
        return [(logits > 0).sum().item() for logits in low_res]

    scene, nothing = pixels()
    assert nothing > 0
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    samples = encoded.subset([0, 3])
    for _ in range(12):
        optimizer.zero_grad()
        losses, _ = model.losses(samples, {})
        losses['loop2/mask_loss'].value.backward()
        optimizer.step()
    after_scene, after_nothing = pixels()
    assert after_nothing < 0.1 * nothing
    assert after_scene > 0.5 * scene


def test_the_official_fine_tuning_data_train(tiny_model, tiny_transform, root):
    folder = root / 'tests/data/metrics/finetune'
    data = Sa2VAFinetuneDataset(str(folder), transforms=tiny_transform)
    batch = sa2va_collate(list(data))
    losses = tiny_model(**batch, mode='loss')
    assert {'loop1/caption_loss', 'loop1/mask_loss', 'loop2/mask_loss'} <= set(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())


# ------------------------------------------------------------------------------ GRPO


def build(tiny_model, **options):
    objective = GRPOObjective(num_generations=2, **options)
    return DualLoopModel(tiny_model.policy, objective, max_new_tokens=6)


def test_every_seg_is_an_action_of_its_own(tiny_model, several):
    model = build(tiny_model)
    encoded = encode(model, several)
    rollouts = model.rollout(encoded)
    first, second = rollouts['mask_to_caption'], rollouts['caption_to_mask']
    assert list(first.samples) == [0, 1, 2]
    assert len(first.captions) == 3 * 2
    assert list(second.samples) == [0, 1, 2, 3]
    assert second.actions.shape[0] == 4 * 2
    assert second.records == [0, 1, 1, 2]
    names = [second.reward_inputs.sample_ids[n] for n in (2, 4, 6)]
    assert names == ['own/two region 1', 'own/two region 2', 'own/none']
    # The mean actions of updates are those of sampling: the same conversation is read.
    with eval_mode(model.policy), torch.no_grad():
        mean = caption_seg_embeddings(model.policy, encoded, [0, 1, 2, 3])
    torch.testing.assert_close(second.ref_action_mean, mean, atol=1e-4, rtol=1e-3)
    losses, _ = model.losses(encoded, rollouts)
    assert int(losses['loop2/mask_loss'].count) == 4
    sum(loss.value for loss in losses.values()).backward()


def test_one_caption_of_several_regions_is_one_action_for_their_union(tiny_model, tiny_transform):
    """As officially for gRefCOCO: several ``ann_id`` are one mask, asked for by one [SEG]."""
    both = RegionSample(
        image=np.full((*SIZE, 3), 90, np.uint8),
        mask=np.stack([LEFT, RIGHT]),
        caption='both squares',
        source='own',
        sample_id='both',
    )
    model = build(tiny_model, caption_to_mask={'reward': {'type': 'MaskIoUReward'}})
    encoded = encode(model, sa2va_collate([tiny_transform(both)]))
    assert len(encoded) == 1
    rollouts = model.rollout(encoded)
    found = rollouts['caption_to_mask']
    assert found.actions.shape[0] == 2
    assert found.reward_inputs.sample_ids == ['own/both'] * 2
    for mask, logits, reward in zip(
        found.reward_inputs.gt_masks,
        found.reward_inputs.pred_mask_logits,
        found.rewards.rewards.tolist(),
        strict=True,
    ):
        assert torch.equal(mask, torch.from_numpy(LEFT | RIGHT)[None])
        pred = logits[0].numpy() > 0
        union = LEFT | RIGHT
        assert reward == pytest.approx((pred & union).sum() / (pred | union).sum())
    # One description of both, asked for as "region1 and region2".
    assert list(rollouts['mask_to_caption'].samples) == [0]
    losses, _ = model.losses(encoded, rollouts)
    assert int(losses['loop2/mask_loss'].count) == 1


def test_a_caption_of_nothing_is_scored_by_its_mask(tiny_model, several):
    model = build(tiny_model, caption_to_mask={'reward': {'type': 'MeteorReward'}})
    encoded = encode(model, several)
    direction = model.objective.caption_to_mask
    masks = [encoded.gt_masks[i] for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    logits = [torch.where(mask, 1.0, -1.0)[None] for mask in masks]
    logits[7][0, 3, 4] = 1.0  # a single pixel where there should be none
    drawn = SegActions(torch.zeros(8, 4), torch.ones(8, 1), torch.zeros(8, 4))
    masks = SampledMasks(logits, [], ['the red square'] * 6 + ['', ''])
    found = direction.score(model.policy, encoded, drawn, masks, None, False, CaptionLikelihoods())
    assert found.rewards.rewards[6:].tolist() == [1.0, 0.0]
    # METEOR has no part in it, and no part of it is METEOR's.
    assert found.rewards.rewards_per_func[6:].isnan().all()
    assert torch.equal(found.rewards.rewards[:6], found.rewards.rewards_per_func[:6, 0])
    assert found.rewards.rewards[2] > 0.9
    assert found.reward_inputs.references[4:] == ['the blue square'] * 2 + [None] * 2


def test_nothing_is_not_described(tiny_model, several, monkeypatch):
    model = build(tiny_model)
    encoded = encode(model, several)
    shown = []

    def write(policy, batch, limit, *, prompt_masks, **options):
        shown.extend(prompt_masks)
        return ['a square'] * len(prompt_masks)

    monkeypatch.setattr(
        'projects.llava_sam2_rl.models.objectives.grpo_caption_to_mask.write_captions', write
    )
    with eval_mode(model.policy), torch.no_grad():
        drawn = model.objective.caption_to_mask.sample(model.policy, encoded)
        masks = model.objective.caption_to_mask.masks(model.policy, encoded, drawn)
        model.objective.caption_to_mask.described(model.policy, model.teacher, encoded, masks, 4)
    assert not any(grid.any() for grid in shown[6:])
    assert any(grid.any() for grid in shown[:6])


# ------------------------------------------------------------------------------ sets


@pytest.fixture(scope='module')
def sets(tiny_transform) -> dict:
    """A caption of one object, and one of two that wants a mask of each."""
    image = np.full((*SIZE, 3), 90, np.uint8)
    image[LEFT], image[RIGHT] = (200, 0, 0), (200, 0, 0)
    one = RegionSample(image, LEFT, 'the left square', source='own', sample_id='one')
    both = RegionSample(
        image,
        np.stack([LEFT, RIGHT]),
        'both red squares',
        source='own',
        sample_id='both',
        seg_per_region=True,
    )
    return sa2va_collate([tiny_transform(one), tiny_transform(both)])


def test_one_caption_has_a_seg_for_each_region(tiny_model, sets):
    policy, encoded = tiny_model.policy, encode(tiny_model, sets)
    assert encoded.num_segs([0, 1]) == [1, 2]
    assert torch.equal(encoded.seg_masks[1], torch.from_numpy(np.stack([LEFT, RIGHT])))
    # Other directions speak of the two as one.
    assert torch.equal(encoded.gt_masks[1], torch.from_numpy(LEFT | RIGHT))
    prompts = segmentation_prompts(
        policy, encoded, ['a', 'both red squares'], [0, 1], ['x', 'y'], num_segs=[1, 2]
    )
    assert prompts.num_masks == [1, 2]
    said = [row[row != -100] for row in prompts.labels]
    assert policy.tokenizer.decode(said[0]) == 'It is [SEG].<|end|>'
    assert policy.tokenizer.decode(said[1]) == 'It is [SEG] and [SEG].<|end|>'
    with eval_mode(policy), torch.no_grad():
        plain = caption_seg_embeddings(policy, encoded, [0, 1])
        shared = SharedPrefixForward(policy, encoded)
        handles = shared.add_descriptions(
            ['the left square', 'both red squares'], [0, 1], ['x', 'y'], num_segs=[1, 2]
        )
        shared.forward()
        found = shared.seg_embeddings(handles)
    assert plain.shape[0] == 3
    torch.testing.assert_close(found.float(), plain, atol=1e-5, rtol=1e-4)


def test_without_the_option_several_regions_are_one_mask(tiny_model, sets):
    data = {**sets['data'], 'seg_per_region': [False, False]}
    encoded = encode_batch(tiny_model.policy, data)
    assert encoded.num_segs([0, 1]) == [1, 1]
    assert torch.equal(encoded.seg_masks[1][0], torch.from_numpy(LEFT | RIGHT))


def test_a_set_is_learnt_in_any_order():
    left, right = torch.from_numpy(LEFT), torch.from_numpy(RIGHT)
    logits = torch.stack([torch.where(mask, 3.0, -3.0) for mask in (left, right, left)])
    found = segmentation_module.matched_masks(logits, [left, left, right], [1, 2])
    assert [torch.equal(a, b) for a, b in zip(found, [left, right, left], strict=True)] == [
        True
    ] * 3
    as_given = segmentation_module.matched_masks(logits, [left, left, right], None)
    assert torch.equal(as_given[1], left)


def test_matching_leaves_what_is_not_finite_to_the_step():
    masks = [torch.from_numpy(LEFT), torch.from_numpy(RIGHT)]
    found = segmentation_module.matched_masks(torch.full((2, 8, 8), torch.nan), masks, [2])
    assert len(found) == 2


def test_sft_learns_a_mask_of_every_region_of_a_caption(tiny_model, sets):
    encoded = encode(tiny_model, sets)
    losses, _ = tiny_model.losses(encoded, {})
    assert int(losses['loop2/mask_loss'].count) == 3
    assert int(losses['loop2/answer_loss'].count) == 2
    losses['loop2/mask_loss'].value.backward()


@pytest.mark.parametrize('iterations', [1, 2])
def test_the_actions_of_a_rollout_share_a_reward(tiny_model, sets, iterations):
    """One caption with one [SEG], one with two, G = 2: six actions, four rewards."""
    options = {'caption_to_mask': {'reward': {'type': 'MaskIoUReward'}}, 'beta': 0.1}
    model = build(tiny_model, num_iterations=iterations, **options)
    encoded = encode(model, sets)
    rollouts = model.rollout(encoded)
    second = rollouts['caption_to_mask']
    assert second.actions.shape[0] == second.sigma.shape[0] == 2 * 1 + 2 * 2
    assert second.ref_action_mean.shape[0] == 3
    inputs = second.reward_inputs
    assert [len(x) for x in inputs.pred_mask_logits] == [1, 1, 2, 2]
    assert [len(x) for x in inputs.gt_masks] == [1, 1, 2, 2]
    assert second.rewards.rewards.shape == (4,)
    # The actions of the second caption are drawn around its own two embeddings, in turn.
    direction = model.objective.caption_to_mask
    assert direction._action_rows(encoded, [0, 1]).tolist() == [0, 0, 1, 2, 1, 2]
    if iterations > 1:
        assert second.old_per_token_logps.shape == (4, 2)
        assert second.old_per_token_logps[:2, 1].tolist() == [0, 0]
    else:
        assert second.old_per_token_logps is None
    losses, metrics = model.losses(encoded, rollouts)
    # An action counts as a token does.
    assert int(losses['loop2/grpo_loss'].count) == 6
    assert int(losses['loop2/mask_loss'].count) == 3
    if iterations > 1:
        assert float(metrics['loop2/clip_ratio/region_mean']) == 0
    sum(loss.value for loss in losses.values()).backward()


def test_a_set_is_rewarded_in_any_order_and_described_region_by_region(
    tiny_model, sets, monkeypatch
):
    model = build(tiny_model, caption_to_mask={'reward': {'type': 'MaskIoUReward'}})
    encoded = encode(model, sets)
    left, right = (torch.from_numpy(mask) for mask in (LEFT, RIGHT))
    nothing = torch.zeros_like(left)
    # Of each action in turn: the second caption's first rollout has its masks the wrong way round,
    # its second one finds a single object.
    wanted = [left, right, right, left, left, nothing]
    low_res = torch.stack([torch.where(mask, 9.0, -9.0) for mask in wanted])[:, None]
    monkeypatch.setattr(type(model.policy), 'segment', lambda *a, **k: (low_res, None, None))
    drawn = SegActions(torch.zeros(6, 4), torch.ones(6, 1), torch.zeros(6, 4))
    direction = model.objective.caption_to_mask
    found = direction.masks(model.policy, encoded, drawn)
    assert [len(grid) for grid in found.prompt_masks] == [1, 1, 2, 1]
    assert all(grid.flatten(1).any(1).all() for grid in found.prompt_masks)
    rollout = direction.score(
        model.policy, encoded, drawn, found, None, False, CaptionLikelihoods()
    )
    assert rollout.rewards.rewards.tolist() == pytest.approx([1.0, 0.0, 1.0, 0.5])


# ---------------------------------------------------------------------------- others


def test_gumbel_leaves_what_cannot_be_described_out(tiny_model, several):
    model = DualLoopModel(tiny_model.policy, GumbelObjective(), max_new_tokens=6)
    encoded = encode(model, several)
    rollouts = model.rollout(encoded)
    assert list(rollouts['mask_to_caption'].samples) == [0, 1, 2]
    losses, _ = model.losses(encoded, rollouts)
    assert int(losses['loop1/mask_loss'].count) == 3
    assert all(torch.isfinite(loss.value) for loss in losses.values())


def test_the_cycle_says_what_it_cannot_take(tiny_model, several):
    with pytest.raises(ValueError, match=r"'own/none' has none.*no_target=False"):
        tiny_model(**several, mode='predict')
    data = copy.copy(several['data'])
    two = {key: data[key][1:2] for key in data if isinstance(data[key], list)}
    two.update(pair=None, vp_overall_mask=data['vp_overall_mask'][1:2], skipped=[])
    with pytest.raises(ValueError, match=r'1 records make 2 samples.*per_object=True'):
        tiny_model(two, several['data_samples'][1:2], mode='predict')


def test_rewards_know_sets_by_their_number(tiny_model, several):
    """What the rollouts hold may be scored by IoU as well: one mask, one target."""
    model = build(tiny_model, caption_to_mask={'reward': {'type': 'MaskIoUReward'}})
    encoded = encode(model, several)
    inputs = model.rollout(encoded)['caption_to_mask'].reward_inputs
    scores = REWARDS.build({'type': 'MaskIoUReward'})(inputs)
    assert all(0 <= value <= 1 for value in scores)
    assert all(value in (0, 1) for value in scores[6:])
