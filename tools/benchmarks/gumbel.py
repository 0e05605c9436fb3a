"""Straight-through Gumbel embeddings against the plain gather and a chunked one.

Both sides get the same logits, noise and upstream gradient; forward and backward are timed in
turns. The plain way gathers `(B, T, k, D)` at once, the chunked one a few candidates at a time.
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
from projects.llava_sam2_rl.losses import gumbel_embeds

Embed = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py gumbel``."""
    for name, default, what in (
        ('batch', 4, 'B'),
        ('tokens', 128, 'T'),
        ('top-k', 512, 'k'),
        ('width', 2048, 'D'),
        ('vocab', 151674, 'V'),
    ):
        parser.add_argument(f'--{name}', type=int, default=default, help=f'{what} (%(default)s)')
    parser.add_argument('--rounds', type=int, default=5, help='timed rounds (%(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times and measures all three.

    Returns:
        A row per way: median seconds of forward and backward, ratios to ours, peak extra memory,
        and how far value and gradient are from the plain way's.
    """
    generator = torch.Generator().manual_seed(0)
    device = torch.device(args.device)
    lead = (args.batch, args.tokens)
    logits = torch.randn(*lead, args.vocab, generator=generator).mul_(3).to(device)
    table = torch.randn(args.vocab, args.width, generator=generator).mul_(0.02).to(device)
    uniform = torch.rand(*lead, args.top_k, generator=generator).clamp(min=1e-20)
    noise = -(-uniform.log()).log().to(device)
    upstream = torch.randn(*lead, args.width, generator=generator).to(device)

    def step(embed: Embed) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        out = embed(leaf, table, noise, 1.0, args.top_k)
        out.backward(upstream)
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    ways: dict[str, Embed] = {'ours': _ours, 'plain gather': plain, 'chunked gather': chunked}
    reference = step(plain)
    errors = {}
    for name, embed in ways.items():
        out, grad = step(embed)  # also the warm-up
        errors[name] = max(
            float((out - reference[0]).abs().max()), float((grad - reference[1]).abs().max())
        )
        del out, grad
    del reference
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, embed in ways.items():
            _wait(device)
            started = time.perf_counter()
            step(embed)
            _wait(device)
            seconds[name].append(time.perf_counter() - started)
    # The gradient of the logits is part of the result, whichever way it is made.
    result = 4 * (logits.numel() + upstream.numel())
    bound = args.batch * args.tokens * args.top_k * 12
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, embed in ways.items():
        extra = peak_extra_bytes(lambda embed=embed: step(embed), device) - result
        rows.append(
            {
                'way': name,
                'seconds': median[name],
                'times ours': median[name] / median['ours'],
                'extra MB': max(extra, 0) / 1e6,
                'B·T·k·12 in MB': bound / 1e6,
                'max difference': errors[name],
            }
        )
    return rows


def _ours(logits: Tensor, table: Tensor, noise: Tensor, tau: float, top_k: int) -> Tensor:
    return gumbel_embeds(logits, table, tau=tau, top_k=top_k, noise=noise)[0]


def _weights(logits: Tensor, noise: Tensor, tau: float, top_k: int) -> tuple[Tensor, Tensor]:
    values, ids = logits.topk(top_k)
    soft = ((values + noise) / tau).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard - soft.detach() + soft, ids


def plain(logits: Tensor, table: Tensor, noise: Tensor, tau: float, top_k: int) -> Tensor:
    """The definition: all candidates' embeddings, weighted."""
    weights, ids = _weights(logits, noise, tau, top_k)
    return torch.einsum('btk,btkd->btd', weights, table[ids])


def chunked(
    logits: Tensor, table: Tensor, noise: Tensor, tau: float, top_k: int, size: int = 32
) -> Tensor:
    """The same, ``size`` candidates at a time."""
    weights, ids = _weights(logits, noise, tau, top_k)
    out = torch.zeros(*ids.shape[:-1], table.shape[1], device=logits.device)
    for start in range(0, top_k, size):
        part = slice(start, start + size)
        out = out + torch.einsum('btk,btkd->btd', weights[..., part], table[ids[..., part]])
    return out


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
