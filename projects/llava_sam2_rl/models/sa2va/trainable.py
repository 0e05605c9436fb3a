"""Which weights are trained: parts by name, and adapters (LoRA) of the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from projects.llava_sam2_rl.models.sa2va.internlm2 import llama_names
from projects.llava_sam2_rl.models.sa2va.internvl import INTERNLM2, LORA_TARGETS, architecture
from projects.llava_sam2_rl.models.sa2va.network import Sa2VANetwork
from projects.llava_sam2_rl.registry import nearest

#: What can be trained; the official recipe trains `OFFICIAL_TRAINABLE`.
PARTS = (
    'vision_model',
    'mlp1',
    'language_model',
    'lora',
    'text_hidden_fcs',
    'mask_decoder',
    'grounding_encoder',
)
# Options of `peft.LoraConfig` that name layers.
_LAYERS = frozenset(
    ('target_modules', 'exclude_modules', 'modules_to_save', 'rank_pattern', 'alpha_pattern')
)
OFFICIAL_TRAINABLE = ('mlp1', 'lora', 'text_hidden_fcs', 'mask_decoder')


def check_parts(parts: Sequence[str]) -> None:
    """Checks names of parts.

    Raises:
        ValueError: One is not of `PARTS`; the message names the nearest.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f'trainable names {part!r}: {nearest(part, list(PARTS))}')


def add_lora(
    language_model: PreTrainedModel, lora: Mapping[str, Any], llm_config: dict[str, Any]
) -> PeftModel:
    """The language model with adapters.

    Args:
        language_model: Is changed in place.
        lora: Options of `peft.LoraConfig`; a ``type`` is ignored. Layers of InternLM2 go by its own
            names (``wqkv``, ``w1``) or by Llama's.
        llm_config: Names the architecture, hence the layers the official recipe adapts.
    """
    options = {k: v for k, v in dict(lora).items() if k != 'type'}
    options.setdefault('task_type', 'CAUSAL_LM')
    options.setdefault('target_modules', LORA_TARGETS[architecture(llm_config)])
    if architecture(llm_config) == INTERNLM2:
        for key in _LAYERS.intersection(options):
            options[key] = _llama_layers(options[key])
    return get_peft_model(language_model, LoraConfig(**options))


def _llama_layers(layers: Any) -> Any:
    """An option that names layers of InternLM2, with Llama's names; a regex stays as it is."""
    if isinstance(layers, Mapping):
        return {new: value for name, value in layers.items() for new in llama_names(name)}
    if isinstance(layers, str) or layers is None:
        return layers
    return [new for name in layers for new in llama_names(name)]


def set_trainable(model: Sa2VANetwork, parts: Sequence[str]) -> list[nn.Module]:
    """Lets parts take gradients, in float32, and freezes all else.

    Returns:
        What is wholly frozen of the encoders and of SAM 2's memory, which stays in eval mode.
    """
    model.requires_grad_(False)
    for part in ('vision_model', 'mlp1', 'language_model', 'text_hidden_fcs'):
        if part in parts:
            getattr(model, part).requires_grad_(True)
    if 'grounding_encoder' in parts:
        model.grounding_encoder.requires_grad_(True)
    if 'mask_decoder' in parts:
        model.grounding_encoder.mask_decoder.requires_grad_(True)
    for name, parameter in model.language_model.named_parameters():
        if '.lora_' in name or '.modules_to_save.' in name:
            parameter.requires_grad_('lora' in parts)
    # An update of 1e-5 of its value is lost in bfloat16, so what is trained is kept in float32.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    sam = model.grounding_encoder.sam2_model
    modules = {
        'vision_model': [model.vision_model],
        'grounding_encoder': [sam.image_encoder, sam.memory_attention, sam.memory_encoder],
    }
    return [module for part, own in modules.items() if part not in parts for module in own]
