"""Which Sa2VA a ``config.json`` describes, and whether this package builds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from projects.llava_sam2_rl.utils.errors import CheckpointError

#: Where a user reads on.
PAGE = 'docs/language_models.md, "What loads"'
_VISION_MODEL = 'InternVisionModel'
#: The sections of the family that is built.
_SECTIONS = ('vision_config', 'llm_config')


def check_family(config: Any, path: Any) -> None:
    """Refuses all that is no Sa2VA on InternVL with SAM 2.

    Args:
        config: What was read.
        path: Of the file, for the message.

    Raises:
        CheckpointError: Says which model it is, what of it is supported, and where to read on.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f'{path} holds a {type(config).__name__}, expected a JSON object')
    if config.get('model_type') != 'sa2va_chat':
        raise CheckpointError(
            f'{path}: model_type is {config.get("model_type")!r}, expected "sa2va_chat"; point to '
            f'a Sa2VA checkpoint of the InternVL family ({PAGE})'
        )
    family = _other_family(config)
    if family is not None:
        raise CheckpointError(
            f'{path}: this is {family}. Of that family the chat template and the questions are '
            'known here, the network is not: only Sa2VA on InternVL 2, 2.5 and 3 with SAM 2 can '
            f'be trained and asked. {PAGE}, lists the checkpoints that load, Sa2VA-4B for one'
        )
    missing = [key for key in _SECTIONS if not isinstance(config.get(key), Mapping)]
    if missing:
        raise CheckpointError(
            f'{path}: a Sa2VA of no known family, it lacks {" and ".join(missing)}, which those on '
            f'InternVL have, and text_config, which those on Qwen-VL have. {PAGE}, lists the '
            'checkpoints that load; download config.json again if this should be one'
        )


def _other_family(config: Mapping[str, Any]) -> str | None:
    """What it is, where this package does not build it."""
    architecture = (config.get('architectures') or ['?'])[0]
    if any('sam3' in _plain(text) for text in _texts(config)):
        return f'a Sa2VA with SAM 3 in the place of SAM 2 ({architecture})'
    vision = config.get('vision_config')
    vision = vision if isinstance(vision, Mapping) else {}
    if 'llm_config' not in config and ('text_config' in config or 'Qwen' in architecture):
        if 'deepstack_visual_indexes' in vision:
            return f'Sa2VA on Qwen3-VL ({architecture}, vision_config.deepstack_visual_indexes)'
        if 'fullatt_block_indexes' in vision:
            return f'Sa2VA on Qwen2.5-VL ({architecture}, vision_config.fullatt_block_indexes)'
        kind = vision.get('model_type') or 'of an unknown kind'
        return f'Sa2VA on a Qwen-VL ({architecture}, vision_config {kind})'
    encoder = (vision.get('architectures') or [_VISION_MODEL])[0]
    if encoder != _VISION_MODEL:
        return f'a Sa2VA whose image encoder is {encoder}, not {_VISION_MODEL}'
    return None


def _texts(value: Any) -> Iterator[str]:
    """Keys and strings at any depth; where the model once lay says nothing."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key != '_name_or_path':
                yield str(key)
                yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _plain(text: str) -> str:
    return text.lower().replace('_', '').replace('-', '').replace(' ', '')
