"""Keys and values of sequences that share prompts, and attention over them without copies.

The G completions of a prompt attend to one copy of its keys and values. With the tokens they got so
far they form a tree, as in `prefix_tree`, whose branches grow in step: a step is one pass of
queries that stand side by side in a row, under a mask by which each sees the prompt and its own
branch. Transformers' `DynamicCache` holds the prompt G times, copies all that it holds at every
step, and its SDPA path may repeat it once more for every query head; here a layer's keys and values
lie in one tensor, are written in place, and are read where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.llava_sam2_rl.models import decode_graph
from projects.llava_sam2_rl.models.prefill import GeneratingModel
from projects.llava_sam2_rl.models.transformers_compat import (
    HeldCache,
    PromptCache,
    register_attention,
)
from projects.llava_sam2_rl.utils.devices import indices_on

_FOLDED = 'sdpa_folded'
#: Positions that the sequences of a row may have of their own, together: each query passes over
#: those of all of them.
_OWN_POSITIONS = 2048
#: Attention kernels take masks of such widths as they are, and copy others.
_ALIGNED = 16


def sequences_in_a_row(num_generations: int, steps: int) -> int:
    """How many of a group share one copy of their prompt: a divisor of the group's size.

    All of them, unless they may become so long that passing over one another's tokens costs more
    than another copy of the prompt.

    Args:
        num_generations: G.
        steps: Positions that each sequence will have behind the prompt, at most.
    """
    most = min(num_generations, max(1, _OWN_POSITIONS // steps))
    return next(n for n in range(most, 0, -1) if num_generations % n == 0)


class GroupCache(HeldCache):
    """Keys and values of N = R·g sequences in R rows, the prompt once for the g of a row.

    Behind the P positions of the prompt stand, for each step, one of each of the g sequences. All
    room is there from the start.

    Args:
        prompts: Of B prompts of P positions; left as it is.
        prompt_mask: ``(B, P)`` bool.
        rows: ``(R,)`` int64: the prompt of each row.
        slots: g.
        steps: Positions that each sequence will have behind the prompt, at most.
        folds: Query heads to a key head: the mask is repeated so often for `folded_attention`.
        dtype: That attention computes in: of the mask, keys and values.
        unit: What the width of a step is a multiple of. Defaults to 16.
    """

    def __init__(
        self,
        prompts: PromptCache,
        prompt_mask: Tensor,
        rows: Tensor,
        slots: int,
        steps: int,
        folds: int,
        dtype: torch.dtype,
        unit: int = _ALIGNED,
    ) -> None:
        super().__init__()
        self.slots, self._unit = slots, unit
        self._prompt_length, self._steps, self._folds = prompt_mask.shape[1], steps, folds
        #: Of each layer ``(R, 2K, S, d)``, keys before values.
        self.joint = [
            self._in_room(torch.cat([keys, values], dim=1)[rows].to(dtype))
            for keys, values in zip(prompts.keys, prompts.values, strict=True)
        ]
        self._length = self._prompt_length
        lowest = torch.finfo(dtype).min
        #: ``(R, 1, 1, P)``, added to the scores.
        self._prompt_bias = (~prompt_mask[rows][:, None, None]).to(dtype).mul_(lowest)
        self._bias = self._full_bias(0)

    def __len__(self) -> int:
        return len(self.joint)

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Positions of a row before the step, without its room."""
        return self._length

    @property
    def width(self) -> int:
        """S: positions that the next step passes over."""
        return self._in_units(self._length + self.slots)

    def next_bias(self) -> Tensor:
        """The mask of the next step.

        Returns:
            ``(R, 1, folds·g, S)``, added to the scores: 0 where a query sees a position, else the
            lowest number. Positions beyond those of the step are there for the kernel's sake and
            seen by none.
        """
        self._bias.index_copy_(3, self._at, self._own.expand(len(self._bias), 1, -1, -1))
        return self._bias[..., : self.width]

    def write(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the next g positions of a layer into their places.

        Args:
            layer: Which.
            new: ``(R, 2K, g, d)``, keys before values.

        Returns:
            Views of its keys and values ``(R, K, S, d)``, as wide as the mask.
        """
        joint = self.joint[layer]
        joint.index_copy_(2, self._at, new.to(joint.dtype))
        keys, values = joint[:, :, : self.width].chunk(2, dim=1)
        return keys, values

    def end_step(self) -> None:
        """All layers have their positions of the step."""
        self._at += self.slots
        self._length += self.slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """`write`, as transformers calls it."""
        return self.write(layer_idx, torch.cat([key_states, value_states], dim=1))

    def keep(self, places: Sequence[int]) -> Tensor:
        """Lets go of all sequences but some, layer by layer.

        Args:
            places: Of those that stay, row · g + slot: of each row that stays equally many, side by
                side.

        Returns:
            ``(N',)`` int64: the places on the device.
        """
        rows = sorted({place // self.slots for place in places})
        kept = indices_on(self._bias.device, places)
        row = kept.view(len(rows), -1)[:, 0] // self.slots
        slot = (kept % self.slots).view(len(rows), -1)
        steps = (self._length - self._prompt_length) // self.slots
        for layer, x in enumerate(self.joint):
            prompt, own, _ = x.split(
                [self._prompt_length, steps * self.slots, x.shape[2] - self._length], dim=2
            )
            # (R', g', 2K, steps, d): indices apart from one another come first.
            own = own.unflatten(2, (steps, self.slots))[row[:, None], :, :, slot]
            own = own.permute(0, 2, 3, 1, 4).flatten(2, 3)
            self.joint[layer] = self._in_room(torch.cat([prompt[row], own], dim=2), slot.shape[1])
        self.slots = slot.shape[1]
        self._length = self._prompt_length + steps * self.slots
        self._prompt_bias = self._prompt_bias[row]
        self._bias = self._full_bias(steps)
        return kept

    def _in_room(self, x: Tensor, slots: int | None = None) -> Tensor:
        """``(R, 2K, n, d)`` with room behind it, which holds zeros: a kernel may multiply them."""
        width = self._in_units(self._prompt_length + self._steps * (slots or self.slots))
        return F.pad(x, (0, 0, 0, width - x.shape[2]))

    def _in_units(self, width: int) -> int:
        return -(-width // self._unit) * self._unit

    def _full_bias(self, steps: int) -> Tensor:
        """The mask over all room, of which so many steps are used."""
        like, lowest = self._prompt_bias, torch.finfo(self._prompt_bias.dtype).min
        #: ``(folds·g, g)``: which of the positions of a step each query sees.
        self._own = torch.eye(self.slots, dtype=like.dtype, device=like.device).sub_(1)
        self._own = self._own.mul_(-lowest).repeat(self._folds, 1)
        width = self._in_units(self._prompt_length + self._steps * self.slots)
        bias = like.new_full((len(like), 1, len(self._own), width), lowest)
        bias[..., : self._prompt_length] = like
        used = self._prompt_length + steps * self.slots
        #: ``(g,)`` int64: the positions of the next step.
        self._at = torch.arange(used, used + self.slots, device=like.device)
        bias[..., self._prompt_length : used] = self._own.repeat(1, steps)
        return bias


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA with keys and values unrepeated, for few query positions.

    The query heads that share a key head become further positions of one head.

    Args:
        module: The attention layer.
        query: ``(R, H, g, d)``.
        key: ``(R, K, S, d)``, K divides H.
        value: ``(R, K, S, d)``.
        attention_mask: ``(R, 1, H / K · g, S)``, added to the scores; or ``None``.
        dropout: Probability.
        scaling: Of the scores.
        **kwargs: What else transformers passes; unused.

    Returns:
        ``(R, g, H, d)``, and no weights.
    """
    rows, heads, slots, width = query.shape
    out = F.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], -1, width),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return out.reshape(rows, heads, slots, width).transpose(1, 2).contiguous(), None


register_attention(_FOLDED, folded_attention)


@contextmanager
def fast_attention(config: Any) -> Iterator[None]:
    """Inside the scope, models of this config attend by `folded_attention`.

    Only for steps behind a `GroupCache`, with its masks.
    """
    before = config._attn_implementation
    config._attn_implementation = _FOLDED
    try:
        yield
    finally:
        config._attn_implementation = before


class ActiveSequences:
    """The R·g of N = B*G sequences that are still decoded, g of one prompt in a row.

    Args:
        policy: In eval mode.
        last: ``(B, D)`` hidden states at the last token of each prompt.
        prompts: The prompts' cache, of P positions.
        prompt_mask: ``(B, P)`` bool.
        num_generations: G.
        room: Positions there will be behind the prompt, at most.
    """

    def __init__(
        self,
        policy: GeneratingModel,
        last: Tensor,
        prompts: PromptCache,
        prompt_mask: Tensor,
        num_generations: int,
        room: int,
    ) -> None:
        config, device = policy.language_model.config, prompt_mask.device
        self._graphs = policy.decode_graphs.for_rollout(policy.language_model, device)
        count = len(prompt_mask) * num_generations
        slots = sequences_in_a_row(num_generations, room)
        rows = torch.arange(count // slots, device=device) // (num_generations // slots)
        #: R·g numbers: which of the N sequences each is.
        self.sequences = list(range(count))
        #: ``(R·g,)`` int64: the same on the device.
        self.index = torch.arange(count, device=device)
        #: ``(R·g, D)``: what the next token of each is predicted from.
        self.hidden = last.repeat_interleave(num_generations, dim=0)
        #: ``(R·g,)`` int64: the last token of each.
        self._tokens = torch.zeros_like(self.index)
        #: ``(R·g,)`` int64: the position of the next token of each.
        self._positions = prompt_mask.sum(1).repeat_interleave(num_generations)
        casts = torch.is_autocast_enabled(device.type)
        self._cache = GroupCache(
            prompts,
            prompt_mask,
            rows,
            slots,
            room,
            folds=config.num_attention_heads // prompts.keys[0].shape[1],
            dtype=torch.get_autocast_dtype(device.type) if casts else last.dtype,
            unit=_ALIGNED if self._graphs is None else decode_graph.WIDTH,
        )

    def places(self, going: Sequence[int]) -> list[int]:
        """The places that have to stay so that some can go on.

        Each row that stays has as many as the fullest of them: what has ended fills the others.

        Args:
            going: Numbers below R·g, ascending.
        """
        slots = self._cache.slots
        rows: dict[int, list[int]] = {}
        for place in going:
            rows.setdefault(place // slots, []).append(place)
        fullest = max(map(len, rows.values()))
        for row, places in rows.items():
            ended = sorted(set(range(row * slots, (row + 1) * slots)) - set(places))
            places += ended[: fullest - len(places)]
        return [place for places in rows.values() for place in places]

    def keep(self, places: Sequence[int]) -> Tensor:
        """Lets go of all places but some, before `advance`; returns these on the device."""
        self.sequences = [self.sequences[place] for place in places]
        kept = self._cache.keep(places)
        self.index, self._positions = self.index[kept], self._positions[kept]
        self._tokens = torch.zeros_like(self.index)
        if self._graphs is not None:
            self._graphs.clear()
        return kept

    def advance(self, policy: GeneratingModel, tokens: Tensor, autocast: bool = True) -> None:
        """Reads the next token ``(R·g,)`` of each, and renews ``hidden``.

        Args:
            policy: In eval mode.
            tokens: Int64.
            autocast: Whether autocast, where it is on, has something to do in the layers. Defaults
                to True.
        """
        self._tokens.copy_(tokens)
        casts = torch.is_autocast_enabled(self.index.device.type)
        step = partial(self._step, policy, casts and not autocast)
        if self._graphs is None:
            self.hidden = step()
        else:
            self.hidden = self._graphs.run(self._cache.width, step, casts and autocast)
        self._positions += 1
        self._cache.end_step()

    def _step(self, policy: GeneratingModel, off: bool) -> Tensor:
        """``(R·g, D)``; it reads and writes tensors that stay where they are from step to step."""
        table = policy.language_model.get_input_embeddings()
        grid = (-1, self._cache.slots)
        quiet = torch.autocast(self.index.device.type, enabled=False) if off else nullcontext()
        with fast_attention(policy.language_model.config), quiet:
            return policy.forward_with_cache(
                table(self._tokens.view(grid)),
                self._cache.next_bias(),
                self._positions.view(grid),
                self._cache,
            ).last_hidden_state.flatten(0, 1)
