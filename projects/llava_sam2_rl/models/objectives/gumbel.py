"""The differentiable caption: pseudo tokens, straight-through Gumbel-Softmax, and the way back.

The teacher writes a caption; some of its tokens are replaced by random ones; the policy reads the
result beside the region and says, for every position, which token should stand there. The tokens
it picks enter the segmentation prompt as embeddings, so that the mask loss of the return trip
flows back through the caption into the pass that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from mmengine.logging import MessageHub
from torch import Tensor

from projects.llava_sam2_rl.losses import gumbel_embeds, length_weights, mask_tokens
from projects.llava_sam2_rl.models.generation import no_gradient, suppressed_token_mask
from projects.llava_sam2_rl.models.objectives.segmentation import segmentation_losses
from projects.llava_sam2_rl.models.sa2va.masks import upsample_logits
from projects.llava_sam2_rl.prompts import STOP_STRINGS, encode_prompt, pad_batch
from projects.llava_sam2_rl.registry import OBJECTIVES, nearest
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid

if TYPE_CHECKING:
    from projects.llava_sam2_rl.models.dual_loop import DualLoopModel, LoopBatch


@dataclass(frozen=True)
class SoftCaptions:
    """B captions through which a loss reaches the model that wrote them.

    Args:
        embeds: B × ``(L_i, D)``, with no row where there is no caption.
        weights: B × ``(L_i,)``: of each token in the reader's attention; ``None`` where there is no
            caption.
        token_ids: B lists of the ids that the embeddings belong to.
    """

    embeds: list[Tensor]
    weights: list[Tensor | None]
    token_ids: list[list[int]]


@OBJECTIVES.register_module()
class GumbelObjective:
    """Mask loss through a straight-through Gumbel-Softmax caption.

    mask_to_caption needs no reference captions. caption_to_mask (on captioned samples; turn it off
    by ``caption_to_mask=dict(weight=0)`` of the wrapper) goes caption -> mask′ -> caption′ and adds
    the cross-entropy of caption′: the region of caption′ is mask′, whose cells carry a
    straight-through factor, so that the mask decoder hears how well its mask could be described.

    Args:
        tau: Temperature of the softmax in the backward pass and of the draw: a number, or
            ``dict(start=…, end=…, steps=…)``, geometric from ``start`` to ``end`` over so many
            iterations.
        top_k: Tokens that take part at each position.
        mask_ratio: Share of the pseudo tokens that are replaced by random ordinary tokens.
        mask_weight: Of the mask loss (2·CE + 0.5·Dice) as it flows through the caption.
        return_weight: Of the same loss, on top of ``mask_weight``, as it trains the reader of the
            caption, > 0. A caption may fit several regions, and one drawn token by token may be
            wrong; a segmenter that is taught to find the region nevertheless learns not to listen.
        min_pseudo_tokens: The teacher writes at least so many tokens. A position that it does not
            write cannot be learnt, so that captions which stop early would never grow.
        learn_length: The mask loss also says whether a caption should have ended earlier (see
            `length_weights`); without it captions keep the length they have.
        beta: Weight of the KL to the teacher over all caption positions, the brake on captions
            that only policy and teacher understand; 0 = none, and no teacher pass is made.
        answer_weight: Of the cross-entropy of the answer that holds ``[SEG]``, so that it stays
            generated.
        num_points: Points sampled on each mask.
        gradient_surgery: Projects the gradient of caption_to_mask to be orthogonal to that of
            mask_to_caption where the two conflict. One process or DDP; refused under DeepSpeed.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        tau: float | Mapping[str, float] = 1.0,
        top_k: int = 512,
        mask_ratio: float = 0.25,
        mask_weight: float = 1.0,
        return_weight: float = 1.0,
        min_pseudo_tokens: int = 0,
        learn_length: bool = True,
        beta: float = 0.1,
        answer_weight: float = 0.1,
        num_points: int = 12544,
        gradient_surgery: bool = False,
    ):
        self.tau = _annealed(tau)
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f'mask_ratio must lie in [0, 1], got {mask_ratio}')
        if top_k < 1:
            raise ValueError(f'top_k must be at least 1, got {top_k}')
        if not return_weight > 0:
            raise ValueError(f'return_weight must be positive, got {return_weight}')
        self.top_k = top_k
        self.mask_ratio = mask_ratio
        self.mask_weight = mask_weight
        self.return_weight = return_weight
        if beta < 0:
            raise ValueError(f'beta must not be negative, got {beta}')
        self.min_pseudo_tokens = min_pseudo_tokens
        self.learn_length = learn_length
        self.beta = beta
        self.answer_weight = answer_weight
        self.num_points = num_points
        self.gradient_surgery = gradient_surgery

    def attach(self, loop: DualLoopModel) -> None:
        """Called once the policy is built.

        Raises:
            ValueError: ``top_k`` exceeds the number of tokens that a caption may hold.
        """
        textless = suppressed_token_mask(loop.policy)
        tokenizer = loop.policy.tokenizer
        # A random chat marker would end the caption in the policy's eyes.
        textless[[i for i in tokenizer.all_special_ids if i < len(textless)]] = True
        textless[[i for i in tokenizer.get_added_vocab().values() if i < len(textless)]] = True
        stops = [encode_prompt(tokenizer, stop)[0] for stop in STOP_STRINGS]
        stops += [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        # Tokens that begin an end: drawn inside a caption they would not end it.
        self._ends = torch.tensor(sorted(set(stops)))
        textless[self._ends] = True
        self._banned = textless
        self._ordinary = (~textless).nonzero().flatten()
        if self.top_k > len(self._ordinary):
            raise ValueError(
                f'top_k={self.top_k} exceeds the {len(self._ordinary)} ordinary tokens of the '
                f'vocabulary of {len(textless)}: set model.objective.top_k to at most that'
            )

    def __call__(
        self, loop: DualLoopModel, batch: LoopBatch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """Losses to be optimised and metrics to be logged, keyed ``loop1/…`` and ``loop2/…``."""
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor | float] = {}
        if loop.mask_to_caption_weight > 0:
            found, logs = self._through_the_caption(loop, batch)
            losses.update({f'loop1/{key}': value for key, value in found.items()})
            for key in found:
                # The KL is a mean over tokens and has been counted.
                batch.counts.setdefault(f'loop1/{key}', len(batch))
            metrics.update({f'loop1/{key}': value for key, value in logs.items()})
        captioned = [i for i, caption in enumerate(batch.captions) if caption]
        if loop.caption_to_mask_weight > 0 and captioned:
            found, logs = self._through_the_mask(loop, batch, captioned)
            losses.update({f'loop2/{key}': value for key, value in found.items()})
            metrics.update({f'loop2/{key}': value for key, value in logs.items()})
        return losses, metrics

    # --------------------------------------------------- mask -> caption -> mask′

    def _through_the_caption(
        self, loop: DualLoopModel, batch: LoopBatch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        weight = loop.mask_to_caption_weight * self.return_weight
        pseudo = self.pseudo_tokens(loop, batch)
        captions, kl, logs = self.caption_embeds(loop, batch, pseudo)
        losses, metrics, _ = segmentation_losses(
            loop,
            batch,
            # An empty caption is a description without words.
            captions.embeds,
            batch.target_image,
            batch.target_masks,
            batch.names,
            mask_weight=weight * self.mask_weight,
            answer_weight=weight * self.answer_weight,
            num_points=self.num_points,
            weights=captions.weights if self.learn_length else None,
        )
        metrics = {**metrics, **logs}
        if kl is not None:
            losses['kl_loss'] = loop.mask_to_caption_weight * self.beta * kl
            metrics['kl_div'] = kl.detach()
        kept = [a == b for a, b in zip(_flat(captions.token_ids), _flat(pseudo), strict=True)]
        if kept:
            metrics['pseudo_agreement'] = sum(kept) / len(kept)
        return losses, metrics

    def pseudo_tokens(self, loop: DualLoopModel, batch: LoopBatch) -> list[list[int]]:
        """B lists of token ids: what the teacher writes of each region, without any marker."""
        with loop.teacher_applied():
            written = loop.write_captions(batch, min_new_tokens=self.min_pseudo_tokens)
        tokenizer = loop.policy.tokenizer
        return [
            encode_prompt(tokenizer, loop.strip_final_period(text))[: loop.max_new_tokens]
            for text in written
        ]

    def caption_embeds(
        self, loop: DualLoopModel, batch: LoopBatch, pseudo: list[list[int]]
    ) -> tuple[SoftCaptions, Tensor | None, dict[str, Tensor | float]]:
        """The policy's own caption, position by position, as embeddings with a gradient.

        Args:
            loop: The wrapper.
            batch: The batch.
            pseudo: B lists of token ids, real tokens only; empty where the teacher wrote nothing.

        Returns:
            The captions, their mean KL to the teacher (``None`` without ``beta`` or captions), and
            metrics.
        """
        policy = loop.policy
        lengths = [len(ids) for ids in pseudo]
        empty = [i for i, length in enumerate(lengths) if not length]
        metrics: dict[str, Tensor | float] = {
            'empty_captions': float(len(empty)),
            'tau': self.tau_now(),
        }
        table = policy.language_model.get_input_embeddings().weight
        embeds = [table.new_zeros(0, table.shape[1]) for _ in pseudo]
        weights: list[Tensor | None] = [None for _ in pseudo]
        token_ids: list[list[int]] = [[] for _ in pseudo]
        captions = SoftCaptions(embeds, weights, token_ids)
        rows = [i for i, length in enumerate(lengths) if length]
        if not rows:
            return captions, None, metrics
        given = self._masked(policy, pseudo, rows)
        logits = self.caption_logits(loop, batch, rows, given)
        logps = logits.float().log_softmax(-1)
        picked, ids = gumbel_embeds(
            logits.masked_fill(self._banned.to(logits.device), float('-inf')),
            table,
            tau=self.tau_now(),
            top_k=self.top_k,
        )
        log_ends = logps[:, self._ends.to(logps.device)].logsumexp(-1)
        start = 0
        for i in rows:
            span = slice(start, start + lengths[i])
            embeds[i], token_ids[i] = picked[span], ids[span].tolist()
            weights[i] = length_weights(log_ends[span])
            for x in (embeds[i], weights[i]):
                if self.return_weight != 1 and x.requires_grad:
                    # What reaches the caption does not depend on how much the reader learns.
                    x.register_hook(lambda gradient: gradient / self.return_weight)
            start = span.stop
        kl = None
        if self.beta > 0:
            with no_gradient(), loop.eval_mode(), loop.teacher_applied():
                reference = self.caption_logits(loop, batch, rows, given).float().log_softmax(-1)
            kl = F.kl_div(reference, logps, reduction='none', log_target=True).sum(-1).mean()
        batch.counts['loop1/kl_loss'] = sum(lengths)
        metrics['entropy'] = -(logps.detach().exp() * logps.detach()).sum(-1).mean()
        metrics['end_prob'] = log_ends.detach().exp().mean()
        metrics['mean_length'] = sum(lengths) / len(lengths)
        return captions, kl, metrics

    def _masked(self, policy: Any, pseudo: list[list[int]], rows: list[int]) -> list[list[int]]:
        data = pad_batch([pseudo[i] for i in rows], policy.pad_token_id, 'right')
        masked = mask_tokens(
            data['input_ids'], data['attention_mask'], self.mask_ratio, self._ordinary
        )
        return [
            ids[keep].tolist() for ids, keep in zip(masked, data['attention_mask'], strict=True)
        ]

    def caption_logits(
        self, loop: DualLoopModel, batch: LoopBatch, rows: list[int], captions: list[list[int]]
    ) -> Tensor:
        """``(ΣL, V)`` logits of every caption position; position t is predicted from t-1.

        Args:
            loop: The wrapper.
            batch: The batch.
            rows: N samples.
            captions: Their N captions as token ids, none empty.
        """
        policy = loop.policy
        prompts = [encode_prompt(policy.tokenizer, loop.region_text(batch, i)) for i in rows]
        data = pad_batch(
            [prompt + ids for prompt, ids in zip(prompts, captions, strict=True)],
            policy.pad_token_id,
            'right',
            device=loop.device,
        )
        embeds = policy.embed(
            data['input_ids'],
            batch.features,
            prompt_masks=[batch.prompt_masks[i] for i in rows],
            image_index=[batch.image[i] for i in rows],
            sample_ids=[batch.names[i] for i in rows],
        )
        hidden = policy.hidden_states(embeds, data['attention_mask'], data['position_ids'])
        # One to the left: the last token of the prompt predicts the first of the caption.
        spans = [
            hidden[n, len(prompt) - 1 : len(prompt) - 1 + len(ids)]
            for n, (prompt, ids) in enumerate(zip(prompts, captions, strict=True))
        ]
        return policy.lm_head(torch.cat(spans))

    def tau_now(self) -> float:
        """The temperature of the current iteration (the runner's, so that a resume goes on)."""
        hub = MessageHub.get_current_instance()
        iteration = hub.get_info('iter') if 'iter' in hub.runtime_info else 0
        start, end, steps = self.tau
        share = min(1.0, iteration / steps) if steps else 1.0
        return start * (end / start) ** share

    # ------------------------------------------------ caption -> mask′ -> caption′

    def _through_the_mask(
        self, loop: DualLoopModel, batch: LoopBatch, captioned: list[int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        policy = loop.policy
        low_res, _ = loop.segment_descriptions(
            batch,
            [loop.strip_final_period(batch.captions[i]) for i in captioned],
            [batch.image[i] for i in captioned],
            [batch.names[i] for i in captioned],
        )
        grids, factors = [], []
        for i, logits in zip(captioned, low_res, strict=True):
            size = tuple(batch.union_masks[i].shape)
            mask = upsample_logits(logits[None, None].detach(), size)[0, 0] > 0
            grids.append(prompt_mask_grid(mask[None], policy.grid_size))
            share = F.adaptive_avg_pool2d(logits.sigmoid()[None], policy.grid_size)
            # 1 in the forward pass; the gradient says which cells help the description.
            factors.append(1 + (share - share.detach()))
        found = [n for n, grid in enumerate(grids) if grid.any()]
        metrics: dict[str, Tensor | float] = {'empty_masks': float(len(grids) - len(found))}
        if found:
            loss = loop.caption_loss(
                batch,
                [captioned[n] for n in found],
                [grids[n] for n in found],
                [factors[n] for n in found],
                count_as='loop2/caption_loss',
            )
        else:
            loss = low_res.sum() * 0.0
            batch.counts['loop2/caption_loss'] = 0
        return {'caption_loss': loop.caption_to_mask_weight * loss}, metrics


def _annealed(tau: float | Mapping[str, float]) -> tuple[float, float, int]:
    """``(start, end, steps)``."""
    if isinstance(tau, Mapping):
        for key in tau:
            if key not in ('start', 'end', 'steps'):
                raise TypeError(
                    f'GumbelObjective.tau has no option {key!r}: '
                    f'{nearest(key, ["start", "end", "steps"])}'
                )
        start, end, steps = (tau[key] for key in ('start', 'end', 'steps'))
        if steps < 1:
            raise ValueError(f'tau.steps must be at least 1, got {steps}')
    else:
        start = end = tau
        steps = 0
    if not (start > 0 and end > 0):
        raise ValueError(f'tau must be positive, got {tau}')
    return float(start), float(end), int(steps)


def _flat(rows: list[list[int]]) -> list[int]:
    return [x for row in rows for x in row]
