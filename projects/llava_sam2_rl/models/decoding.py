"""What a step of one token needs to be cheap: few calls a layer, few looks at what was drawn.

A LoRA layer of peft is seven modules; with a token a sequence calling them takes longer than what
they compute. Keys and values are in `group_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from projects.llava_sam2_rl.prompts import decode_text

#: Up to so many rows the weight comes first in a product on the CPU.
_FEW_ROWS = 8


@contextmanager
def direct_linears(model: nn.Module) -> Iterator[None]:
    """Inside the scope, linear layers and LoRA layers without dropout call their products alone.

    Args:
        model: In eval mode; its modules and weights stay what they are.
    """
    changed = []
    for module in model.modules():
        direct = None if 'forward' in vars(module) else _direct(module)
        if direct is not None:
            module.forward = direct
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


#: A of LoRA ``(r, K)``, B ``(N, r)`` and the scale.
LoRA = tuple[Tensor, Tensor, float]


def plain_parts(module: nn.Module) -> tuple[nn.Linear, LoRA | None] | None:
    """A linear layer and its adapter; ``None`` where peft has more to do than the formula."""
    if type(module) is nn.Linear:
        return module, None
    if not isinstance(module, LoraLinear) or module.training:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    plain = len(active) == 1 and not (module.disable_adapters or module.merged)
    if not plain or active[0] in module.lora_variant or type(module.base_layer) is not nn.Linear:
        return None
    down, up = module.lora_A[active[0]], module.lora_B[active[0]]
    if down.bias is not None or up.bias is not None:
        return None
    return module.base_layer, (down.weight, up.weight, module.scaling[active[0]])


def _direct(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A layer's forward as one function; ``None`` where there is more to do than the formula."""
    parts = plain_parts(module)
    if parts is None:
        return None
    base, lora = parts
    return partial(few_rows_linear, weight=base.weight, bias=base.bias, lora=lora)


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
) -> Tensor:
    """``x Wᵀ + b``, with LoRA ``+ s (x Aᵀ) Bᵀ`` (Hu et al. 2021, "LoRA").

    On a CPU ``W xᵀ`` of two to eight rows takes a half to a fifth of the time of ``x Wᵀ``, which
    the libraries compute as if there were many.

    Args:
        x: ``(..., K)``.
        weight: ``(N, K)``.
        bias: ``(N,)``.
        lora: ``(r, K)``, ``(N, r)`` and the scale.

    Returns:
        ``(..., N)``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if lora is not None and lora[0].dtype != x.dtype:
        # As peft does it: the adapter in its own precision, the sum in that of the layer.
        down, up, scale = lora
        out = F.linear(x, weight, bias)
        return (out + F.linear(F.linear(x.to(down.dtype), down), up) * scale).to(out.dtype)
    if x.device.type == 'cpu' and 1 < len(rows) <= _FEW_ROWS:
        columns = rows.t()
        out = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        if lora is not None:
            down, up, scale = lora
            out = torch.addmm(out, up, down @ columns, alpha=scale)
        return out.t().contiguous().view(*x.shape[:-1], -1)
    out = F.linear(rows, weight, bias)
    if lora is not None:
        down, up, scale = lora
        out = torch.addmm(out, F.linear(rows, down), up.t(), alpha=scale)
    return out.view(*x.shape[:-1], -1)


class StopWatcher:
    """Says where a sequence ends, and decodes only tokens that could end one.

    Args:
        tokenizer: Of the model; needed where there are stop strings.
        stop_strings: Texts that end a sequence.
        eos_token_ids: Ids that end one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        stop_strings: Sequence[str],
        eos_token_ids: Sequence[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = tuple(stop_strings)
        self.eos_token_ids = frozenset(eos_token_ids)
        #: Every token is a byte at least, so a stop that ends here lies within so many tokens.
        self.width = max((len(stop.encode()) for stop in stop_strings), default=1)
        self._candidates = self.eos_token_ids
        if self.stop_strings and tokenizer is not None:
            self._candidates |= _stop_candidates(tokenizer, self.stop_strings)

    def first_end(self, tokens: Sequence[int], start: int) -> int | None:
        """The position of the first token that ends a sequence, or ``None``.

        Args:
            tokens: The sequence, or its last tokens; none before ``start`` ends it.
            start: Where to look from; `width` - 1 tokens before it have to be there, if the
                sequence has so many.
        """
        for position in range(start, len(tokens)):
            if tokens[position] not in self._candidates:
                continue
            tail = tokens[max(0, position + 1 - self.width) : position + 1]
            if tokens[position] in self.eos_token_ids or self._holds_stop(tail):
                return position
        return None

    def _holds_stop(self, tail: Sequence[int]) -> bool:
        text = '' if self.tokenizer is None else decode_text(self.tokenizer, tail)
        return any(stop in text for stop in self.stop_strings)


class SequenceEnds:
    """Where N sequences end, as far as the host has looked.

    Args:
        watcher: Finds ends.
        count: N.
    """

    def __init__(self, watcher: StopWatcher, count: int) -> None:
        self._watcher = watcher
        self._looked = 0
        #: Tokens of each through its end, ``None`` where it goes on.
        self.lengths: list[int | None] = [None] * count

    def look(self, ids: Tensor, index: Tensor, sequences: Sequence[int]) -> list[int]:
        """Reads what was drawn since it looked last. The host waits for a GPU, once.

        Args:
            ids: ``(N, T)`` int64, all tokens so far.
            index: ``(R,)`` int64, the sequences that are still decoded.
            sequences: The same R numbers on the host.

        Returns:
            The rows of ``index`` whose sequence has not ended.
        """
        first = max(0, self._looked + 1 - self._watcher.width)
        tails = ids[index, first:].tolist()
        for sequence, tail in zip(sequences, tails, strict=True):
            if self.lengths[sequence] is None:
                end = self._watcher.first_end(tail, self._looked - first)
                self.lengths[sequence] = None if end is None else first + end + 1
        self._looked = ids.shape[1]
        return [row for row, n in enumerate(sequences) if self.lengths[n] is None]


@lru_cache(maxsize=8)
def _stop_candidates(
    tokenizer: PreTrainedTokenizerBase, stop_strings: tuple[str, ...]
) -> frozenset[int]:
    """Ids of tokens that can complete a stop: those whose text has its last character.

    A character of several bytes may be completed by a token that shows as a replacement character,
    and a space at the start of a text may not show at all.
    """
    last = {stop[-1] for stop in stop_strings}
    if any(c.isspace() for c in last):
        return frozenset(range(len(tokenizer)))
    if any(not c.isascii() for c in last):
        last.add('\ufffd')
    texts = (decode_text(tokenizer, [i]) for i in range(len(tokenizer)))
    return frozenset(i for i, text in enumerate(texts) if not last.isdisjoint(text))
