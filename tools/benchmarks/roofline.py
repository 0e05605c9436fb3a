"""What this machine can do at most, and what a piece of work must do at least.

The roofline of Williams et al. (2009): work is bound by arithmetic or by memory. Generating text
reads all weights for every token and computes little with them; the training pass does the
opposite.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from . import common

#: Of the square matrices that are multiplied, and bytes that are read; more on a GPU.
_SIDE = {'cpu': 2048, 'cuda': 8192}
_BYTES = {'cpu': 2**29, 'cuda': 2**32}


@dataclass(frozen=True)
class Peak:
    """The best of several tries, on as many cores as PyTorch uses.

    Args:
        flops: Of a matrix product, in operations a second; a multiply-add is two.
        bandwidth: Of reading a large tensor once, in bytes a second.
    """

    flops: float
    bandwidth: float


@functools.cache
def measure_peak(device: str, dtype: torch.dtype, tries: int = 5) -> Peak:
    """Measures this machine; seconds."""
    kind = torch.device(device).type
    side = _SIDE[kind]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    long = torch.ones(_BYTES[kind] // dtype.itemsize, device=device, dtype=dtype)
    return Peak(
        flops=2 * side**3 / _fastest(lambda: matrix @ matrix, device, tries),
        bandwidth=long.nbytes / _fastest(long.sum, device, tries),
    )


def _fastest(work: Callable[[], Any], device: str, tries: int) -> float:
    seconds = []
    for _ in range(tries + 1):
        common.wait(device)
        started = time.perf_counter()
        work()
        common.wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def decode_bytes(policy: Any, prompts: int, prompt_length: int, lengths: Tensor) -> int:
    """Bytes that must be read to generate completions, however that is done.

    Each step reads the language model's weights, each prompt's keys and values once for its whole
    group, and of each completion that goes on those of what it has so far.

    Args:
        policy: The network.
        prompts: B.
        prompt_length: Tokens of each.
        lengths: ``(B*G,)`` int64, tokens of each completion.
    """
    model = policy.language_model
    weights = {id(p): p.nbytes for p in (*model.parameters(), policy.lm_head.weight)}
    table = model.get_input_embeddings().weight
    if table is not policy.lm_head.weight:
        del weights[id(table)]  # a row is read, not the table
    steps = int(lengths.max())
    own = int((lengths * (lengths + 1) // 2).sum())
    positions = prompts * prompt_length * steps + own
    return steps * sum(weights.values()) + positions * bytes_of_a_position(policy)


def bytes_of_a_position(policy: Any) -> int:
    """Of its keys and values in all layers."""
    config = policy.language_model.config
    head = getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
    item = policy.lm_head.weight.element_size()
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * item


@dataclass(frozen=True)
class Pass:
    """A training pass: forward with gradients and backward.

    Args:
        seconds: Median.
        flops: Operations without those that checkpointing repeats ("model FLOPs").
    """

    seconds: float
    flops: int


def training_pass(model: Any, batch: Mapping[str, Any], rounds: int, device: str) -> Pass:
    """Measures the pass of a step that comes behind the rollouts.

    Args:
        model: A `DualLoopModel`.
        batch: Of the data loader.
        rounds: Timed rounds.
        device: Of the model.
    """
    model.train()
    names = [meta.name for meta in batch['data_samples']]
    with torch.no_grad():
        encoded = model.encode(batch['data'], names)
        rollouts = model.rollout(encoded)

    def work() -> None:
        losses, _ = model(encoded, rollouts, mode='objective')
        sum(loss.value for loss in losses.values()).backward()
        model.zero_grad()

    with _without_checkpointing(model), FlopCounterMode(display=False) as counter:
        work()
    seconds = common.in_turns({'pass': work}, rounds, device)['pass']
    return Pass(seconds, counter.get_total_flops())


@contextmanager
def _without_checkpointing(model: torch.nn.Module) -> Iterator[None]:
    on = [m for m in model.modules() if getattr(m, 'gradient_checkpointing', False) is True]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True
