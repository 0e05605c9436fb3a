"""Reading and writing checkpoints, whole and broken."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va.checkpoint import save_official
from projects.llava_sam2_rl.utils.errors import CheckpointError


@pytest.fixture
def copy(golden_folder, tmp_path):
    """A writable copy of the checkpoint: its folder and its tensors."""
    (tmp_path / 'config.json').write_text((golden_folder / 'config.json').read_text())
    return tmp_path, load_file(golden_folder / 'model.safetensors')


def load(folder, golden_ids, **options):
    return VideoLLaVASAMModel.from_pretrained(folder, special_token_ids=golden_ids, **options)


def test_what_was_read_is_written_bit_for_bit(golden_folder, golden_ids, tmp_path):
    load(golden_folder, golden_ids).save_pretrained(tmp_path)
    before = load_file(golden_folder / 'model.safetensors')
    after = load_file(tmp_path / 'model.safetensors')
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before
    )
    assert json.loads((tmp_path / 'config.json').read_text()) == json.loads(
        (golden_folder / 'config.json').read_text()
    )


@pytest.mark.parametrize('umask', [0o022, 0o027, 0o077])
def test_weights_may_be_read_by_whoever_may_read_the_rest(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_official({'a': torch.zeros(1)}, {}, tmp_path / 'out')
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / 'out').iterdir()}
    assert modes == dict.fromkeys(('config.json', 'model.safetensors'), 0o666 & ~umask)


def test_untrained_lora_exports_the_same_bits(golden_folder, golden_ids, tmp_path):
    load(golden_folder, golden_ids, lora=dict(r=4, lora_alpha=8)).save_pretrained(tmp_path)
    before = load_file(golden_folder / 'model.safetensors')
    after = load_file(tmp_path / 'model.safetensors')
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_lora_is_merged_on_export(golden_folder, golden_ids, tmp_path):
    model = load(golden_folder, golden_ids, lora=dict(r=2, lora_alpha=6))
    name = 'language_model.base_model.model.model.layers.0.self_attn.q_proj'
    layer = model.get_submodule(name)
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(a)
        layer.lora_B.default.weight.copy_(b)
    model.save_pretrained(tmp_path)
    key = 'language_model.model.layers.0.self_attn.q_proj.weight'
    before = load_file(golden_folder / 'model.safetensors')[key]
    after = load_file(tmp_path / 'model.safetensors')[key]
    torch.testing.assert_close(after, before + (6 / 2) * b @ a)
    assert torch.equal(layer.base_layer.weight, before)  # the model itself is left as it was


def test_shards_and_bin(copy, golden_ids, golden_folder):
    folder, tensors = copy
    keys = sorted(tensors)
    half = len(keys) // 2
    parts = {'model-1.safetensors': keys[:half], 'model-2.safetensors': keys[half:]}
    for file, names in parts.items():
        save_file({k: tensors[k] for k in names}, folder / file)
    index = {'weight_map': {k: file for file, names in parts.items() for k in names}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    expected = load(golden_folder, golden_ids).state_dict()
    sharded = load(folder, golden_ids).state_dict()
    assert all(torch.equal(sharded[k], expected[k]) for k in expected)

    (folder / 'model-2.safetensors').unlink()
    with pytest.raises(CheckpointError, match=r'model-2\.safetensors is missing'):
        load(folder, golden_ids)
    for file in folder.glob('model*'):
        file.unlink()
    torch.save(tensors, folder / 'pytorch_model.bin')
    plain = load(folder, golden_ids).state_dict()
    assert all(torch.equal(plain[k], expected[k]) for k in expected)


def test_missing_unexpected_and_misshapen_keys_are_all_listed(copy, golden_ids):
    folder, tensors = copy
    del tensors['mlp1.0.bias']
    tensors['mlp2.weight'] = torch.zeros(1)
    tensors['text_hidden_fcs.0.bias'] = torch.zeros(3)
    save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(CheckpointError) as error:
        load(folder, golden_ids)
    text = str(error.value)
    assert 'missing 1:\n  mlp1.0.bias' in text
    assert 'unexpected 1:\n  mlp2.weight' in text
    assert 'text_hidden_fcs.0.bias: checkpoint (3,), model (64,)' in text


def test_embeddings_of_another_size_than_the_config_says(copy, golden_ids):
    folder, tensors = copy
    for key in ('model.embed_tokens', 'lm_head'):
        tensors[f'language_model.{key}.weight'] = torch.zeros(310, 64)
    save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(CheckpointError) as error:
        load(folder, golden_ids)
    text = str(error.value)
    assert text.startswith(str(folder))
    assert 'language_model.lm_head.weight: checkpoint (310, 64), model (300, 64)' in text
    assert text.splitlines()[-1] == (
        'The embeddings have 310 rows, llm_config.vocab_size in config.json is 300: correct it, or '
        'take the config.json and tokenizer of these weights'
    )


def test_truncated_safetensors_is_one_line(copy, golden_ids):
    folder, tensors = copy
    save_file(tensors, folder / 'model.safetensors')
    whole = (folder / 'model.safetensors').read_bytes()
    for size in (len(whole) // 2, 4):
        (folder / 'model.safetensors').write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match='truncated or damaged.*download') as error:
            load(folder, golden_ids)
        assert str(folder / 'model.safetensors') in str(error.value)
        assert '\n' not in str(error.value)


def test_missing_folder_wrong_model_and_bad_json(copy, golden_ids):
    folder, _ = copy
    with pytest.raises(CheckpointError, match='no checkpoint folder'):
        load(folder / 'absent', golden_ids)
    with pytest.raises(CheckpointError, match='holds no weights'):
        load(folder, golden_ids)
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'model_type': 'llava'}))
    with pytest.raises(CheckpointError, match='model_type is \'llava\', expected "sa2va_chat"'):
        load(folder, golden_ids)
    (folder / 'config.json').write_text('{')
    with pytest.raises(CheckpointError, match='not valid JSON'):
        load(folder, golden_ids)


class Malicious:
    def __reduce__(self):
        return eval, ('open("executed", "w").close()',)


def test_pickled_code_in_a_bin_is_refused_and_not_executed(copy, golden_ids, monkeypatch):
    folder, _ = copy
    monkeypatch.chdir(folder)
    with (folder / 'pytorch_model.bin').open('wb') as file:
        pickle.dump({'mlp1.0.bias': Malicious()}, file, protocol=2)  # as torch.save writes
    with pytest.raises(CheckpointError, match='tensors only'):
        load(folder, golden_ids)
    assert not (folder / 'executed').exists()


def test_special_token_outside_the_embeddings(golden_folder, golden_ids):
    with pytest.raises(CheckpointError, match=r"'\[SEG\]' has id 300, the embeddings have 300"):
        load(golden_folder, {**golden_ids, '[SEG]': 300})
    with pytest.raises(ValueError, match="id of '<IMG_CONTEXT>' is not known"):
        load(golden_folder, {})


def test_tokenizer_without_room_for_seg(golden_folder, shared_dir):
    with pytest.raises(CheckpointError, match='tokenizer is of another checkpoint'):
        VideoLLaVASAMModel.from_pretrained(
            golden_folder, tokenizer=str(shared_dir / 'fixtures/sa2va_4b_tokenizer')
        )


def xtuner_state(model) -> dict[str, torch.Tensor]:
    """The trainable tensors under the names the official training gives them."""
    parts = ('vision_model.', 'mlp1.', 'language_model.')
    return {
        ('mllm.model.' if name.startswith(parts) else '') + name: torch.randn_like(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def test_xtuner_checkpoint(golden_folder, golden_ids, tmp_path):
    lora = dict(r=4, lora_alpha=8)
    tensors = xtuner_state(load(golden_folder, golden_ids, lora=lora))
    assert any(k.startswith('mllm.model.language_model.base_model.model.model.') for k in tensors)
    path = tmp_path / 'iter_10.pth'
    torch.save({'state_dict': tensors, 'meta': {'iter': 10}}, path)
    model = load(golden_folder, golden_ids, lora=lora, checkpoint=str(path))
    state = model.state_dict()
    for key, tensor in tensors.items():
        assert torch.equal(state[key.removeprefix('mllm.model.')], tensor), key

    with pytest.raises(CheckpointError, match=r'LoRA tensors of rank 4.*pass lora=dict\(r=4'):
        load(golden_folder, golden_ids, checkpoint=str(path))
    with pytest.raises(CheckpointError, match='wrong shape'):
        load(golden_folder, golden_ids, lora=dict(r=8, lora_alpha=8), checkpoint=str(path))
    torch.save({'state_dict': {'backbone.conv': torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match='not a Sa2VA checkpoint'):
        load(golden_folder, golden_ids, checkpoint=str(path))


def test_xtuner_checkpoint_with_trained_embeddings(golden_folder, golden_ids, tmp_path):
    """`modules_to_save` of peft: the trained copy counts, here and on export."""
    embedding = torch.randn(300, 64)
    prefix = 'mllm.model.language_model.base_model.model.model.embed_tokens.'
    path = tmp_path / 'iter_10.pth'
    torch.save({'state_dict': {prefix + 'modules_to_save.default.weight': embedding}}, path)
    lora = dict(r=4, lora_alpha=8, modules_to_save=['embed_tokens', 'lm_head'])
    for options in ({'lora': lora}, {}):
        model = load(golden_folder, golden_ids, checkpoint=str(path), **options)
        assert torch.equal(model.language_model.get_input_embeddings().weight, embedding)
        model.save_pretrained(tmp_path / 'out')
        saved = load_file(tmp_path / 'out' / 'model.safetensors')
        assert torch.equal(saved['language_model.model.embed_tokens.weight'], embedding)
        original = load_file(golden_folder / 'model.safetensors')
        assert saved.keys() == original.keys()
        key = 'language_model.lm_head.weight'
        assert torch.equal(saved[key], original[key])


def test_missing_special_tokens_are_added_when_building(tiny_config):
    """From random weights there is nothing to lose; with a checkpoint it would be an error."""
    from transformers import Qwen2TokenizerFast

    from projects.llava_sam2_rl.prompts import SPECIAL_TOKENS
    from projects.llava_sam2_rl.utils.pretrained import resolve

    folder = resolve('llava_sam2_rl://assets/sa2va_tiny')
    tokenizer = Qwen2TokenizerFast(str(folder / 'vocab.json'), str(folder / 'merges.txt'))
    assert '[SEG]' not in tokenizer.get_vocab()
    options = {k: v for k, v in tiny_config.model.policy.items() if k not in ('type', 'pretrained')}
    options['llm_config'] = {**options['llm_config'], 'vocab_size': len(tokenizer)}
    before = len(tokenizer)
    model = VideoLLaVASAMModel(**options, tokenizer=tokenizer)
    assert len(tokenizer) == before + len(SPECIAL_TOKENS)
    assert model.language_model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.lm_head.weight.shape[0] == len(tokenizer)
    assert model.seg_token_id == tokenizer.convert_tokens_to_ids('[SEG]') >= before
    assert model.config['llm_config']['vocab_size'] == len(tokenizer)
