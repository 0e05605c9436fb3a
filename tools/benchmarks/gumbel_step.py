"""A Gumbel step, mask_to_caption, against the original way: time and memory.

The original way runs both encoders for each of its passes (two with gradient, the teacher's two
without), writes the pseudo tokens by transformers' `generate` from a deep-copied teacher, and
gathers the embeddings of the k candidates a few at a time. The same noise gives the same losses.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.llava_sam2_rl.losses import length_weights
from projects.llava_sam2_rl.models.batch import encode_batch
from projects.llava_sam2_rl.models.schedule import current_iteration
from projects.llava_sam2_rl.models.segmentation_losses import find_masks, segmentation_losses
from projects.llava_sam2_rl.prompts import encode_text, strip_final_period

from . import common, gumbel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``benchmark.py gumbel-step``."""
    common.add_arguments(parser)
    parser.add_argument('--top-k', type=int, default=512, help='k (%(default)s)')


def objective(top_k: int) -> Any:
    """What both sides train by."""
    from projects.llava_sam2_rl.models import GumbelObjective

    return GumbelObjective(top_k=top_k)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times and measures both.

    Returns:
        A row per model: median seconds and peak extra memory of a step.
    """
    return [row(model, args) for model in args.models]


def row(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model."""
    from projects.llava_sam2_rl.engine.memory import peak_extra_bytes

    from . import step

    model = common.build_model(size, objective(args.top_k), args, caption_to_mask=dict(weight=0.0))
    batch = common.make_batch(model, common.batch_size(size, args), args.device)
    way, optimizer = OriginalGumbel(model), step.optimizer_of(model)

    def theirs() -> None:
        sum(way.losses(batch['data']).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        way.update_teacher()

    ways = {'ours': step.ours(model, batch), 'original': theirs}
    seconds = common.in_turns(ways, args.rounds, args.device)
    extra = {}
    for name, work in ways.items():
        torch.manual_seed(0)
        extra[name] = peak_extra_bytes(work, args.device) / 1e6
    return {
        'model': size,
        'B': common.batch_size(size, args),
        'k': args.top_k,
        'tokens': model.max_new_tokens,
        'original s': seconds['original'],
        'ours s': seconds['ours'],
        'faster': seconds['original'] / seconds['ours'],
        'original extra MB': extra['original'],
        'ours extra MB': extra['ours'],
        'less memory': extra['original'] / extra['ours'],
    }


class OriginalGumbel:
    """mask_to_caption through a straight-through caption, the original way.

    Args:
        model: Its policy is trained; its objective, a `GumbelObjective`, gives the settings.
    """

    def __init__(self, model: Any) -> None:
        from .original import Original

        self.model, self.objective = model, model.objective
        self.way = Original(model)
        self.update_teacher = self.way.update_teacher

    def losses(self, data: Any) -> dict[str, Tensor]:
        """The losses of one step."""
        objective, policy = self.objective, self.model.policy
        teacher = self.way.teacher
        pseudo = self.pseudo_tokens(data)
        rows = [i for i, ids in enumerate(pseudo) if ids]
        given = objective._replace_some(policy, [pseudo[i] for i in rows])
        logits = self._logits(policy, data, rows, given)
        logps = logits.float().log_softmax(-1)
        allowed = logits.masked_fill(objective._banned.to(logits.device), float('-inf'))
        noise = (
            -torch.empty(*logits.shape[:-1], objective.top_k, device=logits.device)
            .exponential_()
            .log()
        )
        table = policy.language_model.get_input_embeddings().weight
        tau, top_k = objective.tau.at(current_iteration()), objective.top_k
        picked = gumbel.chunked(allowed[None], table, noise[None], tau, top_k)[0]
        log_ends = logps[:, objective._stop_starts.to(logps.device)].logsumexp(-1)
        with torch.no_grad():
            reference = self._logits(teacher, data, rows, given).float().log_softmax(-1)
        kl = F.kl_div(reference, logps, reduction='none', log_target=True).sum(-1).mean()
        captions: list[Tensor] = [table.new_zeros(0, table.shape[1]) for _ in pseudo]
        weights: list[Tensor | None] = [None for _ in pseudo]
        lengths = [len(pseudo[i]) for i in rows]
        for i, embeds, ends in zip(
            rows, picked.split(lengths), log_ends.split(lengths), strict=True
        ):
            captions[i], weights[i] = embeds, length_weights(ends)
        batch = encode_batch(policy, data)  # the second pass with gradient: its encoders again
        masks = find_masks(
            policy,
            batch,
            captions,
            batch.target_image,
            batch.target_masks,
            batch.names,
            answer_loss=objective.answer_weight > 0,
            weights=weights,
        )
        found, _ = segmentation_losses(
            [masks],
            mask_weight=objective.mask_weight,
            answer_weight=objective.answer_weight,
            num_points=objective.num_points,
        )
        losses = {key: loss.value for key, loss in found.items()}
        return {**losses, 'kl_loss': objective.beta * kl}

    @torch.no_grad()
    def pseudo_tokens(self, data: Any) -> list[list[int]]:
        """What the teacher writes, greedily, by transformers."""
        from .original import generate

        teacher, tokenizer = self.way.teacher, self.way.tokenizer
        prompts = self.way._region_prompts(teacher, data, range(len(data['captions'])))
        limit = self.model.max_new_tokens
        written = generate(teacher, *prompts, limit, do_sample=False).texts
        return [encode_text(tokenizer, strip_final_period(text))[:limit] for text in written]

    def _logits(self, model: Any, data: Any, rows: list[int], given: list[list[int]]) -> Tensor:
        """`caption_logits` of one pass with encoders of its own."""
        embeds, mask = self.way._region_prompts(model, data, rows)
        table = model.language_model.get_input_embeddings()
        parts = [
            torch.cat([row[kept], table(torch.tensor(ids, device=row.device))])
            for row, kept, ids in zip(embeds, mask, given, strict=True)
        ]
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) for part in parts], device=padded.device)
        attended = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        hidden = model.hidden_states(padded, attended)
        spans = [
            hidden[n, len(part) - len(ids) - 1 : len(part) - 1]
            for n, (part, ids) in enumerate(zip(parts, given, strict=True))
        ]
        return model.lm_head(torch.cat(spans))
