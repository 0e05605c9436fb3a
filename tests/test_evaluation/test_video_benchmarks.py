"""Video benchmarks through the test command: generated scenes in the layouts of the real ones."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import run_on_two_ranks
from test_datasets.clips import Clips

from projects.llava_sam2_rl.datasets import (
    GeneratedScenes,
    MeViSDataset,
    clip_collate,
    sa2va_collate,
)
from projects.llava_sam2_rl.evaluation import tasks
from projects.llava_sam2_rl.evaluation.tasks import predict
from projects.llava_sam2_rl.inference import Sa2VA
from projects.llava_sam2_rl.models.sa2va.grounding import GroundingEncoder

CONFIG = 'configs/sa2va_tiny_dual_loop_sft.py'
BENCHMARKS = 'configs/_base_/benchmarks'
#: Frames of a clip; the tiny model's memory was never trained, so that it finds little beyond five.
FRAMES = 3


@pytest.fixture(scope='module')
def scenes():
    plain = GeneratedScenes(length=4, split='val')
    return [plain[i]['sample'] for i in range(4)]


def benchmark(folder, kind, scenes):
    """A clip a scene, each with its object, an object that is nowhere, and one without masks."""
    clips = Clips(folder, kind)
    for number, scene in enumerate(scenes):
        clips.object(number, [scene.mask] * FRAMES)
        expressions = {
            'a': {'exp': scene.caption, 'anno_id': [number], 'type_id': 0},
            'b': {'exp': f'What is {scene.caption}?', 'anno_id': [number], 'type_id': 1},
        }
        clips.foreground[f'v{number}'] = {'masks_rle': clips.masks[str(number)]}
        clips.video(f'v{number}', [scene.image] * FRAMES, expressions)
    return clips


@pytest.fixture(scope='module')
def mevis(scenes, tmp_path_factory):
    """With a record that is bad from the start, and a frame that cannot be decoded."""
    clips = benchmark(tmp_path_factory.mktemp('mevis'), 'mevis_u', scenes)
    clips.videos['v1']['expressions']['c'] = {'exp': 'a ghost', 'anno_id': [99]}
    folder = clips.video(
        'v9',
        [scenes[0].image] * FRAMES,
        {'a': {'exp': scenes[0].caption, 'anno_id': [0]}},
    )
    frame = folder / '00010.jpg'
    whole = frame.read_bytes()
    frame.write_bytes(whole[: len(whole) // 2])
    return clips.write()


@pytest.fixture(scope='module')
def main(root):
    spec = importlib.util.spec_from_file_location('test_command', root / 'tools/test.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def arguments(root, name, dataset, data_root, work_dir, batch_size=1):
    return [
        *(str(root / CONFIG), '--benchmark', str(root / BENCHMARKS / f'{name}.py')),
        *('--work-dir', str(work_dir), '--cfg-options'),
        *(f'dataset_defaults.{dataset}.data_root={data_root}', 'test_dataloader.num_workers=0'),
        f'test_dataloader.batch_size={batch_size}',
    ]


def rows_of(folder):
    lines = (folder / 'test_policy_samples.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def one_rank(root, main, mevis, tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    found = main(arguments(root, 'mevis_u', 'MeViSDataset', mevis, folder))
    return folder, found


def test_the_numbers_are_those_of_segment_video(one_rank, mevis, scenes):
    folder, found = one_rank
    # A stand-in for a bad record has its place.
    rows = sorted(rows_of(folder), key=lambda row: row['sample_id'])
    names = [f'v{number}/{expression}' for number in range(4) for expression in 'ab']
    assert [row['sample_id'] for row in rows] == names
    model = Sa2VA.from_pretrained('llava_sam2_rl://assets/sa2va_tiny', device='cpu')
    expected = []
    for row in rows:
        scene = scenes[int(row['sample_id'][1])]
        video = model.segment_video(
            f'{mevis}/valid_u/JPEGImages/{row["sample_id"][:2]}', row['text']
        )
        assert row['answer'] == video.answer
        masks = [video.object_masks(frame)[:1].any(axis=0) for frame in range(FRAMES)]
        ious = [(m & scene.mask).sum() / (m | scene.mask).sum() for m in masks]
        assert row['j'] == pytest.approx(np.mean(ious), abs=1e-3)
        expected.append(row['j'])
    assert np.mean(expected[::2]) > 0.6
    assert found['video/mevis_valid_u/j'] == pytest.approx(np.mean(expected))
    assert found['video/mevis_valid_u/num_samples'] == 8
    assert json.loads((folder / 'test_policy.json').read_text())['metrics'] == found


def test_what_cannot_be_used_is_counted_and_the_rest_goes_on(one_rank):
    folder, _ = one_rank
    (log,) = folder.glob('*/*.log')
    said = log.read_text()
    assert '2 records cannot be used and are left out' in said
    assert '1 x corrupt_image' in said
    assert '1 x missing_annotation' in said


@pytest.mark.slow
def test_two_ranks_equal_one_exactly(root, mevis, one_rank, tmp_path):
    """Ten records on two ranks, two of them bad on different ones; nothing is counted twice."""
    given = arguments(root, 'mevis_u', 'MeViSDataset', mevis, tmp_path)
    run_on_two_ranks(root / 'tools/test.py', *given, cwd=tmp_path)
    folder, found = one_rank
    assert json.loads((tmp_path / 'test_policy.json').read_text())['metrics'] == found
    assert rows_of(tmp_path) == rows_of(folder)


def test_a_batch_encodes_a_frame_once_for_all_that_is_asked_about_its_clip(
    tiny_model, mevis, scenes, monkeypatch
):
    data = MeViSDataset(mevis)
    items = [data[number] for number in range(4)]
    assert [item['clip'].sample_id for item in items] == ['v0/a', 'v0/b', 'v1/a', 'v1/b']
    encoded, levels = [], GroundingEncoder.levels
    monkeypatch.setattr(
        GroundingEncoder, 'levels', lambda *args: encoded.append(1) or levels(*args)
    )
    together = predict(tiny_model, clip_collate(items), ['video'])['video']
    assert len(encoded) == 2 * FRAMES
    for item, one in zip(items, together, strict=True):
        (alone,) = predict(tiny_model, clip_collate([item]), ['video'])['video']
        assert one.answer == alone.answer
        assert (one.masks ^ alone.masks).mean() < 1e-3


def test_a_clip_of_any_length_holds_one_frame_at_a_time(tiny_model, mevis, monkeypatch):
    """A frame is read when the last one is through SAM 2."""
    order, read_image, levels = [], tasks.read_image, GroundingEncoder.levels

    def read(path, name):
        order.append('read')
        return read_image(path, name)

    def encode(*args):
        order.append('encode')
        return levels(*args)

    monkeypatch.setattr(tasks, 'read_image', read)
    monkeypatch.setattr(GroundingEncoder, 'levels', encode)
    (item,) = [MeViSDataset(mevis)[0]]
    long = item['clip']
    object.__setattr__(long, 'frames', long.frames * 4)
    (found,) = predict(tiny_model, clip_collate([item]), ['video'])['video']
    assert len(found) == 12
    # The five that the language model sees come first.
    assert order == ['read'] * 5 + ['encode'] * 5 + ['read', 'encode'] * 7


def test_the_teachers_weights_are_used_where_they_are_asked_for(tiny_model, mevis):
    batch = clip_collate([MeViSDataset(mevis)[0]])
    (policy,) = predict(tiny_model, batch, ['video'])['video']
    with torch.no_grad():
        for shadow in tiny_model.teacher.state_dict()['shadows'].values():
            shadow.add_(0.05 * torch.randn(shadow.shape, generator=torch.manual_seed(0)))
    tiny_model.predict_with = 'teacher'
    (teacher,) = predict(tiny_model, batch, ['video'])['video']
    assert not np.array_equal(policy.masks, teacher.masks)


def test_photographs_are_no_clips(tiny_model, tiny_transform):
    data = GeneratedScenes(length=1, split='val', transforms=tiny_transform)
    with pytest.raises(TypeError, match='the data set has none: .*Video benchmarks'):
        predict(tiny_model, sa2va_collate([data[0]]), ['video'])


def test_masks_to_hand_in(root, main, scenes, tmp_path):
    clips = benchmark(tmp_path / 'data', 'mevis', scenes[:2])
    found = main(arguments(root, 'mevis', 'MeViSDataset', clips.write(), tmp_path / 'run', 4))
    assert found['video/mevis_valid/num_samples'] == 4
    assert 'video/mevis_valid/j' not in found
    folder = tmp_path / 'run/submission/mevis_valid/Annotations'
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*.png'))
    frames = [f'{5 * t:05d}' for t in range(FRAMES)]
    assert files == [f'v{n}/{e}/{t}.png' for n in range(2) for e in 'ab' for t in frames]
    mask = np.array(Image.open(folder / 'v0/a/00010.png')) > 0
    assert (mask & scenes[0].mask).sum() / (mask | scenes[0].mask).sum() > 0.5


def test_revos_tells_its_kinds_apart(root, main, scenes, tmp_path):
    clips = benchmark(tmp_path / 'data', 'revos', scenes[:2])
    found = main(arguments(root, 'revos', 'ReVOSDataset', clips.write(), tmp_path / 'run', 4))
    for key in ('j&f', 'j', 'f', 'accuracy', 'robustness'):
        kinds = [found[f'video/revos/{kind}/{key}'] for kind in ('referring', 'reasoning')]
        assert found[f'video/revos/overall/{key}'] == pytest.approx(np.mean(kinds))
    assert found['video/revos/referring/accuracy'] > 0.9


@pytest.mark.parametrize(
    ('name', 'folder'),
    [
        ('davis17', 'data/video_datas/davis17'),
        ('mevis', 'data/video_datas/mevis'),
        ('mevis_u', 'data/video_datas/mevis'),
        ('ref_youtube_vos', 'data/video_datas/rvos'),
        ('revos', 'data/video_datas/revos'),
        ('ref_sav', 'data/ref_sav_eval'),
    ],
)
def test_data_that_is_not_there_is_named_before_anything_is_loaded(
    root, main, name, folder, tmp_path, capsys
):
    given = [str(root / CONFIG), '--benchmark', str(root / BENCHMARKS / f'{name}.py')]
    with pytest.raises(SystemExit) as ended:
        main([*given, '--work-dir', str(tmp_path)])
    assert ended.value.code == 2
    assert f'there is no {folder!r}' in capsys.readouterr().err
