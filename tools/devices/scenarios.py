"""What is audited: parts of training and inference of the tiny model on the pretended GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .audit import ROOT, Audit
from .pretend_gpu import DEVICE

#: B of all scenarios that train or validate.
BATCH = 2


def build(name: str, batch: int = BATCH) -> tuple[Any, Any, dict]:
    """Model and optimizer wrapper of a config on the device, and a batch in pinned memory."""
    from benchmarks.common import make_batch
    from mmengine.config import Config
    from mmengine.optim import OptimWrapper
    from torch.utils.data._utils.pin_memory import pin_memory

    from projects.llava_sam2_rl import registry

    torch.manual_seed(0)
    model = registry.MODELS.build(Config.fromfile(f'{ROOT}/configs/{name}.py').model)
    # As the data loader gives it.
    data = pin_memory(make_batch(model, batch))
    model.to(DEVICE)
    model.data_preprocessor.to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return model, OptimWrapper(optimizer, clip_grad={'max_norm': 1.0}), data


def training(name: str, batch: int = BATCH) -> Audit:
    """The second step of a config's model: the first moves the teacher to the device."""
    model, wrapper, data = build(name, batch)
    model.train()
    for _ in range(2):
        audit = Audit()
        with audit:
            model.train_step(data, wrapper)
            model.update_teacher()
    return audit


def sampling(tokens: int = 33, rows: int = 16, **options: Any) -> Audit:
    """So many tokens for so many sequences of two prompts, none of which ends before the last."""
    from benchmarks.rollout import prompts

    from projects.llava_sam2_rl.models import Sampling, sample_completions

    policy = build('sa2va_tiny_dual_loop_sft')[0].policy.eval()
    embeds, mask = prompts(policy, 2, 40)
    options = {'max_new_tokens': tokens, 'min_new_tokens': tokens, **options}
    audit = Audit()
    with audit:
        sample_completions(policy, embeds, mask, rows // 2, Sampling(**options))
    return audit


def validation() -> Audit:
    """Both cycles of a batch, and the metric."""
    from projects.llava_sam2_rl.evaluation import CycleMetric

    model, _, data = build('sa2va_tiny_dual_loop')
    audit = Audit()
    with audit:
        metric = CycleMetric()
        metric.process(data, model.val_step(data))
        metric.compute_metrics(metric.results)
    return audit


def inference() -> Audit:
    """A description and a segmentation of one image, as a user asks for them."""
    import numpy as np
    from PIL import Image

    from projects.llava_sam2_rl.inference import Sa2VA

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (160, 200, 3), dtype='uint8'))
    mask = np.zeros((160, 200), dtype=bool)
    mask[40:90, 50:120] = True
    folder = f'{ROOT}/projects/llava_sam2_rl/assets/sa2va_tiny'
    model = Sa2VA.from_pretrained(folder, device=DEVICE, torch_dtype='float32')
    audit = Audit()
    with audit:
        model.describe(image, mask, max_new_tokens=16)
        model.segment(image, 'the red square', max_new_tokens=16)
    return audit


def resume() -> Audit:
    """mmengine's runner with all hooks: the second step of SFT, after a resume from the first."""
    import mmengine.device.utils
    from mmengine.config import Config
    from mmengine.runner import Runner

    mmengine.device.utils.DEVICE = DEVICE  # what `get_device` gives
    with tempfile.TemporaryDirectory() as folder:
        for steps in (1, 2):
            config = Config.fromfile(f'{ROOT}/configs/sa2va_tiny_dual_loop_sft.py')
            config.update(work_dir=folder, resume=steps > 1, log_level='ERROR')
            config.update(val_cfg=None, val_dataloader=None, val_evaluator=None)
            config.train_cfg.update(max_iters=steps)
            config.train_dataloader.update(
                batch_size=BATCH, num_workers=0, persistent_workers=False
            )
            config.train_dataloader.pop('prefetch_factor', None)
            config.default_hooks.checkpoint.update(interval=1)
            audit = Audit()
            with audit:
                Runner.from_cfg(config).train()
    return audit


def refused() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What CUDA refuses, by name; to test the audit itself."""
    gpu, cpu = torch.ones(3, 3, device=DEVICE), torch.ones(3, 3)
    rows = torch.tensor([0, 1])
    yield 'add', lambda: gpu + cpu
    yield 'cat', lambda: torch.cat([gpu, cpu])
    yield 'stack of scalars', lambda: torch.stack([gpu.sum(), cpu.sum()])
    yield 'where', lambda: torch.where(cpu > 0, gpu, gpu)
    yield 'matmul', lambda: gpu @ cpu
    yield 'index_select', lambda: gpu.index_select(0, rows)
    yield 'embedding', lambda: torch.nn.functional.embedding(rows, gpu)
    yield 'GPU scalar with CPU tensor', lambda: cpu * gpu.sum()
    yield 'CPU tensor, GPU index', lambda: cpu[rows.to(DEVICE)]
    yield 'CPU values at an index', lambda: gpu.clone().__setitem__(rows, cpu[:2])
    yield 'masked_fill, CPU mask', lambda: gpu.masked_fill(cpu > 0, 0.0)
    yield 'generator', lambda: torch.empty_like(gpu).normal_(generator=torch.Generator())
    yield 'foreach', lambda: torch._foreach_lerp_([gpu.clone()], [cpu], 0.5)
    yield 'gradient', lambda: (gpu.clone().requires_grad_() * 2).backward(cpu)


def allowed() -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """What CUDA allows, by name, and how often the host waits for it."""
    gpu, cpu = torch.ones(3, 3, device=DEVICE), torch.ones(3, 3)
    rows, pinned = torch.tensor([0, 1]), torch.ones(3, 3).pin_memory()
    yield 'CPU scalar', 0, lambda: gpu * torch.tensor(2.0)
    yield 'CPU index', 1, lambda: gpu[rows]
    yield 'CPU values of a slice', 1, lambda: gpu.clone().__setitem__(slice(0, 2), cpu[:2])
    yield 'copy to the CPU', 1, lambda: gpu.cpu() + cpu
    yield 'copy from pageable memory', 1, lambda: cpu.to(DEVICE, non_blocking=True)
    yield 'copy from pinned memory', 1, lambda: pinned.to(DEVICE)
    yield 'copy that does not wait', 0, lambda: pinned.to(DEVICE, non_blocking=True)
    yield 'masked fill', 0, lambda: gpu.clone().__setitem__(gpu > 0, 1.0)
    yield 'boolean index', 1, lambda: gpu[gpu > 0]
    yield 'item', 1, lambda: gpu.sum().item()
    yield 'nonzero', 1, lambda: gpu.nonzero()
    yield 'multinomial', 2, lambda: torch.multinomial(gpu, 1)


#: By name on the command line.
SCENARIOS: dict[str, Callable[[], Audit]] = {
    'sft': lambda: training('sa2va_tiny_dual_loop_sft'),
    'gumbel': lambda: training('sa2va_tiny_dual_loop_gumbel'),
    'grpo': lambda: training('sa2va_tiny_dual_loop'),
    'grpo-b4': lambda: training('sa2va_tiny_dual_loop', batch=4),
    'sampling': sampling,
    'greedy': lambda: sampling(greedy=True),
    'validation': validation,
    'inference': inference,
    'resume': resume,
}
