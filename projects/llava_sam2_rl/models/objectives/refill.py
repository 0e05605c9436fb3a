"""Groups whose rewards do not vary are sampled again: dynamic sampling, bounded.

A group whose G rewards are all equal has advantage 0 throughout and teaches nothing. DAPO (Yu et
al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", section 3.2) keeps only
groups with ``0 < |{o_i correct}| < G`` and samples other prompts until the batch is full. Two
things differ here. The condition is that of rewards that are no yes or no: two different ones in a
group. And it is the same prompt that is sampled again, with new noise, at most ``max_refills``
times: its image is encoded already, and the batch stays what the data loader gave, on all ranks.

No collective is called in between. Each rank samples again as often as its own groups need, as it
decodes as many tokens as its own captions need, and waits for the others in the exchange of the
losses. Where weights lie in parts, those are gathered as any rank needs (`engine.split_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from projects.llava_sam2_rl.losses import RewardLossHead
from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.generation import Completions
from projects.llava_sam2_rl.models.objectives.rollouts import Rollout
from projects.llava_sam2_rl.rewards.base import Direction, RewardOutput, RolloutBatch

#: Samples and scores some directions on a part of the batch.
Sampler = Callable[[RegionBatch, Collection[Direction]], Mapping[Direction, Rollout]]


def refill(
    rollouts: Mapping[Direction, Rollout],
    batch: RegionBatch,
    heads: Mapping[Direction, RewardLossHead],
    sample: Sampler,
    max_refills: int,
    pad_token_id: int,
) -> dict[Direction, Rollout]:
    """Samples the groups without variance again and takes what varies.

    A group that varies is left alone, and so is one in which nothing can be scored. New rollouts
    replace all G of a group's old ones, and only where they vary. All that is asked of an image is
    sampled together, since the regions of an image are told from each other and their captions are
    turns of one conversation: with several regions an image, those of the others are drawn in vain.

    Args:
        rollouts: Of the batch, scored.
        batch: The batch.
        heads: Of the directions; they say which groups teach nothing.
        sample: Called with a part of the batch and one direction.
        max_refills: Most times that a group is sampled again, at least 1.
        pad_token_id: Stands behind the end of captions.

    Returns:
        The same groups. The metrics of a direction have shares of this rank: ``refill/frac_groups``
        of the groups that did not vary at first, ``refill/frac_groups_never_varied`` of those that
        do not at the end, ``refill/frac_rollouts_wasted`` of all that was sampled, from the first
        time on, that is in no group that varies.
    """

    def of(direction: Direction, rollout: Rollout) -> Rollout:
        def again(part: RegionBatch) -> Rollout:
            return sample(part, {direction})[direction]

        return _refill(rollout, batch, heads[direction], again, max_refills, pad_token_id)

    return {direction: of(direction, rollout) for direction, rollout in rollouts.items()}


def _refill(
    rollout: Rollout,
    batch: RegionBatch,
    head: RewardLossHead,
    sample: Callable[[RegionBatch], Rollout],
    max_refills: int,
    pad_token_id: int,
) -> Rollout:
    num = head.num_generations
    flat = _flat_groups(head, rollout.scored)
    first, sampled = sum(flat), len(rollout.scored.rewards)
    for _ in range(max_refills):
        if rollout.scored.failure is not None or not any(flat):
            break
        images = {batch.image[i] for i, again in zip(rollout.samples, flat, strict=True) if again}
        part = [i for i in range(len(batch)) if batch.image[i] in images]
        found = sample(batch.subset(part))
        sampled += len(found.scored.rewards)
        if found.scored.failure is not None:
            # What was sampled before stays; the run stops after this step.
            failed = replace(rollout.scored, failure=found.scored.failure)
            rollout = replace(rollout, rewards=failed)
            break
        varies = [not x for x in head.zero_variance(found.scored)[::num].tolist()]
        group_of = {part[i]: k for k, i in enumerate(found.samples)}
        taken = {
            s: group_of[i] for s, i in enumerate(rollout.samples) if flat[s] and varies[group_of[i]]
        }
        counts = [batch.num_segs(rollout.samples), batch.num_segs([part[i] for i in found.samples])]
        rollout = _with_groups(rollout, found, taken, num, counts, pad_token_id)
        flat = [again and s not in taken for s, again in enumerate(flat)]
    varied = int((~head.zero_variance(rollout.scored)).sum())
    metrics = {
        'refill/frac_groups': first / len(flat),
        'refill/frac_groups_never_varied': sum(flat) / len(flat),
        'refill/frac_rollouts_wasted': 1 - varied / sampled,
    }
    return replace(rollout, metrics={**rollout.metrics, **metrics})


def _flat_groups(head: RewardLossHead, rewards: RewardOutput) -> list[bool]:
    """S: groups that have rewards, but no two different ones."""
    num = head.num_generations
    scorable = (~rewards.rewards.isnan()).view(-1, num).any(1)
    return (head.zero_variance(rewards).view(-1, num)[:, 0] & scorable).tolist()


def _with_groups(
    old: Rollout,
    new: Rollout,
    taken: Mapping[int, int],
    num_generations: int,
    num_segs: Sequence[Sequence[int]],
    pad_token_id: int,
) -> Rollout:
    """A rollout with some of its groups replaced.

    Args:
        old: S groups.
        new: Others of some of the same samples.
        taken: Group of ``old`` -> the group of ``new`` that replaces it.
        num_generations: G.
        num_segs: How many ``[SEG]`` answer each of the samples of ``old`` and of ``new``.
        pad_token_id: Stands behind the end of captions.
    """
    if not taken:
        return old
    groups = len(old.samples)
    chosen = [groups + taken[s] if s in taken else s for s in range(groups)]
    rows = [s * num_generations + g for s in chosen for g in range(num_generations)]
    # Those of a rollout, and so of a group, lie side by side.
    sizes = [count * num_generations for counts in num_segs for count in counts]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    action_rows = [a for s in chosen for a in range(ends[s] - sizes[s], ends[s])]
    return replace(
        old,
        captions=_take(old.captions, new.captions, rows),
        completions=_completions(old.completions, new.completions, rows, pad_token_id),
        actions=_take(old.actions, new.actions, action_rows),
        sigma=_take(old.sigma, new.sigma, action_rows),
        old_per_token_logps=_take(old.old_per_token_logps, new.old_per_token_logps, rows),
        ref_per_token_logps=_take(old.ref_per_token_logps, new.ref_per_token_logps, rows),
        reward_inputs=_reward_inputs(old.reward_inputs, new.reward_inputs, rows),
        rewards=replace(
            old.scored,
            rewards=_take(old.scored.rewards, new.scored.rewards, rows),
            rewards_per_func=_take(old.scored.rewards_per_func, new.scored.rewards_per_func, rows),
            terms=_take(old.scored.terms, new.scored.terms, rows),
        ),
    )


def _take(old: Any, new: Any, rows: Sequence[int], fill: float = 0) -> Any:
    """Some rows of two tensors or lists behind one another; nothing where there is nothing.

    Tensors of different widths are filled up on the right.
    """
    if old is None or not len(old):
        return old
    if not isinstance(old, Tensor):
        both = [*old, *new]
        return [both[row] for row in rows]
    if old.ndim > 1:
        width = max(old.shape[1], new.shape[1])
        old, new = (pad(x, (0, width - x.shape[1]), value=fill) for x in (old, new))
    return torch.cat([old, new])[rows]


def _completions(
    old: Completions | None, new: Completions | None, rows: Sequence[int], pad_token_id: int
) -> Completions | None:
    if old is None or new is None:
        return old
    parts = {
        x.name: _take(getattr(old, x.name), getattr(new, x.name), rows) for x in fields(Completions)
    }
    ids = _take(old.completion_ids, new.completion_ids, rows, pad_token_id)
    return Completions(**{**parts, 'completion_ids': ids})


def _reward_inputs(
    old: RolloutBatch | None, new: RolloutBatch | None, rows: Sequence[int]
) -> RolloutBatch | None:
    if old is None or new is None:
        return old
    lists = {
        x.name: _take(getattr(old, x.name), getattr(new, x.name), rows)
        for x in fields(RolloutBatch)
        if x.name not in ('num_generations', 'direction')
    }
    return replace(old, **lists)
