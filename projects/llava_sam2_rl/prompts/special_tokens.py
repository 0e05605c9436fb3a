"""The tokens that a Sa2VA tokenizer holds as one id each."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMG_START, IMG_END, IMG_CONTEXT = '<img>', '</img>', '<IMG_CONTEXT>'
SEG = '[SEG]'
P_START, P_END = '<p>', '</p>'
VP_START, VP_END = '<vp>', '</vp>'
#: Every token that a Sa2VA tokenizer has to hold as one id.
SPECIAL_TOKENS = (IMG_START, IMG_END, IMG_CONTEXT, SEG, P_START, P_END, VP_START, VP_END)

#: What all chat templates write their markers like, as a regular expression.
CHAT_MARKER = r'<\|[^|<>\s]*\|>'
#: Matches each of `SPECIAL_TOKENS` in a text.
SPECIAL_PATTERN = re.compile('|'.join(re.escape(token) for token in SPECIAL_TOKENS))


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The id of each of :data:`SPECIAL_TOKENS`.

    Raises:
        ValueError: A token is not one id of this tokenizer; the message names all such tokens.
    """
    ids, missing = {}, []
    for token in SPECIAL_TOKENS:
        encoded = tokenizer.encode(token, add_special_tokens=False)
        if len(encoded) == 1 and tokenizer.convert_ids_to_tokens(encoded[0]) == token:
            ids[token] = encoded[0]
        else:
            missing.append(token)
    if missing:
        raise ValueError(
            f'the tokenizer {tokenizer.name_or_path!r} lacks the special tokens '
            f'{", ".join(missing)}: take the tokenizer of a Sa2VA checkpoint, or call '
            'add_special_tokens(tokenizer) and resize the embeddings'
        )
    return ids


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds what is missing of :data:`SPECIAL_TOKENS`, in their order.

    Returns:
        The number of tokens added; the model's embeddings have to grow by as many.
    """
    return tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
