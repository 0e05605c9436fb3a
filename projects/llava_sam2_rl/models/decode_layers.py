"""The layers of a language model as one step of decoding needs them: the same numbers, fewer calls.

With a token a sequence, calling a layer of transformers and peft takes longer than what it computes
on a GPU, and half as long on a CPU. Inside of `fast_layers` the projections of one input are one
product, LoRA's among them, the rotation of queries and keys is three operations, a norm five, and
what autocast would cast at every token is cast once. What is not known here keeps its own forward;
`sa2va.self_test` compares the two when a model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projects.llava_sam2_rl.models.decoding import LoRA, few_rows_linear, plain_parts
from projects.llava_sam2_rl.models.group_cache import GroupCache

_ATTENTION = ('Qwen2Attention', 'Qwen3Attention', 'LlamaAttention', 'Phi3Attention')
_MLP = ('Qwen2MLP', 'Qwen3MLP', 'LlamaMLP', 'Phi3MLP')
_NORM = ('Qwen2RMSNorm', 'Qwen3RMSNorm', 'LlamaRMSNorm', 'Phi3RMSNorm')
_CACHE_NAMES = ('past_key_values', 'past_key_value', 'cache')
#: Weights are copied for a rollout where all copies take so many bytes at most, and where it has so
#: many steps at least that the copy pays.
_COPY_AT_MOST = 2**30
_COPY_FROM = 16

_Product = Callable[[Tensor], Tensor]


@contextmanager
def fast_layers(model: Any, rows: int, steps: int) -> Iterator[bool]:
    """Inside the scope, layers of known kinds compute a step behind a `GroupCache` in few calls.

    LoRA is added to a float32 copy of the weights where all weights are float32: rounding is that
    of another order of the sum, 1e-7. In lower precision a small adapter would be rounded away in
    such a sum; there it is a product of its own, as in training, so that what is sampled is the
    policy whose log-probs the loss compares.

    Args:
        model: A language model in eval mode; its weights stay what they are.
        rows: Sequences.
        steps: Tokens of each, at most.

    Yields:
        Whether all layers are known, so that autocast has nothing left to do in them.
    """
    weight = next((m.weight for m in model.modules() if isinstance(m, nn.Embedding)), None)
    made: list[nn.Module] = []
    complete = False
    if weight is not None:
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        makers = _Makers(model, torch.get_autocast_dtype(device.type) if autocast else None)
        makers.rows, makers.copies = rows, makers.copies and steps >= _COPY_FROM
        layers = [m for m in model.modules() if type(m).__name__ in _ATTENTION + _MLP + _NORM]
        forwards = [makers.forward_of(m) for m in layers]
        complete = bool(layers) and all(forwards)
        head = model.get_output_embeddings()
        if makers.copies and not autocast and head is not None:
            product = makers.product([head])
            if product is not None:
                layers.append(head)
                forwards.append(_over_last(product))
        for module, forward in zip(layers, forwards, strict=True):
            if forward is not None:
                module.forward = forward
                made.append(module)
    try:
        yield complete
    finally:
        for module in made:
            del module.forward


class _Makers:
    """Makes forwards of the layers of one model.

    Args:
        model: A language model.
        dtype: That autocast computes in; ``None`` without autocast.
    """

    rows = 1

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.dtype, self.rotation = dtype, _Rotation()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        size = 4 if dtype is None else dtype.itemsize
        #: Whether copies of all weights are small enough.
        self.copies = sum(m.weight.numel() for m in linear) * size <= _COPY_AT_MOST

    def forward_of(self, module: Any) -> Callable[..., Any] | None:
        """A forward for a layer; ``None`` where there is none."""
        if 'forward' in vars(module):
            return None
        name = type(module).__name__
        if name in _NORM:
            return _norm(module)
        if name in _MLP:
            return self._mlp(module)
        return self._attention(module)

    def product(self, layers: Sequence[nn.Module]) -> _Product | None:
        """Linear layers of one input, with LoRA or not, as one product ``(n, K) -> (n, N)``."""
        found = [plain_parts(layer) for layer in layers]
        parts = [x for x in found if x is not None]
        if len(parts) < len(found):
            return None
        bases, loras = [base for base, _ in parts], [lora for _, lora in parts]
        weights = [base.weight for base in bases]
        adapters = [x for lora in loras if lora is not None for x in lora[:2]]
        kinds = {x.dtype for x in (*weights, *adapters)}
        if self.dtype is None and len(kinds) > 1:
            return None  # each in its own precision
        if any(hasattr(weight, 'ds_id') for weight in weights):
            return None  # ZeRO-3 moves them
        dtype = self.dtype or weights[0].dtype
        bias = _together([base.bias for base in bases], weights, dtype)
        if self.dtype is None and dtype == torch.float32:
            return _merged(weights, loras, bias, self.rows) if self.copies else None
        if dtype == torch.float32:
            return None
        joint = self._joint(weights, loras, dtype)
        return None if joint is None else _with_lora(joint, weights, loras, bias, dtype)

    def _joint(
        self,
        weights: Sequence[Tensor],
        loras: Sequence[LoRA | None],
        dtype: torch.dtype,
    ) -> Tensor | None:
        """``(N + r, K)``: the layers' weights, and rows for their A.

        Frozen weights of the right dtype become views of it once, and take no memory again.
        """
        count = sum(map(len, weights))
        rank = sum(len(lora[0]) for lora in loras if lora is not None)
        own = all(
            w.dtype == dtype and not w.requires_grad and not hasattr(w, 'stands_in')
            for w in weights
        )
        if not own and not self.copies:
            return None
        joint = _rows_of(weights, count + rank) if own else None
        if joint is None:
            joint = weights[0].new_empty((count + rank, weights[0].shape[1]), dtype=dtype)
            torch.cat([w.detach().to(dtype) for w in weights], out=joint[:count])
            if own:
                for weight, part in zip(weights, joint[:count].split([*map(len, weights)])):
                    weight.data = part
        return joint

    def _mlp(self, module: Any) -> Callable[..., Any] | None:
        fused = getattr(module, 'gate_up_proj', None)
        both = self.product([module.gate_proj, module.up_proj] if fused is None else [fused])
        down = self.product([module.down_proj])
        if both is None or down is None:
            return None
        act = module.act_fn if fused is None else module.activation_fn

        def forward(hidden_states: Tensor) -> Tensor:
            gate, up = both(hidden_states.flatten(0, -2)).chunk(2, dim=-1)
            return down(act(gate) * up).view(*hidden_states.shape[:-1], -1)

        return forward

    def _attention(self, module: Any) -> Callable[..., Any] | None:
        fused = getattr(module, 'qkv_proj', None)
        names = [module.q_proj, module.k_proj, module.v_proj] if fused is None else [fused]
        qkv, o = self.product(names), self.product([module.o_proj])
        if qkv is None or o is None or _turns_a_part(module.config):
            return None
        width, rotation, usual = module.head_dim, self.rotation, type(module).forward
        q_norm, k_norm = (_norm(getattr(module, name, None)) for name in ('q_norm', 'k_norm'))

        def forward(
            hidden_states: Tensor,
            position_embeddings: tuple[Tensor, Tensor],
            attention_mask: Tensor | None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            cache = next((kwargs[name] for name in _CACHE_NAMES if name in kwargs), None)
            if not isinstance(cache, GroupCache):
                return usual(module, hidden_states, position_embeddings, attention_mask, **kwargs)
            rows, slots = hidden_states.shape[:2]
            heads = cache.joint[module.layer_idx].shape[1] // 2
            x = qkv(hidden_states.flatten(0, 1)).unflatten(1, (-1, width)).unflatten(0, (rows, -1))
            queries = x.shape[2] - 2 * heads
            if q_norm is not None and k_norm is not None:
                q, k, v = x.split([queries, heads, heads], dim=2)
                x = torch.cat([q_norm(q), k_norm(k), v], dim=2)
            x = rotation(x, *position_embeddings, heads)
            q = x[:, :, :queries].unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            keys, values = cache.write(module.layer_idx, x[:, :, queries:].transpose(1, 2))
            out = F.scaled_dot_product_attention(
                q.to(keys.dtype), keys, values, attn_mask=attention_mask, scale=module.scaling
            )
            out = out.unflatten(2, (-1, slots)).permute(0, 3, 1, 2, 4).reshape(rows * slots, -1)
            return o(out).view(rows, slots, -1), None

        return forward


class _Rotation:
    """Rotary embeddings of queries and keys; the values beside them are left as they are."""

    def __init__(self) -> None:
        self._of: Tensor | None = None

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, values: int) -> Tensor:
        """Rotated heads.

        Args:
            x: ``(R, g, H, d)``.
            cos: ``(R, g, d)``, alike in all layers of a step.
            sin: ``(R, g, d)``.
            values: So many heads at the end are not rotated.
        """
        half = x.shape[-1] // 2
        if self._of is not cos:
            rotated = x.shape[2] - values
            signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            # In the precision of the tables: without it a rotation by many steps is off.
            self._cos = torch.ones_like(x, dtype=cos.dtype)
            self._cos[:, :, :rotated] = cos[:, :, None]
            self._sin = torch.zeros_like(x, dtype=cos.dtype)
            self._sin[:, :, :rotated] = signed[:, :, None]
            self._of = cos
        return torch.addcmul(x * self._cos, x.roll(half, -1), self._sin)


def _norm(module: Any) -> Callable[[Tensor], Tensor] | None:
    """Root mean square norm (Zhang & Sennrich 2019), rounded where transformers rounds."""
    if module is None:
        return None
    weight = module.weight
    epsilon = torch.full((), module.variance_epsilon, device=weight.device)

    def forward(hidden_states: Tensor) -> Tensor:
        x = hidden_states
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(epsilon, scale, scale, value=1 / x.shape[-1]).rsqrt_()
        if x.dtype == torch.float32:
            return weight * (x * scale)
        return weight * torch.mul(x, scale, out=torch.empty_like(x))

    return forward


def _turns_a_part(config: Any) -> bool:
    """Whether rotary embeddings turn a part of each head alone."""
    options = getattr(config, 'rope_parameters', None) or {}
    share = options.get('partial_rotary_factor', getattr(config, 'partial_rotary_factor', 1.0))
    return share not in (None, 1.0)


def _over_last(product: _Product) -> _Product:
    return lambda x: product(x.flatten(0, -2)).view(*x.shape[:-1], -1)


def _together(
    biases: Sequence[Tensor | None], weights: Sequence[Tensor], dtype: torch.dtype
) -> Tensor | None:
    """``(N,)``; zeros where a layer has none."""
    if all(bias is None for bias in biases):
        return None
    given = [w.new_zeros(len(w)) if b is None else b for b, w in zip(biases, weights, strict=True)]
    return torch.cat([bias.detach().to(dtype) for bias in given])


def _merged(
    weights: Sequence[Tensor], loras: Sequence[LoRA | None], bias: Tensor | None, rows: int
) -> _Product:
    """By a copy of the weights to which LoRA is added; on a CPU in the order its kernels read."""
    parts = [
        w if lora is None else torch.addmm(w, lora[1], lora[0], alpha=lora[2])
        for w, lora in zip(weights, loras, strict=True)
    ]
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    ops: Any = torch.ops.mkldnn
    packs = whole.device.type == 'cpu' and rows > 1 and torch.backends.mkldnn.is_available()
    if packs and hasattr(ops, '_reorder_linear_weight') and hasattr(ops, '_linear_pointwise'):
        packed = ops._reorder_linear_weight(whole.detach(), rows)
        return lambda x: ops._linear_pointwise(x.contiguous(), packed, bias, 'none', [], '')
    return lambda x: few_rows_linear(x, whole, bias)


def _with_lora(
    joint: Tensor,
    weights: Sequence[Tensor],
    loras: Sequence[LoRA | None],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> _Product:
    """By a matrix of weights and A's, then B's as one block-diagonal matrix."""
    count, rank = sum(map(len, weights)), len(joint) - sum(map(len, weights))
    if not rank:
        return lambda x: F.linear(x.to(dtype), joint, bias)
    there = [lora for lora in loras if lora is not None]
    torch.cat([lora[0].detach().to(dtype) for lora in there], out=joint[count:])
    ups = joint.new_zeros(rank, count)
    row = column = 0
    scale = there[0][2] if len({lora[2] for lora in there}) == 1 else 1.0
    for weight, lora in zip(weights, loras, strict=True):
        if lora is not None:
            up = lora[1].detach() * (lora[2] / scale)
            ups[row : row + len(lora[0]), column : column + len(weight)] = up.t()
            row += len(lora[0])
        column += len(weight)
    whole_bias = None if bias is None else F.pad(bias, (0, rank))

    def product(x: Tensor) -> Tensor:
        out = F.linear(x.to(dtype), joint, whole_bias)
        return out[:, :count].addmm_(out[:, count:], ups, alpha=scale)

    return product


def _rows_of(weights: Sequence[Tensor], count: int) -> Tensor | None:
    """The ``(count, K)`` whose first rows weights are, in memory too; ``None`` if there is none."""
    first = weights[0].detach()
    at, step = first.data_ptr(), first.shape[1] * first.element_size()
    if first.storage_offset() or first.untyped_storage().nbytes() != count * step:
        return None
    for weight in weights:
        if weight.data_ptr() != at or not weight.is_contiguous():
            return None
        at += len(weight) * step
    return first.as_strided((count, first.shape[1]), (first.shape[1], 1))
