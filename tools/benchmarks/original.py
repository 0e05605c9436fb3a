"""The original way, written down once: what the step was before this package.

Every pass runs the encoders again, every caption has a pass of its own with the teacher, the
teacher is a deep copy, the prompts of a group are prefilled G times, and log-probs come from the
full-vocabulary logits. Rewards and loss heads are this package's: they are not what is compared.
Nothing is slowed down on purpose: a pass over the batch is one forward, images of a group are
encoded once a pass, and the head sees the completion's positions only.

One region a sample, captions on all samples, no second frames, one iteration.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from projects.llava_sam2_rl.losses import gaussian_kl, gaussian_logprob
from projects.llava_sam2_rl.losses.mask import mask_loss
from projects.llava_sam2_rl.models.generation import Completions, suppressed_token_mask
from projects.llava_sam2_rl.models.sa2va.masks import upsample_logits
from projects.llava_sam2_rl.prompts import (
    SEGMENTATION_ANSWERS,
    clean_caption,
    encode_prompt,
    encode_turns,
    pad_batch,
    region_input,
    segmentation_input,
    strip_final_period,
    truncate_at_stop,
)
from projects.llava_sam2_rl.rewards import RolloutBatch, score
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid


class Original:
    """GRPO in both directions on the policy of a `DualLoopModel`, the original way.

    Args:
        model: Its policy is trained; its objective, a `GRPOObjective`, gives settings, rewards and
            loss heads.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.policy, self.objective = model, model.policy, model.objective
        self.teacher = copy.deepcopy(model.policy).requires_grad_(False).eval()
        self.tokenizer = model.policy.tokenizer

    @torch.no_grad()
    def update_teacher(self) -> None:
        """Moves the copy towards the policy."""
        share = 1 - self.model.teacher.decay
        for ours, theirs in zip(self.teacher.parameters(), self.policy.parameters(), strict=True):
            ours.lerp_(theirs, share)

    def losses(self, data: Any) -> dict[str, Tensor]:
        """The two losses of one step, rollouts included."""
        self.policy.eval()
        completions = self.sample(data)
        masks = self.return_masks(data, completions.texts)
        reference = self.reference_logps(data, completions)
        losses = {'loop1/grpo_loss': self.caption_loss(data, completions, masks, reference)}
        actions, sigma, logits = self.sample_actions(data)
        texts = self.return_captions(data, logits)
        losses.update(self.mask_losses(data, actions, sigma, logits, texts))
        return losses

    # ------------------------------------------------------------- mask -> caption

    @torch.no_grad()
    def sample(self, data: Any) -> Completions:
        """G captions of each region, by transformers."""
        sampling = self.objective.sampling
        return generate(
            self.policy,
            *self._region_prompts(self.policy, data, range(len(data['captions']))),
            self.model.max_new_tokens,
            do_sample=True,
            num_return_sequences=self.objective.num_generations,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )

    @torch.no_grad()
    def return_masks(self, data: Any, texts: Sequence[str]) -> Tensor:
        """``(B*G, h, w)`` logits, the teacher's, caption by caption."""
        group = len(texts) // len(data['captions'])
        return torch.cat(
            [
                self._segment(self.teacher, data, [i // group], [strip_final_period(text)])[0]
                for i, text in enumerate(texts)
            ]
        )

    @torch.no_grad()
    def reference_logps(self, data: Any, completions: Completions) -> Tensor | None:
        """The teacher's log-probs."""
        if not self.objective.beta > 0:
            return None
        return self.caption_logps(self.teacher, data, completions)

    def caption_logps(self, model: Any, data: Any, completions: Completions) -> Tensor:
        """``(B*G, T)`` by whole sequences, full logits, log-softmax and gather."""
        count, group = (
            len(data['captions']),
            len(completions.completion_ids) // len(data['captions']),
        )
        embeds, mask = self._region_prompts(model, data, range(count))
        embeds = embeds.repeat_interleave(group, dim=0)
        mask = mask.repeat_interleave(group, dim=0)
        text = model.language_model.get_input_embeddings()(completions.completion_ids)
        hidden = model.hidden_states(
            torch.cat([embeds, text], dim=1), torch.cat([mask, completions.completion_mask], dim=1)
        )
        logits = model.lm_head(hidden[:, embeds.shape[1] - 1 : -1]).float()
        logps = (logits / self.objective.sampling.temperature).log_softmax(-1)
        return logps.gather(2, completions.completion_ids[..., None])[..., 0]

    def caption_loss(
        self, data: Any, completions: Completions, masks: Tensor, reference: Tensor | None
    ) -> Tensor:
        """The clipped policy gradient of the captions."""
        group = self.objective.num_generations
        gt = [mask.any(0) for mask in data['masks'] for _ in range(group)]
        rollouts = RolloutBatch(
            completions=completions.texts,
            num_generations=group,
            direction='mask_to_caption',
            references=[text for text in data['captions'] for _ in range(group)],
            gt_masks=[mask[None] for mask in gt],
            pred_mask_logits=_at_original_size(masks, gt),
            completion_lengths=completions.completion_mask.sum(1).tolist(),
            truncated=completions.truncated.tolist(),
        )
        loss, _ = self.objective.mask_to_caption.head(
            self.caption_logps(self.policy, data, completions),
            None,
            reference,
            completions.completion_mask,
            score(self.objective.mask_to_caption.reward, rollouts),
            truncated=completions.truncated,
        )
        return loss

    # ------------------------------------------------------------- caption -> mask

    @torch.no_grad()
    def sample_actions(self, data: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        """G actions of each caption, their deviation, and ``(1, H, W)`` logits of their masks."""
        group = self.objective.num_generations
        _, mean, features = self._segment(self.policy, data, *self._captions(data))
        share = self.objective.caption_to_mask.options.sigma
        sigma = share * mean.pow(2).mean(dim=1, keepdim=True).sqrt()
        mean, sigma = (x.repeat_interleave(group, dim=0) for x in (mean, sigma))
        actions = mean + sigma * torch.randn_like(mean)
        images = [i for i in range(len(data['captions'])) for _ in range(group)]
        low_res, _, _ = self.policy.segment(actions, features, images)
        gt = [data['masks'][i].any(0) for i in images]
        return actions, sigma, _at_original_size(low_res[:, 0], gt)

    @torch.no_grad()
    def return_captions(self, data: Any, logits: Sequence[Tensor]) -> list[str]:
        """What the teacher says of each mask, one by one."""
        texts = []
        for n, mask in enumerate(logits):
            grid = prompt_mask_grid(mask > 0, self.teacher.grid_size)
            if not grid.any():
                texts.append('')
                continue
            prompt = self._region_prompts(
                self.teacher, data, [n // self.objective.num_generations], [grid]
            )
            found = generate(self.teacher, *prompt, self.model.max_new_tokens, do_sample=False)
            texts += found.texts
        return texts

    def mask_losses(
        self,
        data: Any,
        actions: Tensor,
        sigma: Tensor,
        logits: Sequence[Tensor],
        texts: Sequence[str],
    ) -> dict[str, Tensor]:
        """The policy gradient of the actions, and the mask loss of the mean actions."""
        direction, group = self.objective.caption_to_mask, self.objective.num_generations
        options = direction.options
        gt = [mask.any(0) for mask in data['masks']]
        rollouts = RolloutBatch(
            completions=texts,
            num_generations=group,
            direction='caption_to_mask',
            references=[text for text in data['captions'] for _ in range(group)],
            gt_masks=[mask[None] for mask in gt for _ in range(group)],
            pred_mask_logits=list(logits),
        )
        rewards = score(direction.reward, rollouts)
        kl = None
        low_res, mean, _ = self._segment(self.policy, data, *self._captions(data))
        repeated = mean.repeat_interleave(group, dim=0)
        if self.objective.beta > 0:
            with torch.no_grad():
                _, reference, _ = self._segment(self.teacher, data, *self._captions(data))
            reference = reference.repeat_interleave(group, dim=0)
            kl = gaussian_kl(repeated, reference, sigma, options.dims)[:, None]
        logps = gaussian_logprob(actions, repeated, sigma, options.dims)[:, None]
        active = torch.ones_like(logps, dtype=torch.bool)
        loss, _ = direction.head(logps, None, None, active, rewards, per_token_kl=kl)
        auxiliary, _ = mask_loss(low_res, gt)
        return {
            'loop2/grpo_loss': loss,
            'loop2/mask_loss': options.aux_mask_weight * auxiliary,
        }

    # --------------------------------------------------------------------- passes

    @staticmethod
    def _captions(data: Any) -> tuple[list[int], list[str]]:
        return list(range(len(data['captions']))), [strip_final_period(x) for x in data['captions']]

    @staticmethod
    def _encode(model: Any, data: Any, samples: Sequence[int], grounding: bool) -> Any:
        keys = ('pixel_values', 'g_pixel_values', 'vp_overall_mask')
        images = {key: [data[key][i] for i in samples] for key in keys}
        images['vp_overall_mask'] = torch.stack(images['vp_overall_mask'])
        return model.encode_images(images, grounding=grounding)

    def _region_prompts(
        self, model: Any, data: Any, samples: Sequence[int], grids: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        features = self._encode(model, data, samples, grounding=False)
        grids = [data['prompt_masks'][i] for i in samples] if grids is None else grids
        counts = [grid.flatten(1).sum(1).tolist() for grid in grids]
        prompts = [
            encode_prompt(
                self.tokenizer,
                model.chat_template.ask(
                    region_input(model.num_image_tokens, cells, model.questions.region)
                ),
            )
            for cells in counts
        ]
        padded = pad_batch(prompts, model.pad_token_id, 'left', device=self.policy.device)
        embeds = model.embed(padded['input_ids'], features, prompt_masks=grids)
        return embeds, padded['attention_mask']

    def _segment(
        self, model: Any, data: Any, samples: Sequence[int], descriptions: Sequence[str]
    ) -> tuple[Tensor, Tensor, Any]:
        """``(N, h, w)`` logits, ``(N, D)`` float32 prompts of SAM 2, and the features."""
        features = self._encode(model, data, samples, grounding=True)
        questions = [
            segmentation_input(model.num_image_tokens, text, model.questions.segmentation)
            for text in descriptions
        ]
        pairs = [
            encode_turns(self.tokenizer, model.chat_template, [(text, SEGMENTATION_ANSWERS[0])])
            for text in questions
        ]
        padded = pad_batch(
            [ids for ids, _ in pairs], model.pad_token_id, 'right', device=self.policy.device
        )
        embeds = model.embed(padded['input_ids'], features)
        hidden = model.hidden_states(embeds, padded['attention_mask'])
        prompts, _ = model.seg_embeddings(hidden, padded['input_ids'])
        low_res, _, _ = model.segment(prompts, features, range(len(samples)))
        return low_res[:, 0], prompts.float(), features


def generate(
    model: Any, embeds: Tensor, mask: Tensor, max_new_tokens: int, **options: Any
) -> Completions:
    """Transformers' own ``generate`` with this package's stops; the log-probs are not computed."""
    banned = suppressed_token_mask(model).nonzero().flatten().tolist()
    ids = model.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        max_new_tokens=max_new_tokens,
        pad_token_id=model.pad_token_id,
        eos_token_id=model.eos_token_id,
        suppress_tokens=banned,
        stop_strings=list(model.stop_strings),
        tokenizer=model.tokenizer,
        use_cache=True,
        **options,
    )
    texts, completion_mask = truncate_at_stop(ids, model.tokenizer, model.stop_strings)
    ended = completion_mask.sum(1) < max_new_tokens
    return Completions(
        completion_ids=ids,
        completion_mask=completion_mask,
        per_token_logps=torch.zeros(ids.shape, device=ids.device),
        texts=[clean_caption(text) for text in texts],
        truncated=~ended,
    )


def _at_original_size(low_res: Tensor, gt: Sequence[Tensor]) -> list[Tensor]:
    return [
        upsample_logits(logits[None, None], tuple(mask.shape))[0]
        for logits, mask in zip(low_res, gt, strict=True)
    ]
