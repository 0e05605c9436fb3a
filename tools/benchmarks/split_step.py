"""A real step under ZeRO-3 with weights in parts, made of random ones: what each rank holds.

Whole weights are never there: PyTorch's new tensors take no memory before they are written, and
each is filled as DeepSpeed takes it apart. `tools/memory.py CONFIG --gpus W --zero 3 --measure`
starts W processes of this module on this machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from . import common, ranks

#: Numbers of a tensor that is not there before it is taken apart.
_LARGE = 1_000_000


def measure(config: Path, count: int, sizes: Any) -> list[dict[str, Any]]:
    """What each of W ranks took in one step.

    Args:
        config: A config file.
        count: W.
        sizes: `Sizes` that the config was read to.

    Returns:
        W × ``resident`` bytes of the weights it holds, ``seconds`` of the step by phase and
        ``peaks``, bytes above what the process had before the model, by phase.

    Raises:
        RuntimeError: A rank failed; the message ends with its log.
    """
    options = {'batch': sizes.batch, 'group': sizes.group, 'tokens': sizes.tokens}
    return ranks.run_ranks(__name__, count, {**options, 'config': str(config.resolve())})


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


def on_rank(options: argparse.Namespace) -> dict[str, Any]:
    """One step."""
    import psutil
    import torch
    import torch.distributed as dist
    from mmengine.config import Config

    from projects.llava_sam2_rl.engine.timing import phases
    from projects.llava_sam2_rl.models.sa2va.internvl import architecture
    from projects.llava_sam2_rl.models.sa2va.self_test import check_language_model
    from projects.llava_sam2_rl.models.transformers_compat import weights_left_unwritten
    from projects.llava_sam2_rl.registry import MODELS

    made = common.with_random_weights(
        Config.fromfile(options.config).model, options.group, options.tokens
    )
    common.give_freed_memory_back()
    process = psutil.Process()
    before = process.memory_info().rss
    torch.manual_seed(0)
    # Its own small model has weights; what it found is remembered.
    check_language_model(architecture(made.policy['llm_config']))
    with weights_left_unwritten():
        model = MODELS.build(made)
    with common.peaks_by_phase(lambda: process.memory_info().rss - before) as peaks:
        with filled_as_taken_apart(model):
            engine, wrapper = ranks.build_engine(model, 3)
        whole = {p.data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        parts = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters())
        batch = common.make_batch(model, options.batch, start=options.batch * dist.get_rank())
        model.train()
        phases.take()
        engine.train_step(batch, wrapper)
        spent = phases.take()
    return {
        'resident': sum(whole.values()) + parts,
        'seconds': {name: phase.seconds for name, phase in spent.items()},
        'peaks': dict(peaks),
    }
