import io
import pickle

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, disable_progress_bars
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import BadRecord, GraspAnyRegionDataset, arrow_shards
from projects.llava_sam2_rl.registry import DATASETS
from test_datasets.alignment import check_aligned

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 40, 60
disable_progress_bars()


def rle(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': [int(side) for side in code['size']], 'counts': code['counts'].decode()}


def box(x0, y0, x1, y1, height=HEIGHT, width=WIDTH):
    mask = np.zeros((height, width), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def png(colour=(250, 120, 10), height=HEIGHT, width=WIDTH):
    file = io.BytesIO()
    Image.new('RGB', (width, height), colour).save(file, 'PNG')
    return file.getvalue()


CUP = box(5, 5, 25, 30)


def chat(*turns):
    return [{'from': ('human', 'gpt')[i % 2], 'value': turn} for i, turn in enumerate(turns)]


def row(**changes):
    return {
        'image': {'bytes': png(), 'path': None},
        'mask_rle': rle(CUP),
        'conversations': chat('<image>\nDescribe <Prompt0>.', 'a red cup'),
        'catagory': 'cup',
        **changes,
    }


def write_part(root, rows, part='Fine-Grained-Dataset-Part1', shards=1):
    Dataset.from_list(rows).save_to_disk(str(root / part), num_shards=shards)
    return root / part


def open_set(root, **options):
    return GraspAnyRegionDataset(str(root), **options)


def reason(data, index=0):
    with pytest.raises(BadRecord) as caught:
        data.read(index, RNG)
    assert caught.value.name == f'grasp_any_region/{data.sample_id(index)}'
    return caught.value.reason


def test_a_row_gives_picture_mask_caption_and_category(tmp_path):
    write_part(tmp_path, [row(), row(mask_rle=rle(box(0, 0, 3, 3)))])
    data = DATASETS.build(dict(type='GraspAnyRegionDataset', data_root=str(tmp_path)))
    assert len(data) == 2
    sample = data[0]['sample']
    assert sample.image.shape == (HEIGHT, WIDTH, 3)
    assert sample.image[0, 0].tolist() == [250, 120, 10]
    assert np.array_equal(sample.mask, CUP)
    assert (sample.caption, sample.category, sample.has_pair) == ('a red cup', 'cup', False)
    assert sample.name == ('grasp_any_region/Fine-Grained-Dataset-Part1/data-00000-of-00001/0')
    assert data[1]['sample'].mask.sum() == 9


def test_relation_rows_have_the_masks_that_their_text_names(tmp_path):
    masks = [box(0, 0, 9, 9), CUP, box(30, 30, 50, 39)]
    texts = [
        chat('How are <Prompt2> and <Prompt0>?', '<Prompt2> is right of <Prompt0>.'),
        chat('And <Prompt1>?', 'It is a cup.'),
        chat('q', 'first', 'q', 'second', 'q', 'third'),
        chat('q', 'all three'),
    ]
    rows = [row(mask_rle=[rle(mask) for mask in masks], conversations=t) for t in texts]
    write_part(tmp_path, rows, 'Relation-Dataset')
    data = open_set(tmp_path)
    both = data.read(0, RNG)
    assert both.caption == 'region2 is right of region1.'
    assert np.array_equal(both.mask, np.stack([masks[0], masks[2]]))
    one = data.read(1, RNG)
    assert np.array_equal(one.mask, CUP)
    drawn = [data.read(2, RNG) for _ in range(40)]
    assert {sample.caption for sample in drawn} == {'first', 'second', 'third'}
    for sample in drawn:
        number = ['first', 'second', 'third'].index(sample.caption)
        assert np.array_equal(sample.mask, masks[number])
        assert sample.distractor in {'first', 'second', 'third'} - {sample.caption}
    assert data.read(3, RNG).num_regions == 3
    assert reason(open_set(tmp_path, max_regions=2), 3) == 'too_many_regions'


def test_rows_without_a_mask_are_left_out_or_are_whole_images(tmp_path):
    write_part(tmp_path, [row(), row(mask_rle=None), row(mask_rle=rle(box(0, 0, 2, 2)))])
    data = open_set(tmp_path)
    assert [data.read(i, RNG).mask.sum() for i in range(len(data))] == [500, 4]
    assert data.sample_id(1).endswith('/2')
    whole = open_set(tmp_path, whole_images=True)
    assert [whole.read(i, RNG).mask.sum() for i in range(len(whole))] == [500, HEIGHT * WIDTH, 4]


def test_a_partly_downloaded_set_is_read(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(arrow_shards, 'print_log', lambda text, *_, **__: said.append(text))
    rows = [row(catagory=str(i)) for i in range(10)]
    part = write_part(tmp_path, rows, shards=5)
    write_part(tmp_path, [row(catagory='seed')], 'Seed-Dataset')
    (tmp_path / 'Unknown').mkdir()
    for name in ('data-00000-of-00005.arrow', 'data-00003-of-00005.arrow', 'state.json'):
        (part / name).unlink()
    (part / 'data-00003-of-00005.arrow.incomplete').write_bytes(b'x')
    data = open_set(tmp_path)
    found = [data.read(i, RNG).category for i in range(len(data))]
    assert found == ['2', '3', '4', '5', '8', '9', 'seed']
    assert any('3 of 5 shards' in text for text in said)
    assert len(open_set(tmp_path, parts=['Seed-Dataset'])) == 1
    with pytest.raises(FileNotFoundError, match='Relation'):
        open_set(tmp_path, parts=['Relation-Dataset*'])


def write_batches(path, rows, per_batch):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), 'wb') as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=per_batch)


def test_a_truncated_shard_gives_its_whole_batches_and_one_bad_record(tmp_path):
    part = tmp_path / 'Seed-Dataset'
    part.mkdir()
    shard = part / 'data-00000-of-00002.arrow'
    write_batches(shard, [row(catagory=str(i)) for i in range(6)], 2)
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * 0.9)])
    write_batches(part / 'data-00001-of-00002.arrow', [row(catagory='6')], 2)
    data = open_set(tmp_path)
    assert [data.read(i, RNG).category for i in (0, 1, 2, 3, 5)] == ['0', '1', '2', '3', '6']
    assert reason(data, 4) == 'corrupt_shard'


@pytest.mark.parametrize('content', [b'', b'\0' * 5000, b'ARROW1\0\0nonsense', b'{"a": 1}'])
def test_what_is_no_arrow_file_is_one_bad_record(tmp_path, content):
    part = write_part(tmp_path, [row()])
    (part / 'data-00001-of-00002.arrow').write_bytes(content)
    data = open_set(tmp_path)
    assert len(data) == 2
    assert data.read(0, RNG).caption == 'a red cup'
    assert reason(data, 1) == 'corrupt_shard'


def test_the_file_format_is_read_too(tmp_path):
    (tmp_path / 'Seed-Dataset').mkdir()
    table = pa.Table.from_pylist([row(), row(catagory='b')])
    with (
        pa.OSFile(str(tmp_path / 'Seed-Dataset/x.arrow'), 'wb') as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=1)
    data = open_set(tmp_path)
    assert [data.read(i, RNG).category for i in range(2)] == ['cup', 'b']


def test_damaged_offsets_do_not_end_the_process(tmp_path):
    part = write_part(tmp_path, [row(catagory=str(i)) for i in range(20)])
    shard = part / 'data-00000-of-00001.arrow'
    good = shard.read_bytes()
    rng = np.random.default_rng(0)
    reasons = set()
    for _ in range(60):
        damaged = bytearray(good)
        for at in rng.integers(0, len(good), 40):
            damaged[at] = rng.integers(256)
        shard.write_bytes(damaged)
        data = open_set(tmp_path)
        for index in range(len(data)):
            try:
                data.read(index, rng)
            except BadRecord as error:
                reasons.add(error.reason)
    assert 'corrupt_shard' in reasons


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'image': {'bytes': None, 'path': None}}, 'missing_image'),
        ({'image': {'bytes': None, 'path': 'gone.png'}}, 'missing_image'),
        ({'image': {'bytes': None, 'path': '../../secret.png'}}, 'unsafe_path'),
        ({'image': {'bytes': None, 'path': '/etc/passwd'}}, 'unsafe_path'),
        ({'image': {'bytes': b'', 'path': None}}, 'corrupt_image'),
        ({'image': {'bytes': png()[:60], 'path': None}}, 'corrupt_image'),
        ({'image': {'bytes': png(height=WIDTH), 'path': None}}, 'mask_aspect'),
        ({'image': None}, 'missing_image'),
        ({'mask_rle': {'size': [HEIGHT, WIDTH], 'counts': 'nonsense'}}, 'bad_rle'),
        ({'mask_rle': {'size': [HEIGHT + 1, WIDTH], 'counts': rle(CUP)['counts']}}, 'bad_rle'),
        ({'mask_rle': {'size': [HEIGHT], 'counts': 'x'}}, 'bad_rle'),
        ({'mask_rle': {'size': None, 'counts': 'x'}}, 'bad_rle'),
        ({'mask_rle': {'size': [10**9, 10**9], 'counts': 'x'}}, 'mask_too_large'),
        ({'mask_rle': rle(np.zeros((HEIGHT, WIDTH)))}, 'empty_mask'),
        ({'mask_rle': []}, 'missing_mask'),
        ({'mask_rle': [None]}, 'missing_mask'),
        (
            {
                'mask_rle': [rle(CUP), rle(np.zeros((HEIGHT, WIDTH)))],
                'conversations': chat('q', 'both'),
            },
            'empty_mask',
        ),
        ({'conversations': chat('q', '<Prompt1> is red')}, 'bad_prompt_index'),
        ({'conversations': 'text'}, 'bad_caption'),
    ],
)
def test_bad_rows_are_bad_records(tmp_path, changes, expected):
    write_part(tmp_path, [row(**changes)])
    assert reason(open_set(tmp_path)) == expected


def test_none_fields_give_no_caption(tmp_path):
    write_part(tmp_path, [row(conversations=None, catagory=None)])
    sample = open_set(tmp_path)[0]['sample']
    assert (sample.caption, sample.category) == (None, None)
    with pytest.raises(RuntimeError, match='empty_caption'):
        open_set(tmp_path, needs_caption=True, max_attempts=2)[0]


def test_pictures_may_be_files_below_the_root_and_masks_smaller(tmp_path):
    (tmp_path / 'img').mkdir()
    (tmp_path / 'img/a.png').write_bytes(png(height=2 * HEIGHT, width=2 * WIDTH))
    write_part(tmp_path, [row(image={'bytes': None, 'path': 'img/a.png'})])
    sample = open_set(tmp_path)[0]['sample']
    assert np.array_equal(sample.mask, CUP.repeat(2, 0).repeat(2, 1))


def test_start_up_opens_no_picture_and_a_copy_carries_no_rows(tmp_path, monkeypatch):
    write_part(tmp_path, [row() for _ in range(50)], shards=2)
    open_set(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(arrow_shards, 'read_batches', None)  # The index is there already.
        data = open_set(tmp_path)
    data.read(0, RNG)
    copy = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 3000
    assert copy.read(49, RNG).caption == 'a red cup'


def test_real_regions_read_to_the_right_picture(shared_dir, tmp_path):
    folder = shared_dir / 'realdata' / 'gar_demo'
    raw = (folder / 'demo_image_3.png').read_bytes()
    with Image.open(folder / 'demo_image_3.png') as picture:
        pixels = np.asarray(picture.convert('RGB'))
    masks = []
    for number in range(3):
        with Image.open(folder / f'demo_mask_3_{number}.png') as picture:
            masks.append(np.asarray(picture.convert('L')) > 0)
    rows = [
        row(
            image={'bytes': raw, 'path': None},
            mask_rle=[rle(mask) for mask in masks],
            conversations=chat('q', text),
        )
        for text in ('<Prompt0> and <Prompt1> and <Prompt2>', '<Prompt0>', '<Prompt1>', '<Prompt2>')
    ]
    write_part(tmp_path, rows, 'Relation-Dataset')
    data = open_set(tmp_path)
    together = data[0]['sample']
    assert np.array_equal(together.mask, np.stack(masks))
    assert together.caption == 'region1 and region2 and region3'
    for number, mask in enumerate(masks):
        check_aligned(data[number + 1]['sample'], pixels, mask)
