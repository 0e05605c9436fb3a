"""An epoch over files of which some are broken in every way there is, as the training meets it."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import (
    MixedRegionDataset,
    RefCOCODataset,
    SA1BDataset,
    Sa2VATransform,
    sa2va_collate,
)
from projects.llava_sam2_rl.hooks import BadRecordHook

HEIGHT, WIDTH = 30, 40
MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[5:20, 10:30] = 1
TRANSFORM = Sa2VATransform(image_size=28, grounding_size=32)


def rle(mask):
    code = coco_mask.encode(np.asfortranarray(mask))
    return {'size': list(mask.shape), 'counts': code['counts'].decode()}


#: What is done to a record, and the reason it is then counted by. ``data`` is what its JSON holds.
WAYS = {
    'truncated JPEG': 'corrupt_image',
    'zero bytes': 'corrupt_image',
    'all zeros': 'corrupt_image',
    'missing image': 'missing_image',
    'bomb': 'image_too_large',
    'wrong JSON': 'bad_json',
    'None fields': 'bad_json',
    'long RLE': 'bad_rle',
    'other aspect': 'mask_aspect',
    'empty mask': 'empty_mask',
    'absurd size': 'mask_too_large',
}


def corrupt(way, image, annotation):
    data = json.loads(annotation.read_text())
    entry = data['annotations'][0]
    if way == 'truncated JPEG':
        image.write_bytes(image.read_bytes()[:-60])
    elif way == 'zero bytes':
        image.write_bytes(b'')
    elif way == 'all zeros':
        image.write_bytes(bytes(image.stat().st_size))
    elif way == 'missing image':
        image.unlink()
    elif way == 'bomb':
        # A header that promises 60 000 x 60 000 pixels.
        raw = bytearray(image.read_bytes())
        at = raw.index(b'\xff\xc0') + 5
        raw[at : at + 4] = b'\xea\x60\xea\x60'
        image.write_bytes(raw)
    elif way == 'wrong JSON':
        annotation.write_text(annotation.read_text()[:-30])
        return
    elif way == 'None fields':
        data['image'] = dict.fromkeys(data['image'])
        entry.update(dict.fromkeys(entry))
    elif way == 'long RLE':
        entry['segmentation']['size'] = [HEIGHT - 1, WIDTH]
    elif way == 'other aspect':
        entry['segmentation'] = rle(MASK.T)
    elif way == 'empty mask':
        entry['segmentation'] = rle(MASK * 0)
    elif way == 'absurd size':
        entry['segmentation'] = {'size': [10**7, 10**7], 'counts': [10**14]}
    annotation.write_text(json.dumps(data))


def make_sa1b(root, count, corrupted):
    """``corrupted``: ways by number."""
    root.mkdir()
    for i in range(count):
        image, annotation = root / f'sa_{i}.jpg', root / f'sa_{i}.json'
        Image.new('RGB', (WIDTH, HEIGHT), (i % 256, 80, 0)).save(image)
        about = {'image_id': i, 'width': WIDTH, 'height': HEIGHT, 'file_name': image.name}
        entry = {'segmentation': rle(MASK), 'area': 300, 'predicted_iou': 0.9}
        annotation.write_text(json.dumps({'image': about, 'annotations': [entry]}))
        if i in corrupted:
            corrupt(corrupted[i], image, annotation)


def one_epoch(dataset, hook):
    """Batches of four, as the loop hands them to the hook; the names that were trained on."""
    trained = []
    for start in range(0, len(dataset), 4):
        items = [dataset[i] for i in range(start, min(start + 4, len(dataset)))]
        batch = sa2va_collate(items)
        hook.after_train_iter(None, 0, batch)
        trained += [meta.sample_id for meta in batch['data_samples']]
        assert all(mask.any() for mask in batch['data']['masks'])
    hook.after_train_epoch(None)
    hook.after_train(None)
    return trained


def test_one_in_a_hundred_broken_in_each_way_ends_the_epoch(tmp_path, monkeypatch):
    count = 300
    ways = list(WAYS) * 3
    corrupted = {7 + 8 * i: way for i, way in enumerate(ways)}
    assert max(corrupted) < count
    make_sa1b(tmp_path / 'sa1b', count, corrupted)
    # A file that cannot be read at all is one record without a number.
    names = {
        f'sa_{i}-{-1 if way == "wrong JSON" else 0}': WAYS[way] for i, way in corrupted.items()
    }
    # Expressions beside them, whose pictures lie elsewhere.
    (tmp_path / 'refer/refcoco').mkdir(parents=True)
    (tmp_path / 'refer/train2014').mkdir()
    Image.new('RGB', (WIDTH, HEIGHT)).save(tmp_path / 'refer/train2014/a.jpg')
    images = [
        {'id': 1, 'file_name': 'a.jpg', 'height': HEIGHT, 'width': WIDTH},
        {'id': 2, 'file_name': '../../secret.jpg', 'height': HEIGHT, 'width': WIDTH},
    ]
    Image.new('RGB', (WIDTH, HEIGHT)).save(tmp_path / 'secret.jpg')
    refs = [
        {
            'ref_id': i,
            'ann_id': 1 + (i == 50),
            'split': 'train',
            'sentences': [{'sent': f'cup {i}'}],
        }
        for i in range(100)
    ]
    refs[20]['sentences'] = [{'sent': None}]
    polygon = [[10, 5, 30, 5, 30, 20, 10, 20]]
    annotations = [{'id': k, 'image_id': k, 'segmentation': polygon} for k in (1, 2)]
    (tmp_path / 'refer/refcoco/refs(unc).p').write_bytes(pickle.dumps(refs))
    (tmp_path / 'refer/refcoco/instances.json').write_text(
        json.dumps({'images': images, 'annotations': annotations})
    )

    before = sorted(tmp_path.rglob('*'))
    dataset = MixedRegionDataset(
        [
            SA1BDataset(str(tmp_path / 'sa1b'), transforms=TRANSFORM),
            RefCOCODataset(str(tmp_path / 'refer'), transforms=TRANSFORM),
        ]
    )
    hook = BadRecordHook()
    met = set()
    monkeypatch.setattr(
        'projects.llava_sam2_rl.hooks.bad_records.print_log', lambda *args, **kwargs: None
    )
    count_batch = hook.after_train_iter

    def keep(runner, index, batch):
        met.update(batch['data']['skipped'])
        count_batch(runner, index, batch)

    hook.after_train_iter = keep
    trained = one_epoch(dataset, hook)
    expected = {('sa1b', name, reason) for name, reason in names.items()}
    expected |= {('refcoco', '50', 'unsafe_path'), ('refcoco', '20', 'empty_expression')}
    assert met == expected
    per_reason = Counter(WAYS.values())
    for reason, ways_of_it in per_reason.items():
        assert hook.bad['sa1b', reason] >= 3 * ways_of_it
    assert len(trained) == count + 100
    assert not {name for _, name, _ in expected} & set(trained[:count]) - {'20', '50'}
    assert not {'20', '50'} & set(trained[count:])
    after = [path for path in sorted(tmp_path.rglob('*')) if '.index_cache' not in path.parts]
    assert after == before


@pytest.mark.parametrize('way', ['truncated JPEG', 'wrong JSON', 'empty mask'])
def test_nearly_a_third_broken_stops_with_the_list(tmp_path, way):
    count = 200
    rng = np.random.default_rng(0)
    make_sa1b(tmp_path / 'sa1b', count, dict.fromkeys(rng.permutation(count)[:60].tolist(), way))
    dataset = SA1BDataset(str(tmp_path / 'sa1b'), transforms=TRANSFORM)
    with pytest.raises(RuntimeError, match=r'sa1b: \d+ of the first \d+ records') as error:
        one_epoch(dataset, BadRecordHook())
    assert str(error.value).count(WAYS[way]) >= 10
    assert 'max_bad_fraction=0.2' in str(error.value)
