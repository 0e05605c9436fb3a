import shutil

import numpy as np
import pytest
from PIL import Image

from projects.llava_sam2_rl.datasets import openimages
from projects.llava_sam2_rl.datasets.openimages import OpenImagesDataset, index_rows
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid

HEADER = 'MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks'
CLICKS = '"0.5 0.5 1;0.25 0.75 0"'


def row(image, label, box):
    name = f'{image}_{label[1:].replace("/", "")}_{box}.png'
    return f'{name},{image},{label},{box},0.1,0.9,0.1,0.9,0.85,{CLICKS}'


def write_tables(root, rows, split='train'):
    root.mkdir(exist_ok=True)
    text = '\n'.join([HEADER, *rows]) + '\n'
    (root / f'{split}-annotations-object-segmentation.csv').write_text(text)
    (root / 'oidv7-class-descriptions.csv').write_text(
        'LabelName,DisplayName\n/m/0aa,"Fish, small"\n/m/0bb,Dog\n'
    )


def picture(path, width=40, height=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def mask_file(path, width=80, height=60, box=(20, 10, 60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((height, width), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    Image.fromarray(mask).convert('1').save(path)


LAYOUTS = {
    'original': ('images/train', 'masks/train'),
    'flat': ('.', '.'),
    'archives': ('train', 'train-masks'),
    'sixteen': ('images', 'masks/train-masks-a'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_an_object_of_any_layout(tmp_path, layout):
    root = tmp_path / 'openimages'
    write_tables(root, [row('a1', '/m/0aa', 'b1'), row('a1', '/m/0zz', 'b2')])
    images, masks = LAYOUTS[layout]
    picture(root / images / 'a1.jpg')
    mask_file(root / masks / 'a1_m0aa_b1.png')
    mask_file(root / masks / 'a1_m0zz_b2.png', box=(0, 0, 80, 2))
    if layout == 'sixteen':
        (root / 'masks' / 'train-masks-0').mkdir()
    data = OpenImagesDataset(str(root))
    assert len(data) == 2
    sample = data[0]['sample']
    expected = np.zeros((30, 40), bool)
    expected[5:20, 10:30] = True  # half of 10:40, 20:60
    assert np.array_equal(sample.mask, expected)
    assert sample.image.shape == (30, 40, 3)
    assert (sample.name, sample.category) == ('openimages/a1_m0aa_b1', 'Fish, small')
    assert sample.caption is None
    other = data[1]['sample']
    assert other.category is None  # a class without a name
    assert other.mask.sum() == 40


def test_folders_can_be_given(tmp_path):
    root = tmp_path / 'openimages'
    write_tables(root, [row('a1', '/m/0bb', 'b1')], 'validation')
    picture(tmp_path / 'elsewhere' / 'a1.jpg')
    mask_file(root / 'm' / 'a1_m0bb_b1.png')
    data = OpenImagesDataset(
        str(root), 'validation', image_dir=str(tmp_path / 'elsewhere'), mask_dir='m'
    )
    assert data[0]['sample'].category == 'Dog'
    with pytest.raises(FileNotFoundError, match='gone'):
        OpenImagesDataset(str(root), 'validation', image_dir='gone')


def test_bad_records_are_counted_and_replaced(tmp_path):
    root = tmp_path / 'openimages'
    boxes = {
        'good': None,
        'nomask': 'missing_mask',
        'text': 'corrupt_mask',
        'aspect': 'mask_aspect',
        'empty': 'empty_mask',
    }
    rows = [row('a1', '/m/0aa', box) for box in boxes]
    rows += [row('gone', '/m/0aa', 'noimage'), '../a1_m0aa_good.png,a1,/m/0aa,x,,,,,,']
    write_tables(root, rows)
    picture(root / 'images/train/a1.jpg')
    folder = root / 'masks/train'
    for box in ('good', 'noimage'):
        mask_file(folder / f'{"a1" if box == "good" else "gone"}_m0aa_{box}.png')
    (folder / 'a1_m0aa_text.png').write_text('no picture')
    mask_file(folder / 'a1_m0aa_aspect.png', 60, 60)
    mask_file(folder / 'a1_m0aa_empty.png', box=(0, 0, 0, 0))
    data = OpenImagesDataset(str(root), max_attempts=200)
    reasons = [*boxes.values(), 'missing_image', 'unsafe_path']
    for index, reason in enumerate(reasons):
        item = data[index]
        assert item['sample'].sample_id == 'a1_m0aa_good'
        assert [s[2] for s in item['skipped'][:1]] == ([] if reason is None else [reason])


def test_an_image_turned_by_exif_is_turned_where_its_mask_was(tmp_path):
    root = tmp_path / 'openimages'
    write_tables(root, [row('a1', '/m/0aa', 'b1')])
    (root / 'images/train').mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[:15, :20] = 255  # top left, so top right once turned
    Image.fromarray(stored).save(root / 'images/train/a1.jpg', exif=exif, quality=95)
    mask_file(root / 'masks/train/a1_m0aa_b1.png', 60, 80, (30, 0, 60, 40))
    sample = OpenImagesDataset(str(root))[0]['sample']
    assert sample.image.shape == (40, 30, 3)
    assert np.array_equal(sample.image[..., 0] > 128, sample.mask)


def test_rows_are_indexed_in_blocks_without_losing_any(tmp_path):
    # More than one block of 4 MiB, names of different length, classes that first come up late.
    path = tmp_path / 'rows.csv'
    count = 200_000
    labels = [f'/m/{i % 7 + (i // 150_000) * 7:02x}' for i in range(count)]
    images = [f'{i:016x}' if i < 190_000 else f'{i:018x}' for i in range(count)]
    with open(path, 'w') as file:
        file.write(HEADER + '\n')
        for i in range(count):
            file.write(f'{images[i]}_{i}.png,{images[i]},{labels[i]},0,0,1,0,1,0.9,{CLICKS}\n')
    assert path.stat().st_size > 3 * (4 << 20)
    index = index_rows(path)
    assert all(array.dtype.kind in 'Si' for array in index.values())
    assert index['mask'].tolist() == [f'{image}_{i}.png'.encode() for i, image in enumerate(images)]
    assert index['image'].tolist() == [image.encode() for image in images]
    assert index['labels'][index['label']].tolist() == [label.encode() for label in labels]
    assert len(index['labels']) == 14


def test_the_index_is_opened_not_built_at_the_next_start(tmp_path, monkeypatch):
    root = tmp_path / 'openimages'
    write_tables(root, [row('a1', '/m/0aa', 'b1')])
    OpenImagesDataset(str(root))
    monkeypatch.setattr(openimages, 'index_rows', None)
    assert OpenImagesDataset(str(root)).sample_id(0) == 'a1_m0aa_b1'
    monkeypatch.undo()
    write_tables(root, [row('a2', '/m/0aa', 'b1'), row('a3', '/m/0aa', 'b1')])
    assert len(OpenImagesDataset(str(root))) == 2


def test_tables_that_do_not_fit_are_refused(tmp_path):
    root = tmp_path / 'openimages'
    with pytest.raises(FileNotFoundError, match=r'train-annotations.*download'):
        OpenImagesDataset(str(root))
    with pytest.raises(ValueError, match='validation'):
        OpenImagesDataset(str(root), 'val')
    write_tables(root, [])
    with pytest.raises(ValueError, match='no row'):
        OpenImagesDataset(str(root))
    (root / 'train-annotations-object-segmentation.csv').write_text('MaskPath,ImageID\na,b\n')
    with pytest.raises(ValueError, match='LabelName'):
        OpenImagesDataset(str(root))


def test_the_real_samples(shared_dir, tmp_path):
    folder = shared_dir / 'realdata' / 'openimages'
    if not folder.is_dir():
        pytest.skip(f'no real samples at {folder}')
    for layout in ('original', 'flat'):
        root = tmp_path / layout
        if layout == 'original':
            shutil.copytree(folder, root)
        else:
            root.mkdir()
            for path in [*folder.glob('*.csv'), *folder.glob('*/train/*')]:
                shutil.copy(path, root)
        data = OpenImagesDataset(str(root))
        assert len(data) == 8
        seen = set()
        for item in data:
            sample = item['sample']
            seen.add((sample.sample_id, sample.category))
            with Image.open(folder / 'masks/train' / f'{sample.sample_id}.png') as file:
                original = np.array(file)
            assert sample.mask.mean() == pytest.approx(original.mean(), rel=0.02)
            grids = prompt_mask_grid(np.stack([sample.mask]), 16)[0].numpy()
            for mask in (original, grids):
                y, x = (np.argwhere(mask).mean(0) + 0.5) / mask.shape
                v, u = (np.argwhere(sample.mask).mean(0) + 0.5) / sample.mask.shape
                assert abs(y - v) < 1 / 16
                assert abs(x - u) < 1 / 16
        assert len(seen) == 8
        assert ('00dc0baf74f95e45_m0663v_12e4ba7e', 'Pizza') in seen
        assert {category for _, category in seen} == {'Dog', 'Pizza', 'Taxi'}
