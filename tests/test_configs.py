"""The configs: they parse, survive a dump, and tiny and 4B differ in literals only."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dist import init_dist
from mmengine.runner import Runner
from PIL import Image

from projects.llava_sam2_rl.engine.dataloader_config import LOADERS, complete_dataloader
from projects.llava_sam2_rl.hooks.config_check import HOOK_NAMES, moved_keys
from projects.llava_sam2_rl.models.sa2va.internvl import build_language_model, build_vision_model
from projects.llava_sam2_rl.registry import DATASETS, HOOKS, MODELS
from projects.llava_sam2_rl.utils.pretrained import complete_sizes, resolve, sizes_folder

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.name for path in (ROOT / 'configs').glob('*.py'))


#: Config and checkpoint of the sizes besides 4B.
SIZES = {
    'sa2va_1b': 'Sa2VA-1B',
    'sa2va_8b': 'Sa2VA-8B',
    'sa2va_26b': 'Sa2VA-26B',
    'sa2va_internvl3_2b': 'Sa2VA-InternVL3-2B',
    'sa2va_internvl3_8b': 'Sa2VA-InternVL3-8B',
    'sa2va_internvl3_14b': 'Sa2VA-InternVL3-14B',
}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A working directory with the ``config.json`` that 4B configs read."""
    folder = tmp_path_factory.mktemp('weights')
    for name in ('Sa2VA-4B', *SIZES.values()):
        shutil.copytree(resolve(sizes_folder(name)), folder / 'pretrained' / name)
    return folder


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_parses_and_its_dump_does_too(name, tmp_path):
    config = Config.fromfile(ROOT / 'configs' / name)
    config.dump(tmp_path / 'dump.py')
    again = Config.fromfile(tmp_path / 'dump.py')
    assert again.model.policy.lora == config.model.policy.lora
    assert again.get('dataset_defaults') == config.get('dataset_defaults')
    # A string after a dump, a class before.
    kind = config.model.objective.type.__name__
    assert again.model.objective.type.endswith(kind)
    for made in (config._to_lazy_dict(), again.to_dict()):
        assert list(moved_keys(made)) == []


@pytest.mark.parametrize('kind', ['dual_loop_sft', 'dual_loop', 'dual_loop_gumbel'])
def test_tiny_and_4b_are_the_same_but_for_literals(kind):
    tiny = Config.fromfile(ROOT / f'configs/sa2va_tiny_{kind}.py')
    large = Config.fromfile(ROOT / f'configs/sa2va_4b_{kind}.py')
    assert tiny.model.type is large.model.type
    assert tiny.model.objective.type is large.model.objective.type
    assert set(tiny.model) == set(large.model)
    assert set(tiny.model.policy) == set(large.model.policy)
    assert set(tiny.model.policy.lora) == set(large.model.policy.lora)
    assert tiny.model.policy.trainable == large.model.policy.trainable
    for section in ('custom_hooks', 'env_cfg', 'visualizer', 'log_processor', 'val_cfg'):
        assert tiny[section] == large[section]
    assert set(tiny.default_hooks) == set(large.default_hooks)
    for section in ('train_cfg', 'param_scheduler'):
        assert tiny[section].type is large[section].type
        assert set(tiny[section]) == set(large[section])


def test_every_base_of_data_has_a_config_to_run():
    reached = set()
    for name in CONFIGS:
        text = (ROOT / 'configs' / name).read_text()
        reached |= set(re.findall(r'_base_\.datasets\.(\w+) import', text))
    bases = {path.stem for path in (ROOT / 'configs/_base_/datasets').glob('*.py')}
    assert reached == bases
    for name in bases - {'refcoco', 'scenes_and_collages', 'moving_scenes'}:
        config = Config.fromfile(ROOT / f'configs/sa2va_4b_dual_loop_{name}.py')
        base = Config.fromfile(ROOT / f'configs/_base_/datasets/{name}.py')
        assert config.train_dataloader.dataset == base.train_dataloader.dataset
        main = Config.fromfile(ROOT / 'configs/sa2va_4b_dual_loop.py')
        assert config.model == main.model
        assert config.val_dataloader == main.val_dataloader


def test_the_judge_is_one_delta_on_the_main_config():
    main = Config.fromfile(ROOT / 'configs/sa2va_4b_dual_loop.py').to_dict()
    judged = Config.fromfile(ROOT / 'configs/sa2va_4b_dual_loop_judge.py').to_dict()
    reward = judged['model']['objective']['caption_to_mask'].pop('reward')
    plain = main['model']['objective']['caption_to_mask'].pop('reward')
    assert plain['type'].endswith('.MeteorReward')
    assert [(r['type'].rsplit('.', 1)[-1], r['weight']) for r in reward['rewards']] == [
        ('MeteorReward', 0.25),
        ('LLMJudgeReward', 0.75),
    ]
    for section in ('model', 'train_dataloader', 'train_cfg', 'default_hooks'):
        assert judged[section] == main[section]


def test_qlora_is_one_literal_on_the_main_config():
    main = Config.fromfile(ROOT / 'configs/sa2va_4b_dual_loop.py').to_dict()
    other = Config.fromfile(ROOT / 'configs/sa2va_4b_dual_loop_qlora.py').to_dict()
    assert other['model']['policy'].pop('quantization') == 'nf4'
    assert other == main


@pytest.mark.parametrize('name', SIZES)
def test_a_size_is_the_main_config_with_another_checkpoint(name):
    main = Config.fromfile(ROOT / 'configs/sa2va_4b_dual_loop.py').to_dict()
    other = Config.fromfile(ROOT / f'configs/{name}_dual_loop.py').to_dict()
    base = Config.fromfile(ROOT / f'configs/_base_/models/{name}.py').to_dict()
    assert other['model']['policy'] == base['model']['policy']
    assert other['model']['policy'].pop('pretrained') == f'pretrained/{SIZES[name]}'
    main['model']['policy'].pop('pretrained')
    # The official recipe's ranks; alpha is twice the rank.
    rank = 256 if name in ('sa2va_internvl3_8b', 'sa2va_internvl3_14b') else 128
    assert other['model']['policy']['lora'] == {
        'r': rank,
        'lora_alpha': 2 * rank,
        'lora_dropout': 0.05,
    }
    main['model']['policy'].pop('lora')
    other['model']['policy'].pop('lora')
    assert other == main


@pytest.mark.parametrize(
    ('name', 'template', 'vision', 'language'),
    [
        # Millions, from the model cards of InternViT, Qwen2.5 and InternLM2.5. Those of Qwen2.5 up
        # to 3B count one of two tables that Sa2VA holds apart: the other is added, 151 679 rows.
        ('Sa2VA-1B', 'qwen_chat', 304, 494 + 136),
        ('Sa2VA-4B', 'phi3_chat', 304, 3090 + 311),
        ('Sa2VA-8B', 'internlm2_chat', 304, 7740),
        ('Sa2VA-26B', 'internlm2_chat', 5540, 19860),
        ('Sa2VA-InternVL3-2B', 'qwen_chat', 304, 1540 + 233),
        ('Sa2VA-InternVL3-8B', 'qwen_chat', 304, 7620),
        ('Sa2VA-InternVL3-14B', 'qwen_chat', 304, 14770),
    ],
)
def test_sizes_that_come_with_the_package(name, template, vision, language):
    sizes = complete_sizes(sizes_folder(f'pretrained/{name}'), {})
    assert sizes['template'] == template
    with torch.device('meta'):
        models = (
            build_vision_model(sizes['vision_config']),
            build_language_model(sizes['llm_config']),
        )
    for model, expected in zip(models, (vision, language), strict=True):
        found = sum(p.numel() for p in model.parameters()) / 1e6
        assert found == pytest.approx(expected, rel=0.01)


def test_hooks_have_names_and_run_in_one_order(tmp_path):
    """Whatever order a file holds them in: priorities differ where mmengine's are alike."""
    config = Config.fromfile(ROOT / 'configs/sa2va_tiny_dual_loop.py')
    assert config.custom_hooks == []
    config.merge_from_dict({'default_hooks.rollouts.interval': 10})
    assert config.default_hooks.rollouts.interval == 10
    ours = {
        hook.type.__name__: name
        for name, hook in config.default_hooks.items()
        if hook.type.__module__.startswith('projects.')
    }
    assert ours.pop('AtomicCheckpointHook') == 'checkpoint'
    assert ours == HOOK_NAMES
    names = [name for name in HOOK_NAMES.values() if name != 'watchdog']
    priorities = [config.default_hooks[name].priority for name in names]
    assert len(set(priorities)) == len(priorities)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_transforms_are_the_models(name, weights, monkeypatch):
    monkeypatch.chdir(weights)
    config = Config.fromfile(ROOT / 'configs' / name)
    sizes = (96, 8, 0.5, 128) if 'tiny' in name else (448, 14, 0.5, 1024)
    found = 0
    for loader in LOADERS:
        dataset = complete_dataloader(config[loader], config).dataset
        for source in dataset.get('datasets', [dataset]):
            made = source.transforms
            keys = ('image_size', 'patch_size', 'downsample_ratio', 'grounding_size')
            assert tuple(made[key] for key in keys) == sizes
            assert 'image_size' not in config[loader].dataset.get('transforms', {})
            found += 1
    assert found >= 3


def test_one_override_changes_model_and_transforms(weights, monkeypatch):
    monkeypatch.chdir(weights)
    config = Config.fromfile(ROOT / 'configs/sa2va_4b_dual_loop.py')
    config.merge_from_dict({'model.policy.pretrained': 'llava_sam2_rl://assets/sa2va_tiny'})
    source = complete_dataloader(config.train_dataloader, config).dataset.datasets[0]
    assert (source.transforms.image_size, source.transforms.grounding_size) == (96, 128)


def test_one_override_moves_all_splits_of_a_source(weights, monkeypatch):
    monkeypatch.chdir(weights)
    config = Config.fromfile(ROOT / 'configs/sa2va_4b_dual_loop.py')
    config.merge_from_dict({'dataset_defaults.RefCOCODataset.data_root': '/mnt/refer_seg'})
    roots = []
    for loader in LOADERS:
        dataset = complete_dataloader(config[loader], config).dataset
        roots += [source.data_root for source in dataset.get('datasets', [dataset])]
    assert roots == ['/mnt/refer_seg'] * 5


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'tiny' in name])
def test_the_tiny_configs_build(name):
    config = Config.fromfile(ROOT / 'configs' / name)
    model = MODELS.build(config.model)
    for loader in LOADERS:
        data = DATASETS.build(complete_dataloader(config[loader], config).dataset)
        item = data[0]
        assert item['pixel_values'].shape[-1] == model.policy.config['force_image_size']
        assert item['g_pixel_values'].shape[-1] == model.policy.grounding_encoder.image_size


def test_the_4b_data_lies_where_the_readme_says(weights, tmp_path, monkeypatch):
    shutil.copytree(weights / 'pretrained', tmp_path / 'pretrained')
    monkeypatch.chdir(tmp_path)
    config = Config.fromfile(ROOT / 'configs/sa2va_4b_dual_loop_sft.py')
    source = complete_dataloader(config.train_dataloader, config).dataset.datasets[0]
    with pytest.raises(FileNotFoundError, match=r'data/refer_seg/refcoco'):
        DATASETS.build(source)
    folder = Path('data/refer_seg')
    (folder / 'refcoco').mkdir(parents=True)
    (folder / 'images/train2014').mkdir(parents=True)
    Image.new('RGB', (40, 30), (200, 0, 0)).save(folder / 'images/train2014/COCO_1.jpg')
    polygon = [5, 5, 25, 5, 25, 20, 5, 20]
    (folder / 'refcoco/instances.json').write_text(
        json.dumps(
            {
                'images': [{'id': 1, 'file_name': 'COCO_1.jpg', 'height': 30, 'width': 40}],
                'annotations': [
                    {'id': 2, 'image_id': 1, 'category_id': 3, 'segmentation': [polygon]}
                ],
                'categories': [{'id': 3, 'name': 'box'}],
            }
        )
    )
    sentence = {'sent_id': 5, 'sent': 'the box', 'raw': 'the box', 'tokens': ['the', 'box']}
    reference = {
        **{'ref_id': 4, 'ann_id': 2, 'image_id': 1, 'category_id': 3, 'split': 'train'},
        **{'file_name': 'COCO_1_4.jpg', 'sentences': [sentence], 'sent_ids': [5]},
    }
    with (folder / 'refcoco/refs(unc).p').open('wb') as file:
        pickle.dump([reference], file)
    item = DATASETS.build(source)[0]
    assert item['meta'].caption == 'the box'
    assert item['pixel_values'].shape == (1, 3, 448, 448)
    assert item['g_pixel_values'].shape == (3, 1024, 1024)
    assert item['masks'].shape == (1, 30, 40)


ORDER = (
    'WatchdogHook RuntimeInfoHook ConfigCheckHook DeepSpeedHook ClusterCheckHook IterTimerHook '
    'DistSamplerSeedHook RankSeedHook EMATeacherHook ProfileHook BadRecordHook RolloutHook '
    'ResumedValidationHook LoggerHook ParamSchedulerHook AtomicCheckpointHook RewardFailureHook '
    'PreemptionHook ReportHook'
)


@pytest.mark.parametrize('dumped', [False, True])
def test_the_hooks_run_in_this_order(dumped, tmp_path):
    config = Config.fromfile(ROOT / 'configs/sa2va_tiny_dual_loop.py')
    if dumped:
        config.dump(tmp_path / 'dump.py')
        config = Config.fromfile(tmp_path / 'dump.py')
    runner = Runner(
        torch.nn.Linear(1, 1),
        str(tmp_path),
        default_hooks=config.default_hooks,
        experiment_name=f'order_{dumped}',
        log_level='WARNING',
    )
    assert [type(hook).__name__ for hook in runner.hooks] == ORDER.split()


def test_a_collective_may_take_longer_than_the_watchdog_allows(monkeypatch):
    """Else NCCL ends the ranks that wait before the watchdog names the slow one."""
    config = Config.fromfile(ROOT / 'configs/sa2va_tiny_dual_loop.py')
    watchdog = HOOKS.build(config.default_hooks.watchdog)
    given = {}
    monkeypatch.setattr(
        torch.distributed, 'init_process_group', lambda **options: given.update(options)
    )
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch.multiprocessing, 'set_start_method', lambda method: None)
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('LOCAL_RANK', '0')
    init_dist('pytorch', **config.env_cfg.dist_cfg)
    allowed = given['timeout'].total_seconds()
    assert given['backend'] == 'nccl'
    assert allowed > max(watchdog.limits.values()) + 2 * watchdog.grace
