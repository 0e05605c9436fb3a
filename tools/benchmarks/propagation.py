"""What carrying masks through a clip costs beside the modules of SAM 2 that it has to run.

Those are timed inside the same pass: image encoder, prompt encoder and mask decoder, memory encoder
and attention. The memory of a long clip is that of `--long` frames and of three times as many. A
training step of clips is a GRPO step with `return_trip='propagate'` in both directions, T frames
against the first frames of the same clips; the images that the encoder saw in it are counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py propagation``."""
    common.add_arguments(parser, batch=2)
    parser.add_argument('--frames', type=int, default=24, help='of a clip (%(default)s)')
    parser.add_argument('--objects', type=int, default=3, help='of a clip (%(default)s)')
    parser.add_argument('--clip', type=int, default=4, help='T of a step (%(default)s)')
    parser.add_argument('--group', type=int, default=4, help='G of a step (%(default)s)')
    parser.add_argument(
        '--long', type=int, default=24, help='frames; and three times as many (%(default)s)'
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times and measures all.

    Returns:
        A row per model.
    """
    return [row(model, args) for model in args.models]


def row(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    from projects.llava_sam2_rl.engine.memory import peak_extra_bytes
    from projects.llava_sam2_rl.models import GRPOObjective
    from projects.llava_sam2_rl.models.sa2va.propagation import propagate_frames

    objective = GRPOObjective(
        num_generations=args.group,
        mask_to_caption={'return_trip': 'propagate'},
        caption_to_mask={'return_trip': 'propagate'},
    )
    model = common.build_model(size, objective, args)
    encoder = model.policy.grounding_encoder
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randn(args.objects, encoder.hidden_dim, generator=draw).to(args.device)

    def frames(count: int) -> Iterator[Tensor]:
        shape = (3, encoder.image_size, encoder.image_size)
        for _ in range(count):
            yield torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw).to(args.device)

    clip = list(frames(args.frames))
    whole, modules = [], []
    for _ in range(args.rounds + 1):
        with timed(encoder.sam2_model, args.device) as spent, torch.no_grad():
            started = time.perf_counter()
            model.policy.propagate(iter(clip), prompts)
            common.wait(args.device)
            whole.append(time.perf_counter() - started)
        modules.append(sum(spent.values()))
    ratios = [a / b for a, b in zip(whole[1:], modules[1:], strict=True)]

    def carry(count: int) -> float:
        with torch.no_grad():
            for _ in propagate_frames(encoder, frames(count), prompts):
                pass
        return 0.0

    short, long = (
        peak_extra_bytes(lambda count=count: carry(count), args.device)
        for count in (args.long, 3 * args.long)
    )
    step = clip_steps(model, args)
    return {
        'model': size,
        'frames': args.frames,
        'objects': args.objects,
        'propagate s': statistics.median(whole[1:]),
        'its modules s': statistics.median(modules[1:]),
        'of its modules': statistics.median(ratios),
        f'peak MB, {args.long} frames': short / 1e6,
        f'peak MB, {3 * args.long} frames': long / 1e6,
        **step,
    }


@contextmanager
def timed(sam2_model: nn.Module, device: str) -> Iterator[dict[str, float]]:
    """Seconds in each module that a clip needs, by name."""
    decoder = sam2_model.sam_mask_decoder
    parts = {
        'image_encoder': sam2_model.image_encoder,
        'prompt_encoder': sam2_model.sam_prompt_encoder,
        'mask_decoder': decoder,
        # Called for themselves, before the decoder.
        'conv_s0': decoder.conv_s0,
        'conv_s1': decoder.conv_s1,
        'memory_attention': sam2_model.memory_attention,
        'memory_encoder': sam2_model.memory_encoder,
        'pointers': sam2_model.obj_ptr_proj,
    }
    spent = dict.fromkeys(parts, 0.0)
    started: dict[str, float] = {}
    hooks = []
    for name, module in parts.items():

        def begin(*_: Any, name: str = name) -> None:
            common.wait(device)
            started[name] = time.perf_counter()

        def end(*_: Any, name: str = name) -> None:
            common.wait(device)
            spent[name] += time.perf_counter() - started[name]

        hooks.append(module.register_forward_pre_hook(begin))
        hooks.append(module.register_forward_hook(end))
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def clip_steps(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step with clips of T frames and with their first frames, and encoded images."""
    from projects.llava_sam2_rl.datasets import (
        GeneratedMovingScenes,
        Sa2VATransform,
        sa2va_collate,
    )
    from projects.llava_sam2_rl.utils.pretrained import image_sizes

    from .step import optimizer_of

    transform = Sa2VATransform(**image_sizes(model.policy.config))
    cast = model.data_preprocessor.to(args.device).cast_data
    batches = {}
    for count in (1, args.clip):
        clips = GeneratedMovingScenes(
            length=args.batch, num_frames=count, split='val', transforms=transform
        )
        batches[count] = cast(sa2va_collate([clips[i] for i in range(args.batch)]))
    optimizer = optimizer_of(model)
    seen = dict.fromkeys(batches, 0)
    current = 0

    def count_images(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[current] += len(inputs[0])

    def step(count: int) -> None:
        nonlocal current
        current, seen[count] = count, 0
        optimizer.zero_grad()
        sum(model(**batches[count], mode='loss').values()).backward()
        optimizer.step()

    encoder = model.policy.grounding_encoder.sam2_model.image_encoder
    hook = encoder.register_forward_pre_hook(count_images)
    seconds = common.in_turns(
        {str(count): (lambda count=count: step(count)) for count in batches},
        args.rounds,
        args.device,
    )
    hook.remove()
    still, clips = (seconds[str(count)] for count in batches)
    return {
        'step, T = 1, s': still,
        f'step, T = {args.clip}, s': clips,
        'of T = 1': clips / still,
        'images encoded': seen[args.clip],
    }
