"""Training checkpoints as files: written whole or not at all, read without running any code."""

from __future__ import annotations

import codecs
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import find_latest_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from projects.llava_sam2_rl.engine.distributed import unwrapped
from projects.llava_sam2_rl.utils.errors import CheckpointError

#: mmengine's name of the storage backend below (``backend_args=dict(backend=...)``).
ATOMIC_BACKEND = 'atomic_local'
#: Ending of a file that is still being written.
INCOMPLETE = '.incomplete'
# So many wrong keys are named in an error; the others are counted.
_SHOWN = 20

# Besides tensors and plain containers a checkpoint may hold numpy values (a best score, a data
# set's `metainfo`). Nothing else is let through, so a checkpoint cannot run code; log histories
# are stored as tensors, see `plain_message_hub`. (`encode` is how pickle's protocol 2 stores an
# array's bytes.)
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    np.zeros(0).__reduce__()[0],  # numpy's `_reconstruct`, wherever this version keeps it
    np.float64(0).__reduce__()[0],  # and `scalar`
    *{type(np.dtype(kind)) for kind in ('f8', 'f4', 'f2', 'i8', 'i4', 'u8', 'u4', 'u1', '?')},
    codecs.encode,
]
torch.serialization.add_safe_globals(_NUMPY)


def plain_message_hub(message_hub: dict[str, Any]) -> None:
    """Replaces what is not plain data in a message hub's ``state_dict``, in place.

    Log histories become tensors: as mmengine pickles a ``HistoryBuffer``, reading it back means
    calling ``getattr``, which no reader that refuses to run code can allow. Numbers of numpy (the
    time that is left) become Python's: xtuner reads the seed of a checkpoint by a plain
    ``torch.load``, before it imports anything of this package.
    """
    for key, value in message_hub['runtime_info'].items():
        if isinstance(value, np.generic):
            message_hub['runtime_info'][key] = value.item()
    for key, history in message_hub['log_scalars'].items():
        values, counts = history.data
        message_hub['log_scalars'][key] = {
            'values': torch.from_numpy(np.array(values)),
            'counts': torch.from_numpy(np.array(counts)),
            'max_length': history.max_length,
        }


def log_scalars_from_plain(message_hub: dict[str, Any]) -> None:
    """Undoes what :func:`plain_message_hub` does to log histories, in place."""
    for key, plain in message_hub['log_scalars'].items():
        if isinstance(plain, dict):
            message_hub['log_scalars'][key] = HistoryBuffer(
                plain['values'].cpu().numpy(), plain['counts'].cpu().numpy(), plain['max_length']
            )


def write_atomically(path: str | Path, data: bytes) -> None:
    """Writes a file so that ``path`` holds all of ``data`` or what it held before.

    The data goes to ``<path>.incomplete`` and reaches the disk before it takes the name ``path``,
    so neither a killed process nor a power cut leaves half a file under that name.

    Raises:
        OSError: The data could not be written (a full disk); ``path`` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(path.name + INCOMPLETE)
    try:
        with open(incomplete, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(incomplete, path)
    except OSError as error:
        with suppress(OSError):
            incomplete.unlink()
        raise OSError(
            error.errno, f'could not write {path} ({len(data)} bytes): {error.strerror}'
        ) from error
    # The new name itself has to reach the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@register_backend(ATOMIC_BACKEND)
class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, but a file is there whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Writes ``obj`` by :func:`write_atomically`."""
        write_atomically(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Writes ``obj`` by :func:`write_atomically`."""
        write_atomically(filepath, obj.encode(encoding))


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(
    filename: str, map_location: str | torch.device | Callable | None = None
) -> dict[str, Any]:
    """Reads a checkpoint file with ``weights_only=True``; mmengine's loader for local paths.

    Tensors stay on the CPU, whatever ``map_location`` says: mmengine names the GPU, where they
    would lie beside those they are copied into. And AdamW leaves its step numbers where they were
    loaded, so that on a GPU the host waits for each of them at every update.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is damaged or no checkpoint. The message names it and the fix.
    """
    check_file(filename)
    path = Path(filename).expanduser()
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError, KeyError) as error:
        forbidden = re.search(r'GLOBAL (\S+)', str(error))
        if forbidden:
            raise CheckpointError(
                f'{path} holds a Python object ({forbidden[1]}), which is not loaded because it '
                'could run code: use a checkpoint that this project wrote, or convert the file '
                'to plain tensors'
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f'{path} is damaged or not a checkpoint ({reason}): use an earlier checkpoint of the '
            'same folder, or copy the file again'
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(
            f'{path} is not a checkpoint: it holds a {type(checkpoint).__name__}, expected a '
            "dictionary with 'state_dict'"
        )
    return checkpoint


def check_file(filename: str | Path) -> None:
    """Finds what is wrong with a checkpoint file without reading all of it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is a folder, empty, or cut off.
    """
    path = Path(filename).expanduser()
    if path.is_dir():
        raise CheckpointError(
            f'{path} is a folder, as DeepSpeed itself writes checkpoints: resume from an '
            'iter_*.pth file of a run of this project (under --deepspeed it writes files too)'
        )
    if not path.is_file():
        raise FileNotFoundError(
            f'there is no checkpoint {path}: correct the path (the checkpoints of a run lie in '
            'its work directory, `last_checkpoint` there names the newest)'
        )
    with open(path, 'rb') as file:
        start = file.read(2)
    # torch writes zip archives, whose table of contents is at the end.
    if not start or (start == b'PK' and not zipfile.is_zipfile(path)):
        raise CheckpointError(
            f'{path} is damaged: only the first {path.stat().st_size} bytes are there. Use an '
            'earlier checkpoint of the same folder, or copy the file again'
        )


def check_checkpoint(
    checkpoint: dict[str, Any], model: nn.Module, filename: str | Path, *, resume: bool = True
) -> None:
    """Refuses a checkpoint that is not this model's, before anything of it is loaded.

    Args:
        checkpoint: What :func:`load_from_local` returned.
        model: The model under training, not wrapped. Frozen parameters and buffers may be absent
            from the checkpoint; everything else that the model would save must be there.
        filename: Named in the message.
        resume: Whether training goes on from it. Where it only gives initial weights, it is enough
            that it holds some of the model's.

    Raises:
        CheckpointError: Keys are missing, unknown or of another shape. The message lists the first
            20 and counts the others.
    """
    state = checkpoint.get('state_dict')
    if resume and (state is None or 'meta' not in checkpoint):
        lacking = [key for key in ('meta', 'state_dict') if key not in checkpoint]
        raise CheckpointError(
            f'{filename} is not a training checkpoint (no {" and no ".join(map(repr, lacking))}): '
            'resume from an iter_*.pth of a run, or give it as `load_from` to start from its '
            'weights'
        )
    given = {
        re.sub(r'^module\.', '', key): value
        for key, value in (checkpoint if state is None else state).items()
    }
    own = model.state_dict()
    frozen: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    frozen.update(model.named_buffers())
    known = {**frozen, **own}
    problems = [f'{key} is missing' for key in own if key not in given and key not in frozen]
    problems += [f'{key} is not in the model' for key in given if key not in known]
    problems += [
        f'{key} has shape {tuple(given[key].shape)}, the model has {tuple(known[key].shape)}'
        for key in given
        if key in known and given[key].shape != known[key].shape
    ]
    if resume and problems:
        shown = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            shown.append(f'and {len(problems) - _SHOWN} more')
        raise CheckpointError(
            f'{filename} is a checkpoint of another model: {len(problems)} keys do not match '
            f'({"; ".join(shown)}). Resume with the config that wrote it'
        )
    if not resume and not any(key in known for key in given):
        raise CheckpointError(
            f'{filename} holds none of the weights of {type(model).__name__}: its keys begin with '
            f'{next(iter(given), "nothing")!r}, the model has {next(iter(own), "nothing")!r}'
        )


def check_loaded(runner: Any, checkpoint: dict) -> None:
    """:func:`check_checkpoint` for the checkpoint a runner has just read.

    A model with ``upgrade_checkpoint`` brings one of an earlier version up to date first.

    Raises:
        CheckpointError: The checkpoint does not belong to the runner's model.
    """
    filename = runner._load_from or find_latest_checkpoint(runner.work_dir) or 'the checkpoint'
    model = unwrapped(runner)
    if hasattr(model, 'upgrade_checkpoint'):
        model.upgrade_checkpoint(checkpoint, filename, resume=runner._resume)
    check_checkpoint(checkpoint, model, filename, resume=runner._resume)


class DeferredRemoval:
    """A file backend that notes what it is asked to remove (`to_remove`) and does all else."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.to_remove: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        """Notes the path."""
        self.to_remove.append(path)
