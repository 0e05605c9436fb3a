"""The tool that shows a person what the model will see."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image
from test_datasets.clips import Clips, box, pictures

from projects.llava_sam2_rl.datasets import BadRecord, RegionDataset
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

CONFIG = """\
transform = dict(type='Sa2VATransform')
train_dataloader = dict(
    dataset=dict(type='MixedRegionDataset', datasets=[
{sources}
    ]),
)
"""


class Fake(RegionDataset):
    """``length`` records; every ``bad_every``-th cannot be read."""

    def __init__(self, length, data_root='data/fake', bad_every=0, kind='plain', **kwargs):
        super().__init__(**kwargs)
        self.length, self.bad_every, self.kind = length, bad_every, kind

    @property
    def num_records(self):
        return self.length

    def read(self, index, rng):
        name = f'{self.source}/{index}'
        if self.bad_every and index % self.bad_every == 0:
            raise BadRecord('missing_image', name, 'gone.jpg')
        image = np.full((64, 96, 3), 80, np.uint8)
        mask = np.zeros((64, 96), bool)
        mask[16:48, 24:72] = True
        known = {'source': self.source, 'sample_id': str(index)}
        if self.kind == 'tiny':  # between the pixels that nearest sampling looks at
            mask[:] = False
            mask[9, 9] = True
        elif self.kind == 'markup':
            return RegionSample(image, mask, 'a box [SEG]' if index else 'word ' * 9000, **known)
        elif self.kind == 'pair':
            return RegionSample(image, mask, 'a box', image, mask, **known)
        elif self.kind == 'chat':
            return RegionSample(image, mask[None][:0], conversation=(('What?', 'A box.'),), **known)
        elif self.kind == 'nothing':
            return RegionSample(image, mask[None][:0], caption='an elephant', **known)
        elif self.kind == 'several':
            texts = ('a box', 'the same box')
            return RegionSample(image, np.stack([mask, mask]), region_captions=texts, **known)
        return RegionSample(image, mask, **known)


@pytest.fixture
def tool(root):
    spec = importlib.util.spec_from_file_location('verify', root / 'tools/verify_datasets.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['verify'] = module
    spec.loader.exec_module(module)
    DATASETS.register_module(name='FakeSource', module=Fake, force=True)
    yield module
    del DATASETS.module_dict['FakeSource'], sys.modules['verify']


@pytest.fixture
def run(tool, tmp_path, capsys):
    def run(sources, *options):
        path = tmp_path / 'config.py'
        path.write_text(CONFIG.format(sources=',\n'.join(sources)))
        code = tool.main([str(path), '--out', str(tmp_path / 'out'), *options])
        return code, capsys.readouterr().out

    return run


def fake(source, length, **kwargs):
    options = ''.join(f', {key}={value!r}' for key, value in kwargs.items())
    return f"dict(type='FakeSource', source={source!r}, length={length}{options})"


def test_the_original_plans_counts(run):
    code, text = run(
        [
            fake('sav', 735577, repeats=2, data_root='data/sav'),
            fake('sa1b', 755),
            fake('openimages', 2686666),
            fake('refcoco', 16994, repeats=4),
        ],
        '--samples=0',
    )
    assert code == 0
    rows = [line.split('  ') for line in text.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ['sav', '735 577', 'x2', '1 471 154', 'data/sav'] in cells
    assert ['sa1b', '755', 'x1', '755', '-'] in cells
    assert ['openimages', '2 686 666', 'x1', '2 686 666', '-'] in cells
    assert ['refcoco', '16 994', 'x4', '67 976', '-'] in cells
    assert ['total', '4 226 551'] in cells


def test_shares_grids_and_contact_sheets(run, tmp_path):
    transform = "dict(type='Sa2VATransform')"
    sources = [
        fake('pairs', 50, kind='pair'),
        fake('dots', 50, kind='tiny'),
        fake('chats', 50, kind='chat'),
        fake('nothing', 50, kind='nothing'),
        fake('several', 50, kind='several', needs_caption=True),
    ]
    sources = [source[:-1] + f', transforms={transform})' for source in sources]
    code, text = run(sources, '--samples=10', '--rows=2')
    assert code == 0
    rows = {line.split()[0]: line.split()[1:-1] for line in text.splitlines() if '/10' in line}
    assert rows['pairs'] == ['10/10', '100%', '100%', '0%', '0%', '0/10', '0/10']
    assert rows['dots'] == ['10/10', '0%', '0%', '0%', '0%', '10/10', '0/10']
    assert rows['chats'] == ['10/10', '0%', '0%', '100%', '0%', '0/0', '0/0']
    assert rows['nothing'] == ['10/10', '0%', '100%', '0%', '100%', '0/0', '0/0']
    assert rows['several'] == ['10/10', '0%', '100%', '0%', '0%', '0/20', '0/20']
    assert len(list((tmp_path / 'out').glob('*.png'))) == 5
    with Image.open(tmp_path / 'out' / '01_pairs.png') as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * 234 + 10, 4 * 224 + 50, 3)
    magenta = (pixels == (255, 0, 255)).all(axis=2)
    # The outline of the box, a quarter in from each side, on both frames.
    for left in (10, 244):
        rows_, columns = np.nonzero(magenta[10 : 10 + 149, left : left + 224])
        assert abs(rows_.min() - 37) <= 2
        assert abs(rows_.max() - 112) <= 2
        assert abs(columns.min() - 56) <= 2
        assert abs(columns.max() - 168) <= 2
    # The grid on the input: 8 x 8 of 16 x 16 cells tinted.
    tinted = pixels[10:234, 478:702, 0].astype(int) - pixels[10:234, 478:702, 1] > 30
    assert tinted.mean() == pytest.approx(0.25, abs=0.03)


def test_bad_sources_fail_with_the_reasons(run):
    code, text = run([fake('half', 100, bad_every=2), fake('fine', 100)], '--samples=100')
    assert code == 1
    assert '50 x missing_image, e.g. half/' in text
    assert 'FAILED: half (' in text
    code, _ = run([fake('half', 100, bad_every=2)], '--samples=100', '--max-bad-fraction=0.5')
    assert code == 0


def test_what_is_taken_out_of_texts_is_counted(run):
    code, text = run([fake('loud', 10, kind='markup')], '--samples=10')
    assert code == 0
    assert '  loud: 1 x long_caption, e.g. loud/0: long_caption: ' in text
    assert '  loud: 9 x mask_token, e.g. loud/' in text


def test_a_missing_source_fails_and_the_others_are_still_read(run):
    missing = "dict(type='RefCOCODataset', data_root='nowhere/refer_seg', source='lost')"
    code, text = run([missing, fake('fine', 7)])
    assert code == 1
    assert 'cannot be opened: FileNotFoundError: nowhere/refer_seg/refcoco' in text
    assert 'MISSING' in text
    assert '7/7' in text
    assert 'FAILED: lost (' in text


def test_options_override_the_config(run):
    code, text = run(
        [fake('fine', 7)],
        '--cfg-options',
        'train_dataloader.dataset.datasets.0.length=9',
    )
    assert code == 0
    assert '9/9' in text


def test_what_is_no_config_is_refused(tool, capsys):
    with pytest.raises(SystemExit) as error:
        tool.main(['gone.py'])
    assert error.value.code == 2
    assert 'gone.py' in capsys.readouterr().err


def test_the_tiny_config_passes(tool, root, tmp_path, capsys):
    config = str(root / 'configs/sa2va_tiny_dual_loop_sft.py')
    assert tool.main([config, '--samples', '3', '--rows', '2', '--out', str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert '20 000' in text
    assert 'collages' in text


def test_clips_of_a_video_benchmark(tool, root, tmp_path, capsys):
    clips = Clips(tmp_path / 'data')
    clips.object(7, [box(2)] * 2)
    expressions = {
        'a': {'exp': 'the [SEG] box', 'anno_id': [7]},
        'b': {'exp': 'an elephant', 'anno_id': []},
        'c': {'exp': 'a ghost', 'anno_id': [8]},
    }
    clips.video('v', pictures(2), expressions)
    config = str(root / 'configs/_base_/benchmarks/mevis_u.py')
    option = f'dataset_defaults.MeViSDataset.data_root={clips.write()}'
    given = [config, '--loader', 'test_dataloader', '--max-bad-fraction', '0.5']
    assert tool.main([*given, '--out', str(tmp_path), '--cfg-options', option]) == 0
    said = capsys.readouterr().out
    assert 'mevis_valid_u' in said
    assert 'missing_annotation' in said
    assert 'mask_token' in said
