"""The worked example of the data docs runs as it stands there."""

import re

import numpy as np
import pytest
from PIL import Image

from projects.llava_sam2_rl.datasets import MixedRegionDataset, Sa2VATransform
from projects.llava_sam2_rl.registry import DATASETS


@pytest.fixture
def example(root):
    for path in sorted((root / 'docs').glob('datasets.md')):
        blocks = re.findall(r'```python\n(.*?)```', path.read_text(encoding='utf-8'), re.DOTALL)
        if any('class CutoutDataset' in block for block in blocks):
            yield blocks[-2:]
            DATASETS.module_dict.pop('CutoutDataset', None)
            return
    raise AssertionError('the docs have no worked example')


def test_one_file_and_one_line_add_a_source(example, tmp_path, monkeypatch):
    folder = tmp_path / 'data/cutouts'
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new('RGB', (40, 30), (200, 0, 0)).save(folder / f'{i}.jpg')
        mask = np.zeros((15, 20), bool)
        mask[i : 10 + i, 5:15] = True
        Image.fromarray(mask).save(folder / f'{i}.png')
        (folder / f'{i}.txt').write_text(f'thing {i}\n')
    (folder / '1.txt').unlink()
    monkeypatch.chdir(tmp_path)
    names = {'transform': Sa2VATransform(image_size=28, grounding_size=32)}
    code, line = example
    exec(code, names)
    mixed = MixedRegionDataset([eval(line, names)])
    assert len(mixed) == 9
    items = list(mixed)
    assert items[0]['meta'].caption == 'thing 0'
    assert items[0]['masks'].sum() == 4 * 100
    assert items[2]['meta'].name == 'cutouts/2'
    assert {record for item in items for record in item['skipped']} == {
        ('cutouts', '1', 'missing_caption')
    }
