import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import sa1b
from projects.llava_sam2_rl.datasets.sa1b import SA1BDataset

HEIGHT, WIDTH = 30, 40


def box_mask(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def annotation(number, mask, **changes):
    code = coco_mask.encode(np.asfortranarray(mask))
    return {
        'id': number,
        'segmentation': {'size': [HEIGHT, WIDTH], 'counts': code['counts'].decode()},
        'area': int(mask.sum()),
        'predicted_iou': 0.9,
        'stability_score': 0.95,
        **changes,
    }


def write(root, number, annotations, apart=False):
    for folder in ('js', 'img') if apart else ('.',):
        (root / folder).mkdir(parents=True, exist_ok=True)
    name = f'sa_{number}'
    image = {'image_id': number, 'width': WIDTH, 'height': HEIGHT, 'file_name': f'{name}.jpg'}
    (root / ('js' if apart else '.') / f'{name}.json').write_text(
        json.dumps({'image': image, 'annotations': annotations})
    )
    pixels = np.full((HEIGHT, WIDTH, 3), number, np.uint8)
    Image.fromarray(pixels).save(root / ('img' if apart else '.') / f'{name}.jpg')


BIG, SMALL = box_mask(5, 5, 25, 25), box_mask(0, 0, 3, 2)


@pytest.mark.parametrize('apart', [False, True])
def test_every_mask_of_either_layout_is_a_record(tmp_path, apart):
    write(tmp_path, 7, [annotation(1, BIG), annotation(2, SMALL)], apart)
    write(tmp_path, 200, [annotation(3, BIG | SMALL)], apart)
    for _ in range(2):  # the second start finds the cache below the same folder
        data = SA1BDataset(str(tmp_path))
        assert len(data) == 3
        samples = {item['sample'].sample_id: item['sample'] for item in data}
    assert set(samples) == {'sa_7-0', 'sa_7-1', 'sa_200-0'}
    for sample_id, mask in (('sa_7-0', BIG), ('sa_7-1', SMALL), ('sa_200-0', BIG | SMALL)):
        assert np.array_equal(samples[sample_id].mask, mask.astype(bool))
        number = int(sample_id.split('-')[0][3:])
        assert abs(int(samples[sample_id].image[3, 4, 1]) - number) <= 1
        assert samples[sample_id].caption is None


def test_the_filters_choose_among_what_is_indexed_once(tmp_path, monkeypatch):
    masks = [
        annotation(1, BIG, predicted_iou=0.5, stability_score=0.5),
        annotation(2, BIG, predicted_iou=0.8, stability_score=0.99),
        annotation(3, SMALL, predicted_iou=0.99, stability_score=0.8),
    ]
    write(tmp_path, 7, masks)
    SA1BDataset(str(tmp_path))
    monkeypatch.setattr(sa1b, 'index_files', None)

    def chosen(**filters):
        data = SA1BDataset(str(tmp_path), **filters)
        return [data.sample_id(i) for i in range(len(data))]

    assert chosen() == ['sa_7-0', 'sa_7-1', 'sa_7-2']
    # 20 x 20 and 3 x 2 of 40 x 30 pixels: a third, and a two-hundredth.
    assert chosen(min_area=0.3) == ['sa_7-0', 'sa_7-1']
    assert chosen(min_area=0.005) == ['sa_7-0', 'sa_7-1', 'sa_7-2']
    assert chosen(predicted_iou=0.8) == ['sa_7-1', 'sa_7-2']
    assert chosen(stability_score=0.9) == ['sa_7-1']
    with pytest.raises(ValueError, match='none of 3 masks has min_area=1'):
        SA1BDataset(str(tmp_path), min_area=1)
    with pytest.raises(ValueError, match='min_area'):
        SA1BDataset(str(tmp_path), min_area=100)


def test_a_changed_or_added_file_is_indexed_anew(tmp_path):
    write(tmp_path, 7, [annotation(1, BIG)])
    assert len(SA1BDataset(str(tmp_path))) == 1
    write(tmp_path, 8, [annotation(1, BIG)])
    assert len(SA1BDataset(str(tmp_path))) == 2
    write(tmp_path, 8, [annotation(1, BIG), annotation(2, SMALL)])
    assert len(SA1BDataset(str(tmp_path))) == 3


@pytest.mark.parametrize(
    ('case', 'reason'),
    [
        ('json', 'bad_json'),
        ('list', 'bad_json'),
        ('no annotations', 'bad_json'),
        ('null annotation', 'bad_json'),
        ('null size', 'bad_json'),
        ('null segmentation', 'bad_segmentation'),
        ('long rle', 'bad_rle'),
        ('huge', 'mask_too_large'),
        ('image', 'missing_image'),
        ('aspect', 'mask_aspect'),
        ('empty', 'empty_mask'),
    ],
)
def test_bad_records_are_counted_and_replaced(tmp_path, case, reason):
    write(tmp_path, 1, [annotation(1, BIG)])
    path = tmp_path / 'sa_1.json'
    data = json.loads(path.read_text())
    code = data['annotations'][0]['segmentation']
    if case == 'json':
        path.write_text('{"image": ')
    elif case == 'list':
        path.write_text('[]')
    else:
        if case == 'no annotations':
            data['annotations'] = []
        elif case == 'null annotation':
            data['annotations'] = [None]
        elif case == 'null size':
            data['image']['height'] = None
        elif case == 'null segmentation':
            data['annotations'][0]['segmentation'] = None
        elif case == 'long rle':
            code['size'] = [HEIGHT - 1, WIDTH]
        elif case == 'huge':
            code.update(size=[10**6, 10**6], counts=[10**12])
        elif case == 'aspect':
            turned = coco_mask.encode(np.asfortranarray(BIG.T))
            code.update(size=[WIDTH, HEIGHT], counts=turned['counts'].decode())
        elif case == 'empty':
            data['annotations'] = [annotation(1, BIG * 0)]
        path.write_text(json.dumps(data))
    if case == 'image':
        (tmp_path / 'sa_1.jpg').unlink()
    write(tmp_path, 2, [annotation(1, BIG)])
    item = SA1BDataset(str(tmp_path))[0]
    assert item['sample'].sample_id == 'sa_2-0'
    assert {record[2] for record in item['skipped']} == {reason}


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no \.json file: download'):
        SA1BDataset(str(tmp_path))
