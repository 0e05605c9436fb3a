import types

import pytest
from mmengine.config import Config

from projects.llava_sam2_rl.hooks import ConfigCheckHook
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
