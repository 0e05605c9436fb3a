import random
import re
import signal
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS as MM_HOOKS

from projects.llava_sam2_rl.engine.checkpoint_files import load_from_local
from projects.llava_sam2_rl.hooks import AtomicCheckpointHook, EMATeacherHook
from projects.llava_sam2_rl.utils.errors import CheckpointError
from test_hooks.processes import ranks
from test_hooks.toy import build, killed_while_writing


def run(work_dir, **options):
    runner = build(work_dir, **options)
    runner.train()
    return runner


def names(folder):
    return sorted(p.name for p in Path(folder).glob('*.pth*'))


def same(a, b, path=''):
    """Equal values in nested containers, bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            same(a[key], b[key], f'{path}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f'{path}/{i}')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def resumable_state(path):
    checkpoint = load_from_local(path)
    hub = checkpoint.pop('message_hub')
    del checkpoint['meta']  # holds the time and the config's text
    # Times differ, and a validation that came after the checkpoint is not repeated on resume.
    scalars = {
        k: v for k, v in hub['log_scalars'].items() if 'time' not in k and not k.startswith('val/')
    }
    return checkpoint | {'scalars': scalars}


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'val_interval': 2},
        # The checkpoint is written again in the middle of validation, with the new best score.
        {'val_interval': 2, 'save_best': 'acc', 'rule': 'greater'},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, options):
    whole = run(tmp_path / 'whole', **options)
    # The interrupted run shares no random state with this process from here on.
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    resumed = run(
        tmp_path / 'resumed',
        load_from=tmp_path / 'whole' / 'iter_2.pth',
        resume=True,
        **options,
    )
    assert len(whole.model.seen) == 6
    assert resumed.model.seen == whole.model.seen[2:]  # the same data, in the same order
    same(
        resumable_state(tmp_path / 'whole' / 'iter_6.pth'),
        resumable_state(tmp_path / 'resumed' / 'iter_6.pth'),
    )


def test_resume_in_an_epoch_based_loop(tmp_path):
    whole = run(tmp_path / 'whole', epochs=3)
    torch.manual_seed(99)
    resumed = run(
        tmp_path / 'resumed', epochs=3, load_from=tmp_path / 'whole' / 'epoch_1.pth', resume=True
    )
    assert len(whole.model.seen) == 18
    assert resumed.model.seen == whole.model.seen[6:]
    for p, q in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(p, q)


def test_validation_does_not_change_training(tmp_path):
    without = run(tmp_path / 'a')
    with_validation = run(tmp_path / 'b', val_interval=1)
    assert with_validation.model.seen == without.model.seen
    for p, q in zip(without.model.parameters(), with_validation.model.parameters()):
        assert torch.equal(p, q)


def test_resume_from_a_checkpoint_without_random_state_is_said(tmp_path, caplog):
    runner = run(tmp_path / 'whole')
    path = tmp_path / 'whole' / 'iter_2.pth'
    checkpoint = load_from_local(path)
    del checkpoint['random_states']
    torch.save(checkpoint, path)
    runner = build(tmp_path / 'resumed', load_from=path, resume=True)
    said = []
    runner.logger.warning = said.append
    runner.train()
    assert any('holds no random state and this run has 1' in str(text) for text in said)


def killed(work_dir, while_writing, **options):
    """Runs the toy in a process of its own that dies in the middle of a write."""

    def child(rank):
        with killed_while_writing(while_writing):
            run(work_dir, **options)

    codes, printed = ranks(child, 1, work_dir.with_suffix('.logs'))
    assert codes == [-signal.SIGKILL], printed


def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path):
    work_dir = tmp_path / 'run'
    killed(work_dir, 'iter_4.pth', max_keep_ckpts=1)
    assert names(work_dir) == ['iter_2.pth', 'iter_4.pth.incomplete']
    assert (work_dir / 'last_checkpoint').read_text() == str(work_dir / 'iter_2.pth')
    # It resumes by itself, repeats the uninterrupted run and clears what was left.
    resumed = run(work_dir, resume=True, max_keep_ckpts=1)
    assert len(resumed.model.seen) == 4
    assert names(work_dir) == ['iter_6.pth']
    run(tmp_path / 'whole', max_keep_ckpts=1)
    same(
        resumable_state(tmp_path / 'whole' / 'iter_6.pth'),
        resumable_state(work_dir / 'iter_6.pth'),
    )


def test_a_kill_while_writing_last_checkpoint_leaves_the_previous_one(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    from projects.llava_sam2_rl.engine import checkpoint_files

    replace = checkpoint_files.os.replace

    def replace_or_die(source, target):
        if Path(target).name == 'last_checkpoint' and Path(target).exists():
            raise Killed
        replace(source, target)

    monkeypatch.setattr(checkpoint_files.os, 'replace', replace_or_die)
    with pytest.raises(Killed):
        run(tmp_path, max_keep_ckpts=1)
    # The newer checkpoint is whole but not yet named, so the older one must still be there.
    assert names(tmp_path) == ['iter_2.pth', 'iter_4.pth']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_2.pth')
    monkeypatch.undo()
    run(tmp_path, resume=True, max_keep_ckpts=1)
    assert names(tmp_path) == ['iter_6.pth']
    assert not (tmp_path / 'last_checkpoint.incomplete').exists()


def test_old_checkpoints_go_after_the_new_one_is_whole(tmp_path):
    there = []

    class Look(Hook):
        priority = 'LOWEST'

        def before_save_checkpoint(self, runner, checkpoint):
            there.append(names(tmp_path))

    run(tmp_path, interval=1, max_keep_ckpts=2, max_iters=4, hooks=[Look()])
    assert there[2] == ['iter_1.pth', 'iter_2.pth']
    assert there[3] == ['iter_2.pth', 'iter_3.pth']
    assert names(tmp_path) == ['iter_3.pth', 'iter_4.pth']


def test_an_outdated_checkpoint_a_kill_left_is_removed_on_resume(tmp_path, monkeypatch):
    from projects.llava_sam2_rl.hooks import checkpoint

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(checkpoint, '_remove', die)
    with pytest.raises(Killed):
        run(tmp_path, max_keep_ckpts=1)
    assert names(tmp_path) == ['iter_2.pth', 'iter_4.pth']
    monkeypatch.undo()
    run(tmp_path, resume=True, max_keep_ckpts=1)
    assert names(tmp_path) == ['iter_6.pth']


def test_the_best_checkpoint_goes_after_its_successor_is_whole(tmp_path):
    there = []

    class Look(Hook):
        priority = 'LOWEST'

        def before_save_checkpoint(self, runner, checkpoint):
            if runner.message_hub.get_info('loop_stage') == 'val':
                there.append([n for n in names(tmp_path) if n.startswith('best')])

    run(tmp_path, val_interval=2, save_best='acc', rule='greater', hooks=[Look()])
    # Each validation is the best so far and saves twice: the best, then the last with its score.
    two, four, six = (f'best_acc_iter_{i}.pth' for i in (2, 4, 6))
    assert there == [[], [two], [two], [two, four], [four], [four, six]]
    assert [n for n in names(tmp_path) if n.startswith('best')] == [six]


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    from projects.llava_sam2_rl.engine import checkpoint_files

    def full(descriptor):
        raise OSError(28, 'No space left on device')

    run(tmp_path, max_iters=2)
    monkeypatch.setattr(checkpoint_files.os, 'fsync', full)
    with pytest.raises(OSError, match=r'could not write .*iter_4\.pth .* No space left') as error:
        run(tmp_path, resume=True)
    assert error.value.errno == 28
    assert names(tmp_path) == ['iter_2.pth']


# ---- the format of the files, which earlier versions have written


def history(*values):
    return {
        'values': torch.tensor(values, dtype=torch.float64),
        'counts': torch.ones(len(values), dtype=torch.int64),
        'max_length': 1000000,
    }


def written_by_410f5c5():
    """A checkpoint after two iterations, as that commit wrote it, entry by entry."""
    weights = {
        'policy.0.weight': torch.full((8, 4), 0.1),
        'policy.0.bias': torch.full((8,), 0.2),
        'policy.2.weight': torch.full((1, 8), 0.3),
        'policy.2.bias': torch.full((1,), 0.4),
    }
    frozen = {'frozen.weight': torch.ones(2, 2), 'frozen.bias': torch.ones(2)}
    python, numbers = random.Random(5).getstate(), np.random.RandomState(5).get_state()
    return {
        'meta': {
            'epoch': 0,
            'iter': 2,
            'cfg': '\n',
            'seed': 1,
            'experiment_name': 'old_20261124_215217',
            'time': '20261124_215218',
            'mmengine_version': '0.10.6',
            'dataset_meta': {'name': 'random'},
        },
        'state_dict': OrderedDict(weights | frozen),
        'message_hub': {
            'log_scalars': OrderedDict({'train/loss': history(3.0, 2.5)}),
            'runtime_info': OrderedDict(
                {'loop_stage': 'train', 'epoch': 0, 'iter': 1, 'eta': np.float64(0.0)}
            ),
            'resumed_keys': OrderedDict({'train/loss': True, 'iter': True, 'eta': True}),
        },
        'optimizer': {
            'state': {
                i: {
                    'step': torch.tensor(2.0),
                    'exp_avg': 0.1 * weight,
                    'exp_avg_sq': 0.01 * weight,
                }
                for i, weight in enumerate(weights.values())
            },
            'param_groups': [
                {
                    'lr': 0.023,
                    'betas': (0.9, 0.999),
                    'eps': 1e-08,
                    'weight_decay': 0.01,
                    'amsgrad': False,
                    'foreach': None,
                    'maximize': False,
                    'capturable': False,
                    'differentiable': False,
                    'fused': None,
                    'initial_lr': 0.05,
                    'params': [0, 1, 2, 3, 4, 5],
                }
            ],
        },
        'param_schedulers': [
            {
                'start_factor': 0.1,
                'end_factor': 1.0,
                'total_iters': 5,
                'param_name': 'lr',
                'begin': 0,
                'end': 6,
                'by_epoch': False,
                'base_values': [0.05],
                'last_step': 2,
                '_global_step': 2,
                'verbose': False,
                '_last_value': [0.023],
            }
        ],
        'teacher': {
            'num_updates': 2,
            'shadows': {k.removeprefix('policy.'): 2 * v for k, v in weights.items()},
        },
        'random_states': [
            {
                'python': {'version': python[0], 'words': list(python[1]), 'gauss': python[2]},
                'numpy': {
                    'name': 'MT19937',
                    'keys': torch.from_numpy(numbers[1].astype(np.int64)),
                    'position': numbers[2],
                    'has_gauss': numbers[3],
                    'cached_gaussian': numbers[4],
                },
                'torch': torch.Generator().manual_seed(5).get_state(),
                'cuda': None,
            }
        ],
    }


def test_a_checkpoint_of_an_earlier_version_is_taken_up_whole(tmp_path):
    path, old = tmp_path / 'iter_2.pth', written_by_410f5c5()
    torch.save(old, path)
    runner = build(tmp_path / 'run', load_from=path, resume=True, max_iters=2)
    runner.train()  # nothing left to do
    assert runner.iter == 2
    same(dict(runner.model.state_dict()), dict(old['state_dict']))
    teacher = runner.model.teacher.state_dict()
    assert teacher['num_updates'] == 2
    same(dict(teacher['shadows']), old['teacher']['shadows'])
    found, expected = runner.optim_wrapper.optimizer.state_dict(), old['optimizer']
    same(found['state'], expected['state'])
    for group, before in zip(found['param_groups'], expected['param_groups'], strict=True):
        # Newer versions of torch have options that this checkpoint cannot hold.
        same({key: group[key] for key in before}, before)
    assert runner.message_hub.get_scalar('train/loss').data[0].tolist() == [3.0, 2.5]
    assert runner.param_schedulers[0].last_step == 2


def test_a_run_of_an_earlier_version_goes_on_with_its_random_numbers(tmp_path):
    states = []

    class Look(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            states.append((torch.get_rng_state(), random.getstate(), np.random.get_state()[1]))

    torch.save(written_by_410f5c5(), tmp_path / 'iter_2.pth')
    options = dict(load_from=tmp_path / 'iter_2.pth', resume=True, max_iters=3)
    build(tmp_path / 'run', hooks=[EMATeacherHook(), Look()], **options).train()
    ((torchs, python, numbers),) = states
    drawn = torch.Generator().manual_seed(5)
    for _ in range(2):  # the samples of the batch
        torch.randn(4, generator=drawn)
    assert torch.equal(torchs, drawn.get_state())
    assert python == random.Random(5).getstate()
    assert (numbers == np.random.RandomState(5).get_state()[1]).all()


# ---- refusing checkpoints


def resume_error(tmp_path, path, kind=CheckpointError, **options):
    runner = build(tmp_path / 'resumed', load_from=path, resume=True, **options)
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    shadows = runner.model.teacher.state_dict()['shadows']
    teacher_before = {k: v.clone() for k, v in shadows.items()}
    with pytest.raises(kind) as error:
        runner.train()
    for key, value in runner.model.state_dict().items():
        assert torch.equal(value, before[key])
    for key, value in runner.model.teacher.state_dict()['shadows'].items():
        assert torch.equal(value, teacher_before[key])
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_missing_file(tmp_path):
    text = resume_error(tmp_path, tmp_path / 'iter_9.pth', FileNotFoundError)
    assert 'there is no checkpoint' in text
    assert 'last_checkpoint' in text


def test_a_folder(tmp_path):
    (tmp_path / 'iter_9.pth').mkdir()
    assert '--deepspeed' in resume_error(tmp_path, tmp_path / 'iter_9.pth')


@pytest.mark.parametrize('keep', [0, 1, 1000, -200])
def test_a_truncated_file(tmp_path, keep):
    run(tmp_path / 'whole', max_iters=2)
    path = tmp_path / 'whole' / 'iter_2.pth'
    path.write_bytes(path.read_bytes()[:keep])
    text = resume_error(tmp_path, path)
    assert 'is damaged' in text
    assert 'earlier checkpoint' in text


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / 'notes.pth'
    path.write_text('hello, these are notes\n' * 10)
    assert 'is damaged or not a checkpoint' in resume_error(tmp_path, path)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / 'list.pth'
    torch.save([1, 2], path)
    assert 'holds a list' in resume_error(tmp_path, path)


def test_bare_weights_are_no_training_checkpoint(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save({'policy.0.weight': torch.zeros(8, 4)}, path)
    text = resume_error(tmp_path, path)
    assert "no 'meta' and no 'state_dict'" in text
    assert 'load_from' in text


class Evil:
    def __reduce__(self):
        return (print, ('this code ran',))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    path = tmp_path / 'evil.pth'
    torch.save({'meta': {}, 'state_dict': {}, 'x': Evil()}, path)
    text = resume_error(tmp_path, path)
    # torch 2.6 and later leave the module of a builtin out.
    assert re.search(r'holds a Python object \((builtins\.)?print\)', text)
    assert 'this code ran' not in capsys.readouterr().out


def test_a_checkpoint_of_another_model_lists_the_keys(tmp_path):
    run(tmp_path / 'whole', max_iters=2)
    path = tmp_path / 'whole' / 'iter_2.pth'
    checkpoint = load_from_local(path)
    state = checkpoint['state_dict']
    state['policy.9.bias'] = state.pop('policy.2.bias')
    state['policy.0.weight'] = torch.zeros(3, 4)
    torch.save(checkpoint, path)
    text = resume_error(tmp_path, path)
    assert '3 keys do not match' in text
    assert 'policy.2.bias is missing' in text
    assert 'policy.9.bias is not in the model' in text
    assert 'policy.0.weight has shape (3, 4), the model has (8, 4)' in text


def test_a_long_list_of_keys_is_cut_and_counted(tmp_path):
    path = tmp_path / 'other.pth'
    torch.save({'meta': {}, 'state_dict': {f'w{i}': torch.zeros(1) for i in range(50)}}, path)
    text = resume_error(tmp_path, path)
    assert '54 keys do not match' in text
    assert 'w15 is not in the model; and 34 more' in text


def test_the_check_does_not_need_the_teacher_hook(tmp_path):
    run(tmp_path / 'whole', max_iters=2, width=6, hooks=[])
    text = resume_error(tmp_path, tmp_path / 'whole' / 'iter_2.pth', hooks=[])
    assert 'policy.0.weight has shape (6, 4), the model has (8, 4)' in text


def test_frozen_weights_may_be_absent(tmp_path):
    run(tmp_path / 'whole', max_iters=2)
    path = tmp_path / 'whole' / 'iter_2.pth'
    checkpoint = load_from_local(path)
    del checkpoint['state_dict']['frozen.weight'], checkpoint['state_dict']['frozen.bias']
    torch.save(checkpoint, path)
    assert len(run(tmp_path / 'resumed', load_from=path, resume=True).model.seen) == 4


def test_weights_to_start_from_may_be_partial_but_not_of_another_model(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save({'policy.2.bias': torch.tensor([5.0])}, path)
    runner = build(tmp_path / 'a', load_from=path, max_iters=0)
    runner.train()
    assert runner.model.policy[2].bias.item() == 5.0
    assert runner.model.teacher.state_dict()['shadows']['2.bias'].item() == 5.0
    torch.save({'backbone.bias': torch.tensor([5.0])}, path)
    with pytest.raises(CheckpointError, match='holds none of the weights of Toy'):
        build(tmp_path / 'b', load_from=path).train()


def test_xtuner_reads_the_seed(tmp_path):
    run(tmp_path, max_iters=2)
    # What `xtuner train --resume` does first, as strictly as torch 2.6 and later do it.
    checkpoint = torch.load(tmp_path / 'iter_2.pth', map_location='cpu', weights_only=True)
    assert checkpoint['meta']['seed'] == 1


def test_an_interval_between_optimizer_steps_is_said(tmp_path):
    runner = build(tmp_path, interval=3, accumulative_counts=2, max_iters=0)
    said = []
    runner.logger.warning = said.append
    runner.train()
    assert any('multiple of accumulative_counts' in str(text) for text in said)


def test_a_misspelled_option_is_an_error():
    with pytest.raises(TypeError, match="has no option 'intervall': did you mean 'interval'"):
        MM_HOOKS.build({'type': AtomicCheckpointHook, 'intervall': 5})


def test_is_mmengines_hook():
    assert issubclass(AtomicCheckpointHook, CheckpointHook)
    assert AtomicCheckpointHook.priority == CheckpointHook.priority
    assert MM_HOOKS.build({'type': 'llava_sam2_rl.EMATeacherHook'}).__class__ is EMATeacherHook
