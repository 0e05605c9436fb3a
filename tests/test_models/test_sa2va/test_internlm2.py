"""InternLM2 as Llama: its forward, its names and its fused matrix."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va import internlm2
from projects.llava_sam2_rl.models.sa2va.internvl import build_language_model
from projects.llava_sam2_rl.models.sa2va.trainable import add_lora
from projects.llava_sam2_rl.utils.errors import CheckpointError
from test_models.test_sa2va import reference

CASES = ('internlm2', 'internlm2_dynamic', 'internlm2_linear')
LAYER = 'language_model.model.layers.0.'
PEFT = 'language_model.base_model.model.model.layers.0.'


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize('case', CASES)
def test_logits_are_xtuners(case):
    expected = reference.load(case)
    model = build_language_model(expected['config']).eval()
    rows = internlm2.fused_rows(model.config)
    state = {}
    for name, tensor in expected['weights'].items():
        state.update(internlm2.split(name, tensor, rows))
    model.load_state_dict(state)
    mask = expected['attention_mask']
    with torch.no_grad():
        logits = model(
            input_ids=expected['input_ids'],
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
        ).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected['logits'][real], rtol=0, atol=1e-5)
    assert model.config._attn_implementation == 'sdpa'


@pytest.mark.parametrize('case', CASES)
def test_the_file_holds_what_xtuners_class_gives(case):
    module = pytest.importorskip('xtuner._lite.modelings.internlm2', exc_type=ImportError)
    expected = reference.load(case)
    config = module.InternLM2Config(**expected['config'], attn_implementation='eager')
    model = module.InternLM2ForCausalLM(config).eval()
    model.load_state_dict(expected['weights'])
    mask = expected['attention_mask']
    with torch.no_grad():
        logits = model(
            input_ids=expected['input_ids'], attention_mask=mask, position_ids=positions(mask)
        ).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected['logits'][real], rtol=0, atol=1e-5)


def test_the_rows_of_the_fused_matrix():
    # Two key heads, two query heads each, two rows a head:
    # q0 q0 q1 q1 k0 k0 v0 v0 | q2 q2 q3 q3 k1 k1 v1 v1
    config = internlm2.internlm2_config(
        hidden_size=8, num_attention_heads=4, num_key_value_heads=2, vocab_size=10
    )
    rows = internlm2.fused_rows(config)
    assert {name: part.tolist() for name, part in rows.items()} == {
        'q_proj': [0, 1, 2, 3, 8, 9, 10, 11],
        'k_proj': [4, 5, 12, 13],
        'v_proj': [6, 7, 14, 15],
    }


@pytest.mark.parametrize(
    ('official', 'own'),
    [
        ('model.tok_embeddings.weight', ['model.embed_tokens.weight']),
        ('model.norm.weight', ['model.norm.weight']),
        ('output.weight', ['lm_head.weight']),
        ('model.layers.3.attention_norm.weight', ['model.layers.3.input_layernorm.weight']),
        ('model.layers.3.ffn_norm.weight', ['model.layers.3.post_attention_layernorm.weight']),
        ('model.layers.3.attention.wo.bias', ['model.layers.3.self_attn.o_proj.bias']),
        ('model.layers.3.feed_forward.w1.weight', ['model.layers.3.mlp.gate_proj.weight']),
        ('model.layers.3.feed_forward.w2.weight', ['model.layers.3.mlp.down_proj.weight']),
        ('model.layers.3.feed_forward.w3.weight', ['model.layers.3.mlp.up_proj.weight']),
        (
            'model.layers.3.attention.wqkv.weight',
            [f'model.layers.3.self_attn.{x}_proj.weight' for x in 'qkv'],
        ),
    ],
)
def test_names_both_ways(official, own):
    assert list(internlm2.llama_names(official)) == own
    for name in own:
        which = name.split('.')[-2] if len(own) == 3 else None
        assert internlm2.internlm2_name(name) == (official, which)
        assert internlm2.llama_names(name) == (name,)
        assert not internlm2.is_internlm2_name(name)


def test_defaults_are_internlm2s():
    config = internlm2.internlm2_config()
    assert (config.vocab_size, config.attention_bias, config.pad_token_id) == (103168, True, 0)
    assert config.num_key_value_heads == 32
    assert not config.mlp_bias


@pytest.mark.parametrize(
    'scaling',
    [{'type': 'yarn', 'factor': 2.0}, {'type': 'dynamic'}, {'type': 'linear', 'factor': 0.5}],
)
def test_other_rotary_scaling_is_refused(scaling):
    with pytest.raises(ValueError, match='rope_scaling of InternLM2 must have type') as error:
        internlm2.internlm2_config(rope_scaling=scaling)
    assert '\n' not in str(error.value)


# ------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def official(golden_folder, tmp_path):
    """A folder in the official layout with an InternLM2 of two layers; its tensors."""
    expected = reference.load('internlm2')
    config = json.loads((golden_folder / 'config.json').read_text())
    config['llm_config'] = {**expected['config'], 'vocab_size': 300}
    torch.manual_seed(0)
    tensors = {
        name: tensor
        for name, tensor in load_file(golden_folder / 'model.safetensors').items()
        if name.startswith(('vision_model.', 'grounding_encoder.'))
    }
    for name, tensor in expected['weights'].items():
        shape = list(tensor.shape)
        if name in ('model.tok_embeddings.weight', 'output.weight'):
            shape[0] = 300
        tensors[f'language_model.{name}'] = torch.randn(shape) * 0.3
    for name, shape in {
        'mlp1.0.weight': (192,),
        'mlp1.0.bias': (192,),
        'mlp1.1.weight': (16, 192),
        'mlp1.1.bias': (16,),
        'mlp1.3.weight': (16, 16),
        'mlp1.3.bias': (16,),
        'text_hidden_fcs.0.weight': (16, 16),
        'text_hidden_fcs.0.bias': (16,),
        'text_hidden_fcs.2.weight': (64, 16),
        'text_hidden_fcs.2.bias': (64,),
    }.items():
        tensors[name] = torch.randn(shape) * 0.3
    folder = tmp_path / 'official'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    save_file(tensors, folder / 'model.safetensors')
    return folder, tensors


def load(folder, golden_ids, **options):
    return VideoLLaVASAMModel.from_pretrained(folder, special_token_ids=golden_ids, **options)


def test_read_and_written_again_are_the_same_keys_and_bits(official, golden_ids, tmp_path):
    folder, tensors = official
    for lora in (None, dict(r=2, lora_alpha=4)):
        load(folder, golden_ids, lora=lora).save_pretrained(tmp_path / 'out')
        saved = load_file(tmp_path / 'out' / 'model.safetensors')
        assert saved.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(saved[name], tensor), name
        config = json.loads((tmp_path / 'out' / 'config.json').read_text())
        assert config == json.loads((folder / 'config.json').read_text())


def test_a_fused_matrix_of_another_size_is_listed_by_its_official_name(official, golden_ids):
    folder, tensors = official
    tensors[LAYER + 'attention.wqkv.weight'] = torch.zeros(48, 16)
    del tensors[LAYER + 'attention.wo.weight']
    tensors[LAYER + 'self_attn.q_proj.weight'] = torch.zeros(16, 16)
    save_file(tensors, folder / 'model.safetensors')
    with pytest.raises(CheckpointError) as error:
        load(folder, golden_ids)
    text = str(error.value)
    assert f'{LAYER}attention.wqkv.weight: checkpoint (48, 16), model (32, 16)' in text
    assert f'missing 1:\n  {LAYER}attention.wo.weight' in text
    assert f'unexpected 1:\n  {LAYER}self_attn.q_proj.weight' in text


def test_tied_embeddings_have_their_official_names(official, golden_ids):
    folder, tensors = official
    config = json.loads((folder / 'config.json').read_text())
    config['llm_config']['tie_word_embeddings'] = True
    (folder / 'config.json').write_text(json.dumps(config))
    del tensors['language_model.output.weight']
    save_file(tensors, folder / 'model.safetensors')
    model = load(folder, golden_ids)
    assert torch.equal(model.lm_head.weight, tensors['language_model.model.tok_embeddings.weight'])


def test_training_checkpoint_of_the_official_recipe(official, golden_ids, tmp_path):
    """One adapter over the fused layer; head and embeddings trained whole, the head under LoRA."""
    folder, tensors = official
    a, b = torch.randn(2, 16), torch.randn(32, 2)
    embedding, head = torch.randn(300, 16), torch.randn(300, 16)
    head_a, head_b = torch.randn(2, 16), torch.randn(300, 2)
    outer = 'mllm.model.language_model.base_model.model.'
    path = tmp_path / 'iter_9.pth'
    torch.save(
        {
            'state_dict': {
                outer + 'model.layers.0.attention.wqkv.lora_A.default.weight': a,
                outer + 'model.layers.0.attention.wqkv.lora_B.default.weight': b,
                outer + 'model.tok_embeddings.weight': embedding,
                outer + 'output.base_layer.weight': head,
                outer + 'output.lora_A.default.weight': head_a,
                outer + 'output.lora_B.default.weight': head_b,
            }
        },
        path,
    )
    # In the official recipe's names, and with its alpha of twice the rank.
    lora = dict(r=2, lora_alpha=4, target_modules=['wqkv', 'wo', 'w1', 'w2', 'w3', 'output'])
    model = load(folder, golden_ids, lora=lora, checkpoint=str(path))
    # By hand: rows 0–7 of the first group are two query heads of four rows, then key, then value.
    layer = model.get_submodule(PEFT + 'self_attn')
    assert torch.equal(layer.q_proj.lora_B.default.weight, torch.cat([b[:8], b[16:24]]))
    assert torch.equal(layer.k_proj.lora_B.default.weight, torch.cat([b[8:12], b[24:28]]))
    assert torch.equal(layer.v_proj.lora_B.default.weight, torch.cat([b[12:16], b[28:]]))
    for part in (layer.q_proj, layer.k_proj, layer.v_proj):
        assert torch.equal(part.lora_A.default.weight, a)

    # The three together are the fused one.
    x = torch.randn(5, 16)
    weight = tensors[LAYER + 'attention.wqkv.weight']
    fused = x @ weight.T + 2.0 * (x @ a.T) @ b.T
    rows = internlm2.fused_rows(model.language_model.config)
    with torch.no_grad():
        for name, part in rows.items():
            torch.testing.assert_close(
                layer.get_submodule(name)(x), fused[:, part], rtol=0, atol=1e-5
            )

    # And export merges them into the official matrix.
    model.save_pretrained(tmp_path / 'out')
    saved = load_file(tmp_path / 'out' / 'model.safetensors')
    assert saved.keys() == tensors.keys()
    torch.testing.assert_close(saved[LAYER + 'attention.wqkv.weight'], weight + 2.0 * b @ a)
    torch.testing.assert_close(saved['language_model.output.weight'], head + 2.0 * head_b @ head_a)
    assert torch.equal(saved['language_model.model.tok_embeddings.weight'], embedding)
    second = 'language_model.model.layers.1.attention.wqkv.weight'
    assert torch.equal(saved[second], tensors[second])

    with pytest.raises(CheckpointError, match=r'LoRA tensors of rank 2.*pass lora=dict\(r=2'):
        load(folder, golden_ids, checkpoint=str(path))


@pytest.mark.parametrize('whole', [True, False])
def test_an_adapter_of_the_head_is_merged_where_the_model_has_none(
    official, golden_ids, tmp_path, whole
):
    """As the official recipe leaves it for InternLM2; `lora` here adapts no head by default."""
    folder, tensors = official
    head, a, b = torch.randn(300, 16), torch.randn(2, 16), torch.randn(300, 2)
    outer = 'mllm.model.language_model.base_model.model.output.'
    saved = {f'{outer}lora_A.default.weight': a, f'{outer}lora_B.default.weight': b}
    saved['mllm.model.mlp1.1.bias'] = torch.ones(16)
    if whole:
        saved[f'{outer}base_layer.weight'] = head
    path = tmp_path / 'iter_9.pth'
    torch.save({'state_dict': saved}, path)
    before = head if whole else tensors['language_model.output.weight']
    for lora in (
        dict(r=2, lora_alpha=4),
        dict(r=2, lora_alpha=4, modules_to_save=['output']),
        dict(r=2, lora_alpha=2 * 2**0.5, use_rslora=True),
    ):
        model = load(folder, golden_ids, lora=lora, checkpoint=str(path))
        torch.testing.assert_close(model.lm_head.weight, before + 2.0 * b @ a)
        model.save_pretrained(tmp_path / 'out')
        out = load_file(tmp_path / 'out' / 'model.safetensors')
        assert out.keys() == tensors.keys()
        torch.testing.assert_close(out['language_model.output.weight'], before + 2.0 * b @ a)
    with pytest.raises(
        CheckpointError, match=r'head.* has rank 2, the model 3: pass lora=dict\(r=2'
    ):
        load(folder, golden_ids, lora=dict(r=3, lora_alpha=4), checkpoint=str(path))
    with pytest.raises(CheckpointError, match=r'LoRA tensors of rank 2.*pass lora=dict\(r=2'):
        load(folder, golden_ids, checkpoint=str(path))
    del saved[f'{outer}lora_B.default.weight']
    torch.save({'state_dict': saved}, path)
    with pytest.raises(
        CheckpointError, match=r'iter_9\.pth does not fit this model:\nunexpected 1:'
    ):
        load(folder, golden_ids, lora=lora, checkpoint=str(path))


def test_an_adapter_of_another_language_model_is_one_line(official, golden_ids, tmp_path):
    path = tmp_path / 'iter_9.pth'
    name = f'mllm.model.{PEFT}attention.wqkv.lora_B.default.weight'
    torch.save({'state_dict': {name: torch.zeros(48, 2)}}, path)
    with pytest.raises(CheckpointError, match=r'wqkv.*has 48 rows, the model 32') as error:
        load(official[0], golden_ids, lora=dict(r=2, lora_alpha=4), checkpoint=str(path))
    assert '\n' not in str(error.value)


def test_layers_may_be_named_as_the_official_recipe_does():
    sizes = reference.load('internlm2')['config']

    def adapted(**lora):
        model = add_lora(build_language_model(sizes), dict(r=2, **lora), sizes)
        names = {n.split('.lora_A')[0].split('.')[-1] for n, _ in model.named_parameters()}
        return names & {f'{x}_proj' for x in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')}, model

    every = {f'{x}_proj' for x in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')}
    assert adapted()[0] == every
    assert adapted(target_modules=['wqkv', 'wo', 'w1', 'w2', 'w3'])[0] == every
    assert adapted(target_modules=['wqkv', 'w2'])[0] == every - {'o_proj', 'gate_proj', 'up_proj'}
    assert adapted(target_modules=['gate_proj'])[0] == {'gate_proj'}
    names, model = adapted(
        target_modules=['wqkv'],
        modules_to_save=['tok_embeddings', 'output'],
        rank_pattern={'wqkv': 3},
    )
    layer = model.get_base_model().model.layers[0].self_attn
    assert names == {'q_proj', 'k_proj', 'v_proj'}
    assert layer.v_proj.lora_A.default.weight.shape == (3, 16)
    saved = {n for n, _ in model.named_parameters() if 'modules_to_save' in n}
    assert {n.split('.modules_to_save')[0].split('.')[-1] for n in saved} == {
        'embed_tokens',
        'lm_head',
    }
