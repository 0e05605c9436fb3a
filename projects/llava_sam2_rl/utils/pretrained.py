"""Where a pretrained model lies and which sizes its ``config.json`` gives it; reads no weights.

The network builds itself by these sizes and the transform cuts images by them, so they stand here,
below both.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from projects.llava_sam2_rl.prompts.templates import find_template
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.families import check_family

CONFIG_NAME = 'config.json'
TOKENIZER_CONFIG_NAME = 'tokenizer_config.json'
PACKAGE_SCHEME = 'llava_sam2_rl://'

#: Options of `VideoLLaVASAMModel` that the official ``config.json`` holds under the same names,
#: and what holds where neither says. ``None`` for the grounding encoder is SAM 2's Hiera-L; the
#: other three that are ``None`` must be said by one of them.
SIZES: Mapping[str, Any] = {
    'vision_config': None,
    'llm_config': None,
    'grounding_encoder_config': None,
    'template': None,
    'select_layer': -1,
    'ps_version': 'v2',
    'force_image_size': 448,
    'downsample_ratio': 0.5,
}
#: Side of the image for SAM 2 in pixels where ``grounding_encoder_config`` is not given.
GROUNDING_SIZE = 1024
# What makes two models different ones; the rest of a section may be given anew (`rope_theta`).
_IDENTITY = ('architectures', 'hidden_size', 'num_hidden_layers', 'vocab_size')
_TEMPLATE_REMEDY = (
    'Write the key, or set model.policy.template: phi3_chat for Sa2VA-4B, internlm2_chat for 8B '
    'and 26B, qwen_chat for 1B and those on InternVL3'
)

#: Folder with the ``config.json`` of Sa2VA-4B alone; see `sizes_folder`.
SA2VA_4B = f'{PACKAGE_SCHEME}assets/sa2va_4b'


def resolve(path: str | Path) -> Path:
    """A path as the user means it: ``llava_sam2_rl://…`` lies inside this package."""
    text = str(path)
    if text.startswith(PACKAGE_SCHEME):
        return Path(__file__).resolve().parents[1] / text[len(PACKAGE_SCHEME) :]
    return Path(text)


def sizes_folder(pretrained: str | Path) -> str | Path:
    """Where the ``config.json`` of a checkpoint is: its folder, or a copy inside this package.

    The package has those of the published models on InternVL (sizes and template only), so that
    memory can be measured and planned before a download.

    Args:
        pretrained: Folder of a checkpoint, there or not: ``pretrained/Sa2VA-InternVL3-8B``.
    """
    own = f'{PACKAGE_SCHEME}assets/{Path(pretrained).name.lower().replace("-", "_")}'
    return own if not resolve(pretrained).is_dir() and resolve(own).is_dir() else pretrained


def read_config(folder: str | Path) -> dict:
    """Reads ``config.json`` of a checkpoint in the official layout.

    Raises:
        CheckpointError: The folder or file is missing, is not JSON, or is no Sa2VA's of the
            family that this package builds.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f'no checkpoint folder {str(folder)!r}: download one in the official Sa2VA layout '
            '(README, "Training Sa2VA-4B") or correct the path'
        )
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f'{path} is missing: {folder} is not a checkpoint folder')
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f'{path} is not valid JSON ({error}): download it again') from error
    check_family(config, path)
    return config


def check_tokenizer_config(folder: str | Path) -> None:
    """Refuses a tokenizer's folder with which transformers can be made to do what nobody asked for.

    Without a ``tokenizer_class`` transformers builds whatever its ``config.json`` names, and before
    5.5 one of those runs remote code on the folder's own word (CVE-2026-5241). Before 5.10 it saves
    each of several chat templates under a file name made of its own (CVE-2026-9856).

    Args:
        folder: One without ``tokenizer_config.json`` is left to transformers.

    Raises:
        CheckpointError: Names the file, and what is wrong with it.
    """
    path = Path(folder) / TOKENIZER_CONFIG_NAME
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f'{path} is not valid JSON ({error}): download it again') from error
    kind = config.get('tokenizer_class') if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise CheckpointError(
            f'{path}: tokenizer_class is {kind!r}, expected a name as "Qwen2Tokenizer": take the '
            "file of the model's original tokenizer"
        )
    templates = config.get('chat_template')
    for template in templates if isinstance(templates, list) else ():
        name = template.get('name') if isinstance(template, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r'\w[\w.-]*', name):
            raise CheckpointError(
                f'{path}: a chat template is called {name!r}, expected letters, digits, "_", "-" '
                'and ".": the name becomes that of a file'
            )


def complete_sizes(pretrained: str | Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a model: those given, else the checkpoint's, else the defaults of `SIZES`.

    Args:
        pretrained: Folder in the official layout, or ``None``.
        given: Options of `VideoLLaVASAMModel`; those that are not sizes are ignored. A section
            that is given in part is completed from the checkpoint.

    Returns:
        Every key of `SIZES` that has a value, as plain dicts and lists.

    Raises:
        CheckpointError: The folder is not a checkpoint's, a given size contradicts it, or the
            chat template is named by neither, or not known.
        ValueError: There is no checkpoint and not all of ``vision_config``, ``llm_config`` and
            ``template``.
    """
    theirs = {} if pretrained is None else read_config(resolve(pretrained))
    if pretrained is not None and given.get('template') is None:
        _check_template(resolve(pretrained) / CONFIG_NAME, theirs.get('template'))
    sizes: dict[str, Any] = {}
    for key, default in SIZES.items():
        own, read = plain(given.get(key)), theirs.get(key)
        if isinstance(own, dict) and isinstance(read, dict):
            _check_identity(str(pretrained), key, own, read)
            own = {**read, **own}
        value = next((value for value in (own, read, default) if value is not None), None)
        if value is not None:
            sizes[key] = copy.deepcopy(value)
    missing = [key for key in ('vision_config', 'llm_config', 'template') if key not in sizes]
    if missing:
        raise ValueError(
            f'{" and ".join(missing)} must be given where `pretrained` is not: they are read from '
            "a checkpoint's config.json"
        )
    return sizes


def _check_template(path: Path, name: Any) -> None:
    if name is None:
        raise CheckpointError(
            f"{path} has no 'template': prompts cannot be written without the chat template that "
            f'the weights were trained with. {_TEMPLATE_REMEDY}'
        )
    try:
        find_template(name)
    except ValueError as error:
        raise CheckpointError(f'{path}: {error}. {_TEMPLATE_REMEDY}') from error


def _check_identity(folder: str, section: str, own: dict, read: dict) -> None:
    for key in _IDENTITY:
        if own.get(key) is not None and read.get(key) is not None and own[key] != read[key]:
            raise CheckpointError(
                f'{folder}: {section}.{key} is {read[key]} in its config.json and {own[key]} in '
                f'this config: leave {section} out of the config, the checkpoint has it'
            )


def image_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What a model of these sizes asks of images: the size options of `Sa2VATransform`.

    Args:
        sizes: From `complete_sizes`, or a model's own ``config``.
    """
    grounding = sizes.get('grounding_encoder_config') or {}
    return {
        'image_size': sizes['force_image_size'],
        'patch_size': sizes['vision_config']['patch_size'],
        'downsample_ratio': sizes['downsample_ratio'],
        'grounding_size': grounding.get('image_size', GROUNDING_SIZE),
    }


def plain(value: Any) -> Any:
    """A deep copy in plain dicts and lists, where mmengine hands in a ``ConfigDict``."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return copy.deepcopy(value)
