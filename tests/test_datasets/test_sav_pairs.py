import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from projects.llava_sam2_rl.datasets import BadRecord, SAVPairsDataset
from projects.llava_sam2_rl.registry import DATASETS
from test_datasets.alignment import check_aligned

RNG = np.random.default_rng(0)


def arrays(side=32):
    mask = np.zeros((side, side), np.float32)
    mask[4:20, 8:24] = 255
    frame = np.zeros((side, side, 3), np.float32)
    frame[..., 0], frame[..., 1], frame[..., 2] = 200, 100, 30  # blue, green, red
    return {'frame1': frame, 'mask1': mask, 'frame2': frame + 7, 'mask2': mask[::-1].copy()}


def save(folder, number=1, **changes):
    content = {**arrays(), **changes}
    path = folder / f'masklet_data_{number:05d}.npz'
    np.savez_compressed(path, **{k: v for k, v in content.items() if v is not None})
    return path


def reason(folder):
    with pytest.raises(BadRecord) as caught:
        SAVPairsDataset(str(folder)).read(0, RNG)
    assert caught.value.name.startswith('sav_pairs/masklet_data_')
    return caught.value.reason


def test_frames_are_turned_to_rgb_and_masks_are_bool(tmp_path):
    save(tmp_path)
    sample = SAVPairsDataset(str(tmp_path))[0]['sample']
    assert sample.image.dtype == np.uint8
    assert sample.image[0, 0].tolist() == [30, 100, 200]
    assert sample.image2[0, 0].tolist() == [37, 107, 207]
    assert sample.mask.sum() == sample.mask2.sum() == 16 * 16
    assert sample.mask[4, 8]
    assert sample.mask2[31 - 4, 8]
    assert not sample.mask2[4, 8]
    assert sample.caption is None
    rgb = SAVPairsDataset(str(tmp_path), bgr=False)[0]['sample']
    assert rgb.image[0, 0].tolist() == [200, 100, 30]


def test_files_are_found_at_any_depth_in_sorted_order(tmp_path):
    for folder, number in (('b', 3), ('a/deep', 2), ('.', 1), ('a', 4)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        save(tmp_path / folder, number)
    (tmp_path / 'other.npz').write_bytes(b'')
    data = DATASETS.build(dict(type='SAVPairsDataset', data_root=str(tmp_path), repeats=2))
    assert (data.num_records, len(data)) == (4, 8)
    assert [data.sample_id(i) for i in range(4)] == [
        'a/deep/masklet_data_00002',
        'a/masklet_data_00004',
        'b/masklet_data_00003',
        'masklet_data_00001',
    ]


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='masklet_data_'):
        SAVPairsDataset(str(tmp_path / 'nowhere'))


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        ({'frame2': None}, 'missing_array'),
        ({'frame1': np.zeros((32, 32), np.float32)}, 'bad_array'),
        ({'frame1': np.zeros((16, 16, 3), np.float32)}, 'bad_array'),
        ({'frame1': np.zeros((0, 32, 3), np.float32)}, 'bad_array'),
        ({'mask1': np.zeros((32, 32), np.complex64)}, 'bad_array'),
        ({'mask1': np.full((32, 32), 'x')}, 'bad_array'),
        ({'frame1': np.full((32, 32, 3), np.nan, np.float32)}, 'bad_values'),
        ({'frame1': np.full((32, 32, 3), 900, np.float32)}, 'bad_values'),
        ({'mask2': np.full((32, 32), -1, np.float32)}, 'bad_values'),
        ({'mask1': np.zeros((32, 32), np.float32)}, 'empty_mask'),
        ({'mask1': np.zeros((32, 32)), 'mask2': np.zeros((32, 32))}, 'empty_mask'),
    ],
)
def test_what_cannot_be_used_is_a_bad_record(tmp_path, changes, expected):
    save(tmp_path, **changes)
    assert reason(tmp_path) == expected


@pytest.mark.parametrize('keep', [0, 10, 0.5, -30])
def test_a_truncated_file_is_a_bad_record(tmp_path, keep):
    path = save(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert reason(tmp_path) == 'corrupt_npz'


def test_damaged_bytes_and_a_folder_under_the_name_are_bad_records(tmp_path):
    path = save(tmp_path)
    data = bytearray(path.read_bytes())
    data[120:160] = bytes(40)
    path.write_bytes(data)
    assert reason(tmp_path) == 'corrupt_npz'
    dataset = SAVPairsDataset(str(tmp_path))
    path.unlink()
    with pytest.raises(BadRecord, match='missing_file'):
        dataset.read(0, RNG)
    path.mkdir()
    with pytest.raises(BadRecord, match='corrupt_npz'):
        dataset.read(0, RNG)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_inside_is_not_run(tmp_path):
    marker = str(tmp_path / 'executed')
    loaded = np.empty((32, 32), object)
    loaded[:] = Payload(marker)
    save(tmp_path, mask1=loaded)
    assert reason(tmp_path) == 'bad_array'
    pickled = pickle.dumps(Payload(marker))
    with zipfile.ZipFile(tmp_path / 'masklet_data_00001.npz', 'w') as archive:
        for key in arrays():
            archive.writestr(f'{key}.npy', pickled)
    assert reason(tmp_path) == 'corrupt_npz'
    assert not os.path.exists(marker)


def npy(shape, dtype='<f4', extra=b''):
    file = io.BytesIO()
    header = {'descr': dtype, 'fortran_order': False, 'shape': shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + extra


def test_a_zip_bomb_is_refused_before_it_is_decompressed(tmp_path, monkeypatch):
    # 400 MB of zeros are 400 kB in the file. Nothing of that size may be read.
    path = tmp_path / 'masklet_data_00001.npz'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open('frame1.npy', 'w') as member:
            member.write(npy((10000, 10000)))
            for _ in range(100):
                member.write(bytes(4_000_000))
        for key in ('mask1', 'frame2', 'mask2'):
            archive.writestr(f'{key}.npy', npy((4, 4), extra=bytes(64)))
    monkeypatch.setattr(np.lib.format, 'read_array', None)
    assert reason(tmp_path) == 'bad_array'


def test_a_header_without_end_is_refused_before_it_is_decompressed(tmp_path):
    # Version 2 headers may claim 4 GB; this one of 300 MB takes 300 kB in the file.
    length = 300 << 20
    with zipfile.ZipFile(
        tmp_path / 'masklet_data_00001.npz', 'w', zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive:
        with archive.open('frame1.npy', 'w') as member:
            member.write(b'\x93NUMPY\x02\x00' + length.to_bytes(4, 'little'))
            for _ in range(75):
                member.write(b' ' * (length // 75))
        for key in ('mask1', 'frame2', 'mask2'):
            archive.writestr(f'{key}.npy', npy((4, 4), extra=bytes(64)))
    assert reason(tmp_path) == 'bad_array'


def test_bytes_behind_an_array_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'masklet_data_00001.npz', 'w') as archive:
        for key, value in arrays().items():
            extra = b'x' if key == 'mask2' else b''
            archive.writestr(f'{key}.npy', npy(value.shape, extra=value.tobytes() + extra))
    assert reason(tmp_path) == 'bad_array'


@pytest.mark.parametrize('shape', [(2**40, 2**40, 3), (4096, 4096, 3), (-1, 32, 3), (64, 64, 3)])
def test_a_header_that_claims_another_size_is_refused(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / 'masklet_data_00001.npz', 'w') as archive:
        for key, value in arrays().items():
            file = io.BytesIO()
            np.save(file, value)
            archive.writestr(f'{key}.npy', file.getvalue())
    good = SAVPairsDataset(str(tmp_path))[0]['sample']
    assert good.image.shape == (32, 32, 3)
    with zipfile.ZipFile(tmp_path / 'masklet_data_00001.npz', 'w') as archive:
        for key, value in arrays().items():
            file = io.BytesIO()
            np.save(file, value)
            data = npy(shape, extra=value.tobytes()) if key == 'frame1' else file.getvalue()
            archive.writestr(f'{key}.npy', data)
    assert reason(tmp_path) == 'bad_array'


def test_an_epoch_ends_with_bad_files_replaced_and_counted(tmp_path):
    for number in range(20):
        save(tmp_path, number)
    (tmp_path / 'masklet_data_00003.npz').write_bytes(b'')
    save(tmp_path, 7, mask1=np.zeros((32, 32)))
    items = list(SAVPairsDataset(str(tmp_path)))
    assert len(items) == 20
    assert {tuple(s) for item in items for s in item['skipped']} == {
        ('sav_pairs', 'masklet_data_00003', 'corrupt_npz'),
        ('sav_pairs', 'masklet_data_00007', 'empty_mask'),
    }


def real_folder(shared_dir, tmp_path, numbers):
    """The npz of the real samples, one copied, the others made of the pictures of their arrays."""
    folder = shared_dir / 'realdata' / 'sav_npz'
    for number in numbers:
        stored = {
            key: np.asarray(Image.open(folder / f'png/masklet_data_{number}_{key}.png'))
            for key in ('frame1', 'mask1', 'frame2', 'mask2')
        }
        path = tmp_path / f'masklet_data_{number}.npz'
        np.savez_compressed(path, **{k: v.astype(np.float32) for k, v in stored.items()})
    return folder


@pytest.mark.parametrize('number', ['00800', '01417', '01579'])
def test_real_pairs_have_true_colours_and_lie_where_they_should(shared_dir, tmp_path, number):
    folder = real_folder(shared_dir, tmp_path, [number])
    if number == '00800':
        tmp_path = folder
    sample = SAVPairsDataset(str(tmp_path))[0]['sample']

    def picture(key):
        return np.asarray(Image.open(folder / f'png/masklet_data_{number}_{key}.png'))

    item = check_aligned(
        sample,
        picture('frame1')[..., ::-1],
        picture('mask1') > 0,
        picture('frame2')[..., ::-1],
        picture('mask2') > 0,
    )
    red, _, blue = sample.image[sample.mask].mean(0)
    if number in ('00800', '01579'):  # a candle and a saxophone of brass
        assert red > 1.2 * blue
    if number == '01417':
        # 0.2 % of the picture: the official sampling misses it or catches a cell or two.
        assert 1 <= item['prompt_masks'].sum() <= 3


def test_the_real_file_with_empty_masks_is_a_bad_record(shared_dir, tmp_path):
    real_folder(shared_dir, tmp_path, ['01713'])
    assert reason(tmp_path) == 'empty_mask'
