"""InternLM2's tokenizer without the code that its folder brings.

It is a sentencepiece model with added tokens, which transformers' slow Llama class (``legacy``)
encodes to the same ids. The fast Llama class renumbers the added tokens, and without ``legacy``
blanks are inserted: neither can be used. What the slow class gets wrong is decoding: blanks at the
start and around special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import transformers
from transformers import LlamaTokenizer, PreTrainedTokenizer

if issubclass(LlamaTokenizer, PreTrainedTokenizer):
    _Sentencepiece: Any = LlamaTokenizer
else:
    # From transformers 5 on the Llama class is a fast one; this is what it was built upon.
    _Sentencepiece = transformers.tokenization_utils_sentencepiece.SentencePieceBackend

#: Classes that a folder of InternLM2 may name in ``tokenizer_config.json``.
INTERNLM2_TOKENIZERS = ('InternLM2Tokenizer', 'InternLM2TokenizerFast')
_BLANK = '▁'


class InternLM2Tokenizer(_Sentencepiece):
    """A sentencepiece tokenizer that decodes piece by piece.

    Its name is that of the class in the folder, which is so written back by ``save_pretrained``.

    Args:
        vocab_file: ``tokenizer.model``.
        unk_token: As in ``tokenizer_config.json``, as are all that follow.
        bos_token: Stands before a conversation.
        eos_token: Ends a text, though not an answer: that is ``<|im_end|>``.
        pad_token: Fills a batch.
        legacy: Ignored, it is always on.
        **kwargs: Of transformers' class.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {'vocab_file': 'tokenizer.model'}

    def __init__(
        self,
        vocab_file: str,
        unk_token: Any = '<unk>',
        bos_token: Any = '<s>',
        eos_token: Any = '</s>',
        pad_token: Any = '</s>',
        legacy: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            legacy=True,
            **kwargs,
        )

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens: each piece as it is, ``▁`` as a blank, bytes put together."""
        text, held = '', bytearray()
        for token in tokens:
            byte = _byte(token)
            if byte is not None:
                held.append(byte)
                continue
            text += held.decode(errors='replace') + token.replace(_BLANK, ' ')
            held.clear()
        return text + held.decode(errors='replace')

    def _decode(
        self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        tokens = self.convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)
        return self.convert_tokens_to_string(tokens)


def _byte(token: str) -> int | None:
    """Of a piece like ``<0x0A>``."""
    if len(token) == 6 and token.startswith('<0x') and token.endswith('>'):
        return int(token[3:5], 16)
    return None
