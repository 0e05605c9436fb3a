import dataclasses

import pytest
from mmengine import registry as mm
from mmengine.config import Config
from mmengine.dataset import ConcatDataset
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from projects.llava_sam2_rl import registry
from projects.llava_sam2_rl.registry import (
    HOOKS,
    MODELS,
    OBJECTIVES,
    REWARDS,
    from_options,
    nearest,
    with_hints,
)


@MODELS.register_module()
class PlainModelForTest(BaseModel):
    def __init__(self, width=1, objective=None, data_preprocessor=None):
        super().__init__(data_preprocessor=data_preprocessor)
        self.objective = OBJECTIVES.build(objective) if objective else None

    def forward(self, inputs, mode='tensor'):
        return {}


@OBJECTIVES.register_module()
class ObjectiveForTest:
    def __init__(self, beta=0.1):
        self.beta = beta


@HOOKS.register_module()
class HookForTest(Hook):
    def __init__(self, interval=1):
        self.interval = interval


class UnregisteredHook(Hook):
    def __init__(self, interval=1):
        self.interval = interval


@REWARDS.register_module()
class RewardForTest:
    def __init__(self, **anything):
        self.anything = anything


def runner(tmp_path, model, hooks=(), scope='llava_sam2_rl', name=[0]):  # noqa: B006
    name[0] += 1
    return Runner.from_cfg(
        Config(
            {
                'model': model,
                'work_dir': str(tmp_path),
                'custom_hooks': list(hooks),
                'default_scope': scope,
                'experiment_name': f'registry-{name[0]}-{tmp_path.name}',
                'log_level': 'WARNING',
            },
            format_python_code=False,  # a class has no text that mmengine could lay out
        )
    )


NAMES = [PlainModelForTest, 'PlainModelForTest', 'llava_sam2_rl.PlainModelForTest']


@pytest.mark.parametrize('kind', NAMES)
def test_builds_by_class_by_name_and_by_scoped_name(tmp_path, kind):
    built = runner(
        tmp_path, {'type': kind, 'objective': {'type': 'ObjectiveForTest', 'beta': 0.5}}
    ).model
    assert isinstance(built, PlainModelForTest)
    assert built.objective.beta == 0.5


@pytest.mark.parametrize('kind', NAMES)
def test_a_misspelled_option_names_the_nearest(tmp_path, kind):
    with pytest.raises(
        TypeError, match="PlainModelForTest has no option 'widht': did you mean 'width'"
    ):
        runner(tmp_path, {'type': kind, 'widht': 3})


@pytest.mark.parametrize('kind', NAMES)
def test_a_misspelled_option_further_in(tmp_path, kind):
    objective = {'type': 'ObjectiveForTest', 'betta': 0.5}
    with pytest.raises(
        TypeError, match="ObjectiveForTest has no option 'betta': did you mean 'beta'"
    ):
        runner(tmp_path, {'type': kind, 'objective': objective})


def test_a_misspelled_class_names_the_nearest(tmp_path):
    with pytest.raises(
        KeyError, match="'PlainModelForTset' is not registered in 'model': did you mean 'Plain"
    ):
        runner(tmp_path, {'type': 'PlainModelForTset'})


@pytest.mark.parametrize('kind', [UnregisteredHook, HookForTest, 'HookForTest'])
def test_hooks_of_the_runner(tmp_path, kind):
    model = {'type': PlainModelForTest}
    hooks = runner(tmp_path, model, [{'type': kind, 'interval': 7}]).hooks
    assert 7 in [getattr(hook, 'interval', None) for hook in hooks]
    with pytest.raises(TypeError, match="has no option 'intervall': did you mean 'interval'"):
        runner(tmp_path, model, [{'type': kind, 'intervall': 7}])
    with pytest.raises(KeyError, match=r"'HookForTset' is not registered .*'HookForTest'"):
        runner(tmp_path, model, [{'type': 'HookForTset'}])


def test_a_config_file_with_imported_classes(tmp_path, monkeypatch):
    # Lazy configs: imports become objects that are resolved when they are built.
    (tmp_path / 'model_of_test.py').write_text(
        'from mmengine.model import BaseModel\n'
        'class Model(BaseModel):\n'
        '    def __init__(self, width=1, data_preprocessor=None):\n'
        '        super().__init__()\n'
        '    def forward(self, inputs, mode="tensor"):\n'
        '        return {}\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / 'lazy_config_of_test.py'
    text = (
        'from mmengine.hooks import IterTimerHook\n'
        'from model_of_test import Model\n'
        'model = dict(type=Model, width=3)\n'
        'custom_hooks = [dict(type=IterTimerHook)]\n'
        f'work_dir = {str(tmp_path)!r}\n'
        "log_level = 'WARNING'\n"
        "experiment_name = 'lazy'\n"
    )
    path.write_text(text)
    Runner.from_cfg(Config.fromfile(path))
    path.write_text(text.replace('width', 'widht').replace("'lazy'", "'misspelled'"))
    with pytest.raises(TypeError, match="Model has no option 'widht': did you mean 'width'"):
        Runner.from_cfg(Config.fromfile(path))
    path.write_text(text.replace("'lazy'", "'by option'"))
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({'model.widht': 5})  # `--cfg-options model.widht=5`
    with pytest.raises(TypeError, match="Model has no option 'widht': did you mean 'width'"):
        Runner.from_cfg(cfg)


def test_priority_of_a_hook_is_not_a_misspelling(tmp_path):
    built = runner(
        tmp_path,
        {'type': PlainModelForTest},
        [{'type': HookForTest, 'interval': 7, 'priority': 'LOW'}],
    )
    assert [h.priority for h in built.hooks if isinstance(h, HookForTest)] == ['LOW']


def test_mmengines_own_classes_stay_buildable(tmp_path):
    built = runner(
        tmp_path,
        {'type': PlainModelForTest, 'data_preprocessor': {'type': 'BaseDataPreprocessor'}},
        scope='mmengine',
    )
    assert type(built.model.data_preprocessor).__name__ == 'BaseDataPreprocessor'
    assert mm.DATASETS.get('ConcatDataset') is ConcatDataset
    with DefaultScope.overwrite_default_scope('llava_sam2_rl'):
        assert mm.HOOKS.get('IterTimerHook') is not None
        assert mm.HOOKS.build({'type': 'mmengine.IterTimerHook'}) is not None


def test_dotted_paths_are_left_to_mmengine():
    built = mm.MODELS.build({'type': 'torch.nn.Linear', 'in_features': 2, 'out_features': 3})
    assert built.weight.shape == (3, 2)


def test_a_target_that_takes_anything_is_not_checked():
    assert REWARDS.build({'type': 'RewardForTest', 'x': 1}).anything == {'x': 1}


def test_positional_only_checks_nothing_twice():
    build = registry.mm.MODELS.build_func
    assert with_hints(build) is build  # a second import of the package changes nothing


def test_nearest():
    assert nearest('betta', ['beta', 'alpha']) == "did you mean 'beta'?"
    assert nearest('zzz', ['beta', 'alpha']) == 'valid are: alpha, beta'


@dataclasses.dataclass
class OptionsForTest:
    steps: int
    weight: float = 1.0


def test_a_dataclass_from_the_options_of_a_config():
    assert from_options(OptionsForTest, 'Model.loss', {'steps': 3}) == OptionsForTest(3, 1.0)
    config = Config({'loss': {'steps': 3, 'weight': 0.5}})
    assert from_options(OptionsForTest, 'Model.loss', config.loss) == OptionsForTest(3, 0.5)


def test_an_option_that_the_dataclass_lacks_names_the_nearest():
    with pytest.raises(
        TypeError, match=r"^Model\.loss has no option 'wieght': did you mean 'weight'"
    ):
        from_options(OptionsForTest, 'Model.loss', {'steps': 3, 'wieght': 1.0})


def test_a_missing_option_is_named():
    with pytest.raises(TypeError, match=r"^Model\.loss: .*'steps'"):
        from_options(OptionsForTest, 'Model.loss', {'weight': 1.0})
