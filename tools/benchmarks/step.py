"""A GRPO step in both directions against the original way: time and memory.

A step is rollouts, rewards, losses, backward, optimizer and the teacher's move. The original way
is tools/benchmarks/original.py; both train copies of the same model on the same batch. Of ours
also: the pass with gradients, its operations without those that checkpointing repeats, and the
share of this machine's peak that it reaches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from . import common, roofline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py step``."""
    common.add_arguments(parser)
    parser.add_argument('--group', type=int, default=4, help='G (%(default)s)')


def objective(group: int) -> Any:
    """What both sides train by."""
    from projects.llava_sam2_rl.models import GRPOObjective

    return GRPOObjective(num_generations=group, beta=0.1, ref='teacher')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times and measures both.

    Returns:
        A row per model: median seconds, peak extra memory of a step, and what the teacher holds.
    """
    return [row(model, args) for model in args.models]


def row(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    from projects.llava_sam2_rl.engine.memory import peak_extra_bytes

    model = common.build_model(size, objective(args.group), args)
    batch = common.make_batch(model, common.batch_size(size, args), args.device)
    ways = {'ours': ours(model, batch), 'original': original(model, batch)}
    seconds = common.in_turns(ways, args.rounds, args.device)
    extra = {}
    for name, way in ways.items():
        torch.manual_seed(0)
        extra[name] = peak_extra_bytes(way, args.device) / 1e6
    batched = roofline.training_pass(model, batch, args.rounds, args.device)
    peak = roofline.measure_peak(args.device, model.policy.lm_head.weight.dtype)
    # The teacher lives between steps too: it is extra to the policy on either side.
    trainable, everything = model.teacher.memory_bytes / 1e6, _megabytes(model.policy)
    total = {'ours': extra['ours'] + trainable, 'original': extra['original'] + everything}
    return {
        'model': size,
        'B': common.batch_size(size, args),
        'G': args.group,
        'tokens': model.max_new_tokens,
        'original s': seconds['original'],
        'ours s': seconds['ours'],
        'faster': seconds['original'] / seconds['ours'],
        'original extra MB (teacher)': f'{total["original"]:.0f} ({everything:.0f})',
        'ours extra MB (teacher)': f'{total["ours"]:.0f} ({trainable:.0f})',
        'less memory': total['original'] / total['ours'],
        'pass with gradients s': batched.seconds,
        'GFLOP': batched.flops / 1e9,
        'peak GFLOP/s': peak.flops / 1e9,
        'share of peak': batched.flops / peak.flops / batched.seconds,
    }


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """That does not move the model far: every round should do the same work."""
    return torch.optim.SGD([p for p in model.policy.parameters() if p.requires_grad], lr=1e-9)


def ours(model: Any, batch: Any) -> Callable[[], None]:
    """`DualLoopModel.train_step` and the teacher's move, as a run has them."""
    from mmengine.optim import OptimWrapper

    wrapper = OptimWrapper(optimizer_of(model))

    def step() -> None:
        model.train()
        model.train_step(batch, wrapper)
        model.update_teacher()

    return step


def original(model: Any, batch: Any) -> Callable[[], None]:
    """The same, the original way."""
    from .original import Original

    way, optimizer = Original(model), optimizer_of(model)

    def step() -> None:
        losses = way.losses(batch['data'])
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        way.update_teacher()

    return step


def _megabytes(model: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
