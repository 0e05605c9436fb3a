"""Folders that are not there, records that cannot be read, transforms of other sizes."""

import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from projects.llava_sam2_rl.datasets import GeneratedScenes, Sa2VATransform
from projects.llava_sam2_rl.datasets.base import RegionDataset
from projects.llava_sam2_rl.evaluation import DLCBenchDataset
from projects.llava_sam2_rl.preflight.data import check_data, item_sizes
from projects.llava_sam2_rl.preflight.files import Source, check_checkpoint_folder, check_paths
from projects.llava_sam2_rl.registry import DATASETS, METRICS, TRANSFORMS
from test_preflight.configs import BIG, ROOT, by_key, config


@TRANSFORMS.register_module(force=True)
class OwnTransform:
    """Somebody's own, which wraps ours and has nothing to compare but what it makes."""

    def __init__(self, side=448):
        self.inner = Sa2VATransform(image_size=side, patch_size=14)

    def __call__(self, sample):
        return self.inner(sample)


@DATASETS.register_module(force=True)
class SlowSource(RegionDataset):
    def __init__(self, **kwargs):
        super().__init__(source='slow', **kwargs)
        time.sleep(600)


@DATASETS.register_module(force=True)
class DyingSource(RegionDataset):
    def __init__(self, **kwargs):
        super().__init__(source='dying', **kwargs)
        os.kill(os.getpid(), 9)


@METRICS.register_module(force=True)
class MetricWithAFile:
    def __init__(self, words):
        open(words).close()


def with_source(cfg, loader='train_dataloader', **source):
    cfg[loader].dataset = dict(type='MixedRegionDataset', datasets=[dict(source)])
    return cfg


def test_the_tiny_config_has_nothing():
    assert check_data(config(), 'train') == []
    assert check_data(config(), 'test') == []


def test_a_missing_folder_of_all_splits_is_one_problem_that_names_the_one_option():
    found = by_key(check_data(config(file=BIG), 'train'))
    assert list(found) == ['dataset_defaults.RefCOCODataset.data_root']
    (text,) = found.values()
    assert "there is no 'data/refer_seg'" in text
    assert '--cfg-options dataset_defaults.RefCOCODataset.data_root=PATH' in text


def test_a_validation_folder_that_is_missing_alone(tmp_path):
    """Training data are there; the run would end at its first validation."""
    cfg = with_source(config(), 'val_dataloader', type='Photographs', image_dir=str(tmp_path / 'v'))
    ((key, text),) = by_key(check_data(cfg, 'train')).items()
    assert key == 'val_dataloader.dataset.datasets.0.image_dir'
    assert f"'{tmp_path / 'v'}'" in text
    assert check_data(cfg, 'test') == []


def test_a_file_that_only_the_source_itself_knows_of(tmp_path):
    cfg = with_source(config(), type='RefCOCODataset', data_root=str(tmp_path), image_dir='.')
    ((key, text),) = by_key(check_data(cfg, 'train')).items()
    assert key == 'train_dataloader.dataset.datasets.0'
    assert 'refs(unc).p is not there: download the RefCOCO annotations' in text


def test_a_data_root_that_is_a_file_or_a_pattern_is_the_sources_business(tmp_path):
    (tmp_path / 'regions.parquet').touch()
    for root in ('regions.parquet', '*.parquet'):
        options = dict(type='RefCOCODataset', data_root=str(tmp_path / root))
        assert check_paths(Source('x', options, frozenset())) == []


def test_pictures_that_are_elsewhere(tmp_path):
    """The annotations are read; the first picture is looked for, and is not there."""
    coco = {
        'images': [{'id': 1, 'file_name': 'a.jpg', 'height': 8, 'width': 8}],
        'annotations': [
            {'id': 5, 'image_id': 1, 'segmentation': [[1, 1, 5, 1, 5, 5]], 'bbox': [1, 1, 4, 4]}
        ],
    }
    (tmp_path / 'annotations.json').write_text(json.dumps(coco))
    (tmp_path / 'images').mkdir()
    cfg = with_source(
        config(), 'test_dataloader', type=DLCBenchDataset, data_root=str(tmp_path),
        transforms=dict(type='Sa2VATransform'),
    )  # fmt: skip
    ((key, text),) = by_key(check_data(cfg, 'test')).items()
    assert key == 'test_dataloader.dataset.datasets.0'
    assert '20 x missing_image' in text

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / 'images/a.jpg')
    assert check_data(cfg, 'test') == []


@pytest.mark.parametrize('loader', ['train_dataloader', 'val_dataloader', 'test_dataloader'])
def test_a_transform_of_ones_own_for_another_model(loader):
    cfg = with_source(
        config(), loader, type='GeneratedScenes', length=4, transforms=dict(type='OwnTransform')
    )
    stage = 'test' if loader == 'test_dataloader' else 'train'
    problems = check_data(cfg, stage)
    assert {p.key for p in problems} == {f'{loader}.dataset.datasets.0.transforms'}
    text = ' '.join(problem.message for problem in problems)
    assert 'it makes pixel_values of 1 x 3 x 448 x 448, the model takes any x 3 x 96 x 96' in text
    assert 'g_pixel_values of 3 x 1024 x 1024, the model takes 3 x 128 x 128' in text
    assert 'prompt_masks of 3 x 16 x 16, the model takes any x 6 x 6' in text or 'x 6 x 6' in text


def test_a_size_in_our_own_transform_that_is_not_the_models():
    cfg = config('test_dataloader.dataset.transforms.image_size=448')
    ((key, text),) = by_key(check_data(cfg, 'test')).items()
    assert key == 'test_dataloader.dataset.transforms.image_size'
    assert 'is 448, the model' in text
    assert 'has 96' in text


def test_items_are_compared_with_the_model_name_by_name():
    sizes = dict(image_size=96, patch_size=8, downsample_ratio=0.5, grounding_size=128)
    good = Sa2VATransform(**sizes)
    item = GeneratedScenes(length=1, transforms=good)[0]
    assert item_sizes(item, sizes) == []
    ((option, text, _),) = item_sizes({**item, 'g_pixel_values': torch.zeros(3, 64, 64)}, sizes)
    assert option == 'transforms'
    assert text == 'it makes g_pixel_values of 3 x 64 x 64, the model takes 3 x 128 x 128'
    ((_, text, _),) = item_sizes({**item, 'pixel_values': None}, sizes)
    assert "no 'pixel_values'" in text


def test_a_source_that_reads_for_minutes_is_left_to_the_run():
    started = time.monotonic()
    cfg = with_source(config(), type='SlowSource')
    (problem,) = check_data(cfg, 'train', seconds=2)
    assert time.monotonic() - started < 60
    assert not problem.fatal
    assert problem.key == 'train_dataloader.dataset.datasets.0'


def test_a_source_that_is_killed_is_named():
    (problem,) = check_data(with_source(config(), type='DyingSource'), 'train')
    assert problem.fatal
    assert 'building DyingSource ends the process (exit status -9)' in problem.message


def test_a_metric_and_an_objective_that_cannot_be_built():
    cfg = config('model.objective.beta=0.1', 'model.objective.ref=None')
    cfg.val_evaluator = dict(type='MetricWithAFile', words='nowhere.txt')
    found = by_key(check_data(cfg, 'train'))
    assert 'needs a reference' in found['model.objective']
    assert 'nowhere.txt' in found['val_evaluator']


def test_a_checkpoint_folder(tmp_path):
    ((key, text),) = by_key(check_checkpoint_folder(config(file=BIG))).items()
    assert key == 'model.policy.pretrained'
    assert "no checkpoint folder 'pretrained/Sa2VA-4B'" in text

    # All files but one of two shards.
    source = ROOT / 'projects/llava_sam2_rl/assets/sa2va_tiny'
    for name in ('config.json', 'tokenizer_config.json'):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    shards = {'a': 'model-1.safetensors', 'b': 'model-2.safetensors'}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': shards}))
    (tmp_path / 'model-1.safetensors').touch()
    cfg = config(f'model.policy.pretrained={tmp_path}')
    ((key, text),) = by_key(check_checkpoint_folder(cfg)).items()
    assert 'model-2.safetensors is missing' in text

    cfg = config('load_from=nowhere.pth')
    assert 'there is no checkpoint nowhere.pth' in by_key(check_checkpoint_folder(cfg))['load_from']
