"""What a process of a distributed run does before mmengine's runner, and when it fails."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import traceback
from collections.abc import Callable

# So long the processes of a run have to start, and later on a collective may take.
_SECONDS_TO_MEET = 1800
# So long a rank that fails by the failure of another waits for its traceback.
_SECONDS = 5


def prepare(launcher: str, deepspeed: str | None) -> None:
    """Makes the process group where mmengine cannot: without GPUs, or for DeepSpeed alone.

    mmengine asks for a CUDA device of every rank, and DeepSpeed without a launcher for MPI. A
    process group that is there already is used by both. On machines with GPUs and a launcher
    nothing is done: mmengine makes the group, by ``env_cfg.dist_cfg``.

    Args:
        launcher: ``'none' | 'pytorch' | 'slurm' | 'mpi'``.
        deepspeed: Value of ``--deepspeed``.

    Raises:
        KeyError: A variable that the launcher should have set is missing.
        RuntimeError: The processes did not find each other; says where and what to do.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if deepspeed and not has_gpu:
        import deepspeed as ds

        # An extension for shared memory that DeepSpeed would compile at the first start on a CPU.
        ds.ops.__compatible_ops__['deepspeed_shm_comm'] = False
    if torch.distributed.is_initialized():
        return
    if launcher == 'none':
        if deepspeed:
            torch.distributed.init_process_group(
                'nccl' if has_gpu else 'gloo',
                store=torch.distributed.HashStore(),
                rank=0,
                world_size=1,
            )
    elif not has_gpu and launcher in ('pytorch', 'slurm'):
        if launcher == 'slurm':
            _environment_from_slurm()
        missing = [key for key in _REQUIRED if key not in os.environ]
        if missing:
            raise KeyError(
                f'--launcher {launcher} needs {", ".join(missing)} in the environment: start the '
                'run by torchrun or tools/dist_train.sh'
            )
        try:
            torch.distributed.init_process_group(
                'gloo', timeout=datetime.timedelta(seconds=_SECONDS_TO_MEET)
            )
        except (RuntimeError, OSError) as error:
            raise RuntimeError(_why_not_met(error)) from error


def _why_not_met(error: Exception) -> str:
    """What to do about ranks that did not find each other."""
    environ = os.environ
    where = f'{environ["MASTER_ADDR"]}:{environ["MASTER_PORT"]}'
    rank = f'rank {environ["RANK"]} of {environ["WORLD_SIZE"]}'
    reason = str(error).strip().splitlines()[0]
    if 'EADDRINUSE' in str(error) or 'in use' in str(error):
        return (
            f'{rank}: the port of {where} is taken by another program: set another MASTER_PORT '
            f'(torchrun: --master-port; --standalone chooses a free one) ({reason})'
        )
    return (
        f'{rank} did not meet the others at {where} within {_SECONDS_TO_MEET} s: start as many '
        'processes as were announced (torchrun --nnodes, --nproc-per-node; NNODES), with the same '
        f'MASTER_ADDR and MASTER_PORT on all nodes, and see that the port is open ({reason})'
    )


_REQUIRED = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def _environment_from_slurm() -> None:
    """As mmengine derives it."""
    environ = os.environ
    environ['RANK'] = environ['SLURM_PROCID']
    environ['WORLD_SIZE'] = environ['SLURM_NTASKS']
    environ['LOCAL_RANK'] = environ['SLURM_LOCALID']
    environ.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in environ:
        nodes = subprocess.run(
            ['scontrol', 'show', 'hostname', environ['SLURM_NODELIST']],
            capture_output=True,
            text=True,
            check=True,
        )
        environ['MASTER_ADDR'] = nodes.stdout.split()[0]


def run(main: Callable[[], None]) -> None:
    """``main()``; where a rank of several fails, all end, and its traceback is shown last.

    The others find their collectives broken a moment later. They show the traceback of the rank
    that failed first instead of their own. The first one's goes into PyTorch's error record too,
    so that torchrun's summary has it. (Records of all ranks would not do: their times are whole
    seconds, and torchrun takes the lowest rank of those that failed within the same one.)

    Raises:
        Exception: What ``main`` raised, in a run of one process; a rank of several exits with 1.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()  # a crash inside a library leaves the stacks of all threads
    try:
        main()
    except Exception as error:
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            raise
        text, is_first = _who_failed()
        if is_first:
            handler.record_exception(error)
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Not through the interpreter's end, which may wait for the other ranks.
        os._exit(1)


def _who_failed() -> tuple[str, bool]:
    """What this rank says of the error under way, and whether it was the first to fail."""
    import torch

    rank = torch.distributed.get_rank()
    own = f'rank {rank} failed:\n{traceback.format_exc()}'
    store = torch.distributed.distributed_c10d._get_default_store()
    try:
        store.set_timeout(datetime.timedelta(seconds=_SECONDS))
        if store.add('llava_sam2_rl/failures', 1) == 1:
            store.set('llava_sam2_rl/failure', own)
            return own, True
        first = store.get('llava_sam2_rl/failure').decode()
    except (RuntimeError, OSError):
        # Without torchrun the store is in rank 0, which may be the one that failed.
        return f'rank 0 has gone; if it failed first, its traceback says why.\n{own}', False
    return f'rank {rank} stops because another rank failed.\n{first}', False
