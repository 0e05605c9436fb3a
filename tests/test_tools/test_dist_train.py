"""`tools/dist_train.sh`: its arguments, and a training on two "machines" that is asked to stop."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from distributed import PATIENCE, free_port, wait_until
from runs import load, newest, training

CONFIG = 'configs/sa2va_tiny_dual_loop_sft.py'


def dist_train(root, *arguments, path=None):
    path = path or f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'
    command = [root / 'tools/dist_train.sh', *arguments]
    environment = dict(os.environ, PATH=path)
    return subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('', 'usage: tools/dist_train.sh [options] CONFIG'),
        (CONFIG, '--nproc-per-node is missing: processes on this machine, one per GPU'),
        ('--nproc-per-node', '--nproc-per-node needs a value'),
        (f'--nproc-per-node two {CONFIG}', "--nproc-per-node must be a number, got 'two'"),
        (f'--nproc-per-node 0 {CONFIG}', '--nproc-per-node and --nnodes start at 1'),
        (f'--nproc-per-node 1 --nnodes 0 {CONFIG}', '--nproc-per-node and --nnodes start at 1'),
        (f'--nproc-per-node 1 --nnodes 2 {CONFIG}', '--nnodes 2 needs --node-rank'),
        (
            f'--nproc-per-node 1 --nnodes 2 --node-rank 0 {CONFIG}',
            '--nnodes 2 needs --master-addr, the address of machine 0',
        ),
        (
            f'--nproc-per-node 1 --nnodes 2 --node-rank 2 --master-addr a {CONFIG}',
            '--node-rank 2, but --nnodes 2: they count from 0',
        ),
        (f'--nproc-per-node 1 --master-port 65536 {CONFIG}', '--master-port must lie in 1..65535'),
        (f'--deepspeed zero2 {CONFIG}', 'unknown option --deepspeed (options of tools/train.py'),
        (f'--nproc-per-node 1 {CONFIG} --launcher slurm', 'leave --launcher out'),
        ('--nproc-per-node 1 configs/none.py', 'there is no config configs/none.py'),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(root, arguments, message):
    done = dist_train(root, *arguments.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ''


def test_help_names_every_option(root):
    done = dist_train(root, '--help')
    assert done.returncode == 0
    source = (root / 'tools/dist_train.sh').read_text()
    options = set(re.findall(r'^ *(--[a-z-]+)\) ', source, re.M))
    assert options == {
        *('--nproc-per-node', '--nnodes', '--node-rank', '--master-addr', '--master-port')
    }
    assert all(f'  {option} ' in done.stdout for option in options)


def test_a_port_that_is_taken_is_named(root):
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = dist_train(root, '--nproc-per-node', '1', '--master-port', port, CONFIG)
    assert done.returncode == 2
    assert f'port {port} of this machine is taken: choose another with --master-port' in done.stderr


@pytest.mark.slow
def test_two_machines_train_together_and_save_when_one_is_asked_to_stop(root, tmp_path):
    port = free_port()
    work_dir = tmp_path / 'run'
    path = f'{os.path.dirname(sys.executable)}:{os.environ["PATH"]}'
    environment = dict(os.environ, PATH=path, OMP_NUM_THREADS='1')
    logs = [tmp_path / f'node{rank}.log' for rank in range(2)]
    nodes = []
    for rank, log in enumerate(logs):
        with log.open('w') as file:
            command = f"""tools/dist_train.sh --nnodes 2 --node-rank {rank} --nproc-per-node 1
                --master-addr 127.0.0.1 --master-port {port} {CONFIG} --work-dir {work_dir}
                --cfg-options train_dataloader.batch_size=1 default_hooks.logger.interval=1"""
            nodes.append(
                subprocess.Popen(
                    command.split(), cwd=root, env=environment, stdout=file, stderr=file
                )
            )
    try:
        wait_until(
            lambda: (
                'Iter(train) [  2/' in logs[0].read_text()
                or any(node.poll() is not None for node in nodes)
            ),
            lambda: logs[0].read_text()[-3000:],
        )
        assert all(node.poll() is None for node in nodes), logs[0].read_text()[-3000:]
        nodes[1].send_signal(signal.SIGTERM)
        codes = [node.wait(PATIENCE) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    # torchrun has one status for every failure.
    assert all(code not in (0, 2) for code in codes), codes
    stopped = re.search(r'SIGTERM: the run stops after iteration (\d+)', logs[0].read_text())
    assert stopped, logs[0].read_text()[-3000:]
    assert newest(work_dir) == work_dir / f'iter_{stopped[1]}.pth'
    assert len(load(newest(work_dir))['random_states']) == 2
    assert max(training(work_dir)) == int(stopped[1])


def test_the_commands_of_the_page_are_real(root):
    """Scripts, configs and options are there, and `tools/train.py` takes what follows."""
    import importlib.util
    import shlex

    spec = importlib.util.spec_from_file_location('launcher', root / 'tools/train.py')
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    text = (root / 'docs/slurm.md').read_text()
    commands = [
        shlex.split(line)
        for block in re.findall(r'```bash\n(.*?)```', text, re.DOTALL)
        for line in block.replace('\\\n', ' ').strip().splitlines()
    ]
    started = {'tools/slurm_train.sh': 0, 'tools/dist_train.sh': 0}
    usage = dist_train(root, '--help').stdout
    for command in commands:
        for word in command:
            if word.startswith(('tools/', 'configs/', 'tests/')):
                assert (root / word).exists(), word
        for script in started:
            if script in command:
                started[script] += 1
                at = next(n for n, word in enumerate(command) if word.startswith('configs/'))
                launcher.build_parser().parse_args(command[at:])
                if script == 'tools/dist_train.sh':
                    given = [word for word in command[:at] if word.startswith('--')]
                    assert all(f'  {option} ' in usage for option in given)
    assert started == {'tools/slurm_train.sh': 2, 'tools/dist_train.sh': 2}
