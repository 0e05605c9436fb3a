"""DLC-Bench from its files to its numbers, with a judge on loopback."""

from __future__ import annotations

import importlib.util
import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from test_rewards.judge_server import Fault, judge_server

from projects.llava_sam2_rl.evaluation import DLCBenchDataset, DLCBenchMetric, dlc_bench
from projects.llava_sam2_rl.evaluation.dlc_bench import load_captions, load_class_names
from projects.llava_sam2_rl.rewards.wording import load_wording
from projects.llava_sam2_rl.structures import RegionMeta

POSITIVE = {
    'question': 'What colour is it?',
    'choices': [['Red', 1], ['Reddish', 0.5], ['It is not mentioned', 0], ['Blue', -1]],
    'type': 'positive',
}
NEGATIVE = {
    'question': 'Does it have a handle?',
    'choices': [['A handle is mentioned', -1], ['No handle is mentioned', 1]],
    'type': 'negative',
}


def answer(prompt, number):
    """Reads like a person: the class by its name, the colour and the handle by the words."""
    caption = re.search(r'Description: (.*)\n', prompt)[1]
    if 'likely a' in prompt:
        return 'Yes' if 'cup' in caption else 'No'
    if 'colour' in prompt:
        return 'Red' if 'red' in caption else 'It is not mentioned'
    return 'A handle is mentioned' if 'handle' in caption else 'No handle is mentioned'


@pytest.fixture
def files(tmp_path):
    questions = {key: [POSITIVE, NEGATIVE] for key in ('1', '2', '3', '4')}
    (tmp_path / 'qa.json').write_text(json.dumps(questions))
    (tmp_path / 'class_names.json').write_text(json.dumps(dict.fromkeys('1234', 'cup')))
    return tmp_path


#: By hand: (positive, negative) of each. 3 is not recognised: nothing above 0 counts.
CAPTIONS = {'1': 'a red cup', '2': 'a cup with a handle', '3': 'a red dog', '4': 'a red cup'}
EXPECTED = {'pos': (1 + 0 + 0 + 1) / 4, 'neg': (1 - 1 + 0 + 1) / 4}


def judge(url, **options):
    return dict(model='judge', base_url=url, max_retries=0, **options)


def evaluate(files, captions, url, **options):
    metric = DLCBenchMetric(
        str(files / 'qa.json'), str(files / 'class_names.json'), judge(url, **options)
    )
    metric.work_dir = files
    metas = [RegionMeta('dlc_bench', key, None, None, 4, 4) for key in captions]
    predictions = [{'caption': text, 'reference': None} for text in captions.values()]
    metric.process({'data': {}, 'data_samples': metas}, predictions)
    return metric.evaluate(len(captions)), metric


def test_numbers_by_hand(files):
    with judge_server(answer) as server:
        found, metric = evaluate(files, CAPTIONS, server.url)
    assert found['dlc_bench/pos'] == pytest.approx(EXPECTED['pos'])
    assert found['dlc_bench/neg'] == pytest.approx(EXPECTED['neg'])
    assert found['dlc_bench/avg'] == pytest.approx((EXPECTED['pos'] + EXPECTED['neg']) / 2)
    assert found['dlc_bench/num_scored'] == 4
    assert [row['positive'] for row in metric.rows] == [1, 0, 0, 1]
    assert json.loads((files / 'dlc_bench_captions.json').read_text()) == CAPTIONS


def test_choices_are_asked_in_the_order_of_the_file(files):
    with judge_server(answer) as server:
        _, metric = evaluate(files, CAPTIONS, server.url)
    prompts = [prompt for prompt in server.prompts if 'colour' in prompt]
    assert len(prompts) == 4
    for prompt in prompts:
        assert 'A. Red\nB. Reddish\nC. It is not mentioned\nD. Blue\n' in prompt
    assert metric.notes['wording'].startswith('llava_sam2_rl (')
    assert metric.notes['compares'].startswith('compares with no published number')


def test_without_a_judge_the_captions_are_kept_and_it_is_said(files, log):
    found, _ = evaluate(files, CAPTIONS, 'http://127.0.0.1:9/v1', max_consecutive_failures=3)
    assert found == {'dlc_bench/num_samples': 4}
    assert json.loads((files / 'dlc_bench_captions.json').read_text()) == CAPTIONS
    assert 'requests in a row' in log[0]
    assert f'They are in {files / "dlc_bench_captions.json"}; score them with' in log[0]


def test_without_the_key_too(files, monkeypatch):
    monkeypatch.delenv('NO_SUCH_KEY', raising=False)
    metric = DLCBenchMetric(
        str(files / 'qa.json'), str(files / 'class_names.json'), {'api_key_env': 'NO_SUCH_KEY'}
    )
    metric.work_dir = files
    rows = [{'source': 'dlc_bench', 'sample_id': '1', 'caption': 'a cup'}]
    assert metric.compute_metrics(rows) == {'num_samples': 1}


def test_failed_requests_count_for_nothing(files):
    def sometimes(prompt, number):
        return Fault('no', 500) if 'with a handle' in prompt else answer(prompt, number)

    with judge_server(sometimes) as server:
        found, _ = evaluate(files, CAPTIONS, server.url)
    assert found['dlc_bench/num_failed'] == 1
    assert found['dlc_bench/pos'] == pytest.approx((1 + 0 + 1) / 3)


@pytest.fixture
def log(monkeypatch):
    """What is said in the log."""
    said: list[str] = []
    monkeypatch.setattr(dlc_bench, 'print_log', lambda text, **_: said.append(text))
    return said


def test_unknown_ids_are_named_and_the_rest_is_scored(files, tool, capsys, log):
    given = {'1': 'a red cup', '2': 'a cup with a handle', '99': 'a tree'}
    (files / 'captions.json').write_text(json.dumps(given))
    with judge_server(answer) as server:
        tool(files, files / 'captions.json', server.url)
    numbers = json.loads(capsys.readouterr().out)
    assert numbers == {
        'pos': 0.5,
        'neg': 0.0,
        'avg': 0.25,
        'num_scored': 2,
        'num_failed': 0,
        'num_missing': 2,
        'wording': f'llava_sam2_rl ({load_wording().digest})',
        'judge': 'judge',
        'order': 'as in the file',
        'compares': "compares with no published number (wording 'llava_sam2_rl' is not the "
        "official one, and judge 'judge' is not Llama-3.1-8B-Instruct): compare only scores of "
        'the same wording and judge',
    }
    assert log == [
        'DLC-Bench: 2 ids with questions but no caption are left out: 3, 4',
        'DLC-Bench: 1 ids with a caption but no questions are left out: 99',
    ]
    written = json.loads((files / 'scores.json').read_text())
    assert written['notes']['judge'] == 'judge'
    regions = written['regions']
    assert regions == {
        '1': {'positive': 1.0, 'negative': 1.0},
        '2': {'positive': 0.0, 'negative': -1.0},
    }


@pytest.fixture
def tool(root):
    spec = importlib.util.spec_from_file_location('dlc', root / 'tools/dlc_bench.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(files, captions, url):
        out = ['--out', str(files / 'scores.json')]
        data = ['--data-root', str(files), '--model', 'judge', '--base-url', url]
        return module.main([str(captions), *data, *out])

    return run


def test_files_that_do_not_belong_together(files, tool, capsys):
    (files / 'captions.json').write_text('{"7": "a cup"}')
    with pytest.raises(SystemExit) as stopped:
        tool(files, files / 'captions.json', 'http://127.0.0.1:9/v1')
    assert stopped.value.code == 2
    assert 'the files do not belong together' in capsys.readouterr().err


def test_captions_with_duplicates(tmp_path, log):
    path = tmp_path / 'captions.json'
    path.write_text('{"1": "first", "2": "b", "1": "second"}')
    assert load_captions(path) == {'1': 'first', '2': 'b'}
    assert log == [f'{path}: 1 captions of ids that came before are left out: 1']
    path.write_text('[{"id": 1, "caption": "first"}, {"id": 1, "caption": "second", "x": 0}]')
    assert load_captions(path) == {'1': 'first'}


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"1": 2}', "caption of '1' is a int"),
        ('["a"]', 'expected an object'),
        ('[{"id": 1}]', r"one has \['id'\]"),
        ('3', 'expected an object'),
        ('{', 'is no JSON'),
    ],
)
def test_other_caption_files(tmp_path, text, message):
    (tmp_path / 'captions.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        load_captions(tmp_path / 'captions.json')


def test_class_names_must_be_names(tmp_path):
    (tmp_path / 'names.json').write_text('["cup"]')
    with pytest.raises(ValueError, match='class names by annotation id'):
        load_class_names(tmp_path / 'names.json')


def test_the_data_set(tmp_path):
    (tmp_path / 'images').mkdir()
    Image.new('RGB', (8, 6), (200, 0, 0)).save(tmp_path / 'images/a.png')
    mask = np.zeros((6, 8), np.uint8)
    mask[1:3, 2:5] = 1
    rle = coco.encode(np.asfortranarray(mask))
    annotation = {
        'id': 17,
        'image_id': 5,
        'segmentation': {**rle, 'counts': rle['counts'].decode()},
    }
    content = {
        'images': [{'id': 5, 'file_name': 'a.png', 'height': 6, 'width': 8}],
        'annotations': [annotation, {**annotation, 'id': 18, 'image_id': 6}],
    }
    (tmp_path / 'annotations.json').write_text(json.dumps(content))
    dataset = DLCBenchDataset(str(tmp_path))
    assert len(dataset) == 2
    item = dataset[0]
    assert item['sample'].sample_id == '17'
    assert np.array_equal(item['sample'].mask, mask.astype(bool))
    assert set(dataset[1]['skipped']) == {('dlc_bench', '18', 'missing_image')}
    with pytest.raises(FileNotFoundError, match='download DLC-Bench'):
        DLCBenchDataset(str(tmp_path / 'elsewhere'))
