"""The configs: they parse, survive a dump, and tiny and 4B differ in literals only."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from projects.llava_sam2_rl.registry import DATASETS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.name for path in (ROOT / 'configs').glob('*.py'))


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_parses_and_its_dump_does_too(name, tmp_path):
    config = Config.fromfile(ROOT / 'configs' / name)
    config.dump(tmp_path / 'dump.py')
    again = Config.fromfile(tmp_path / 'dump.py')
    assert again.model.policy.llm_config == config.model.policy.llm_config
    # A string after a dump, a class before.
    kind = config.model.objective.type.__name__
    assert again.model.objective.type.endswith(kind)


@pytest.mark.parametrize('kind', ['dual_loop_sft', 'dual_loop', 'dual_loop_gumbel'])
def test_tiny_and_4b_are_the_same_but_for_literals(kind):
    tiny = Config.fromfile(ROOT / f'configs/sa2va_tiny_{kind}.py')
    large = Config.fromfile(ROOT / f'configs/sa2va_4b_{kind}.py')
    assert tiny.model.type is large.model.type
    assert tiny.model.objective.type is large.model.objective.type
    assert set(tiny.model) == set(large.model)
    optional = {'bos_token_id', 'eos_token_id', 'initializer_range'}
    for section in ('vision_config', 'llm_config', 'grounding_encoder_config', 'lora'):
        a, b = tiny.model.policy[section], large.model.policy[section]
        assert set(a) ^ set(b) <= optional, section
    assert set(tiny.model.policy) == set(large.model.policy)
    assert tiny.model.policy.trainable == large.model.policy.trainable
    for section in ('custom_hooks', 'env_cfg', 'visualizer', 'log_processor'):
        assert tiny[section] == large[section]


def test_the_4b_data_lies_where_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Config.fromfile(
        ROOT / 'configs/sa2va_4b_dual_loop_sft.py'
    ).train_dataloader.dataset.datasets[0]
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
