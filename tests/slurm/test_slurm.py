"""`sbatch tools/slurm_train.sh` on a real Slurm with two nodes: pre-empted, killed, resumed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import PATIENCE, wait_until
from runs import assert_same_checkpoint, newest, training

ROOT = Path(__file__).resolve().parents[2]
SETUP = ROOT / 'tests/slurm/setup.sh'
PROGRAMS = ('sbatch', 'slurmctld', 'slurmd', 'munged')
ITERATIONS = 20
#: Of a job that is cancelled: more than it gets to.
LONG = 1000
RESOURCES = ['--nodes=2', '--gpus-per-node=1', '--ntasks-per-node=1', '--cpus-per-task=1']
OPTIONS = [
    'train_dataloader.batch_size=1',
    'default_hooks.checkpoint.interval=5',
    'default_hooks.logger.interval=1',
    'val_dataloader.dataset.length=2',
]
pytestmark = pytest.mark.slow


class Slurm:
    """The daemons below a folder, and their commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
        self.environment = dict(os.environ, PATH=path, OMP_NUM_THREADS='1')
        # What another launcher or an outer Slurm has set is not this cluster's.
        for name in list(self.environment):
            if name.startswith(('SLURM_', 'SBATCH_')):
                del self.environment[name]
        self.environment['SLURM_CONF'] = str(folder / 'slurm.conf')

    def __call__(self, *command: str | Path, timeout: float = PATIENCE) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f'{command}: {done.stdout}{done.stderr}'
        return done.stdout.strip()

    def kill_node(self, name: str) -> None:
        """SIGKILL to everything of a node: its daemon, then the job's steps and tasks."""
        pids = [int((self.folder / f'slurmd-{name}.pid').read_text())]
        for task in self.tasks(name):
            stat = Path(f'/proc/{task}/stat').read_text()
            pids += [int(stat.rsplit(')', 1)[1].split()[1]), task]  # its slurmstepd
        assert len(pids) > 1
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def tasks(self, node: str) -> list[int]:
        """The training processes on a node."""
        wanted = {f'SLURMD_NODENAME={node}', f'SLURM_CONF={self.folder / "slurm.conf"}'}
        found = []
        for process in Path('/proc').iterdir():
            if process.name.isdigit():
                try:
                    environment = (process / 'environ').read_bytes().decode().split('\0')
                    command = (process / 'cmdline').read_bytes().decode()
                except OSError:  # gone, or not ours
                    continue
                if wanted <= set(environment) and 'tools/train.py' in command:
                    found.append(int(process.name))
        # A dataloader's workers look the same.
        return [pid for pid in found if _parent(pid) not in found]


def _parent(pid: int) -> int:
    return int(Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[1])


class Job:
    """A training under Slurm."""

    def __init__(self, slurm: Slurm, folder: Path, iterations: int = ITERATIONS) -> None:
        folder.mkdir()
        self.slurm = slurm
        self.iterations = iterations
        self.work_dir = folder / 'run'
        self.log = folder / 'log'
        self.seen = 0
        self.id = slurm(
            *('sbatch', '--parsable', f'--output={self.log}', *RESOURCES),
            *('tools/slurm_train.sh', 'configs/sa2va_tiny_dual_loop_sft.py'),
            *('--work-dir', self.work_dir, '--cfg-options', *OPTIONS),
            f'train_cfg.max_iters={iterations}',
        )

    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text() if self.log.exists() else ''

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Waits until the log has it, after what was waited for before."""
        found = wait_until(
            lambda: re.compile(pattern, re.M).search(self.text(), self.seen),
            lambda: f'no {pattern} in\n{self.text()[-5000:]}',
        )
        self.seen = found.end()
        return found

    def wait_for_iteration(self, iteration: int) -> int:
        """At least this one."""
        later = '|'.join(str(number) for number in range(iteration, self.iterations + 1))
        return int(self.wait_for(rf'Iter\(train\) \[ *({later})/{self.iterations}\]')[1])

    def state(self) -> tuple[str, str]:
        """As Slurm has it: RUNNING, …, and exit code:signal."""
        text = self.slurm('scontrol', 'show', 'job', self.id)
        return re.search(r'JobState=(\w+)', text)[1], re.search(r' ExitCode=(\S+)', text)[1]

    def wait_for_state(self, *states: str) -> str:
        """Waits until the job is in one of them; its exit code."""
        return wait_until(
            lambda: (now := self.state())[0] in states and now[1],
            lambda: f'{self.state()}:\n{self.text()[-5000:]}',
        )


@pytest.fixture(scope='module')
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(
            f'Slurm is not installed ({", ".join(missing)} not found): '
            '`tests/slurm/setup.sh install` gets it, as root on Debian'
        )
    if os.geteuid() != 0:
        pytest.skip('the daemons of a test cluster need root')
    slurm = Slurm(tmp_path_factory.mktemp('slurm'))
    started = subprocess.run(
        # A daemon would hold a pipe open for ever.
        [SETUP, 'start', slurm.folder],
        stdout=(slurm.folder / 'start.log').open('w'),
        stderr=subprocess.STDOUT,
        env=slurm.environment,
        timeout=PATIENCE,
        check=False,
    )
    assert started.returncode == 0, (slurm.folder / 'start.log').read_text()
    yield slurm
    with (slurm.folder / 'stop.log').open('w') as log:
        subprocess.run(
            [SETUP, 'stop', slurm.folder], stdout=log, stderr=log, timeout=PATIENCE, check=True
        )


@pytest.mark.parametrize(
    ('options', 'arguments', 'message'),
    [
        ([], [], 'no config given: sbatch [options] tools/slurm_train.sh CONFIG'),
        ([], ['configs/none.py'], 'there is no config configs/none.py in '),
        ([], ['configs/none.py', '--resume', 'auto'], 'a job resumes by itself'),
        ([], ['configs/none.py', '--launcher=pytorch'], 'the launcher is slurm'),
        (
            ['--ntasks-per-node=2'],
            ['configs/sa2va_tiny_dual_loop_sft.py'],
            '2 tasks and 1 GPUs per node: give --ntasks-per-node and --gpus-per-node the same',
        ),
    ],
)
def test_a_wrong_submission_fails_with_what_to_change(slurm, tmp_path, options, arguments, message):
    log = tmp_path / 'log'
    command = ['sbatch', '--parsable', f'--output={log}', '--job-name=test', *RESOURCES, *options]
    job = slurm(*command, 'tools/slurm_train.sh', *arguments)
    show = ('scontrol', 'show', 'job', job)
    wait_until(lambda: 'JobState=FAILED' in slurm(*show), lambda: slurm(*show))
    assert ' ExitCode=2:0' in slurm(*show)
    assert f'test: error: {message}' in log.read_text()


def test_without_slurm_the_script_says_what_it_is(tmp_path):
    done = subprocess.run(
        [ROOT / 'tools/slurm_train.sh', 'configs/sa2va_tiny_dual_loop_sft.py'],
        env={'PATH': os.environ['PATH']},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert 'this is a batch script: sbatch [options] tools/slurm_train.sh CONFIG' in done.stderr


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, tmp_path):
    job = Job(slurm, tmp_path / 'job', LONG)
    job.wait_for_iteration(1)
    slurm('scancel', job.id)
    stopped = job.wait_for(r'SIGTERM: the run stops after iteration (\d+) with exit code 85; saved')
    job.wait_for(
        r'Slurm ends the job \(cancelled, time limit, or a lost node; '
        rf'the training ended with 85\); to start it again: scontrol requeue {job.id}'
    )
    job.wait_for_state('CANCELLED')
    assert newest(job.work_dir).name == f'iter_{stopped[1]}.pth'


def test_a_job_near_its_time_limit_saves_and_goes_on_in_its_next_start(slurm, tmp_path):
    """SIGUSR1 to the job's tasks, as `#SBATCH --signal=USR1@120` has Slurm send it."""
    job = Job(slurm, tmp_path / 'job', LONG)
    job.wait_for_iteration(1)
    slurm('scancel', '--signal=USR1', job.id)
    stopped = job.wait_for(r'SIGUSR1: the run stops after iteration (\d+) with exit code 85; saved')
    job.wait_for('the training was asked to stop and has saved: back into the queue')
    job.wait_for(rf': job {job.id}, start 2, 2 nodes')
    job.wait_for(rf'^Resuming from \S+/iter_{stopped[1]}\.pth$')
    job.wait_for_iteration(int(stopped[1]) + 1)
    slurm('scancel', job.id)
    job.wait_for_state('CANCELLED')


def test_a_job_goes_on_after_preemption_a_killed_task_and_a_killed_node(slurm, tmp_path):
    whole = Job(slurm, tmp_path / 'whole')
    assert whole.wait_for_state('COMPLETED', 'FAILED') == '0:0'
    assert 'start 1, 2 nodes (n[1-2]), 1 tasks each' in whole.log.read_text()
    assert sorted(training(whole.work_dir)) == list(range(1, ITERATIONS + 1))
    final = f'iter_{ITERATIONS}.pth'
    assert newest(whole.work_dir).name == final

    # A job of a partition with precedence takes the nodes.
    job = Job(slurm, tmp_path / 'job')
    job.wait_for_iteration(3)
    slurm('sbatch', '--partition=urgent', '--output=/dev/null', *RESOURCES, '--wrap=sleep 1')
    stopped = job.wait_for(r'SIGTERM: the run stops after iteration (\d+) with exit code 85; saved')
    at = int(stopped[1])
    assert 3 <= at < ITERATIONS
    job.wait_for('the training was asked to stop and has saved: back into the queue')
    job.wait_for(rf': job {job.id}, start 2, 2 nodes')
    job.wait_for(rf'^Resuming from \S+/iter_{at}\.pth$')

    # The kernel kills one task. The job ends with an error, and goes on when it is told to.
    assert job.wait_for_iteration(at + 1) < ITERATIONS
    (task,) = slurm.tasks('n2')
    os.kill(task, signal.SIGKILL)
    code = job.wait_for_state('FAILED')
    assert code.split(':')[0] not in ('0', '85')
    job.wait_for(rf'to go on from its last checkpoint: scontrol requeue {job.id}')
    before = newest(job.work_dir)
    slurm('scontrol', 'requeue', job.id)
    job.wait_for(rf': job {job.id}, start 3, 2 nodes')
    job.wait_for(rf'^Resuming from {re.escape(str(before))}$')

    # A node goes, with all that is on it. Slurm itself requeues the job, for when it is back.
    job.wait_for(r'Iter\(train\)')
    slurm.kill_node('n2')
    job.wait_for(r'srun: error: n1: task 0: Exited with exit code 1$')
    job.wait_for_state('PENDING')
    before = newest(job.work_dir)
    with (slurm.folder / 'node.log').open('w') as log:
        environment = slurm.environment
        command = [SETUP, 'node', slurm.folder, '2']
        subprocess.run(
            command, stdout=log, stderr=log, env=environment, timeout=PATIENCE, check=True
        )
    job.wait_for(rf': job {job.id}, start 4, 2 nodes')
    job.wait_for(rf'^Resuming from {re.escape(str(before))}$')

    assert job.wait_for_state('COMPLETED', 'FAILED') == '0:0'
    assert newest(job.work_dir) == job.work_dir / final
    assert training(job.work_dir) == training(whole.work_dir)
    assert_same_checkpoint(job.work_dir / final, whole.work_dir / final)
    assert not list(job.work_dir.glob('*.incomplete'))
