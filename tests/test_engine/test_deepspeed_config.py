"""What `--deepspeed` makes of a config, against xtuner's own command where that is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from runs import skip_without_xtuner

from projects.llava_sam2_rl.engine import deepspeed_config
from projects.llava_sam2_rl.engine.deepspeed_config import (
    NAMES,
    named_config,
    read_deepspeed_config,
    use_deepspeed,
    with_dtype,
)


def config(**optim_wrapper):
    wrapper = {'type': 'OptimWrapper', 'optimizer': {'type': 'AdamW', 'lr': 0.1}, **optim_wrapper}
    return Config({'optim_wrapper': wrapper, 'train_dataloader': {'batch_size': 3}})


@pytest.fixture
def said(monkeypatch):
    """What is logged."""
    texts: list[str] = []
    monkeypatch.setattr(deepspeed_config, 'print_log', lambda text, **_: texts.append(text))
    return texts


def test_the_names_mean_what_xtuner_ships():
    theirs = skip_without_xtuner('xtuner.configs').cfgs_name_path
    assert set(NAMES) == {name for name in theirs if name.startswith('deepspeed_')}
    for name, what in NAMES.items():
        assert named_config(*what) == json.loads(Path(theirs[name]).read_text()), name


def test_a_file_of_a_name_comes_before_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_config('deepspeed_zero1')['zero_optimization']['stage'] == 1
    Path('deepspeed_zero1').write_text('{"zero_optimization": {"stage": 2}}')
    assert read_deepspeed_config('deepspeed_zero1') == {'zero_optimization': {'stage': 2}}


def test_the_configs_own_values_take_the_place_of_the_jsons(said):
    run = config(accumulative_counts=4, clip_grad={'max_norm': 0.5})
    settings = {'train_micro_batch_size_per_gpu': 8, 'gradient_accumulation_steps': 4}
    use_deepspeed(run, settings)
    assert run.runner_type == 'FlexibleRunner'
    assert run.optim_wrapper == {
        'type': 'DeepSpeedOptimWrapper',
        'optimizer': {'type': 'AdamW', 'lr': 0.1},
    }
    assert run.strategy.gradient_accumulation_steps == 4
    assert run.strategy.train_micro_batch_size_per_gpu == 3
    assert run.strategy.gradient_clipping == 0.5
    assert run.strategy.config == settings
    key = 'train_micro_batch_size_per_gpu'
    assert said == [f'{key} of the DeepSpeed config is 8, the config says 3: 3.']


def test_without_clipping_in_the_config_it_is_one():
    for wrapper in ({}, {'clip_grad': None}, {'clip_grad': {'max_norm': None}}):
        run = config(**wrapper)
        use_deepspeed(run, {})
        assert run.strategy.gradient_clipping == 1.0
        assert run.strategy.gradient_accumulation_steps == 1


def test_a_config_that_sets_deepspeed_up_itself_stays_as_it_is(said):
    run = config(type='DeepSpeedOptimWrapper')
    before = run.to_dict()
    use_deepspeed(run, named_config(2, False))
    assert run.to_dict() == before
    assert '--deepspeed is not used' in said[0]


@pytest.mark.parametrize(
    ('gpu', 'bf16', 'expected'),
    [
        (False, False, {'fp16': False, 'bf16': True}),
        (True, True, {'fp16': False, 'bf16': True}),
        (True, False, {'fp16': True, 'bf16': False}),
    ],
)
def test_auto_takes_bfloat16_where_it_can_be(monkeypatch, gpu, bf16, expected):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: bf16)
    settings = named_config(2, False)
    found = with_dtype(settings)
    assert {kind: found[kind]['enabled'] for kind in expected} == expected
    assert found['fp16']['initial_scale_power'] == 16
    assert settings == named_config(2, False)
    # What is given stays as it is.
    given = {'fp16': {'enabled': False}, 'bf16': {'enabled': False}}
    assert with_dtype(given) == given
    assert with_dtype({'fp16': {'enabled': 'auto'}}) == {'fp16': {'enabled': gpu}}


def test_dtype_is_xtuners_on_a_gpu(monkeypatch):
    tools = skip_without_xtuner('xtuner.tools.utils')
    for bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda bf16=bf16: bf16)
        monkeypatch.setattr(tools, 'get_torch_device', lambda: torch.cuda)
        for stage, offload in NAMES.values():
            expected = tools.auto_dtype_of_deepspeed_config(named_config(stage, offload))
            assert with_dtype(named_config(stage, offload)) == expected
