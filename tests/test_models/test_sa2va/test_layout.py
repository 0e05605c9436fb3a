"""Training checkpoints of 0.1.0, which trained InternLM2 under its own names."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from projects.llava_sam2_rl.engine.checkpoint_files import check_loaded
from projects.llava_sam2_rl.export import load_training_checkpoint
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.utils.errors import CheckpointError

LAYER = 'language_model.base_model.model.model.layers.1.'


@pytest.fixture(scope='module')
def config(tiny_config):
    """A `DualLoopModel` around an InternLM2 with random weights and an adapter."""
    config = copy.deepcopy(tiny_config.model)
    llm = {**config.policy.llm_config, 'architectures': ['InternLM2ForCausalLM']}
    config.policy.update(
        pretrained=None, llm_config=llm, tokenizer='llava_sam2_rl://assets/sa2va_tiny'
    )
    config.policy.lora.pop('target_modules', None)
    return config


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return MODELS.build(config)


def of_0_1_0(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other values of the same model as 0.1.0 named them: an adapter of each fused matrix."""
    renamed = {}
    for name, tensor in tensors.items():
        if 'language_model.' not in name:
            renamed[name] = torch.randn_like(tensor)
            continue
        for new, old in {
            'self_attn.o_proj': 'attention.wo',
            'mlp.gate_proj': 'feed_forward.w1',
            'mlp.down_proj': 'feed_forward.w2',
            'mlp.up_proj': 'feed_forward.w3',
        }.items():
            name = name.replace(new, old)
        if 'self_attn.q_proj.lora_A' in name:
            renamed[name.replace('self_attn.q_proj', 'attention.wqkv')] = torch.randn_like(tensor)
        elif 'self_attn.q_proj.lora_B' in name:
            key_rows = len(tensors[name.replace('q_proj', 'k_proj')])
            fused = torch.randn(len(tensor) + 2 * key_rows, tensor.shape[1])
            renamed[name.replace('self_attn.q_proj', 'attention.wqkv')] = fused
        elif 'self_attn.' not in name:
            renamed[name] = torch.randn_like(tensor)
    assert sum('wqkv' in name for name in renamed) > 0
    return renamed


@pytest.fixture
def old(model):
    """What 0.1.0 saved."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shadows = {name.removeprefix('policy.'): tensor for name, tensor in state.items()}
    return {
        'meta': {'iter': 4},
        'state_dict': of_0_1_0(state),
        'teacher': {'num_updates': 3, 'shadows': of_0_1_0(shadows)},
    }


def assert_holds(layer, tensors, prefix, llm):
    """Two query heads of a group, then its key and its value head."""
    before = f'{prefix}{LAYER}'
    a = tensors[before + 'attention.wqkv.lora_A.default.weight']
    b = tensors[before + 'attention.wqkv.lora_B.default.weight']
    width = llm['hidden_size'] // llm['num_attention_heads']
    groups = b.view(llm['num_key_value_heads'], -1, width, b.shape[1])
    attention, mlp = layer.self_attn, layer.mlp
    parts = {'q_proj': groups[:, :-2], 'k_proj': groups[:, -2], 'v_proj': groups[:, -1]}
    for name, rows in parts.items():
        part = attention.get_submodule(name)
        assert torch.equal(part.lora_A.default.weight, a)
        assert torch.equal(part.lora_B.default.weight, rows.reshape(-1, b.shape[1]))
    for part, name in (
        (attention.o_proj, 'attention.wo'),
        (mlp.gate_proj, 'feed_forward.w1'),
        (mlp.down_proj, 'feed_forward.w2'),
        (mlp.up_proj, 'feed_forward.w3'),
    ):
        assert torch.equal(
            part.lora_B.default.weight, tensors[f'{before}{name}.lora_B.default.weight']
        )


def test_its_weights_load_policy_and_teacher(config, model, old, tmp_path):
    torch.save(old, tmp_path / 'iter_4.pth')
    load_training_checkpoint(model, tmp_path / 'iter_4.pth', 'teacher')
    layer = model.policy.get_submodule(LAYER.rstrip('.'))
    llm = config.policy.llm_config
    assert llm['num_key_value_heads'] < llm['num_attention_heads']
    assert_holds(layer, old['state_dict'], 'policy.', llm)
    projector = model.policy.mlp1[1].weight
    assert torch.equal(projector, old['state_dict']['policy.mlp1.1.weight'])
    with model.teacher_applied():
        assert_holds(layer, old['teacher']['shadows'], '', llm)
    assert model.teacher.num_updates == 3


def runner(model, resume):
    return SimpleNamespace(model=model, _load_from='run/iter_4.pth', _resume=resume, work_dir='run')


def test_a_run_starts_from_its_weights_and_does_not_resume_it(config, model, old):
    expected = copy.deepcopy(old)
    with pytest.raises(CheckpointError) as error:
        check_loaded(runner(model, resume=True), old)
    text = str(error.value)
    assert text.startswith('run/iter_4.pth was written by 0.1.0')
    assert 'one matrix (wqkv)' in text
    assert '`load_from`' in text
    assert '\n' not in text
    assert old['state_dict'].keys() == expected['state_dict'].keys()

    check_loaded(runner(model, resume=False), old)
    model.load_state_dict(old['state_dict'])
    model.teacher.load_state_dict(old['teacher'])
    layer = model.policy.get_submodule(LAYER.rstrip('.'))
    assert_holds(layer, expected['state_dict'], 'policy.', config.policy.llm_config)


def test_todays_checkpoints_are_left_alone(model):
    today = {'meta': {}, 'state_dict': dict(model.state_dict())}
    keys = list(today['state_dict'])
    check_loaded(runner(model, resume=True), today)
    assert list(today['state_dict']) == keys


def test_an_adapter_of_another_size_is_one_line(model, old):
    name = f'policy.{LAYER}attention.wqkv.lora_B.default.weight'
    old['state_dict'][name] = old['state_dict'][name][:-1]
    with pytest.raises(CheckpointError, match='wqkv.*of another language model') as error:
        check_loaded(runner(model, resume=False), old)
    assert '\n' not in str(error.value)
