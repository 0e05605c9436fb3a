"""Sampling G completions of a prompt against transformers' own `generate` on the same model.

Both sample from the same prompt with the same stops; tokens through each completion's end count. Of
ours also: how long a decode step takes, how much it must read, and the share of this machine's peak
bandwidth that it reaches.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from . import common, roofline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py rollout``."""
    common.add_arguments(parser, batch=1)
    parser.add_argument('--group', type=int, default=8, help='G (%(default)s)')
    parser.add_argument('--prompt', type=int, default=350, help='tokens (%(default)s)')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times both.

    Returns:
        A row per model: tokens a second (median over the rounds) and their ratio.
    """
    args.tokens = args.tokens or 128
    return [row(model, args) for model in args.models]


def row(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    from projects.llava_sam2_rl.engine.timing import phases
    from projects.llava_sam2_rl.models import SFTObjective, sample_completions
    from projects.llava_sam2_rl.models.generation import Sampling

    from .original import generate

    model = common.build_model(size, SFTObjective(), args)
    policy = model.policy.eval()
    embeds, mask = prompts(policy, args.batch, args.prompt)
    counted: dict[str, list[int]] = {'generate': [], 'ours': []}
    decoding: list[tuple[float, int, int]] = []  # seconds, bytes, steps
    if torch.device(args.device).type == 'cuda':
        phases.synchronize = torch.cuda.synchronize

    def ours() -> None:
        sampling = Sampling(max_new_tokens=args.tokens)
        phases.take()
        drawn = sample_completions(policy, embeds, mask, args.group, sampling)
        took, tokens = phases.take()['decode'].seconds, drawn.completion_mask.sum(1)
        counted['ours'].append(int(tokens.sum()))
        read = roofline.decode_bytes(policy, args.batch, args.prompt, tokens)
        decoding.append((took, read, int(tokens.max())))

    def theirs() -> None:
        with torch.no_grad():
            drawn = generate(
                policy,
                embeds,
                mask,
                args.tokens,
                do_sample=True,
                top_k=0,
                num_return_sequences=args.group,
            )
        counted['generate'].append(int(drawn.completion_mask.sum()))

    seconds = common.in_turns({'generate': theirs, 'ours': ours}, args.rounds, args.device)
    # Of the timed rounds; both sample, so their lengths differ a little.
    rate = {
        name: statistics.median(counted[name][-args.rounds :]) / seconds[name] for name in counted
    }
    peak = roofline.measure_peak(args.device, policy.lm_head.weight.dtype)
    # Every round has its own number of steps.
    step = statistics.median(took / steps for took, _, steps in decoding[-args.rounds :])
    least = statistics.median(read / steps for _, read, steps in decoding[-args.rounds :])
    return {
        'model': size,
        'prompt': f'{args.batch} x {args.prompt}',
        'G': args.group,
        'tokens drawn': int(statistics.median(counted['ours'][-args.rounds :])),
        'generate tokens/s': rate['generate'],
        'ours tokens/s': rate['ours'],
        'faster': rate['ours'] / rate['generate'],
        'decode step ms': 1e3 * step,
        'MB to read': least / 1e6,
        'peak GB/s': peak.bandwidth / 1e9,
        'share of peak': least / peak.bandwidth / step,
    }


def prompts(policy: Any, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings ``(count, length, D)`` of ordinary tokens, and their mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, len(policy.tokenizer) - 20, (count, length), generator=generator)
    table = policy.language_model.get_input_embeddings()
    ids = ids.to(table.weight.device)
    return table(ids).detach(), torch.ones_like(ids, dtype=torch.bool)
