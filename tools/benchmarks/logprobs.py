"""Log-probs of completions without the full logits, against `log_softmax` and gather.

Both sides start from the same hidden states and output embedding and run forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.engine.memory import peak_extra_bytes
from projects.llava_sam2_rl.losses import chunked_logprobs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py logprobs``."""
    for name, default, what in (
        ('batch', 4, 'completions'),
        ('tokens', 128, 'tokens of each'),
        ('width', 2048, 'hidden size'),
        ('vocab', 151674, 'vocabulary'),
    ):
        parser.add_argument(f'--{name}', type=int, default=default, help=f'{what} (%(default)s)')
    parser.add_argument('--rounds', type=int, default=3, help='timed rounds (%(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times and measures both.

    Returns:
        A row per way: median seconds, peak extra memory, ratios, largest differences.
    """
    generator = torch.Generator().manual_seed(0)
    device = torch.device(args.device)
    shape = (args.batch, args.tokens, args.width)
    hidden = torch.randn(shape, generator=generator).to(device)
    weight = torch.randn(args.vocab, args.width, generator=generator).mul_(0.05).to(device)
    targets = torch.randint(args.vocab, shape[:2], generator=generator).to(device)
    upstream = torch.randn(shape[:2], generator=generator).to(device)

    def step(way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = hidden.detach().requires_grad_()
        logps = way(leaf, weight, targets)
        logps.backward(upstream)
        assert leaf.grad is not None
        return logps.detach(), leaf.grad

    ways = {'ours': ours, 'full logits': full}
    expected = step(full)
    found = step(ours)
    difference = [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            step(way)
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    extra = {
        name: peak_extra_bytes(lambda way=way: step(way), device) for name, way in ways.items()
    }
    return [
        {
            'way': name,
            'seconds': median[name],
            'speed of full': median['full logits'] / median[name],
            'extra MB': extra[name] / 1e6,
            'memory of full': extra[name] / extra['full logits'],
            'max difference (value, gradient)': (
                ', '.join(f'{value:.1e}' for value in difference) if name == 'ours' else ''
            ),
        }
        for name in ways
    ]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Chunk by chunk, recomputed in backward."""
    logps = chunked_logprobs(hidden, weight, targets=targets)
    assert isinstance(logps, Tensor)
    return logps


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition."""
    return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
