"""A run's length either way, and data loaders completed from the rest of the config."""

from __future__ import annotations

import types

import pytest
from mmengine.config import Config
from test_hooks.toy import build

from projects.llava_sam2_rl.engine.dataloader_config import complete_dataloader
from projects.llava_sam2_rl.engine.loops import DualLoopTrainLoop, run_length
from projects.llava_sam2_rl.engine.schedules import WarmupCosineLR


@pytest.mark.parametrize(
    ('given', 'length'),
    [
        (dict(default_length=dict(max_iters=400)), ('max_iters', 400)),
        (dict(default_length=dict(max_epochs=2)), ('max_epochs', 2)),
        (dict(max_iters=3, default_length=dict(max_epochs=2)), ('max_iters', 3)),
        (dict(max_epochs=0.5, default_length=dict(max_iters=400)), ('max_epochs', 0.5)),
        (dict(max_epochs=1, max_iters=None), ('max_epochs', 1)),
    ],
)
def test_either_way(given, length):
    options = dict(max_iters=None, max_epochs=None, default_length=None)
    assert run_length(**{**options, **given}) == length


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(max_iters=3, max_epochs=1), 'max_iters=3 and max_epochs=1: give one'),
        (dict(), 'neither max_iters nor max_epochs'),
        (dict(default_length=dict(max_iters=3, max_epochs=1)), 'give one of them'),
        (dict(default_length=dict(max_iter=3)), "'max_iter': did you mean 'max_iters'"),
        (dict(max_iters=0), 'max_iters must be positive and whole, got 0'),
        (dict(max_iters=2.5), 'max_iters must be positive and whole, got 2.5'),
        (dict(max_epochs=-1), 'max_epochs must be positive, got -1'),
    ],
)
def test_no_length(given, message):
    options = dict(max_iters=None, max_epochs=None, default_length=None)
    with pytest.raises(ValueError, match=message):
        run_length(**{**options, **given})


@pytest.mark.parametrize(
    ('length', 'iters'),
    [(dict(max_iters=5), 5), (dict(max_epochs=2), None), (dict(max_epochs=0.5), None)],
)
def test_runs_and_their_schedules(tmp_path, length, iters):
    runner = build(tmp_path, hooks=[])
    runner._train_loop = dict(
        type=DualLoopTrainLoop, default_length=dict(max_iters=7), val_interval=1000, **length
    )
    runner.param_schedulers = dict(type=WarmupCosineLR, by_epoch=False)
    runner.train()
    if iters is None:
        iters = int(length['max_epochs'] * len(runner.train_dataloader))
    assert runner.iter == runner.max_iters == iters
    assert runner.param_schedulers[0].end == iters


def completed(dataset, **config):
    config = Config(config)
    return complete_dataloader(dict(batch_size=2, dataset=dataset), config)['dataset']


TINY = dict(policy=dict(pretrained='llava_sam2_rl://assets/sa2va_tiny'))


def test_sizes_go_to_every_transform_at_any_depth():
    transform = dict(type='Sa2VATransform', max_dynamic_patch=3)
    data = dict(type='Mixed', datasets=[dict(type='A', transforms=[transform, dict(type='B')])])
    made = completed(data, model=TINY)['datasets'][0]['transforms']
    assert made[0] == dict(
        transform, image_size=96, patch_size=8, downsample_ratio=0.5, grounding_size=128
    )
    assert made[1] == dict(type='B')
    # What was given stays as it was.
    assert 'image_size' not in transform


def test_sizes_of_a_model_without_a_checkpoint():
    policy = dict(vision_config=dict(patch_size=16), llm_config={}, force_image_size=64)
    model = dict(policy=dict(policy, template='qwen_chat'))
    made = completed(dict(type='A', transforms=dict(type='Sa2VATransform')), model=model)
    assert made['transforms']['image_size'] == 64
    assert made['transforms']['patch_size'] == 16
    assert made['transforms']['grounding_size'] == 1024


def test_a_size_of_its_own_that_is_not_the_models_is_named():
    data = dict(type='A', transforms=dict(type='Sa2VATransform', image_size=448))
    message = r'dataset\.transforms\.image_size is 448, the model \(llava_sam2_rl://.*\) has 96'
    with pytest.raises(ValueError, match=message):
        completed(data, model=TINY)


def test_defaults_of_a_class_and_the_exception():
    roots = dict(RefCOCODataset=dict(data_root='/mnt/r', image_dir='i'))
    data = dict(
        type='Mixed',
        datasets=[dict(type='RefCOCODataset'), dict(type='RefCOCODataset', data_root='own')],
    )
    first, second = completed(data, dataset_defaults=roots)['datasets']
    assert first == dict(type='RefCOCODataset', data_root='/mnt/r', image_dir='i')
    assert second == dict(type='RefCOCODataset', data_root='own', image_dir='i')


def test_what_is_built_is_left_alone():
    loader = types.SimpleNamespace()
    assert complete_dataloader(loader, Config({})) is loader
    given = dict(dataset=loader)
    assert complete_dataloader(given, Config({})) is given
