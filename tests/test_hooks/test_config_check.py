import types

import pytest
from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner

from projects.llava_sam2_rl.datasets import Sa2VATransform
from projects.llava_sam2_rl.hooks import ConfigCheckHook
from projects.llava_sam2_rl.hooks.config_check import check_layout
from projects.llava_sam2_rl.utils.pretrained import image_sizes
from test_hooks.toy import build


def check(cfg, **options):
    ConfigCheckHook(**options).before_run(types.SimpleNamespace(cfg=Config(dict(cfg.items()))))


@pytest.mark.parametrize(
    ('typo', 'meant'),
    [
        ('modle', 'model'),
        ('train_dataloaders', 'train_dataloader'),
        ('optim_wraper', 'optim_wrapper'),
        ('default_hook', 'default_hooks'),
        ('visualiser', 'visualizer'),
    ],
)
def test_a_misspelled_section_is_named(typo, meant):
    with pytest.raises(KeyError, match=f'{typo!r} that nobody reads; did you mean {meant!r}'):
        check({typo: {'x': 1}})


def test_what_a_command_line_override_makes_of_it():
    cfg = Config({'model': {'type': 'A', 'objective': {'beta': 0.1}}})
    cfg.merge_from_dict({'modle.objective.beta': 1})
    with pytest.raises(KeyError, match="did you mean 'model'"):
        check(cfg)
    cfg = Config({'model': {'type': 'A', 'objective': {'beta': 0.1}}})
    cfg.merge_from_dict({'model.objective.beta': 1})
    check(cfg)


def test_helper_variables_and_plain_values_pass():
    check(
        {
            'model': {},
            'train_dataset': {'type': 'A'},
            'tokenizer': {},
            'policy': {},
            'lr': 1e-5,
            'modle': 'not a section',
        }
    )


def test_allow():
    check({'models': {'x': 1}}, allow=['models'])
    with pytest.raises(KeyError, match="'models'"):
        check({'models': {'x': 1}})


def test_stops_a_real_run_before_it_trains(tmp_path):
    runner = build(tmp_path, hooks=[{'type': ConfigCheckHook}])
    runner.cfg = Config({'modle': {'objective': {'beta': 1}}})
    with pytest.raises(KeyError, match="did you mean 'model'"):
        runner.train()
    assert runner.model.seen == []


OLD = """
model = dict(type='projects.llava_sam2_rl.models.DualLoopModel')
custom_hooks = [
    dict(type='projects.llava_sam2_rl.hooks.ConfigCheckHook'),
    dict(type='mine.MyHook'),
    dict(type='projects.llava_sam2_rl.hooks.RolloutHook', interval=5),
]
custom_imports = dict(imports=['projects.llava_sam2_rl.registry', 'projects.llava_sam2_rl.hooks'])
default_scope = 'llava_sam2_rl'
train_cfg = dict(type='xtuner.engine.runner.TrainLoop', max_iters=3)
val_cfg = dict(type='mmengine.runner.ValLoop')
train_dataloader = dict(
    sampler=dict(type='projects.llava_sam2_rl.datasets.VisitSampler', shuffle=True),
    dataset=dict(
        type='projects.llava_sam2_rl.datasets.MixedRegionDataset',
        datasets=[
            dict(
                type='projects.llava_sam2_rl.datasets.GeneratedScenes',
                transforms=dict(
                    type='projects.llava_sam2_rl.datasets.Sa2VATransform',
                    image_size=96,
                    max_dynamic_patch=1,
                ),
            )
        ],
    ),
)
work_dir = 'work'
"""
MOVED = [
    'custom_hooks.0 (ConfigCheckHook): default_hooks.config_check',
    'custom_hooks.2 (RolloutHook): default_hooks.rollouts',
    'train_dataloader.sampler.type=VisitSampler: train_dataloader.sampler.type=ResumableSampler',
    'train_dataloader.dataset.datasets.0.transforms.image_size: leave out',
    'train_cfg.type=TrainLoop: train_cfg.type=DualLoopTrainLoop',
    'val_cfg.type=ValLoop: val_cfg.type=DualLoopValLoop',
]


def test_an_old_layout_is_one_error_that_names_each_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'old.py'
    path.write_text(OLD)
    for runner in (Runner, FlexibleRunner):
        with pytest.raises(ValueError, match='earlier version') as raised:
            runner.from_cfg(Config.fromfile(path))
        for line in MOVED:
            assert line in str(raised.value)
        assert '(6 keys have moved)' in str(raised.value)
        assert 'mine.MyHook' not in str(raised.value)
    # Before anything is built.
    assert not (tmp_path / 'work').exists()


def test_an_old_layout_of_imports_that_are_gone(tmp_path):
    """Such a file imports nothing when it is read: names alone are looked at."""
    path = tmp_path / 'old.py'
    path.write_text(
        'from mmengine.config import read_base\n'
        'from projects.llava_sam2_rl.datasets import VisitSampler\n'
        'from projects.llava_sam2_rl.hooks import ReportHook\n'
        'from projects.llava_sam2_rl.models import DualLoopModel\n'
        'model = dict(type=DualLoopModel)\n'
        'custom_hooks = [dict(type=ReportHook)]\n'
        'train_dataloader = dict(sampler=dict(type=VisitSampler))\n'
    )
    with pytest.raises(ValueError, match='2 keys have moved') as raised:
        check_layout(Config.fromfile(path))
    assert 'type=ResumableSampler' in str(raised.value)
    assert 'default_hooks.report' in str(raised.value)


def test_configs_of_other_models_are_not_looked_at():
    check_layout(Config(dict(custom_hooks=[dict(type='RolloutHook')])))
    check_layout(Config(dict(model=dict(type='A'), val_cfg=dict(type='ValLoop'))))


def test_a_class_that_dataset_defaults_misspells():
    check({'dataset_defaults': {'RefCOCODataset': {'data_root': 'x'}}})
    with pytest.raises(KeyError, match="'RefCocoDataset', no data set: did you mean 'RefCOCO"):
        check({'dataset_defaults': {'RefCocoDataset': {'data_root': 'x'}}})


def test_transforms_that_other_loops_left_to_themselves(tiny_model):
    """Loops of one's own do not complete data loaders; a wrong size must not be trained on."""
    tiny_policy = tiny_model.policy

    def runner(transform):
        source = types.SimpleNamespace(transforms=transform)
        data = types.SimpleNamespace(datasets=[source])
        loader = types.SimpleNamespace(dataset=data)
        return types.SimpleNamespace(
            cfg=Config({}),
            model=types.SimpleNamespace(policy=tiny_policy),
            _train_loop=types.SimpleNamespace(dataloader=loader),
            _val_loop=dict(type='ValLoop'),
            _test_loop=None,
        )

    ConfigCheckHook().before_run(runner(Sa2VATransform(**image_sizes(tiny_policy.config))))
    message = r'train_dataloader\.dataset\.datasets\.0\.transforms .* image_size 448, .* has 96'
    with pytest.raises(ValueError, match=message):
        ConfigCheckHook().before_run(runner(Sa2VATransform()))
