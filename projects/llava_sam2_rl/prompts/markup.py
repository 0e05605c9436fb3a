"""Texts of data sets as words alone: what a tokenizer or a chat template would take for more.

A caption is put into prompts and answers as it stands. A special token in it would become an image
position, a mask or the end of an answer, so it is taken out where records are read.
"""

from __future__ import annotations

import re
from collections import Counter

from projects.llava_sam2_rl.prompts.special_tokens import (
    CHAT_MARKER,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    P_END,
    P_START,
    SEG,
    VP_END,
    VP_START,
)


def _any_of(*texts: str) -> str:
    return '|'.join(map(re.escape, texts))


#: What is taken out of a text, by kind: regular expressions.
MARKUP = {
    'image_token': _any_of(IMG_START, IMG_END, IMG_CONTEXT),
    'mask_token': _any_of(SEG),
    # Sa2VA's own, and those that InternVL's tokenizers bring.
    'region_token': _any_of(VP_START, VP_END, P_START, P_END) + r'|</?(?:ref|box|quad)>',
    # Of all chat templates; bos, eos and pad of sentencepiece; tools and thoughts of Qwen;
    # InternLM2's reserve.
    'chat_marker': CHAT_MARKER + r'|</?s>|<unk>|<pad>|</?tool_(?:call|response)>|</?think>'
    r'|\[UNUSED_TOKEN_\d+\]',
    # Of data formats: where a picture, a video or a region goes.
    'placeholder': r'(?i:<(?:image|video|audio|mask|im_start|im_end|im_patch|prompt\d+)>)',
    # No text has them, and half of a surrogate pair cannot be encoded at all.
    'control_character': '[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff]',
}
_MARKUP = re.compile('|'.join(f'(?P<{kind}>{pattern})' for kind, pattern in MARKUP.items()))
_RUN = re.compile(rf'[ \t]*(?:(?:{_MARKUP.pattern})[ \t]*)+')
_SENTENCE_END = re.compile(r'[.!?…]["\'”’)\]]*(?=\s)|[。！？]["”’」』）]*|\n')
#: Runs of letters, and anything else but blanks one by one.
_PIECE = re.compile(r'[^\W\d_]+|\S')
_NAME_LENGTH = 200


def neutralize(text: str) -> tuple[str, Counter[str]]:
    """A text without markup: each piece of it becomes a blank, so that nothing new can form.

    Returns:
        The text, and how much was taken out by kind, the keys of `MARKUP`. A text without markup
        is returned as it is.
    """
    kinds = Counter(str(found.lastgroup) for found in _MARKUP.finditer(text))
    if not kinds:
        return text, kinds
    return _RUN.sub(' ', text).strip(), kinds


def neutralize_name(name: str) -> tuple[str, Counter[str]]:
    """A file's or a record's name that can be printed and encoded, and still be recognised.

    Brackets of markup become parentheses, control characters and line breaks their escapes; of
    a name longer than 200 characters the middle goes.

    Returns:
        The name, and what was changed by kind.
    """
    kinds: Counter[str] = Counter()

    def plain(found: re.Match[str]) -> str:
        kind = str(found.lastgroup)
        kinds[kind] += 1
        if kind == 'control_character':
            return found.group().encode('unicode_escape').decode('ascii')
        return found.group().translate(_PARENTHESES)

    plain_name = printable(_MARKUP.sub(plain, name))
    if len(plain_name) > _NAME_LENGTH:
        half = _NAME_LENGTH // 2
        plain_name = f'{plain_name[:half]}…{plain_name[-half:]}'
    return plain_name, kinds


def printable(text: str) -> str:
    """A text that every stream takes: line breaks and halves of surrogate pairs are escaped."""
    text = text.replace('\r', '\\r').replace('\n', '\\n')
    return text.encode('utf-8', 'backslashreplace').decode('utf-8')


_PARENTHESES = str.maketrans('<>[]', '()()')


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, without a tokenizer.

    A token for every 4 bytes of a word, the last ones counted whole, and one for every digit and
    punctuation mark (3 for an emoji). For the tokenizers of Sa2VA this is a little more than they
    need: 0.9 to 1.4 times what Qwen2.5's gives for English, Chinese, Russian and numbers.
    """
    count = 0
    for piece in _PIECE.findall(text):
        size = len(piece.encode('utf-8', 'replace'))
        count += -(-size // 4) if piece.isalpha() else (1 if size < 4 else 3)
    return count


def cut_at_sentence(text: str, max_tokens: int) -> str | None:
    """The whole sentences of a text that fit.

    Args:
        text: Of any length.
        max_tokens: As `estimate_tokens` counts them, at least 1.

    Returns:
        The text itself where it fits, ``None`` where not even its first sentence does.
    """
    # No text of so few bytes has more tokens, and most are that short.
    if len(text) <= max_tokens or estimate_tokens(text) <= max_tokens:
        return text
    left, start = max_tokens, 0
    for found in _SENTENCE_END.finditer(text):
        left -= estimate_tokens(text[start : found.end()])
        if left < 0:
            break
        start = found.end()
    return text[:start].strip() or None
