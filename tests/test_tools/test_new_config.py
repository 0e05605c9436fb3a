"""A user's own data to a running fine-tune in two commands, for each format."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys

import pytest
from mmengine.config import Config
from own_data import FORMATS, photographs

from projects.llava_sam2_rl.datasets import JSONLRegionDataset
from projects.llava_sam2_rl.engine.dataloader_config import complete_dataloader
from projects.llava_sam2_rl.hooks import ReportHook
from projects.llava_sam2_rl.registry import DATASETS

SHORT = [
    'train_cfg.max_iters=1',
    'train_dataloader.batch_size=2',
    'model.objective.num_generations=2',
    'default_hooks.logger.interval=1',
    'default_hooks.report.validate_first=False',
]


def run(root, name, argv):
    spec = importlib.util.spec_from_file_location(name, root / f'tools/{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks its own module up
    spec.loader.exec_module(module)
    return module.main(argv)


@pytest.fixture
def place(root, tmp_path, monkeypatch):
    """A user's folder, with the configs of the project."""
    shutil.copytree(root / 'configs', tmp_path / 'configs')
    monkeypatch.chdir(tmp_path)
    # Most of the time of a run of one step.
    monkeypatch.setattr(ReportHook, '_write', lambda *_: None)
    return tmp_path


@pytest.fixture
def new_config(root, place, capsys):
    def make(*argv):
        code = run(root, 'new_config', [*argv, '--out', 'configs/mine.py'])
        return code, capsys.readouterr().out

    return make


def documented(root):
    """The commands of docs/datasets.md by tool."""
    blocks = re.findall(r'```bash\n(.*?)```', (root / 'docs/datasets.md').read_text(), re.DOTALL)
    found: dict[str, list[list[str]]] = {}
    for line in '\n'.join(blocks).splitlines():
        if 'configs/mine.py' in line:
            python, tool, *words = shlex.split(line)
            assert python == 'python'
            found.setdefault(tool.removeprefix('tools/').removesuffix('.py'), []).append(words)
    return found


def test_the_page_has_a_command_for_each_format(root, tmp_path):
    commands = documented(root)
    for name, write in FORMATS.items():
        (tmp_path / name).mkdir()
        words = write(tmp_path / name, photographs()[:1])
        assert [*words, '--out', 'configs/mine.py'] in commands['new_config'], name
    assert len(commands['new_config']) == len(FORMATS)
    assert commands['train'] == [['configs/mine.py']]
    assert commands['verify_datasets'] == [['configs/mine.py']]


@pytest.mark.slow
@pytest.mark.parametrize('name', FORMATS)
def test_photographs_masks_and_captions_to_a_run_in_two_commands(root, place, new_config, name):
    words = FORMATS[name](place, photographs())
    code, text = new_config(*words, '--base', 'sa2va_tiny_dual_loop')
    assert code == 0
    facts = {line[:13].strip(): line[13:] for line in text.splitlines()}
    assert facts['pictures'] == '7, 451 x 300 to 741 x 500 pixels, median 512 x 512'
    assert facts['regions'].startswith('19, 0 empty (not used), 0 tiny')
    assert facts['captions'] == '19, 2 to 9 words, median 6'
    lines = (place / 'configs/mine.py').read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith('#')]) <= 11
    run(root, 'train', ['configs/mine.py', '--cfg-options', *SHORT])
    work_dir = place / 'work_dirs/mine'
    assert (work_dir / 'iter_1.pth').is_file()
    rows = [
        json.loads(line)
        for file in work_dir.glob('*/vis_data/scalars.json')
        for line in file.read_text().splitlines()
    ]
    trained = next(row for row in rows if 'loss' in row)
    # Both directions learn from it, and the held-out part is validated.
    assert {'loop1/reward_mean', 'loop2/reward_mean'} <= set(trained)
    assert any('cycle/meteor' in row for row in rows)
    assert 'bad records: none' in next(work_dir.glob('*/*.log')).read_text()
    assert run(root, 'verify_datasets', ['configs/mine.py', '--samples', '3', '--rows', '1']) == 0


def write_lines(place, *lines):
    FORMATS['jsonl'](place, photographs())
    (place / 'regions.jsonl').write_text('\n'.join(json.dumps(line) for line in lines))
    return '--images', 'photos', '--annotations', 'regions.jsonl'


def test_masks_without_captions_run_too(root, place, new_config):
    lines = [
        {'image': f'{n}.jpg', 'mask': f'masks/{i}.png'} for i, (n, _) in enumerate(photographs())
    ]
    code, text = new_config(*write_lines(place, *lines), '--base', 'sa2va_tiny_dual_loop')
    assert code == 0
    assert 'captions     none: mask -> caption -> mask is trained, the other way is not' in text
    run(root, 'train', ['configs/mine.py', '--cfg-options', *SHORT])
    assert (place / 'work_dirs/mine/iter_1.pth').is_file()


def test_it_says_what_is_in_the_data(place, new_config):
    dot = [[10, 10, 13, 10, 13, 13, 10, 13]]
    words = write_lines(
        place,
        {'image': 'astronaut.jpg', 'mask': dot, 'caption': 'a <IMG_CONTEXT> dot'},
        {'image': 'astronaut.jpg', 'mask': []},
        {'image': 'gone.jpg', 'mask': dot},
        {'image': 'astronaut.jpg', 'mask': dot, 'caption': 'word ' * 2000},
        {'image': 'astronaut.jpg', 'mask': dot, 'image2': 'astronaut.jpg', 'mask2': dot},
    )
    code, text = new_config(*words)
    assert code == 0
    for line in (
        'records      5',
        'regions      3, 1 empty (not used), e.g. jsonl/2, 2 tiny (below 1/256 of the image), e.g.',
        'captions     1, 2 to 2 words, median 2',
        'pairs        1 records have a second picture',
        'not usable   1 x missing_image, e.g. jsonl/3: missing_image: photos/gone.jpg',
        'not usable   1 x long_caption, e.g. jsonl/4',
        'texts        1 x image_token (docs/datasets.md, "Texts are words")',
        'written      configs/mine.py, which inherits sa2va_4b_dual_loop.py',
        'train        python tools/train.py configs/mine.py',
    ):
        assert line in text, line


def test_the_config_holds_pictures_out_and_lengthens_the_epoch(place, new_config):
    words = FORMATS['coco'](place, photographs())
    _, text = new_config(*words)
    assert 'held out     4 records for validation, of other pictures than the 15 others' in text
    config = Config.fromfile('configs/mine.py')
    main = Config.fromfile('configs/sa2va_4b_dual_loop.py')
    assert config.model == main.model
    shutil.rmtree(place / 'pretrained', ignore_errors=True)
    config.model.policy.pretrained = 'llava_sam2_rl://assets/sa2va_tiny'
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    train, val, test = (
        DATASETS.build(complete_dataloader(config[loader], config).dataset) for loader in loaders
    )
    assert len(train) == 15 * 67  # at least 1000
    assert [item['meta'].sample_id for item in val] == [item['meta'].sample_id for item in test]
    assert len(val) == 4
    pictures = [
        {data.image_key(data.record_number(i)) for i in range(data.num_used)}
        for data in (train, val)
    ]
    assert pictures[0].isdisjoint(pictures[1])
    assert config.val_dataloader.batch_size == main.val_dataloader.batch_size


def test_one_picture_is_trained_and_validated_on(place, new_config):
    line = {'image': 'astronaut.jpg', 'mask': [10, 10, 99, 10, 99, 99], 'caption': 'a corner'}
    _, text = new_config(*write_lines(place, line, line))
    assert 'held out     nothing: one picture' in text
    config = Config.fromfile('configs/mine.py')
    assert 'part' not in config.train_dataloader.dataset
    assert config.train_dataloader.dataset.type is JSONLRegionDataset


def test_nothing_is_written_where_nothing_can_be_used(place, new_config):
    line = {'image': 'astronaut.jpg', 'mask': []}
    code, text = new_config(*write_lines(place, line, {**line, 'image': 'gone.jpg'}))
    assert code == 1
    assert 'not usable   1 x missing_image' in text
    assert 'FAILED: none of the records can be used' in text
    assert not (place / 'configs/mine.py').exists()


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--images', 'gone'], 'there is no gone'),
        (['--images', 'photos', '--annotations', 'a.txt'], 'is of no known format'),
        (['--images', 'photos', '--base', 'sa2va_5b'], 'configs has no sa2va_5b.py to inherit'),
        (['--images', 'photos', '--columns', 'picture=a'], '--columns takes WHAT=COLUMN'),
        (['--images', 'photos', '--columns', 'image'], '--columns takes WHAT=COLUMN'),
        (['--images', 'photos', '--samples', '0'], '--samples must be at least 1'),
        (['--images', 'photos', '--out', 'configs/sa2va_4b_dual_loop.py'], 'is there already'),
        (['--images', 'photos', '--out', 'configs/my data.py'], 'a config is a Python file'),
        (['--images', 'photos', '--out', 'mine.py'], 'beside the others'),
    ],
)
def test_wrong_arguments_exit_2_with_what_to_change(root, place, capsys, words, message):
    FORMATS['folder'](place, photographs()[:2])
    (place / 'a.txt').write_text('hello')
    if '--out' not in words:
        words = [*words, '--out', 'configs/mine.py']
    with pytest.raises(SystemExit) as error:
        run(root, 'new_config', words)
    assert error.value.code == 2
    assert message in ' '.join(capsys.readouterr().err.split())
    assert not (place / 'configs/mine.py').exists()
