"""A GRPO step in both directions by the reward of caption_to_mask: read captions, or written ones.

`CaptionLikelihoodReward` has the teacher read the given captions, in the pass that it makes anyway;
METEOR has it write one for each of the B·G sampled masks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from . import common
from .step import objective, ours

REWARDS: dict[str, dict[str, Any]] = {
    'meteor': {'type': 'MeteorReward', 'synonyms': 'off'},
    'likelihood': {'type': 'CaptionLikelihoodReward'},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py reward-step``."""
    common.add_arguments(parser)
    parser.add_argument('--group', type=int, default=8, help='G (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times steps with either reward.

    Returns:
        A row per model: median seconds, and the likelihood's share of METEOR's.
    """
    return [row(model, args) for model in args.models]


def row(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    model = common.build_model(size, objective(args.group), args)
    batch = common.make_batch(model, common.batch_size(size, args), args.device)
    ways = {name: with_reward(model, batch, reward) for name, reward in REWARDS.items()}
    seconds = common.in_turns(ways, args.rounds, args.device)
    return {
        'model': size,
        'B': common.batch_size(size, args),
        'G': args.group,
        'tokens': model.max_new_tokens,
        'meteor s': seconds['meteor'],
        'likelihood s': seconds['likelihood'],
        'share': seconds['likelihood'] / seconds['meteor'],
    }


def with_reward(model: Any, batch: Any, config: dict[str, Any]) -> Callable[[], None]:
    """A step of `step.ours` in which caption_to_mask has this reward."""
    from projects.llava_sam2_rl.registry import REWARDS as registry
    from projects.llava_sam2_rl.rewards import needs_of

    reward, step = registry.build(dict(config)), ours(model, batch)

    def rewarded() -> None:
        direction = model.objective.caption_to_mask
        direction.reward, direction.needs = reward, needs_of(reward)
        step()

    return rewarded
