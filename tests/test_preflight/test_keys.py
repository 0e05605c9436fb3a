"""A misspelled key in any section, and an override that nobody reads."""

import pytest

from projects.llava_sam2_rl.preflight.keys import check_keys
from test_preflight.configs import ROOT, by_key, config


@pytest.mark.parametrize('file', sorted(ROOT.glob('configs/*.py')), ids=lambda path: path.stem)
def test_every_config_of_the_project_is_clean(file):
    assert check_keys(config(file=file)) == []


@pytest.mark.parametrize(
    ('option', 'meant'),
    [
        ('train_cfg.max_iter=3', 'max_iters'),
        ('train_dataloader.batch_sice=3', 'batch_size'),
        ('train_dataloader.sampler.shufle=True', 'shuffle'),
        ('train_dataloader.dataset.datasets.0.lenght=3', 'length'),
        ('train_dataloader.dataset.datasets.0.repeat=3', 'repeats'),  # of the base class
        ('val_dataloader.dataset.transforms.max_dynamic_patchs=2', 'max_dynamic_patch'),
        ('optim_wrapper.clip_grads.max_norm=1', 'clip_grad'),
        ('optim_wrapper.optimizer.learning_rate=1', 'lr'),
        ('param_scheduler.warmup=1', 'warmup_ratio'),
        ('default_hooks.checkpoint.intervall=5', 'interval'),
        ('default_hooks.chekpoint.interval=5', 'checkpoint'),
        ('visualizer.vis_backend=1', 'vis_backends'),
        ('log_processor.window=1', 'window_size'),
        ('randomness.sed=1', 'seed'),
        ('env_cfg.cudnn_bench=True', 'cudnn_benchmark'),
        ('model.max_new_token=3', 'max_new_tokens'),
        ('model.policy.trainabel=1', 'trainable'),
        ('model.policy.lora.rank=1', 'r'),
        ('model.teacher.decai=1', 'decay'),
        ('model.chat.wait=1', 'weight'),
        ('model.objective.betta=1', 'beta'),
        ('model.objective.caption_to_mask.sigmar=1', 'sigma'),
        ('val_cfg.fp61=True', 'fp16'),
    ],
)
def test_the_nearest_name_in_every_section(option, meant):
    key = option.partition('=')[0]
    if key.startswith(('default_hooks.chekpoint', 'optim_wrapper.clip_grads')):
        key = key.rpartition('.')[0]
    ((found, text),) = by_key(check_keys(config(option))).items()
    assert found == key
    assert f'{meant!r}' in text or meant in text


@pytest.mark.parametrize('option', ['foo.bar=1', 'foo=1', 'lr=1e-3'])
def test_an_override_of_a_section_that_nobody_reads_is_refused(option):
    (problem,) = check_keys(config(option))
    assert problem.key == option.partition('=')[0].partition('.')[0]
    assert 'nobody reads' in problem.message


def test_a_misspelled_section_is_named_once():
    assert by_key(check_keys(config('modle.objective.beta=1'))) == {
        'modle': "nobody reads a section of this name -> did you mean 'model'? If it is meant: "
        'default_hooks.config_check.allow=modle'
    }


def test_an_override_of_a_variable_of_the_file_reaches_nothing():
    """mmengine has put `transform` into the data loaders when the override comes."""
    (problem,) = check_keys(config('transform.max_dynamic_patch=3'))
    assert problem.key == 'transform'
    assert 'reaches nothing' in problem.message


def test_variables_of_the_file_pass(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text('my_words = dict(a=1)\nmodel = dict(type="DualLoopModel")\n')
    assert check_keys(config(file=path)) == []
    assert [p.key for p in check_keys(config('my_words.a=2', file=path))] == ['my_words']


def test_sections_of_ones_own_are_allowed_by_name(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(
        'default_hooks = dict(config_check=dict(type="ConfigCheckHook", allow=["mine"]))\n'
    )
    assert check_keys(config('mine.a=2', file=path)) == []


def test_types_that_nobody_registered(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(
        'train_cfg = dict(type="DualLoopTrainLop")\n'
        'val_cfg = dict(type="projects.llava_sam2_rl.engine.loops.ValLop")\n'
    )
    found = by_key(check_keys(config(file=path)))
    assert "did you mean 'DualLoopTrainLoop'?" in found['train_cfg.type']
    assert 'val_cfg.type' in found


def test_dataset_defaults():
    found = by_key(
        check_keys(
            config(
                'dataset_defaults.RefCOCODatset.data_root=x',
                'dataset_defaults.RefCOCODataset.data_rot=x',
            )
        )
    )
    assert "'RefCOCODataset'" in found['dataset_defaults.RefCOCODatset']
    assert "'data_root'" in found['dataset_defaults.RefCOCODataset.data_rot']
