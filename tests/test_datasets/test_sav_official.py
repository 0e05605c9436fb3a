import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from projects.llava_sam2_rl.datasets import BadRecord, SAVOfficialDataset
from projects.llava_sam2_rl.registry import DATASETS
from test_datasets.alignment import check_aligned
from test_datasets.test_video import COUNT, HEIGHT, WIDTH, decoded, write_video

RNG = np.random.default_rng(0)


def rle(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': [int(side) for side in code['size']], 'counts': code['counts'].decode()}


def disc(number):
    """The disc of the generated video's frame, computed anew."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (x - number % WIDTH) ** 2 + (y - HEIGHT // 2) ** 2 <= 81


def masklets(shown=range(15)):
    """Object 0 is the disc, object 1 is never there, object 2 a corner of the last two frames."""
    nothing = np.zeros((HEIGHT, WIDTH), bool)
    corner = nothing.copy()
    corner[:20, :20] = True
    return [
        [
            rle(disc(4 * t) if t in shown else nothing),
            rle(nothing),
            rle(corner if t >= 13 else nothing),
        ]
        for t in range(COUNT // 4)
    ]


def write(folder, video='sav_000001', kind='manual', **changes):
    content = {
        'video_id': video,
        'video_frame_count': float(COUNT),
        'video_height': float(HEIGHT),
        'video_width': float(WIDTH),
        'masklet': masklets(),
        'masklet_id': [0, 1, 2],
        'masklet_num': 3,
        **changes,
    }
    path = folder / f'{video}_{kind}.json'
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope='module')
def movie(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp('sav') / 'sav_000001.mp4')


@pytest.fixture
def root(tmp_path, movie):
    (tmp_path / 'sav_000').mkdir()
    shutil.copy(movie, tmp_path / 'sav_000')
    write(tmp_path / 'sav_000')
    return tmp_path


def reason(data, index=0):
    with pytest.raises(BadRecord) as caught:
        data.read(index, RNG)
    assert caught.value.name == f'sav/{data.sample_id(index)}'
    return caught.value.reason


def test_a_pair_shows_the_object_in_both_frames(root, movie):
    data = SAVOfficialDataset(str(root), pair_gap=(8, 16))
    assert data.num_records == 3
    assert [data.sample_id(i) for i in range(3)] == [
        f'sav_000/sav_000001_manual/{i}' for i in range(3)
    ]
    frames = {frame.tobytes(): number for number, frame in enumerate(decoded(movie))}
    gaps = set()
    for index in range(0, 90, 3):
        sample = data[index]['sample']
        first, second = (frames[i.tobytes()] for i in (sample.image, sample.image2))
        assert first % 4 == second % 4 == 0
        gaps.add(second - first)
        assert np.array_equal(sample.mask, disc(first))
        assert np.array_equal(sample.mask2, disc(second))
        again = SAVOfficialDataset(str(root), pair_gap=(8, 16))[index]['sample']
        assert np.array_equal(again.image2, sample.image2)
    assert gaps == {8, 12, 16}


def test_a_clip_goes_evenly_from_one_frame_to_the_other(root, movie):
    """The ends show the object; between them it may be away."""
    write(root / 'sav_000', masklet=masklets(shown=(1, 2, 9)))
    data = SAVOfficialDataset(str(root), pair_gap=(28, None), num_frames=4)
    frames = {frame.tobytes(): number for number, frame in enumerate(decoded(movie))}
    seen = set()
    for _ in range(20):
        sample = data.read(0, RNG)
        numbers = tuple(frames[image.tobytes()] for image, _ in sample.frames)
        seen.add(numbers)
        for number, (_, mask) in zip(numbers, sample.frames, strict=True):
            assert np.array_equal(mask, disc(number) & (number in (4, 8, 36)))
    # Annotations 1 to 9 and 2 to 9: the thirds of eight steps are 2.7 and 5.3, of seven 2.3, 4.7.
    assert seen == {(4, 16, 24, 36), (8, 16, 28, 36)}
    few = SAVOfficialDataset(str(root), pair_gap=(4, 4), num_frames=4)
    assert len(few.read(0, RNG).frames) == 2
    with pytest.raises(ValueError, match='num_frames must be at least 2, got 1'):
        SAVOfficialDataset(str(root), num_frames=1)


def test_absent_frames_are_never_drawn(root, movie):
    write(root / 'sav_000', masklet=masklets(shown=(2, 3, 9)))
    data = SAVOfficialDataset(str(root), pair_gap=(4, None))
    frames = {frame.tobytes(): number for number, frame in enumerate(decoded(movie))}
    drawn = set()
    for _ in range(40):
        sample = data.read(0, RNG)
        drawn.add((frames[sample.image.tobytes()], frames[sample.image2.tobytes()]))
    assert drawn == {(8, 12), (8, 36), (12, 36)}
    assert reason(data, 1) == 'empty_mask'
    sample = data.read(2, RNG)
    assert sample.mask.sum() == sample.mask2.sum() == 400


def test_a_single_frame_is_read_where_no_pair_is_apart_enough(root):
    data = SAVOfficialDataset(str(root), pair_gap=(24, 48))
    sample = data.read(2, RNG)
    assert sample.mask.sum() == 400
    assert not sample.has_pair


def test_kinds_choose_the_files_and_the_index_is_kept(root, tmp_path_factory):
    cache = tmp_path_factory.mktemp('cache')
    path = write(root / 'sav_000', kind='auto', masklet=[[r[0]] * 5 for r in masklets()])
    path.write_text(path.read_text().replace('"masklet_num": 3', '"masklet_num": 5'))
    both = SAVOfficialDataset(str(root), kinds=('manual', 'auto'), cache_dir=str(cache))
    assert both.num_records == 8
    assert [both.sample_id(i)[-8:] for i in (0, 4, 5, 7)] == [
        *('1_auto/0', '1_auto/4'),
        *('manual/0', 'manual/2'),
    ]
    assert SAVOfficialDataset(str(root), kinds=('auto',)).num_records == 5
    assert list(cache.iterdir())
    assert both[6]['sample'].has_pair


def test_the_masklets_are_counted_without_reading_the_whole_file(root, monkeypatch):
    import projects.llava_sam2_rl.datasets.sav_official as module

    path = root / 'sav_000' / 'sav_000001_manual.json'
    with monkeypatch.context() as patch:
        patch.setattr(module.json, 'loads', None)
        assert module._num_masklets(path) == 3
    # In another order of the fields it has to be read.
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items()))))
    assert module._num_masklets(path) == 3
    path.write_text('{')
    assert module._num_masklets(path) == 1


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('', 'bad_annotation'),
        ('{"masklet": [[', 'bad_annotation'),
        ('[]', 'bad_annotation'),
        ('[' * 100_000, 'bad_annotation'),
        ('{"masklet": null, "masklet_num": 1}', 'bad_annotation'),
        ('{"masklet": [], "masklet_num": 1}', 'bad_annotation'),
        ('{"masklet": [[], []], "masklet_num": 1}', 'bad_annotation'),
        ('{"masklet": [[null], [null]], "masklet_num": 1}', 'empty_mask'),
        ('{"masklet": [[3]], "masklet_num": 1}', 'bad_rle'),
        ('{"masklet": [[{"size": [4, 4]}]], "masklet_num": 1}', 'bad_rle'),
        ('{"masklet": [[{"size": [4, 4], "counts": null}]], "masklet_num": 1}', 'bad_rle'),
        ('{"masklet": [[{"size": [4, 4], "counts": [9, 90]}]], "masklet_num": 1}', 'bad_rle'),
        (
            '{"masklet": [[{"size": [1e9, 1e9], "counts": "x"}]], "masklet_num": 1}',
            'mask_too_large',
        ),
        ('{"masklet": [[{"size": [4, 32], "counts": [9, 119]}]], "masklet_num": 1}', 'mask_aspect'),
    ],
)
def test_bad_annotations_are_bad_records(root, text, expected):
    (root / 'sav_000' / 'sav_000001_manual.json').write_text(text)
    assert reason(SAVOfficialDataset(str(root))) == expected


def test_missing_and_damaged_videos_are_bad_records(root, capfd):
    data = SAVOfficialDataset(str(root))
    video = root / 'sav_000' / 'sav_000001.mp4'
    video.write_bytes(b'')
    assert reason(data) == 'corrupt_video'
    video.unlink()
    assert reason(data) == 'missing_video'
    (root / 'sav_000' / 'sav_000001_manual.json').unlink()
    assert reason(data) == 'missing_annotation'


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'_manual\.json.*JPEGImages_24fps'):
        SAVOfficialDataset(str(tmp_path))
    with pytest.raises(ValueError, match='kinds'):
        SAVOfficialDataset(str(tmp_path), kinds=('both',))
    with pytest.raises(ValueError, match='pair_gap'):
        SAVOfficialDataset(str(tmp_path), pair_gap=(9, 4))


# -- folders of frames -----------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Two objects in nine frames; 001 is in frames 0 and 8 only."""
    images = tmp_path / 'JPEGImages_24fps' / 'sav_7'
    images.mkdir(parents=True)
    for number in range(9):
        pixels = np.full((HEIGHT, WIDTH, 3), (20 * number, 60, 200), np.uint8)
        Image.fromarray(pixels).save(images / f'{number:05d}.jpg', quality=95)
    for name in ('000', '001'):
        masks = tmp_path / 'Annotations_6fps' / 'sav_7' / name
        masks.mkdir(parents=True)
        for number in (0, 4, 8):
            mask = np.zeros((HEIGHT, WIDTH), np.uint8)
            if name == '000' or number != 4:
                mask[number : number + 9, 3:30] = 1
            picture = Image.fromarray(mask)
            picture.putpalette([0, 0, 0, 236, 95, 103])
            picture.save(masks / f'{number:05d}.png')
    return tmp_path


def test_frame_folders_give_pairs(folders):
    data = DATASETS.build(dict(type='SAVOfficialDataset', data_root=str(folders)))
    assert [data.sample_id(i) for i in range(data.num_records)] == ['sav_7/000', 'sav_7/001']
    drawn = set()
    for _ in range(30):
        sample = data.read(0, RNG)
        rows = [int(mask.any(1).argmax()) for mask in (sample.mask, sample.mask2)]
        drawn.add(tuple(rows))
        assert sample.mask.sum() == 9 * 27
        for image, number in ((sample.image, rows[0]), (sample.image2, rows[1])):
            assert np.abs(image[5, 5].astype(int) - (20 * number, 60, 200)).max() <= 4
    assert drawn == {(0, 4), (0, 8), (4, 8)}
    other = data.read(1, RNG)
    assert int(other.mask2.any(1).argmax()) == 8


def test_bad_frame_folders_are_bad_records(folders):
    data = SAVOfficialDataset(str(folders), pair_gap=(8, 8))
    image = folders / 'JPEGImages_24fps' / 'sav_7' / '00008.jpg'
    good = image.read_bytes()
    image.write_bytes(good[: len(good) // 2])
    assert reason(data) == 'corrupt_image'
    image.unlink()
    assert reason(data) == 'missing_image'
    Image.new('RGB', (WIDTH * 2, HEIGHT)).save(image)
    assert reason(data) == 'mask_aspect'
    masks = folders / 'Annotations_6fps' / 'sav_7' / '000'
    (masks / '00008.png').write_bytes(b'')
    assert reason(data) == 'corrupt_mask'
    for path in masks.iterdir():
        path.unlink()
    assert reason(data) == 'empty_mask'
    masks.rmdir()
    assert reason(data) == 'missing_annotation'


# -- the real annotations --------------------------------------------------------------------------


@pytest.mark.parametrize(('kind', 'objects'), [('manual', 5), ('auto', 9)])
def test_real_masklets_read_on_a_video_of_their_size(shared_dir, tmp_path, kind, objects):
    content = json.loads((shared_dir / f'realdata/sav_official/sav_000001_{kind}.json').read_text())
    height, width = int(content['video_height']), int(content['video_width'])
    assert (height, width) == (848, 480)
    shutil.copy(shared_dir / f'realdata/sav_official/sav_000001_{kind}.json', tmp_path)
    write_video(tmp_path / 'sav_000001.mp4', count=60, height=height, width=width)
    movie = decoded(tmp_path / 'sav_000001.mp4')
    frames = {frame[height // 2].tobytes(): number for number, frame in enumerate(movie)}
    # The video is shorter than the real one: keep the annotations of its frames.
    short = {**content, 'masklet': content['masklet'][:15]}
    (tmp_path / f'sav_000001_{kind}.json').write_text(json.dumps(short))
    data = SAVOfficialDataset(str(tmp_path), kinds=(kind,))
    assert data.num_records == objects == content['masklet_num']
    for number in range(objects):
        shown = [4 * t for t in range(15) if coco_mask.area(content['masklet'][t][number]) > 0]
        if len(shown) < 2:
            continue
        sample = data.read(number, RNG)
        found = [frames[image[height // 2].tobytes()] for image in (sample.image, sample.image2)]
        assert set(found) <= set(shown)
        codes = [content['masklet'][frame // 4][number] for frame in found]
        assert int(sample.mask.sum()) == int(coco_mask.area(codes[0]))
        if number < 3:
            masks = [coco_mask.decode(code).astype(bool) for code in codes]
            check_aligned(
                sample,
                movie[found[0]],
                masks[0],
                movie[found[1]],
                masks[1],
                compact=kind == 'manual',
            )


def test_the_real_files_have_the_known_number_of_absent_objects(shared_dir):
    rows = absent = 0
    for kind in ('manual', 'auto'):
        path = shared_dir / f'realdata/sav_official/sav_000001_{kind}.json'
        for row in json.loads(path.read_text())['masklet']:
            rows += len(row)
            absent += sum(int(coco_mask.area(code) == 0) for code in row)
    assert (rows, absent) == (1694, 262)
