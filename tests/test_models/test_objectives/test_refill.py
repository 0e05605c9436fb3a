"""Groups without variance are sampled again: which, how often, and what is kept of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from distributed import run_ranks
from mmengine.config import Config
from mmengine.optim import OptimWrapper

from projects.llava_sam2_rl.datasets import sa2va_collate
from projects.llava_sam2_rl.losses import gaussian_logprob
from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective
from projects.llava_sam2_rl.models.generation import Completions
from projects.llava_sam2_rl.models.objectives.refill import _completions
from projects.llava_sam2_rl.models.segmentation import caption_seg_embeddings
from projects.llava_sam2_rl.models.shared_prefix import SharedPrefixForward
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.rewards import RewardUnavailableError
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils.modules import eval_mode
from test_models.batches import encode

#: Groups of three. Of the first call only the first group varies; of the second the second one;
#: the third group never does.
CALLS = [
    [0.0, 0.5, 1.0, 0.3, 0.3, 0.3, 0.0, 0.0, 0.0],
    [0.1, 0.2, 0.6, 0.0, 0.0, 0.0],
    [1.0, 1.0, 1.0],
]


class Scripted:
    """A reward that gives at each call what the script has, and keeps what it was shown."""

    name = 'scripted'

    def __init__(self, calls, failing=None):
        self.calls, self.failing, self.seen = calls, failing, []

    def __call__(self, rollouts):
        self.seen.append(rollouts)
        if len(self.seen) - 1 == self.failing:
            raise RewardUnavailableError('the judge is gone')
        values = self.calls[min(len(self.seen), len(self.calls)) - 1]
        assert len(values) >= len(rollouts)
        return values[: len(rollouts)]


def build(
    tiny_model, direction='mask_to_caption', reward=None, limit=6, **options
) -> DualLoopModel:
    options = {'num_generations': 3, 'max_refills': 2, 'num_iterations': 2, **options}
    other = ({'mask_to_caption', 'caption_to_mask'} - {direction}).pop()
    objective = GRPOObjective(**{direction: {'reward': reward}, **options})
    return DualLoopModel(
        tiny_model.policy, objective, max_new_tokens=limit, **{other: {'weight': 0.0}}
    )


def metrics_of(rollout) -> dict[str, float]:
    return {k.split('/')[1]: v for k, v in rollout.metrics.items() if k.startswith('refill/')}


def test_by_hand_which_groups_are_sampled_again_and_what_is_kept(tiny_model, batch):
    reward = Scripted(CALLS)
    model = build(tiny_model, reward=reward)
    rollout = model.rollout(encode(model, batch))['mask_to_caption']
    names = [meta.name for meta in batch['data_samples']]
    # Only the groups that do not vary are sampled again, and no more once they do.
    asked = [list(seen.sample_ids[::3]) for seen in reward.seen]
    assert asked == [names, names[1:], names[2:]]
    # The third group keeps what it had first: nothing that was sampled later varied.
    expected = torch.tensor([0.0, 0.5, 1.0, 0.1, 0.2, 0.6, 0.0, 0.0, 0.0])
    assert torch.equal(rollout.rewards.rewards, expected)
    assert torch.equal(rollout.rewards.rewards_per_func[:, 0], expected)
    first, second, _ = reward.seen
    texts = [*first.completions[:3], *second.completions[:3], *first.completions[6:]]
    assert list(rollout.captions) == list(rollout.completions.texts) == texts
    assert list(rollout.reward_inputs.completions) == texts
    assert list(rollout.reward_inputs.sample_ids) == [n for n in names for _ in range(3)]
    for n in range(3, 6):
        kept = rollout.reward_inputs.pred_mask_logits[n]
        assert torch.equal(kept, second.pred_mask_logits[n - 3])
    # 9 + 6 + 3 were sampled, of which 6 lie in a group that varies.
    assert metrics_of(rollout) == {
        'frac_groups': pytest.approx(2 / 3),
        'frac_groups_never_varied': pytest.approx(1 / 3),
        'frac_rollouts_wasted': pytest.approx(1 - 6 / 18),
    }
    # Means 0.5 and 0.3; deviations 0.5 and sqrt(0.07).
    torch.testing.assert_close(
        rollout.advantages,
        torch.tensor([-0.9998, 0.0, 0.9998, -0.7556, -0.3778, 1.1335, 0.0, 0.0, 0.0]),
        atol=2e-4,
        rtol=0,
    )


def test_log_probs_of_what_was_put_together_are_those_of_its_tokens(tiny_model, batch):
    """Of captions of different lengths, from different calls of the sampler."""
    model = build(tiny_model, reward=Scripted(CALLS), limit=32)
    encoded = encode(model, batch)
    for seed in range(20):
        torch.manual_seed(seed)
        model.objective.mask_to_caption.reward.seen.clear()
        rollout = model.rollout(encoded)['mask_to_caption']
        lengths = rollout.completions.completion_mask.sum(1)
        if lengths[3:6].max() != lengths[[0, 1, 2, 6, 7, 8]].max():
            break
    else:
        pytest.fail('no draw of captions of different lengths')
    with eval_mode(model.policy), torch.no_grad():
        shared = SharedPrefixForward(model.policy, encoded)
        asked = shared.add_captions(rollout.completions)
        shared.forward()
        logps, _ = shared.per_token_logps(asked, 1.0)
    torch.testing.assert_close(rollout.old_per_token_logps, logps, atol=1e-4, rtol=0)
    # The teacher is the reference, and has not moved yet.
    torch.testing.assert_close(rollout.ref_per_token_logps, logps, atol=1e-4, rtol=0)


@pytest.mark.parametrize('widths', [(2, 3), (3, 2)])
def test_behind_the_end_of_the_shorter_captions_stands_padding(widths):
    ids = [torch.full((2, width), 7) for width in widths]
    old, new = (
        Completions(x, x > 0, torch.zeros_like(x, dtype=torch.float32), ['', ''], x[:, 0] > 9)
        for x in ids
    )
    found = _completions(old, new, [2, 1], pad_token_id=5)
    rows = [[7] * widths[1] + [5] * (3 - widths[1]), [7] * widths[0] + [5] * (3 - widths[0])]
    assert found.completion_ids.tolist() == rows
    assert found.completion_mask.sum(1).tolist() == [widths[1], widths[0]]


@pytest.fixture(scope='module')
def several(tiny_transform) -> dict:
    """One text answered with a mask for each of two objects; one text for one; two texts."""
    size = (60, 80)
    image = np.full((*size, 3), 90, np.uint8)
    left, right = np.zeros((2, *size), bool)
    left[20:40, 8:28] = right[20:40, 50:70] = True
    image[left], image[right] = (200, 0, 0), (0, 0, 200)
    both, shared = np.stack([left, right]), dict(image=image, source='own')
    samples = (
        RegionSample(
            mask=both, caption='squares', sample_id='set', seg_per_region=True, **shared
        ),
        RegionSample(mask=left, caption='a red square', sample_id='one', **shared),
        RegionSample(
            mask=both, region_captions=('red', 'blue'), sample_id='two', **shared
        ),
    )  # fmt: skip
    return sa2va_collate([tiny_transform(sample) for sample in samples])


def test_actions_stay_with_their_rollouts(tiny_model, several):
    """With two ``[SEG]`` in one answer and one in the others, which makes rows of two widths."""
    # Four groups: the second and the last do not vary; of the last, both texts are asked again.
    calls = [
        [0.0, 0.5, 1.0, 0.3, 0.3, 0.3, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        [0.1, 0.2, 0.6, 0.9, 0.9, 0.9, 0.0, 0.0, 0.7],
    ]
    reward = Scripted(calls)
    model = build(tiny_model, 'caption_to_mask', reward)
    encoded = encode(model, several)
    torch.manual_seed(0)
    rollout = model.rollout(encoded)['caption_to_mask']
    expected = torch.tensor([0.0, 0.5, 1.0, 0.1, 0.2, 0.6, 0.0, 0.0, 1.0, 0.0, 0.0, 0.7])
    assert torch.equal(rollout.rewards.rewards, expected)
    asked = [list(seen.sample_ids[::3]) for seen in reward.seen]
    assert asked[1] == ['own/one', 'own/two region 1', 'own/two region 2']
    # 12 and 9, of which the region that had varied was drawn in vain.
    assert metrics_of(rollout) == {
        'frac_groups': 0.5,
        'frac_groups_never_varied': 0.0,
        'frac_rollouts_wasted': pytest.approx(1 - 12 / 21),
    }
    # 2 * 3 actions of the first group, 3 of each other.
    assert len(rollout.actions) == len(rollout.sigma) == 15
    with eval_mode(model.policy), torch.no_grad():
        mean = caption_seg_embeddings(model.policy, encoded, encoded.captioned)
        rows = [0, 1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
        logps = gaussian_logprob(rollout.actions, mean[rows], rollout.sigma, 'mean')
        old = rollout.old_per_token_logps
        assert old.shape == (12, 2)
        torch.testing.assert_close(old[:3].flatten(), logps[:6], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(old[3:, 0], logps[6:], atol=1e-4, rtol=1e-4)
        assert (old[3:, 1] == 0).all()
        # The masks that were scored are those of the actions that are learnt from.
        low_res, _, _ = model.policy.segment(rollout.actions[6:9], encoded.features, [1] * 3)
    seen = torch.stack([x[0] > 0 for x in reward.seen[1].pred_mask_logits[:3]])
    kept = torch.stack([x[0] > 0 for x in rollout.reward_inputs.pred_mask_logits[3:6]])
    assert torch.equal(seen, kept)
    again = torch.nn.functional.interpolate(low_res, seen.shape[-2:], mode='bilinear') > 0
    assert (again[:, 0] == kept).float().mean() > 0.95
    losses, _ = model.losses(encoded, {'caption_to_mask': rollout})
    assert all(torch.isfinite(loss.value) for loss in losses.values())


def test_a_reward_that_never_varies_ends(tiny_model, batch):
    reward = Scripted([[0.4] * 9])
    model = build(tiny_model, reward=reward, max_refills=3)
    encoded = encode(model, batch)
    rollouts = model.rollout(encoded)
    assert [len(seen) for seen in reward.seen] == [9] * 4
    losses, metrics = model.losses(encoded, rollouts)
    assert metrics['loop1/refill/frac_groups'] == 1
    assert metrics['loop1/refill/frac_groups_never_varied'] == 1
    assert metrics['loop1/refill/frac_rollouts_wasted'] == 1
    assert list(rollouts['mask_to_caption'].captions) == list(reward.seen[0].completions)
    assert torch.isfinite(losses['loop1/grpo_loss'].value)


def test_nothing_is_sampled_again_by_default(tiny_model, batch):
    reward = Scripted([[0.4] * 9])
    model = build(tiny_model, reward=reward, max_refills=0)
    rollout = model.rollout(encode(model, batch))['mask_to_caption']
    assert len(reward.seen) == 1
    assert metrics_of(rollout) == {}


def test_what_cannot_be_scored_is_not_sampled_again(tiny_model, batch):
    """A judge that declines is not asked once more; a group that is half declined is."""
    declined = [None] * 3 + [None, 0.5, 0.5] + [0.0, 0.5, None]
    reward = Scripted([declined, [0.1, 0.2, 0.3]])
    model = build(tiny_model, reward=reward)
    rollout = model.rollout(encode(model, batch))['mask_to_caption']
    assert [len(seen) for seen in reward.seen] == [9, 3]
    assert rollout.rewards.rewards[:3].isnan().all()
    assert rollout.rewards.rewards[3:6].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_reward_that_gives_up_while_sampling_again_stops_the_run(tiny_model, batch):
    """`RewardFailureHook` reads it of the rollouts; what was scored before stays."""
    reward = Scripted(CALLS, failing=1)
    model = build(tiny_model, reward=reward)
    rollout = model.rollout(encode(model, batch))['mask_to_caption']
    assert len(reward.seen) == 2
    assert rollout.rewards.failure == 'the judge is gone'
    assert torch.equal(rollout.rewards.rewards, torch.tensor(CALLS[0]))


def test_rewards_that_differ_only_apart_teach_under_gdpo(tiny_model, batch):
    """The sum is the same for all, each reward is not: nothing is to be sampled again."""
    parts = [Scripted([[0.0, 0.5, 1.0] * 3]), Scripted([[1.0, 0.5, 0.0] * 3])]
    weighted = {
        'type': 'WeightedRewards',
        'rewards': [{'type': lambda p=p: p, 'name': f'part{n}'} for n, p in enumerate(parts)],
    }
    for aggregation, calls in (('sum_then_normalize', 3), ('normalize_then_sum', 1)):
        for part in parts:
            part.seen.clear()
        model = build(
            tiny_model,
            reward=copy.deepcopy(weighted),
            multi_objective_aggregation=aggregation,
        )
        model.rollout(encode(model, batch))
        assert len(parts[0].seen) == calls


@pytest.mark.parametrize('options', [{'max_refills': -1}, {'num_generations': 1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=r'max_refills must be 0, or more with num_generations'):
        GRPOObjective(**{'max_refills': 1, 'scale_rewards': 'none', **options})


class OfRank:
    """Never varies on rank 0, always on the others."""

    name = 'of_rank'

    def __init__(self):
        self.calls = 0

    def __call__(self, rollouts):
        self.calls += 1
        rank = torch.distributed.get_rank()
        return [float(rank and n % 2) for n in range(len(rollouts))]


def step_of_rank(rank: int, config: str, data: dict) -> dict:
    torch.distributed.init_process_group('gloo')
    reward = OfRank()
    options = Config.fromfile(config).model
    options.objective = GRPOObjective(
        num_generations=2, max_refills=2, mask_to_caption={'reward': reward}, beta=0.0, ref=None
    )
    options.update(max_new_tokens=6, caption_to_mask={'weight': 0.0})
    torch.manual_seed(0)
    model = MODELS.build(options).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    log = model.train_step(data, OptimWrapper(optimizer), wrapper=wrapped)
    found = model.objective.last_rollouts['mask_to_caption'].metrics
    sums = [float(p.detach().double().sum()) for p in model.parameters() if p.requires_grad]
    return {'calls': reward.calls, 'log': log, 'metrics': dict(found), 'sums': sums}


@pytest.mark.slow
def test_a_rank_that_samples_again_keeps_no_other_waiting(root, tmp_path, batch):
    """The second rank samples once, the first three times; both make the same update."""
    config = str(root / 'configs/sa2va_tiny_dual_loop.py')
    first, second = run_ranks(step_of_rank, 2, tmp_path, config, batch, timeout=240)
    assert (first['calls'], second['calls']) == (3, 1)
    assert first['metrics']['refill/frac_groups_never_varied'] == 1
    assert second['metrics']['refill/frac_rollouts_wasted'] == 0
    assert first['sums'] == second['sums']
    assert {k: float(v) for k, v in first['log'].items()} == {
        k: float(v) for k, v in second['log'].items()
    }
