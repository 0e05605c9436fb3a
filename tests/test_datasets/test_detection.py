import json
from pathlib import Path

import pytest
from own_data import FORMATS, coco, photographs

from projects.llava_sam2_rl.datasets import (
    COCORegionDataset,
    FolderRegionDataset,
    HuggingFaceRegionDataset,
    JSONLRegionDataset,
    Sa2VAFinetuneDataset,
)
from projects.llava_sam2_rl.datasets.detection import detect

KINDS = {
    'folder': FolderRegionDataset,
    'jsonl': JSONLRegionDataset,
    'coco': COCORegionDataset,
    'hugging_face': HuggingFaceRegionDataset,
    'parquet': HuggingFaceRegionDataset,
    'sa2va': Sa2VAFinetuneDataset,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find(*words, **columns):
    given = dict(zip((word.removeprefix('--') for word in words[::2]), words[1::2], strict=True))
    paths = [given.get(name) for name in ('images', 'annotations', 'captions')]
    return detect(*(None if p is None else Path(p) for p in paths), columns)


@pytest.mark.parametrize('name', FORMATS)
def test_every_format_is_recognised_and_opens(place, name):
    found = find(*FORMATS[name](place, photographs()[:6]))
    assert found.kind is KINDS[name]
    data = found.kind(**found.options)
    samples = [item['sample'] for item in data]
    assert sum(len(sample.texts) for sample in samples) == 6
    assert all(item['skipped'] == [] for item in data)


def test_the_folder_of_names_is_found(place):
    regions = photographs()[:3]
    FORMATS['jsonl'](place, regions)
    line = {'image': 'photos/camera.jpg', 'mask': [1, 2, 3, 4, 5, 6]}
    (place / 'photos/camera.jpg').write_bytes(b'')
    (place / 'r.jsonl').write_text(json.dumps(line))
    # Names that begin above the folder of pictures, which is given or beside the file.
    for words in (('--images', 'photos', '--annotations', 'r.jsonl'), ('--annotations', 'r.jsonl')):
        assert find(*words).options['image_dir'] == '.'
    (place / 'r.json').write_text(json.dumps(coco(regions)))
    assert find('--images', 'photos', '--annotations', 'r.json').options['image_dir'] == 'photos'
    (place / 'photos').rename(place / 'images')
    assert find('--annotations', 'r.json').options['image_dir'] == 'images'
    (place / 'images').rename(place / 'elsewhere')
    with pytest.raises(
        ValueError, match=r"none of the 1 pictures .*first is '.*jpg': give the fol"
    ):
        find('--annotations', 'r.json')


def test_a_folder_with_one_annotation_file_is_that_file(place):
    FORMATS['sa2va'](place, photographs()[:3])
    assert find('--images', 'photos', '--annotations', '.').kind is Sa2VAFinetuneDataset


def test_masks_may_lie_in_a_folder_of_their_own(place):
    FORMATS['folder'](place, photographs()[:2])
    (place / 'notes').mkdir()
    for path in (place / 'photos').glob('*.mask*'):
        path.rename(place / 'notes' / path.name)
    found = find('--images', 'photos', '--annotations', 'notes')
    assert found.options == {'data_root': 'photos', 'annotation_dir': 'notes'}
    assert len(found.kind(**found.options)) == 2


def test_columns_are_guessed_or_given(place):
    import datasets

    table = datasets.Dataset.from_dict(
        {'a': ['x'], 'seg': ['y'], 'image_url': ['z'], 'text': ['t']}
    )
    table.save_to_disk('d')
    found = find('--annotations', 'd')
    assert [found.options[key] for key in ('image', 'mask', 'caption')] == [
        'image_url',
        'seg',
        'text',
    ]
    found = find('--annotations', 'd', image='a', category='text')
    assert [found.options[key] for key in ('image', 'mask', 'category')] == ['a', 'seg', 'text']
    table.select_columns(['a', 'text']).save_to_disk('e')
    with pytest.raises(ValueError, match=r'has the columns a \(.*text \(.*--columns image=photo'):
        find('--annotations', 'e')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (
            '[{"image": "a.jpg", "conversations": []}]',
            'entries have conversations, image; known are',
        ),
        ('[]', 'entries have no JSON objects; known are'),
        ('{"a": 1}', 'entries have a; known are'),
        ('{"images": [], "annotations": {}}', "needs the lists 'images' and 'annotations'"),
        ('{"images": [], "annotations": [{"caption": "x"}]}', 'take the one of instances'),
        ('{', 'is no JSON'),
    ],
)
def test_what_is_not_known_is_told_with_what_is(place, text, message):
    (place / 'a.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        find('--annotations', 'a.json')


def test_places_that_do_not_fit_are_refused(place):
    with pytest.raises(ValueError, match='give --images, --annotations, or both'):
        find()
    with pytest.raises(FileNotFoundError, match='there is no gone'):
        find('--images', 'gone')
    with pytest.raises(
        ValueError, match=r'holds no NAME\.mask\*\.png, no parquet and 0 JSON files'
    ):
        find('--images', '.')
    FORMATS['folder'](place, photographs()[:1])
    (place / 'c.csv').write_text('id,caption\n')
    with pytest.raises(ValueError, match='belongs to COCO instances'):
        find('--images', 'photos', '--captions', 'c.csv')
    with pytest.raises(ValueError, match='--columns is for data sets of Hugging Face'):
        find('--images', 'photos', image='a')
