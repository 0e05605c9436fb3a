"""The tokenizer of a model, and the ids of its special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from projects.llava_sam2_rl.models.sa2va.internlm2_tokenizer import (
    INTERNLM2_TOKENIZERS,
    InternLM2Tokenizer,
)
from projects.llava_sam2_rl.prompts import IMG_CONTEXT, SEG, SPECIAL_TOKENS, add_special_tokens
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import (
    TOKENIZER_CONFIG_NAME,
    check_tokenizer_config,
    resolve,
)


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | Path | None, pretrained: str | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer given, or read from the folder given, else the one in ``pretrained``.

    Code that a folder brings is not run.

    Returns:
        ``None`` where there is none.

    Raises:
        CheckpointError: There is no such folder, no tokenizer in it that is known here, or
            `check_tokenizer_config` refuses it.
    """
    if tokenizer is None and pretrained is not None:
        has_one = (Path(pretrained) / TOKENIZER_CONFIG_NAME).is_file()
        tokenizer = pretrained if has_one else None
    if isinstance(tokenizer, str | Path):
        folder = resolve(tokenizer)
        if not folder.is_dir():
            raise CheckpointError(f'no tokenizer folder {str(folder)!r}')
        check_tokenizer_config(folder)
        tokenizer = _read_tokenizer(folder)
    return tokenizer


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    name = _tokenizer_class(folder)
    reader: Any = InternLM2Tokenizer if name in INTERNLM2_TOKENIZERS else AutoTokenizer
    options: dict[str, Any] = {} if reader is InternLM2Tokenizer else {'trust_remote_code': False}
    options |= _named_by_5(folder)
    try:
        return reader.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split('\n')[0]
        raise CheckpointError(
            f'{folder}: its tokenizer (class {name}) cannot be read: {reason}. Tokenizers of '
            'transformers and of InternLM2 are known here, code in the folder is not run; download '
            'the files of the tokenizer again, or give another by model.policy.tokenizer'
        ) from error


def _tokenizer_class(folder: Path) -> str | None:
    """The class that ``tokenizer_config.json`` names, that of the folder's own code first."""
    config = _tokenizer_config(folder)
    own = (config.get('auto_map') or {}).get('AutoTokenizer') or []
    names = [own] if isinstance(own, str) else own
    found = next((name for name in names if name), None) or config.get('tokenizer_class')
    return None if found is None else str(found).rpartition('.')[2]


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise CheckpointError(f'{path} is not valid JSON ({error}): download it again') from error


def _named_by_5(folder: Path) -> dict[str, Any]:
    """What transformers 4 needs to read a folder that transformers 5 wrote; empty for others.

    Special tokens without a role are the list ``additional_special_tokens`` to the one and the list
    ``extra_special_tokens`` to the other. To transformers 4 the latter is a dict, and a list there
    an ``AttributeError``.
    """
    extra = _tokenizer_config(folder).get('extra_special_tokens')
    if not isinstance(extra, list) or Version(transformers.__version__).major >= 5:
        return {}
    return {'additional_special_tokens': extra, 'extra_special_tokens': {}}


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes a tokenizer, and the code that came with it for readers that run it.

    Whatever version of transformers writes, 4 and 5 read it.
    """
    tokenizer.save_pretrained(str(folder))
    path = Path(folder) / TOKENIZER_CONFIG_NAME
    config = _tokenizer_config(Path(folder))
    extra = config.get('extra_special_tokens')
    if isinstance(extra, list):  # as transformers 5 writes it; it reads the older name as well
        del config['extra_special_tokens']
        config['additional_special_tokens'] = extra
    for how_it_was_read in ('is_local', 'local_files_only'):
        config.pop(how_it_was_read, None)
    text = json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + '\n', encoding='utf-8')
    source = Path(tokenizer.name_or_path)
    if source.is_dir() and source.resolve() != Path(folder).resolve():
        for file in source.glob('tokenization_*.py'):
            shutil.copyfile(file, Path(folder) / file.name)


def add_missing_tokens(
    tokenizer: PreTrainedTokenizerBase,
    language_model: PreTrainedModel,
    llm_config: dict[str, Any],
    pretrained: str | None,
) -> None:
    """Adds the special tokens that the tokenizer lacks, and embeddings for them.

    Args:
        tokenizer: Changed in place where the weights are random.
        language_model: Grows where its weights are random; those of a checkpoint are left.
        llm_config: Its ``vocab_size`` follows.
        pretrained: The checkpoint's folder, where there is one: its tokenizer must hold all.

    Raises:
        CheckpointError: The checkpoint's tokenizer lacks a token, or has more tokens than there
            are embeddings.
    """
    rows = language_model.get_input_embeddings().num_embeddings
    known = tokenizer.get_vocab()
    absent = [token for token in SPECIAL_TOKENS if token not in known]
    if absent and pretrained is not None:
        raise CheckpointError(
            f'{pretrained}: the tokenizer {tokenizer.name_or_path!r} lacks {", ".join(absent)}, '
            'whose embeddings a Sa2VA checkpoint has learnt: use the tokenizer that came with it'
        )
    add_special_tokens(tokenizer)
    if len(tokenizer) > rows and pretrained is not None:
        raise CheckpointError(
            f'{pretrained}: the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, '
            f'the embeddings {rows} rows (llm_config.vocab_size): the tokenizer is of another '
            'checkpoint, use the one that came with the weights'
        )
    if len(tokenizer) > rows:
        # Without weights (sizes alone are asked for) there is no mean to draw new rows around.
        has_weights = not language_model.get_input_embeddings().weight.is_meta
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=has_weights)
        llm_config['vocab_size'] = len(tokenizer)


def find_special_tokens(
    given: Mapping[str, int] | None, tokenizer: PreTrainedTokenizerBase | None, rows: int
) -> dict[str, int]:
    """Token -> id: those given, and the tokenizer's for the rest.

    Args:
        given: Token -> id.
        tokenizer: Holds all special tokens.
        rows: Of the embeddings.

    Raises:
        ValueError: The id of ``<IMG_CONTEXT>`` or ``[SEG]`` is not known.
        CheckpointError: An id lies outside the embeddings.
    """
    ids = dict(given or {})
    if tokenizer is not None:
        for token in SPECIAL_TOKENS:
            ids.setdefault(token, tokenizer.convert_tokens_to_ids(token))
    for token in (IMG_CONTEXT, SEG):
        if token not in ids:
            raise ValueError(
                f'the id of {token!r} is not known: give a tokenizer, or '
                f"special_token_ids={{'{IMG_CONTEXT}': …, '{SEG}': …}}"
            )
    for token, index in ids.items():
        if not 0 <= index < rows:
            raise CheckpointError(
                f'{token!r} has id {index}, the embeddings have {rows} rows: the tokenizer is '
                'of another checkpoint'
            )
    return ids
