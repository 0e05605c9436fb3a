"""The bases of configs/_base_/datasets: they parse, build with fake sources, and mix safely."""

import json
import pickle

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import sa2va_collate
from projects.llava_sam2_rl.engine.dataloader_config import complete_dataloader
from projects.llava_sam2_rl.registry import DATASETS

BASES = {
    'openimages': {'OpenImagesDataset': 1},
    'sa1b': {'SA1BDataset': 1},
    'grefcoco': {'GRefCOCODataset': 1},
    'sa2va_finetune': {'Sa2VAFinetuneDataset': 100},
    'coco_regions': {'COCORegionDataset': 1},
    'jsonl_regions': {'JSONLRegionDataset': 1},
    'folder_regions': {'FolderRegionDataset': 1},
    'hugging_face': {'HuggingFaceRegionDataset': 1},
    'original_mixture': {
        'SAVPairsDataset': 2,
        'SA1BDataset': 1,
        'OpenImagesDataset': 1,
        'RefCOCODataset': 4,
    },
    'captioned_mixture': {
        'DescribeAnythingDataset': 1,
        'GraspAnyRegionDataset': 1,
        'RefCOCODataset': 4,
    },
    'multi_task_mixture': {
        'SAVPairsDataset': 2,
        'DescribeAnythingDataset': 1,
        'RefCOCODataset': 4,
        'ConversationDataset': 1,
    },
}


def load(root, name):
    config = Config.fromfile(root / f'configs/_base_/datasets/{name}.py')
    return complete_dataloader(config.train_dataloader, config)


@pytest.mark.parametrize('name', BASES)
def test_a_base_names_its_sources_with_literal_paths(root, name, tmp_path):
    loader = load(root, name)
    repeats = {}
    for source in loader.dataset.datasets:
        repeats[source.type.__name__] = source.get('repeats', 1)
        paths = [source[key] for key in ('data_root', 'ann_file') if key in source]
        assert all(path.startswith('data/') for path in paths)
        assert paths
    assert repeats == BASES[name]
    config = Config(dict(train_dataloader=loader))
    config.dump(tmp_path / 'dump.py')
    again = Config.fromfile(tmp_path / 'dump.py').train_dataloader.dataset.datasets
    assert [source.type.rsplit('.', 1)[-1] for source in again] == [
        source.type.__name__ for source in loader.dataset.datasets
    ]


BOX = np.zeros((30, 40), np.uint8)
BOX[5:20, 10:30] = 1


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (40, 30), (200, 0, 0)).save(path)


def write_openimages(root):
    picture(root / 'images/train/a1.jpg')
    (root / 'masks/train').mkdir(parents=True)
    Image.fromarray(BOX * 255).convert('1').save(root / 'masks/train/m.png')
    (root / 'train-annotations-object-segmentation.csv').write_text(
        'MaskPath,ImageID,LabelName,BoxID\nm.png,a1,/m/0,b\n'
    )
    (root / 'oidv7-class-descriptions.csv').write_text('LabelName,DisplayName\n/m/0,Box\n')


def write_sa1b(root):
    picture(root / 'sa_1.jpg')
    code = coco_mask.encode(np.asfortranarray(BOX))
    annotation = {
        'segmentation': {'size': [30, 40], 'counts': code['counts'].decode()},
        'area': 300,
        'predicted_iou': 0.9,
        'stability_score': 0.95,
    }
    image = {'width': 40, 'height': 30, 'file_name': 'sa_1.jpg'}
    (root / 'sa_1.json').write_text(json.dumps({'image': image, 'annotations': [annotation]}))


def write_refcoco(root):
    picture(root / 'images/train2014/c.jpg')
    (root / 'refcoco').mkdir()
    ref = {
        **{'ref_id': 4, 'ann_id': 2, 'image_id': 1, 'category_id': 3, 'split': 'train'},
        'sentences': [{'sent': 'the box'}],
    }
    (root / 'refcoco/refs(unc).p').write_bytes(pickle.dumps([ref]))
    polygon = [10, 5, 30, 5, 30, 20, 10, 20]
    (root / 'refcoco/instances.json').write_text(
        json.dumps(
            {
                'images': [{'id': 1, 'file_name': 'c.jpg', 'height': 30, 'width': 40}],
                'annotations': [
                    {'id': 2, 'image_id': 1, 'category_id': 3, 'segmentation': [polygon]}
                ],
                'categories': [{'id': 3, 'name': 'box'}],
            }
        )
    )


def write_sav_pairs(root):
    root.mkdir(parents=True)
    frame = np.zeros((512, 512, 3), np.float32)
    mask = np.zeros((512, 512), np.float32)
    mask[100:300, 100:300] = 255
    np.savez(root / 'masklet_data_0.npz', frame1=frame, mask1=mask, frame2=frame, mask2=mask)


def write_conversations(root):
    picture(root / 'images/a.jpg')
    turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'Red.'}]
    record = {'id': 'q', 'image': 'a.jpg', 'conversations': turns}
    (root / 'llava_v1_5_mix665k.json').write_text(json.dumps([record]))


def write_grefcoco(root):
    write_refcoco(root)
    (root / 'grefcoco').mkdir()
    (root / 'refcoco/instances.json').rename(root / 'grefcoco/instances.json')
    refs = [
        {'ref_id': i, 'ann_id': ids, 'image_id': 1, 'split': 'train', 'sentences': [{'sent': text}]}
        for i, (ids, text) in enumerate([([2], 'the box'), ([-1], 'the dog')])
    ]
    (root / 'grefcoco/grefs(unc).json').write_text(json.dumps(refs))


def write_finetune(root):
    picture(root / 'images/a.jpg')
    entry = {'image': 'a.jpg', 'mask': [[[10, 5, 30, 5, 30, 20, 10, 20]]], 'text': ['A box.']}
    (root / 'annotations.json').write_text(json.dumps([entry]))


def test_sets_and_nothing_lie_where_their_bases_say(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_grefcoco(tmp_path / 'data/refer_seg')
    write_finetune(tmp_path / 'data/sa2va_finetune')
    referred = DATASETS.build(load(root, 'grefcoco').dataset)
    own = DATASETS.build(load(root, 'sa2va_finetune').dataset)
    assert (len(referred), len(own)) == (2, 100)
    batch = sa2va_collate([*referred, own[99]])
    assert [len(masks) for masks in batch['data']['masks']] == [1, 0, 1]
    assert batch['data']['captions'] == ['the box', 'the dog', None]
    assert batch['data']['region_captions'] == [None, None, ('a box',)]
    assert batch['data']['skipped'] == []


def test_data_of_ones_own_lies_where_its_bases_say(root, tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    folders = {n: tmp_path / 'data' / n for n in BASES if n.endswith('regions')}
    for folder in folders.values():
        picture(folder / 'a.jpg')
    polygon = [10, 5, 30, 5, 30, 20, 10, 20]
    picture(folders['coco_regions'] / 'images/a.jpg')
    instances = {
        'images': [{'id': 1, 'file_name': 'a.jpg', 'height': 30, 'width': 40}],
        'annotations': [{'id': 2, 'image_id': 1, 'segmentation': [polygon]}],
    }
    (folders['coco_regions'] / 'annotations.json').write_text(json.dumps(instances))
    (folders['coco_regions'] / 'captions.csv').write_text('id,caption\n2,the box\n')
    line = {'image': 'a.jpg', 'mask': polygon, 'caption': 'the box'}
    (folders['jsonl_regions'] / 'regions.jsonl').write_text(json.dumps(line))
    Image.fromarray(BOX * 255).save(folders['folder_regions'] / 'a.mask.png')
    (folders['folder_regions'] / 'a.txt').write_text('the box')
    raw = (folders['jsonl_regions'] / 'a.jpg').read_bytes()
    row = {'image': [raw], 'mask': [polygon], 'caption': ['the box']}
    datasets.Dataset.from_dict(row).save_to_disk('data/hugging_face')
    for name in [*folders, 'hugging_face']:
        item = DATASETS.build(load(root, name).dataset)[0]
        assert (item['meta'].caption, item['skipped']) == ('the box', []), name
        assert item['masks'].sum() == pytest.approx(15 * 20, abs=1), name


def test_the_sources_lie_where_the_bases_say_and_share_batches(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_openimages(tmp_path / 'data/openimages')
    write_sa1b(tmp_path / 'data/sa1b')
    write_refcoco(tmp_path / 'data/refer_seg')
    write_sav_pairs(tmp_path / 'data/sav_pairs')
    write_conversations(tmp_path / 'data/llava')
    mixed = DATASETS.build(load(root, 'original_mixture').dataset)
    assert len(mixed) == 2 * 1 + 1 + 1 + 4 * 1
    items = list(mixed)
    config = load(root, 'multi_task_mixture').dataset
    config.datasets = [s for s in config.datasets if 'Describe' not in s.type.__name__]
    tasks = DATASETS.build(config)
    items.append(tasks[len(tasks) - 1])
    batch = sa2va_collate(items)
    sources = [meta.source for meta in batch['data_samples']]
    assert sources == ['sav_pairs'] * 2 + ['sa1b', 'openimages'] + ['refcoco'] * 4 + [
        'conversations'
    ]
    data = batch['data']
    assert data['pair']['index'].tolist() == [0, 1]
    assert [mask.shape[0] for mask in data['masks']] == [1] * 8 + [0]
    assert data['captions'] == [None] * 4 + ['the box'] * 4 + [None]
    assert data['conversations'] == [None] * 8 + [(('What?', 'Red.'),)]
    assert all(pixels.shape == (1, 3, 448, 448) for pixels in data['pixel_values'])
    assert data['skipped'] == []
