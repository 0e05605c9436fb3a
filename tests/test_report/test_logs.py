from __future__ import annotations

import math

import pytest

from projects.llava_sam2_rl.report import logs
from test_report.hand_made import train_row, write_lines, write_run


def test_a_resumed_run_has_one_curve(tmp_path):
    scalars = logs.read_scalars(write_run(tmp_path))
    assert scalars.curve('loop1/reward_mean') == [(10, 0.25), (20, 0.5), (30, 0.75), (40, 0.875)]
    assert scalars.curve('cycle/return_iou') == [(0, 0.494), (40, 0.524)]
    assert scalars.curve('loop1/kl_div') == [(30, 0.0625)]
    assert (scalars.starts, scalars.unreadable, scalars.last_step) == (2, 1, 40)


def test_what_a_later_start_has_not_reached_yet_is_not_shown(tmp_path):
    """Resumed from 20 and now at 30: what the first start logged of 40 is of other weights."""
    rows = [train_row(step, 0.1) for step in (10, 20, 30, 40)]
    write_lines(tmp_path / '1/vis_data/scalars.json', [*rows, {'cycle/meteor': 0.3, 'step': 20}])
    again = {'cycle/meteor': 0.4, 'step': 20}  # made up for at the start
    write_lines(tmp_path / '2/vis_data/scalars.json', [again, train_row(30, 0.2)])
    scalars = logs.read_scalars(tmp_path)
    assert list(scalars.training) == [10, 20, 30]
    assert scalars.curve('cycle/meteor') == [(20, 0.4)]


def test_a_run_begun_anew_in_the_same_folder_replaces_the_old(tmp_path):
    write_lines(tmp_path / '1/vis_data/scalars.json', [train_row(10, 0.1), train_row(20, 0.1)])
    write_lines(tmp_path / '2/vis_data/scalars.json', [train_row(10, 0.9)])
    assert logs.read_scalars(tmp_path).curve('loop1/reward_mean') == [(10, 0.9)]


def test_reward_parts_by_source(tmp_path):
    rewards = logs.read_reward_parts(write_run(tmp_path))
    (part,) = rewards.parts
    assert (part.direction, part.source, part.name) == ('mask_to_caption', 'scenes', 'mask_iou')
    assert part.early == pytest.approx(0.3)  # (0.2 + 0.4) / 2
    assert part.late == 0.6
    assert (part.scored, part.unscored) == (3, 1)


def test_several_rewards_and_sources(tmp_path):
    rows = [
        {'direction': d, 'sample': f'{s}/1', 'reward': 0.5, 'rewards': {'a': 0.25, 'b': None}}
        for d, s in (('caption_to_mask', 'x'), ('mask_to_caption', 'y'), ('mask_to_caption', 'x'))
    ]
    write_lines(tmp_path / 'rollouts/iter_00000005.jsonl', rows)
    parts = logs.read_reward_parts(tmp_path).parts
    assert [(p.direction[:4], p.source, p.name) for p in parts] == [
        *(('mask', 'x', 'reward'), ('mask', 'x', 'a'), ('mask', 'x', 'b')),
        *(('mask', 'y', 'reward'), ('mask', 'y', 'a'), ('mask', 'y', 'b')),
        *(('capt', 'x', 'reward'), ('capt', 'x', 'a'), ('capt', 'x', 'b')),
    ]
    assert [p.late for p in parts[:3]] == [0.5, 0.25, None]
    assert parts[0].early is None


def test_rollouts_of_an_earlier_start_and_too_many_are_left_out(tmp_path, monkeypatch):
    row = {'direction': 'mask_to_caption', 'sample': 'x/1', 'reward': 0.5, 'rewards': {'a': 0.5}}
    for step in range(1, 12):
        write_lines(tmp_path / f'rollouts/iter_{step:08d}.jsonl', [row])
    monkeypatch.setattr(logs, 'MAX_ROLLOUT_FILES', 5)
    rewards = logs.read_reward_parts(tmp_path, last_step=9)
    assert rewards.steps == [1, 3, 5, 7, 9]
    assert rewards.left_out == 4


def test_progress_counts_no_step_twice(tmp_path):
    progress = logs.read_progress(write_run(tmp_path))
    assert dict(progress.bad) == {('scenes', 'empty <mask>'): 6}
    assert progress.read['scenes'] == 180
    assert progress.seconds['training steps'] == 120.0
    assert progress.host_memory == 2**30


def test_progress_of_a_run_begun_anew(tmp_path):
    line = {'bad': [], 'seconds': {'report': 1.0}, 'host_memory': 1}
    write_lines(
        tmp_path / 'report/progress.jsonl',
        [
            {'start': 'A', 'from': 0, 'iter': 0, 'read': {'x': 100}, **line},
            {'start': 'A', 'from': 0, 'iter': 50, 'read': {'x': 200}, **line},
            {'start': 'B', 'from': 0, 'iter': 50, 'read': {'x': 7}, **line},
        ],
    )
    assert logs.read_progress(tmp_path).read['x'] == 7


def test_nothing_there(tmp_path):
    assert logs.read_scalars(tmp_path).last_step == 0
    assert logs.read_reward_parts(tmp_path).parts == []
    assert logs.read_progress(tmp_path).known is False


def test_mean_leaves_out_what_is_not_finite():
    assert logs.mean([1.0, math.nan, 2.0, math.inf]) == 1.5
    assert logs.mean([math.nan]) is None
