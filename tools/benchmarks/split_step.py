"""A real step under ZeRO-3 with weights in parts, made of random ones: what each rank holds.

Whole weights are never there: PyTorch's new tensors take no memory before they are written, and
each is filled as DeepSpeed takes it apart. `tools/memory.py CONFIG --gpus W --zero 3 --measure`
starts W processes of this module on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
#: How often the memory of a rank is looked at, in seconds.
_INTERVAL = 0.05
#: Numbers of a tensor that is not there before it is taken apart.
_LARGE = 1_000_000


def measure(config: Path, ranks: int, sizes: Any) -> list[dict[str, Any]]:
    """What each of W ranks took in one step.

    Args:
        config: A config file of GRPO.
        ranks: W.
        sizes: `Sizes` that the config was read to.

    Returns:
        W × ``resident`` bytes of the weights it holds, ``seconds`` of the step by phase and
        ``peaks``, bytes above what the process had before the model, by phase.

    Raises:
        RuntimeError: The ranks failed; the message ends with their output.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / 'job.json'
        options = {'batch': sizes.batch, 'group': sizes.group, 'tokens': sizes.tokens}
        job.write_text(json.dumps({**options, 'config': str(config.resolve()), 'folder': folder}))
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
        command += ['--nproc_per_node', str(ranks), '-m', 'benchmarks.split_step', str(job)]
        paths = [str(ROOT), str(ROOT / 'tools'), os.environ.get('PYTHONPATH', '')]
        environment = {**os.environ, 'PYTHONPATH': ':'.join(paths)}
        environment.setdefault('OMP_NUM_THREADS', '1')
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            text = (done.stdout + done.stderr)[-12000:]
            raise RuntimeError(f'a step of {config.name} on {ranks} ranks failed:\n{text}')
        return [
            json.loads((Path(folder) / f'rank{rank}.json').read_text()) for rank in range(ranks)
        ]


@contextmanager
def unwritten_weights() -> Iterator[None]:
    """Modules that are built inside leave their weights as they were handed out."""
    import torch
    from transformers.modeling_utils import PreTrainedModel

    names = [name for name in vars(torch.nn.init) if name.endswith('_') and name[0] != '_']
    with (
        mock.patch.multiple(
            torch.nn.init, **{name: lambda tensor, *_, **__: tensor for name in names}
        ),
        mock.patch.object(PreTrainedModel, '_init_weights'),
    ):
        yield


def fill(name: str, param: Any) -> None:
    """Random numbers for a matrix, ones or zeros for what norms and biases are."""
    import torch

    if param.ndim > 1:
        torch.nn.init.normal_(param.data, std=0.02)
    else:
        param.data.fill_(0.0 if name.endswith('bias') else 1.0)


@contextmanager
def filled_as_taken_apart(model: Any) -> Iterator[None]:
    """What is small or trained is filled now; the rest as DeepSpeed splits it, tensor by tensor."""
    from deepspeed.runtime.zero.partition_parameters import Init

    split = Init._zero_init_param
    later = {}
    for name, param in model.named_parameters():
        if param.requires_grad or param.numel() < _LARGE:
            fill(name, param)
        else:
            later[id(param)] = name
    model.teacher.copy_from(model.policy)

    def filled(self: Any, param: Any) -> None:
        if id(param) in later:
            fill(later[id(param)], param)
        split(self, param)

    with mock.patch.object(Init, '_zero_init_param', filled):
        yield


def step_of_rank(options: argparse.Namespace) -> dict[str, Any]:
    """One step on this rank."""
    import deepspeed
    import psutil
    import torch
    import torch.distributed as dist
    from benchmarks.common import make_batch
    from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper
    from mmengine.config import Config

    from projects.llava_sam2_rl.engine.deepspeed import DualLoopEngine
    from projects.llava_sam2_rl.engine.timing import phases
    from projects.llava_sam2_rl.models.sa2va.internvl import architecture
    from projects.llava_sam2_rl.models.sa2va.self_test import check_language_model
    from projects.llava_sam2_rl.preflight.memory import random_weights
    from projects.llava_sam2_rl.registry import MODELS

    process = psutil.Process()
    before = process.memory_info().rss
    made = Config.fromfile(options.config).model
    made.policy = random_weights(made.policy)
    made.max_new_tokens = options.tokens
    made.objective.num_generations = options.group
    torch.manual_seed(0)
    # Its own small model has weights; what it found is remembered.
    check_language_model(architecture(made.policy['llm_config']))
    with unwritten_weights():
        model = MODELS.build(made)
    dtype = model.policy.torch_dtype
    name = 'zero3.json' if dtype == torch.bfloat16 else 'zero3_fp32.json'
    zero = json.loads((ROOT / 'configs/deepspeed' / name).read_text())
    zero.update(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    zero['gradient_clipping'] = 1.0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    peaks: dict[str, int] = defaultdict(int)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL):
            phase = phases.current or 'between'
            peaks[phase] = max(peaks[phase], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with filled_as_taken_apart(model):
        found, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero)
    engine = DualLoopEngine(model=found)
    engine.after_step.append(model.update_teacher)
    if model.gather_for_rollout is None:
        model.gather_for_rollout = False
    wrapper = DeepSpeedOptimWrapper(optimizer)
    wrapper.model = engine
    whole = {p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    parts = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters())
    batch = make_batch(model, options.batch, start=options.batch * dist.get_rank())
    model.train()
    phases.take()
    engine.train_step(batch, wrapper)
    spent = phases.take()
    done.set()
    watcher.join()
    return {
        'resident': sum(whole.values()) + parts,
        'seconds': {name: phase.seconds for name, phase in spent.items()},
        'peaks': dict(peaks),
    }


def main(job: str) -> None:
    """What a rank does."""
    import ctypes

    import torch.distributed as dist

    from projects.llava_sam2_rl.engine.launch import prepare

    if sys.platform == 'linux':
        # What is freed goes back to the system at once; glibc keeps blocks below 32 MB otherwise.
        ctypes.CDLL(None).mallopt(-3, 2**16)
    prepare('pytorch', 'a.json')
    options = argparse.Namespace(**json.loads(Path(job).read_text()))
    found = step_of_rank(options)
    (Path(options.folder) / f'rank{dist.get_rank()}.json').write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    main(sys.argv[1])
