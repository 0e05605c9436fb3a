"""A tokenizer folder as InternLM2's: a sentencepiece model, tokens added inside and behind it."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import sentencepiece

#: Unused pieces of the vocabulary, which the folder gives other names.
INSIDE = ('<|im_end|>', '<|im_start|>')
BEHIND = (
    '<img>',
    '</img>',
    '<IMG_CONTEXT>',
    '<quad>',
    '</quad>',
    '<ref>',
    '</ref>',
    '<box>',
    '</box>',
    '[SEG]',
    '<p>',
    '</p>',
    '<vp>',
    '</vp>',
)
TEXT = (
    'please segment describe the region a red blue small large circle square triangle in this '
    'image of picture detail there are part regions sure it is cup table with on what can you '
    'region1 region2 user assistant corner left right top bottom centre'
)
WORDS = TEXT.split()


def write_folder(folder: Path, *, add_dummy_prefix: bool, vocab_size: int = 360) -> Path:
    """Trains the sentencepiece model and writes what surrounds it."""
    rng = random.Random(0)
    corpus = [' '.join(rng.choices(WORDS, k=rng.randint(3, 12))) + '.' for _ in range(3000)]
    corpus += ['It is [X].', 'Sure, the result is: 1, 2; 3\n', 'What\'s "that"? (no)'] * 40
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=vocab_size,
        model_type='bpe',
        byte_fallback=True,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name='identity',
        user_defined_symbols=['[UNUSED_TOKEN_1]', '[UNUSED_TOKEN_2]'],
        minloglevel=2,
        num_threads=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'tokenizer.model').write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    inside = [pieces.piece_to_id(f'[UNUSED_TOKEN_{i}]') for i in (1, 2)]
    ids = {'<unk>': 0, '<s>': 1, '</s>': 2, **dict(zip(INSIDE, inside, strict=True))}
    ids |= {token: pieces.get_piece_size() + i for i, token in enumerate(BEHIND)}
    added = {
        str(i): {
            'content': token,
            'lstrip': False,
            'normalized': False,
            'rstrip': False,
            'single_word': False,
            'special': True,
        }
        for token, i in sorted(ids.items(), key=lambda item: item[1])
    }
    special = {'unk_token': '<unk>', 'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '</s>'}
    config = {
        'added_tokens_decoder': added,
        'additional_special_tokens': [*INSIDE, *BEHIND],
        'auto_map': {'AutoTokenizer': ['tokenization_internlm2.InternLM2Tokenizer', None]},
        **special,
        'chat_template': '{{ messages }}',
        'clean_up_tokenization_spaces': False,
        'model_max_length': 8192,
        'tokenizer_class': 'InternLM2Tokenizer',
    }
    (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2))
    (folder / 'tokenization_internlm2.py').write_text('raise SystemExit("this code was run")\n')
    names = {**special, 'additional_special_tokens': [*INSIDE, *BEHIND]}
    (folder / 'special_tokens_map.json').write_text(json.dumps(names, indent=2))
    behind = {token: ids[token] for token in BEHIND}
    (folder / 'added_tokens.json').write_text(json.dumps(behind, indent=2))
    return folder
