import types

import pytest
import torch
from mmengine.runner import FlexibleRunner

from projects.llava_sam2_rl.engine.checkpoint_files import load_from_local
from projects.llava_sam2_rl.hooks import EMATeacherHook
from test_hooks.toy import build

# What mmengine does where an optimizer step takes several iterations.
SCHEDULER = 'ignore:Detected call of `scheduler.step:UserWarning'


class Recorder:
    """Follows the policy after every optimizer step, independently of the hook."""

    def __init__(self, runner):
        self.values = []
        model = runner.model
        update = model.update_teacher
        self.start = model.policy[2].bias.detach().double().clone()

        def recording():
            self.values.append(model.policy[2].bias.detach().double().clone())
            update()

        model.update_teacher = recording

    def expected(self, decay):
        shadow = self.start
        for value in self.values:
            shadow = decay * shadow + (1 - decay) * value
        return shadow


def trained(tmp_path, **options):
    runner = build(tmp_path, **options)
    recorder = Recorder(runner)
    runner.train()
    return runner, recorder


@pytest.mark.filterwarnings(SCHEDULER)
@pytest.mark.parametrize(
    ('options', 'steps'),
    [
        ({}, 6),
        ({'accumulative_counts': 2}, 3),
        ({'accumulative_counts': 4}, 2),  # after 4, and mmengine's step for the remainder
        ({'steps_per_iter': 3}, 18),
    ],
)
def test_one_update_per_optimizer_step(tmp_path, options, steps):
    runner, recorder = trained(tmp_path, **options)
    teacher = runner.model.teacher
    assert teacher.num_updates == steps
    # Each update saw another policy: it came after the step, not before or twice.
    assert len({value.item() for value in [recorder.start, *recorder.values]}) == steps + 1
    shadow = teacher.state_dict()['shadows']['2.bias'].double()
    torch.testing.assert_close(shadow, recorder.expected(0.9), rtol=0, atol=1e-6)


def test_the_decay_of_the_config_wins(tmp_path):
    runner, recorder = trained(tmp_path, hooks=[{'type': EMATeacherHook, 'decay': 0.5}])
    shadow = runner.model.teacher.state_dict()['shadows']['2.bias'].double()
    torch.testing.assert_close(shadow, recorder.expected(0.5), rtol=0, atol=1e-6)


def test_decay_and_count_are_logged(tmp_path):
    runner, _ = trained(tmp_path)
    assert runner.message_hub.get_scalar('train/teacher/decay').current() == 0.9
    assert runner.message_hub.get_scalar('train/teacher/updates').data[0].tolist() == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip


def test_the_teacher_is_in_the_checkpoint_and_comes_back(tmp_path):
    runner, _ = trained(tmp_path / 'a', max_iters=4)
    saved = load_from_local(tmp_path / 'a' / 'iter_4.pth')['teacher']
    assert saved['num_updates'] == 4
    resumed = build(
        tmp_path / 'b', load_from=tmp_path / 'a' / 'iter_4.pth', resume=True, max_iters=4
    )
    resumed.train()  # nothing left to do
    assert resumed.model.teacher.num_updates == 4
    for name, shadow in runner.model.teacher.state_dict()['shadows'].items():
        assert torch.equal(resumed.model.teacher.state_dict()['shadows'][name], shadow)
        assert torch.equal(saved['shadows'][name], shadow)
        assert not torch.equal(runner.model.policy.state_dict()[name], shadow)


def test_a_checkpoint_without_teacher_starts_it_at_the_loaded_policy(tmp_path):
    trained(tmp_path / 'a', max_iters=2)
    path = tmp_path / 'a' / 'iter_2.pth'
    checkpoint = load_from_local(path)
    del checkpoint['teacher']
    torch.save(checkpoint, path)
    runner = build(tmp_path / 'b', load_from=path, resume=True, max_iters=2)
    said = []
    runner.logger.warning = said.append
    runner.train()
    assert any('holds no teacher' in str(text) for text in said)
    assert runner.model.teacher.num_updates == 0
    for name, value in checkpoint['state_dict'].items():
        if name.startswith('policy.'):
            shadow = runner.model.teacher.state_dict()['shadows'][name.removeprefix('policy.')]
            assert torch.equal(shadow, value)


def test_without_a_checkpoint_the_teacher_starts_at_the_policy(tmp_path):
    runner = build(tmp_path, max_iters=0)
    with torch.no_grad():
        runner.model.policy[2].bias.fill_(4.0)  # as an init_cfg would
    runner.train()
    assert runner.model.teacher.state_dict()['shadows']['2.bias'].item() == 4.0


def test_stops_following_when_training_ends(tmp_path):
    runner, _ = trained(tmp_path)
    runner.optim_wrapper.optimizer.step()
    assert runner.model.teacher.num_updates == 6


class Engine:
    """What a DeepSpeed engine shows, with a script of what its steps do."""

    def __init__(self, script):
        self.script = iter(script)
        self.global_steps, self.skipped_steps = 3, 1  # of the run that was resumed
        self.module = types.SimpleNamespace(
            teacher=types.SimpleNamespace(decay=0.9, num_updates=0, copy_from=lambda policy: None),
            policy=None,
        )

    def zero_optimization_stage(self):
        return 1

    def zero_overlap_comm(self):
        return False

    def is_gradient_accumulation_boundary(self):
        return True

    def step(self):
        what = next(self.script)
        self.global_steps += what != 'micro'
        self.skipped_steps += what == 'overflow'


def test_deepspeed_steps_are_the_engines_own_less_the_skipped_ones():
    from projects.llava_sam2_rl.engine.deepspeed import DualLoopEngine

    engine = Engine(['step', 'micro', 'overflow', 'step', 'micro'])
    updates = []
    engine.module.update_teacher = lambda: updates.append(engine.global_steps)
    wrapper = DualLoopEngine(model=engine)
    hook = EMATeacherHook()
    runner = FlexibleRunner.__new__(FlexibleRunner)  # as `xtuner train --deepspeed` takes
    vars(runner).update(model=wrapper, _resume=False, _load_from=None)
    hook.before_train(runner)
    for _ in range(5):
        wrapper.step()
    assert updates == [4, 6]


def test_several_optimizers_are_an_error(tmp_path):
    runner = build(tmp_path)
    runner.optim_wrapper = object()
    runner.train_loop  # noqa: B018  # built, as before training
    with pytest.raises(TypeError, match='follows one optimizer, got object'):
        EMATeacherHook().before_train(runner)


def test_decay_outside_the_range_is_an_error():
    with pytest.raises(ValueError, match='between 0 and 1, got 2'):
        EMATeacherHook(decay=2)
