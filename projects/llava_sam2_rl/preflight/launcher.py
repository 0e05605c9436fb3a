"""Whether the processes of a run were started as its launcher expects."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

import torch
from mmengine.config import Config

from projects.llava_sam2_rl.engine.dataloader_config import bare_name
from projects.llava_sam2_rl.preflight.problems import Problem

# What each launcher sets for every process, and how it is called.
_NEEDS = {
    'pytorch': (
        ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'),
        'start it by torchrun --nproc_per_node N, or by tools/dist_train.sh',
    ),
    'slurm': (
        ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_NODELIST'),
        'start it by srun, or by sbatch tools/slurm_train.sh',
    ),
    'mpi': (('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK'), 'start it by mpirun'),
}


def check_launcher(cfg: Config) -> list[Problem]:
    """The launcher's variables, a GPU for each process, and DeepSpeed where it is asked for."""
    environ = os.environ
    launcher = cfg.get('launcher') or 'none'
    found = []
    if launcher in _NEEDS:
        variables, how = _NEEDS[launcher]
        missing = [name for name in variables if name not in environ]
        if missing:
            text = f'{launcher} sets {", ".join(missing)} for every process, and nothing here has'
            found.append(Problem('launcher', text, f'{how}; or --launcher none for one process'))
    elif launcher != 'none':
        text = f'{launcher!r} is no launcher'
        found.append(Problem('launcher', text, 'one of none, pytorch, slurm, mpi'))
    elif int(environ.get('WORLD_SIZE', 1)) > 1:
        found.append(
            Problem(
                'launcher',
                f'{environ["WORLD_SIZE"]} processes were started, and without a launcher each '
                'would train alone, into the same folder',
                '--launcher pytorch',
            )
        )
    processes, gpus = local_processes(environ), torch.cuda.device_count()
    if gpus and processes > gpus:
        found.append(
            Problem(
                'launcher',
                f'{processes} processes were started on a machine with {gpus} GPU(s)',
                f'torchrun --nproc_per_node {gpus} (NPROC_PER_NODE={gpus})',
            )
        )
    return found + _deepspeed(cfg)


def _deepspeed(cfg: Config) -> list[Problem]:
    kind = bare_name((cfg.get('optim_wrapper') or {}).get('type', ''))
    if kind != 'DeepSpeedOptimWrapper' or importlib.util.find_spec('deepspeed') is not None:
        return []
    return [
        Problem(
            'optim_wrapper.type',
            'DeepSpeed is asked for and is not installed',
            "pip install 'llava-sam2-rl[deepspeed]', or leave --deepspeed out",
        )
    ]


def local_processes(environ: Mapping[str, str]) -> int:
    """Processes of the run on this machine."""
    for name in ('LOCAL_WORLD_SIZE', 'SLURM_NTASKS_PER_NODE', 'OMPI_COMM_WORLD_LOCAL_SIZE'):
        if environ.get(name, '').isdecimal():
            return int(environ[name])
    return 1


def all_processes(environ: Mapping[str, str]) -> int:
    """Processes of the run on all machines."""
    for name in ('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
        if environ.get(name, '').isdecimal():
            return int(environ[name])
    return 1
