"""The tokenizer of a model, and the ids of its special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from projects.llava_sam2_rl.prompts import IMG_CONTEXT, SEG, SPECIAL_TOKENS, add_special_tokens
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import check_tokenizer_config, resolve


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | Path | None, pretrained: str | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer given, or read from the folder given, else the one in ``pretrained``.

    Returns:
        ``None`` where there is none.

    Raises:
        CheckpointError: There is no such folder, or `check_tokenizer_config` refuses it.
    """
    if tokenizer is None and pretrained is not None:
        has_one = (Path(pretrained) / 'tokenizer_config.json').is_file()
        tokenizer = pretrained if has_one else None
    if isinstance(tokenizer, str | Path):
        folder = resolve(tokenizer)
        if not folder.is_dir():
            raise CheckpointError(f'no tokenizer folder {str(folder)!r}')
        check_tokenizer_config(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    return tokenizer


def add_missing_tokens(
    tokenizer: PreTrainedTokenizerBase,
    language_model: PreTrainedModel,
    llm_config: dict[str, Any],
    pretrained: str | None,
) -> None:
    """Adds the special tokens that the tokenizer lacks, and embeddings for them.

    Args:
        tokenizer: Changed in place.
        language_model: Grows where its weights are random; those of a checkpoint are left.
        llm_config: Its ``vocab_size`` follows.
        pretrained: The checkpoint's folder, where there is one.

    Raises:
        CheckpointError: The checkpoint has no room for the tokens.
    """
    rows = language_model.get_input_embeddings().num_embeddings
    known = tokenizer.get_vocab()
    absent = [token for token in SPECIAL_TOKENS if token not in known]
    if absent:
        add_special_tokens(tokenizer)
        if len(tokenizer) > rows and pretrained is not None:
            raise CheckpointError(
                f'{pretrained}: its tokenizer lacks {", ".join(absent)} and its {rows} embeddings '
                'have no room for them: use a Sa2VA checkpoint with its own tokenizer'
            )
    if len(tokenizer) > rows and pretrained is None:
        language_model.resize_token_embeddings(len(tokenizer))
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
