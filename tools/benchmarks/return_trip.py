"""B·G captions to masks in one batch with the images encoded once, against one by one.

One by one is the original way (tools/benchmarks/original.py): every caption runs both encoders.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from . import common

_WORDS = ('red', 'small', 'left', 'circle', 'near', 'the', 'top', 'blue')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py return-trip``."""
    common.add_arguments(parser, batch=2)
    parser.add_argument('--group', type=int, default=8, help='G (%(default)s)')
    parser.add_argument('--words', type=int, default=12, help='of a caption (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times both.

    Returns:
        A row per model: median seconds, their ratio, and how far the mask logits are apart.
    """
    return [row(model, args) for model in args.models]


def row(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    from projects.llava_sam2_rl.models.segmentation import segment_descriptions
    from projects.llava_sam2_rl.utils.modules import eval_mode

    from .original import Original
    from .step import objective

    model = common.build_model(size, objective(args.group), args)
    data = common.make_batch(model, args.batch, args.device)['data']
    count = args.batch * args.group
    captions = [
        ' '.join(_WORDS[(i + j * (i + 1)) % len(_WORDS)] for j in range(args.words))
        for i in range(count)
    ]
    way = Original(model)
    found = {}

    def theirs() -> None:
        found['one by one'] = way.return_masks(data, captions)

    def ours() -> None:
        with torch.no_grad(), eval_mode(model.policy), model.teacher_applied():
            batch = model.encode(data)
            images = [i // args.group for i in range(count)]
            names = [batch.names[i] for i in images]
            found['ours'] = segment_descriptions(model.policy, batch, captions, images, names)[0]

    seconds = common.in_turns({'one by one': theirs, 'ours': ours}, args.rounds, args.device)
    difference = float((found['ours'] - found['one by one']).abs().max())
    return {
        'model': size,
        'B': args.batch,
        'B·G': count,
        'one by one s': seconds['one by one'],
        'ours s': seconds['ours'],
        'faster': seconds['one by one'] / seconds['ours'],
        'largest difference of logits': difference,
    }
