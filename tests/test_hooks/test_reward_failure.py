"""A reward that gave up: every rank stops after the step, with a checkpoint of that step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook

from projects.llava_sam2_rl.hooks import EMATeacherHook, RewardFailureHook
from projects.llava_sam2_rl.rewards import RewardOutput
from test_hooks.processes import ranks
from test_hooks.toy import build

REASON = "3 requests in a row to 'judge' failed"


class RewardAt(Hook):
    """Stands in for an objective whose reward gives up at one iteration."""

    def __init__(self, failing: int | None, reason: str = REASON):
        self.failing, self.reason = failing, reason

    def before_train(self, runner):
        self.objective = runner.model.objective = SimpleNamespace(
            has_rewards=True, last_rollouts={}
        )

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        failure = self.reason if runner.iter + 1 == self.failing else None
        values = torch.zeros(2)
        inputs = SimpleNamespace(references=None)
        fine = SimpleNamespace(
            rewards=RewardOutput(values, values[:, None], ('a',)), reward_inputs=inputs
        )
        bad = SimpleNamespace(
            rewards=RewardOutput(values, values[:, None], ('a',), failure), reward_inputs=inputs
        )
        self.objective.last_rollouts = {'mask_to_caption': fine, 'caption_to_mask': bad}


def hooks(failing, reason=REASON):
    return [
        {'type': EMATeacherHook},
        {'type': RewardAt, 'failing': failing, 'reason': reason},
        {'type': RewardFailureHook},
    ]


def state(path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


def test_it_stops_with_a_checkpoint_that_continues_exactly(tmp_path, capfd):
    runner = build(tmp_path / 'whole', interval=6, hooks=hooks(None))
    runner.train()
    expected = state(tmp_path / 'whole/iter_6.pth')

    runner = build(tmp_path / 'run', interval=6, hooks=hooks(4))
    path = tmp_path / 'run/iter_4.pth'
    with pytest.raises(RuntimeError, match='after iteration 4: 3 requests in a row') as error:
        runner.train()
    assert f'--resume {path}' in str(error.value)
    assert (tmp_path / 'run/last_checkpoint').read_text() == str(path)
    assert state(path)['meta']['iter'] == 4
    assert REASON in next((tmp_path / 'run').glob('*/*.log')).read_text()

    build(tmp_path / 'run', interval=6, hooks=hooks(None), load_from=path, resume=True).train()
    resumed = state(tmp_path / 'run/iter_6.pth')
    for key, value in expected['state_dict'].items():
        assert torch.equal(value, resumed['state_dict'][key]), key


def test_a_checkpoint_that_is_due_anyway_is_written_once(tmp_path, monkeypatch):
    runner = build(tmp_path, interval=2, hooks=hooks(4))
    saved = []
    save = runner.save_checkpoint
    monkeypatch.setattr(
        runner,
        'save_checkpoint',
        lambda folder, name, **options: (saved.append(name), save(folder, name, **options)),
    )
    with pytest.raises(RuntimeError, match=r'iter_4\.pth'):
        runner.train()
    assert saved == ['iter_2.pth', 'iter_4.pth']


def test_old_checkpoints_make_room(tmp_path):
    runner = build(tmp_path, interval=2, hooks=hooks(5), max_keep_ckpts=2)
    with pytest.raises(RuntimeError, match=r'iter_5\.pth'):
        runner.train()
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['iter_4.pth', 'iter_5.pth']


def test_in_a_run_by_epochs_the_epoch_begins_anew(tmp_path):
    runner = build(tmp_path, epochs=2, hooks=hooks(8))  # 6 iterations an epoch
    with pytest.raises(RuntimeError, match=r'iter_8\.pth'):
        runner.train()
    meta = state(tmp_path / 'iter_8.pth')['meta']
    assert (meta['epoch'], meta['iter']) == (1, 8)


def test_without_a_checkpoint_hook_it_says_so(tmp_path):
    runner = build(tmp_path, hooks=hooks(2))
    runner._hooks = [h for h in runner.hooks if type(h).__name__ != 'AtomicCheckpointHook']
    with pytest.raises(RuntimeError, match='No checkpoint was written'):
        runner.train()


def test_objectives_without_rewards_are_left_alone(tmp_path):
    runner = build(tmp_path, hooks=[{'type': EMATeacherHook}, {'type': RewardFailureHook}])
    runner.model.objective = SimpleNamespace(has_rewards=False)
    runner.train()
    assert (tmp_path / 'iter_6.pth').exists()


NAN = float('nan')


class Declines(Hook):
    """Stands in for an objective of which one part declines what it is told to."""

    def __init__(self, column, references):
        self.column, self.references = column, references

    def before_train(self, runner):
        column = torch.tensor(self.column)
        parts = torch.stack([torch.zeros(len(column)), column], dim=1)
        rollout = SimpleNamespace(
            rewards=RewardOutput(parts[:, 0], parts, ('meteor', 'llm_judge')),
            reward_inputs=SimpleNamespace(references=self.references),
        )
        runner.model.objective = SimpleNamespace(
            has_rewards=True, last_rollouts={'mask_to_caption': rollout}
        )


def declining(column, references, **options):
    return [
        {'type': EMATeacherHook},
        {'type': Declines, 'column': column, 'references': references},
        {'type': RewardFailureHook, 'window': 3, **options},
    ]


def test_a_part_that_declines_too_often_stops_the_run_with_a_checkpoint(tmp_path):
    # Two of three with a reference; the fourth has none and does not count.
    hooks = declining([NAN, 0.5, NAN, 0.5], ['a', 'b', 'c', ' '])
    runner = build(tmp_path, interval=6, hooks=hooks)
    message = r'reward llm_judge \(mask_to_caption\) could not score 6 of 9 completions in 3 steps'
    with pytest.raises(RuntimeError, match=message) as error:
        runner.train()
    assert 'max_declined=0.5' in str(error.value)
    assert f'--resume {tmp_path / "iter_3.pth"}' in str(error.value)


@pytest.mark.parametrize(
    ('column', 'references', 'options'),
    [
        ([NAN, 0.5], ['a', 'b'], {}),  # a half, no more
        ([NAN, 0.5], [None, 'b'], {}),  # what has no reference may be declined
        ([NAN, NAN], [None, None], {}),
        ([NAN, NAN], ['a', 'b'], {'max_declined': 1}),
    ],
)
def test_what_is_not_too_often(tmp_path, column, references, options):
    build(tmp_path, interval=6, hooks=declining(column, references, **options)).train()
    assert (tmp_path / 'iter_6.pth').exists()


def test_bad_options(tmp_path):
    for options in ({'max_declined': 0}, {'max_declined': 1.5}, {'window': 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RewardFailureHook(**options)


def _train(rank, work_dir):
    build(work_dir, interval=6, hooks=hooks(3 if rank == 1 else None, 'rank 1 is cut off')).train()


def test_one_rank_that_cannot_score_stops_all(tmp_path):
    codes, printed = ranks(_train, 2, tmp_path / 'logs', tmp_path / 'run')
    assert codes == [1, 1]
    answers = [text.strip().splitlines()[-1] for text in printed]
    assert answers[0] == answers[1]
    assert 'after iteration 3: rank 1 is cut off' in answers[0]
    assert len(state(tmp_path / 'run/iter_3.pth')['random_states']) == 2
