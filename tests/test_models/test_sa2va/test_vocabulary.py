"""Tokenizers of every family, as they are read, asked, decoded and written."""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va.internlm2_tokenizer import InternLM2Tokenizer
from projects.llava_sam2_rl.models.sa2va.vocabulary import (
    add_missing_tokens,
    load_tokenizer,
    save_tokenizer,
)
from projects.llava_sam2_rl.prompts import (
    TEMPLATES,
    decode_text,
    encode_prompt,
    encode_text,
    encode_turns,
    special_token_ids,
    truncate_at_stop,
)
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import resolve
from test_models.test_sa2va.sentencepiece_folder import BEHIND, INSIDE, WORDS, write_folder

TINY = resolve('llava_sam2_rl://assets/sa2va_tiny')


@pytest.fixture(scope='module', params=[True, False], ids=['dummy_prefix', 'no_prefix'])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp('internlm2') / 'model'
    return write_folder(path, add_dummy_prefix=request.param)


def texts(special: list[str], count: int) -> list[str]:
    rng = random.Random(1)
    alphabet = [*'abcxyz.,?!\n\t<>|é猫🐈', *WORDS, *special]
    return [
        ''.join(rng.choice(alphabet) + rng.choice(['', ' ', '  ']) for _ in range(length))
        for length in (rng.randint(1, 14) for _ in range(count))
    ]


def test_internlm2_ids_are_the_models_and_decode_to_the_text(folder):
    """Against sentencepiece itself: special tokens cut a text, the rest is its own."""
    tokenizer = load_tokenizer(None, str(folder))
    assert isinstance(tokenizer, InternLM2Tokenizer)
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    ids = {t['content']: int(i) for i, t in config['added_tokens_decoder'].items()}
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model'))
    # Some stand on pieces of the model, most behind it.
    assert all(ids[token] < pieces.get_piece_size() for token in INSIDE)
    assert all(ids[token] >= pieces.get_piece_size() for token in BEHIND)
    assert len(tokenizer) == max(ids.values()) + 1
    blank = ' ' if pieces.encode('a', out_type=str)[0].startswith('▁') else ''
    cut = re.compile('(' + '|'.join(map(re.escape, ids)) + ')')
    for text in texts(list(ids), 1000):
        parts = [part for part in cut.split(text) if part]
        expected = [
            i for part in parts for i in ([ids[part]] if part in ids else pieces.encode(part))
        ]
        assert encode_text(tokenizer, text) == expected
        # A model with a dummy prefix reads every part with a blank before it.
        read = ''.join(part if part in ids else blank + part for part in parts)
        assert decode_text(tokenizer, expected) == tokenizer.decode(expected) == read


def test_internlm2_special_ids_bos_and_ends(folder):
    tokenizer = load_tokenizer(str(folder), None)
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    ids = {t['content']: int(i) for i, t in config['added_tokens_decoder'].items()}
    assert special_token_ids(tokenizer) == {
        token: ids[token]
        for token in ('<img>', '</img>', '<IMG_CONTEXT>', '[SEG]', '<p>', '</p>', '<vp>', '</vp>')
    }
    template = TEMPLATES['internlm2_chat']
    sequence, labels = encode_turns(tokenizer, template, [('a', 'It is [SEG].'), ('b', 'c')])
    assert sequence[0] == 1
    assert sequence.count(1) == 1
    assert sequence[: len(encode_prompt(tokenizer, template.ask('a')))] == encode_prompt(
        tokenizer, template.ask('a')
    )
    end = ids['<|im_end|>']
    assert (tokenizer.eos_token_id, end) == (2, INSIDE.index('<|im_end|>') + 3)
    # The answer ends with the template's stop text, the tokenizer's eos stands nowhere.
    assert labels.count(end) == 2
    assert 2 not in sequence
    said = [i for i in labels if i != -100]
    (text,), mask = truncate_at_stop(
        torch.tensor([[*said[: said.index(end) + 1], 2, 2]]), tokenizer, template.stop_strings
    )
    assert text.replace(' .', '.').strip() == 'It is [SEG].'
    assert int(mask.sum()) == said.index(end) + 1


def test_internlm2_is_written_as_it_was_read(folder, tmp_path):
    tokenizer = load_tokenizer(None, str(folder))
    save_tokenizer(tokenizer, tmp_path)
    before, after = (
        json.loads((path / 'tokenizer_config.json').read_text()) for path in (folder, tmp_path)
    )
    for key in ('tokenizer_class', 'auto_map', 'added_tokens_decoder', 'eos_token', 'pad_token'):
        assert after[key] == before[key]
    for file in ('tokenizer.model', 'tokenization_internlm2.py'):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    again = load_tokenizer(None, str(tmp_path))
    for text in texts(list(BEHIND), 50):
        assert encode_text(again, text) == encode_text(tokenizer, text)


@pytest.fixture(params=['qwen2', 'internlm2'])
def with_others(request, tmp_path):
    """A tokenizer with special tokens that have no role, as those of all real checkpoints."""
    if request.param == 'internlm2':
        return write_folder(tmp_path / 'base', add_dummy_prefix=False), [*INSIDE, *BEHIND]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    others = ['<|im_end|>', '<img>', '</img>', '[SEG]']
    tokenizer.add_special_tokens({'additional_special_tokens': others})
    save_tokenizer(tokenizer, tmp_path / 'base')
    return tmp_path / 'base', others


def test_what_is_written_is_read_by_transformers_4_and_5(with_others, tmp_path):
    """5 writes a list under the name of a dict of 4, which 4 does not survive."""
    base, others = with_others
    save_tokenizer(load_tokenizer(str(base), None), tmp_path / 'out')
    config = json.loads((tmp_path / 'out/tokenizer_config.json').read_text())
    assert config['additional_special_tokens'] == others
    assert isinstance(config.get('extra_special_tokens', {}), dict)
    assert not {'is_local', 'local_files_only'} & config.keys()
    assert config['tokenizer_class'] in ('Qwen2Tokenizer', 'InternLM2Tokenizer')


def test_folders_that_transformers_5_wrote_are_read(with_others, tmp_path):
    base, others = with_others
    shutil.copytree(base, tmp_path / 'five')
    path = tmp_path / 'five/tokenizer_config.json'
    config = json.loads(path.read_text())
    config['extra_special_tokens'] = config.pop('additional_special_tokens')
    path.write_text(json.dumps(config))
    before, after = load_tokenizer(str(base), None), load_tokenizer(str(tmp_path / 'five'), None)
    for text in texts(others, 50):
        ids = encode_text(before, text)
        assert encode_text(after, text) == ids
        assert after.decode(ids, skip_special_tokens=True) == before.decode(
            ids, skip_special_tokens=True
        )
    assert set(others) <= set(after.all_special_tokens)
    save_tokenizer(after, tmp_path / 'out')
    config = json.loads((tmp_path / 'out/tokenizer_config.json').read_text())
    assert config['additional_special_tokens'] == others


def test_a_tokenizer_of_unknown_code_is_refused_by_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'tokenizer_config.json'
    config = json.loads(path.read_text())
    config['auto_map'] = {'AutoTokenizer': ['tokenization_own.OwnTokenizer', None]}
    config['tokenizer_class'] = 'OwnTokenizer'
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r'class OwnTokenizer\) cannot be read') as error:
        load_tokenizer(None, str(tmp_path))
    assert str(tmp_path) in str(error.value)
    path.write_text('{')
    with pytest.raises(CheckpointError, match=r'tokenizer_config\.json is not valid JSON'):
        load_tokenizer(None, str(tmp_path))


def test_slow_and_fast_qwen2_say_the_same():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        slow, fast = Qwen2Tokenizer.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    special = ['[SEG]', '<img>', '</vp>', '<|im_end|>']
    for text in [*texts(special, 300), '<|user|>\nIt is [SEG].<|end|>\n']:
        ids = encode_text(fast, text)
        assert encode_text(slow, text) == ids
        assert decode_text(slow, ids) == decode_text(fast, ids) == text
    turns = [('What?', 'A cup.'), ('Where?', '[SEG].')]
    for template in TEMPLATES:
        assert encode_turns(slow, template, turns) == encode_turns(fast, template, turns)


def edited(folder, tokens):
    """The tiny checkpoint, its tokenizer without some tokens or with some more."""
    shutil.copytree(TINY, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_of_another_size_is_refused_with_both_numbers(tmp_path):
    folder = edited(tmp_path / 'model', [f'extra{i}' for i in range(400)])
    size = len(AutoTokenizer.from_pretrained(folder))
    with pytest.raises(CheckpointError, match=rf'has {size} tokens, the embeddings 1024 rows'):
        VideoLLaVASAMModel.from_pretrained(folder)


def test_a_tokenizer_without_seg_is_refused_by_name(tmp_path):
    folder = tmp_path / 'model'
    shutil.copytree(TINY, folder)
    for file in folder.glob('*.json'):
        text = file.read_text()
        file.write_text(text.replace('"[SEG]"', '"[OTHER]"'))
    with pytest.raises(CheckpointError, match=r'model.* lacks \[SEG\].*tokenizer that came with'):
        VideoLLaVASAMModel.from_pretrained(folder)


def test_eos_is_the_tokenizers_whatever_llm_config_says(tmp_path):
    folder = tmp_path / 'model'
    shutil.copytree(TINY, folder)
    config = json.loads((folder / 'config.json').read_text())
    config['llm_config']['eos_token_id'] = 3
    (folder / 'config.json').write_text(json.dumps(config))
    model = VideoLLaVASAMModel.from_pretrained(folder)
    assert model.tokenizer.eos_token == '<|im_end|>'
    assert model.eos_token_id == model.tokenizer.eos_token_id != 3


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_embeddings_grow_with_the_tokenizer_where_the_weights_are_random(device):
    """New rows lie around the mean of the old ones; where only sizes are asked for, nowhere."""
    tokenizer = load_tokenizer(str(TINY), None)
    llm = {'vocab_size': 20, 'hidden_size': 8, 'intermediate_size': 8, 'num_hidden_layers': 1}
    heads = {'num_attention_heads': 2, 'num_key_value_heads': 1}
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**llm, **heads, tie_word_embeddings=False))
        table = model.get_input_embeddings().weight
        if device == 'cpu':
            table.data += 5
        mean = table.detach().mean(0)
        add_missing_tokens(tokenizer, model, llm, None)
    rows = len(tokenizer)
    assert rows > 100
    assert llm['vocab_size'] == model.config.vocab_size == rows
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape == (rows, 8)
        assert layer.weight.device.type == device
    if device == 'cpu':
        new = model.get_input_embeddings().weight.detach()[20:]
        torch.testing.assert_close(new, mean.expand_as(new), rtol=0, atol=0.02)
