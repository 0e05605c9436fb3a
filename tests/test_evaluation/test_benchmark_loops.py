"""The test command: every metric, policy or teacher, one rank or two, results on disk."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from runs import ENV, run_on_two_ranks, skip_without_xtuner

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.evaluation.benchmark_loops import table
from projects.llava_sam2_rl.evaluation.tasks import predict
from projects.llava_sam2_rl.registry import MODELS

CONFIG = 'configs/sa2va_tiny_dual_loop_sft.py'
#: One at a time, so that a sample's numbers do not depend on its neighbours in the batch.
OPTIONS = ['--cfg-options', 'test_dataloader.dataset.length=7', 'test_dataloader.batch_size=1']


@pytest.fixture(scope='module')
def checkpoint(root, tmp_path_factory):
    """Policy and teacher have moved, each its own way."""
    torch.manual_seed(1)
    model = MODELS.build(Config.fromfile(root / CONFIG).model)
    with torch.no_grad():
        for moved in ('teacher', 'policy'):
            for p in model.policy.parameters():
                if p.requires_grad:
                    p.add_(0.01 * torch.randn_like(p))
            if moved == 'teacher':
                model.teacher.copy_from(model.policy)
                model.teacher.num_updates = 5
    path = tmp_path_factory.mktemp('run') / 'iter_3.pth'
    content = {'meta': {'iter': 3}, 'state_dict': model.state_dict()}
    torch.save({**content, 'teacher': model.teacher.state_dict()}, path)
    return path


@pytest.fixture(scope='module')
def main(root):
    spec = importlib.util.spec_from_file_location('test_command', root / 'tools/test.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(root / CONFIG), *map(str, arguments)])


def result(folder, weights='policy'):
    return json.loads((folder / f'test_{weights}.json').read_text())


@pytest.fixture(scope='module')
def one_rank(main, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp('one')
    main('--checkpoint', checkpoint, '--work-dir', folder, *OPTIONS)
    return folder


def test_numbers_rows_and_table(one_rank, checkpoint):
    folder = one_rank
    found = result(folder)
    assert found['weights'] == 'policy'
    assert found['checkpoint'] == str(checkpoint)
    assert found['num_samples'] == 7
    metrics = found['metrics']
    assert {'referring/collages/ciou', 'captioning/collages/meteor', 'cycle/return_iou'} <= set(
        metrics
    )
    lines = (folder / 'test_policy_samples.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    referring = [row for row in rows if row['metric'] == 'referring']
    assert len(referring) == 7
    assert metrics['referring/collages/giou'] == pytest.approx(
        np.mean([r['iou'] for r in referring])
    )
    union = sum(row['union'] for row in referring)
    total = sum(row['intersection'] for row in referring) / union
    assert metrics['referring/collages/ciou'] == pytest.approx(total)
    # Free generation and the answer that training gives find the same masks, nearly.
    assert metrics['referring/collages/giou'] == pytest.approx(metrics['cycle/own_iou'], abs=0.05)
    (log,) = folder.glob('*/*.log')
    assert re.search(r'^  referring/collages/num_samples +7$', log.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_two_ranks_equal_one_exactly(root, checkpoint, one_rank, tmp_path):
    """Seven samples on two ranks: the sampler repeats one, which is not counted twice."""
    given = ('--checkpoint', checkpoint, '--work-dir', tmp_path, *OPTIONS)
    run_on_two_ranks(root / 'tools/test.py', root / CONFIG, *given, cwd=tmp_path)
    assert result(tmp_path) == result(one_rank)
    samples = 'test_policy_samples.jsonl'
    assert (tmp_path / samples).read_text() == (one_rank / samples).read_text()


@pytest.mark.slow
def test_xtuner_test_gives_the_same_numbers(root, checkpoint, one_rank, tmp_path):
    skip_without_xtuner('xtuner.tools.test')
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(
        [
            *('xtuner', 'test', root / CONFIG, '--checkpoint', checkpoint),
            *('--work-dir', tmp_path, *OPTIONS),
        ],
        cwd=tmp_path,
        env={**ENV, 'PATH': path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (tmp_path / 'test_policy.json').is_file(), done.stderr[-3000:]
    assert result(tmp_path)['metrics'] == result(one_rank)['metrics']


def test_the_teacher(main, checkpoint, one_rank, tmp_path):
    main('--checkpoint', checkpoint, '--weights', 'teacher', '--work-dir', tmp_path, *OPTIONS)
    found = result(tmp_path, 'teacher')
    assert found['weights'] == 'teacher'
    assert found['metrics'] != result(one_rank)['metrics']


def test_a_teacher_that_was_not_loaded(main, tmp_path):
    with pytest.raises(RuntimeError, match='no teacher was loaded'):
        main('--weights', 'teacher', '--work-dir', tmp_path, *OPTIONS)


def test_a_checkpoint_of_another_config(main, checkpoint, tmp_path, capsys):
    arguments = ['--checkpoint', checkpoint, '--work-dir', tmp_path, *OPTIONS]
    with pytest.raises(SystemExit) as stopped:
        main(*arguments, 'model.policy.lora.r=8')
    assert stopped.value.code == 2
    assert 'checkpoint of another model' in capsys.readouterr().err
    assert not (tmp_path / 'test_policy.json').exists()


def test_a_benchmark_takes_the_place_of_the_configs_own(main, tmp_path, capsys):
    """Its data is not here, and is what is looked for before anything is loaded."""
    benchmark = Path(__file__).resolve().parents[2] / 'configs/_base_/benchmarks'
    folders = {
        'refcoco_all': 'data/refer_seg',
        'refcocog_captions': 'data/refer_seg',
        'dlc_bench': 'data/DLC-Bench',
    }
    for name, folder in folders.items():
        with pytest.raises(SystemExit) as ended:
            main('--benchmark', benchmark / f'{name}.py', '--work-dir', tmp_path)
        assert ended.value.code == 2
        assert f'there is no {folder!r}' in capsys.readouterr().err


def test_several_ranks_under_xtuner_are_told_that_nothing_was_loaded(checkpoint, tiny_model):
    """What its command does to a wrapped model, whose names begin with `module.`."""
    from projects.llava_sam2_rl.utils.errors import CheckpointError

    wrapped = torch.nn.Module()
    wrapped.module = tiny_model
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    with pytest.raises(CheckpointError, match=r'none of the \d+ trained .*tools/test\.py'):
        wrapped.load_state_dict(state, strict=False)
    tiny_model.load_state_dict(state, strict=False)


@pytest.fixture
def batch(tiny_transform):
    scenes = GeneratedScenes(length=3, split='val', transforms=tiny_transform)
    return sa2va_collate([scenes[i] for i in range(3)])


def test_every_task_uses_the_weights_that_are_asked_for(tiny_model, batch):
    tasks = ('captioning', 'referring')
    policy = predict(tiny_model, batch, tasks)
    with torch.no_grad():
        for shadow in tiny_model.teacher.state_dict()['shadows'].values():
            shadow.add_(0.05 * torch.randn(shadow.shape, generator=torch.manual_seed(0)))
    again = predict(tiny_model, batch, tasks)
    tiny_model.predict_with = 'teacher'
    teacher = predict(tiny_model, batch, tasks)
    captions = [[p['caption'] for p in found['captioning']] for found in (policy, again, teacher)]
    assert captions[0] == captions[1] != captions[2]
    masks = [[p['answer'].mask for p in found['referring']] for found in (policy, again, teacher)]
    assert all(map(torch.equal, masks[0], masks[1]))
    assert not all(map(torch.equal, masks[0], masks[2]))


def test_a_batch_equals_one_by_one(tiny_model, batch, tiny_transform):
    scenes = GeneratedScenes(length=3, split='val', transforms=tiny_transform)
    tasks = ('captioning', 'referring')
    together = predict(tiny_model, batch, tasks)
    for i in range(3):
        alone = predict(tiny_model, sa2va_collate([scenes[i]]), tasks)
        assert alone['captioning'][0]['caption'] == together['captioning'][i]['caption']
        assert alone['referring'][0]['answer'].text == together['referring'][i]['answer'].text
        pair = [p['referring'][j]['answer'].mask for p, j in ((alone, 0), (together, i))]
        assert (pair[0] ^ pair[1]).float().mean() < 1e-3


RUNNER = ('model', 'work_dir', 'val_dataloader', 'val_cfg', 'val_evaluator', 'default_scope')


def test_validation_by_the_benchmark_loop(tiny_config, tmp_path):
    import copy

    from mmengine.runner import Runner

    from projects.llava_sam2_rl.evaluation import BenchmarkValLoop

    config = copy.deepcopy(tiny_config)
    config.val_cfg = dict(type=BenchmarkValLoop)
    config.val_evaluator = config.test_evaluator[:1]
    config.val_dataloader.dataset.length = 2
    config.work_dir = str(tmp_path)
    found = Runner(**{key: config[key] for key in RUNNER}, experiment_name='val').val()
    assert found['referring/collages/num_samples'] == 2


def test_table():
    assert table({'a/b': 0.25, 'count': 3}) == '  a/b       0.2500\n  count          3'
