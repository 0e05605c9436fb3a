"""Both tasks one behind the other, greedily: what validation measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.captioning import write_captions
from projects.llava_sam2_rl.models.sa2va.masks import upsample_masks
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.segmentation import (
    seg_embeddings,
    segment_clips,
    tracks_at_size,
)
from projects.llava_sam2_rl.prompts import clean_caption, strip_final_period
from projects.llava_sam2_rl.structures import RegionMeta
from projects.llava_sam2_rl.utils.devices import indices_on
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid
from projects.llava_sam2_rl.utils.modules import eval_mode


@torch.no_grad()
def run_cycles(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    data_samples: Sequence[RegionMeta] | None,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Runs mask -> caption -> mask′ and caption -> mask′ -> caption′ for every sample.

    Args:
        policy: The network.
        batch: B regions.
        data_samples: B; their captions and distractors are segmented too.
        max_new_tokens: Longest caption in tokens.

    Returns:
        A dict per sample: ``caption`` (generated), ``reference``, ``gt_mask`` and ``target_mask``
        ``(H, W)`` bool, and ``masks``: what the model finds for the generated caption
        (``'generated'``, on the target frame), the reference (``'reference'``) and another
        region's caption (``'distractor'``), each ``(H, W)`` bool on the CPU, where there is such a
        text; ``caption_return``: the greedy caption of the mask found for the reference, ``None``
        without a reference; ``attributes`` of the record, ``None`` where it has none. Of a clip,
        that is of more than the two frames of a pair, ``tracks`` as well: T × ``(H, W)`` bool of
        the clip itself (``'gt'``), and what SAM 2's memory carries through it of the masks found on
        the first frame for the generated caption (``'generated'``) and the reference
        (``'reference'``).

    Raises:
        ValueError: The batch holds a conversation, a caption of nothing in its image, or a record
            with a caption for each of several regions.
    """
    if batch.chats:
        raise ValueError('the cycle needs regions: evaluate on data without conversations')
    if len(batch.describable) < len(batch):
        name = next(n for n, grid in zip(batch.names, batch.prompt_masks) if not len(grid))
        raise ValueError(
            f'the cycle needs regions, sample {name!r} has none: leave such captions out '
            '(no_target=False of GRefCOCODataset)'
        )
    if data_samples is not None and len(data_samples) != len(batch):
        raise ValueError(
            f'{len(data_samples)} records make {len(batch)} samples: evaluate on data with one '
            'caption a record (per_object=True of Sa2VAFinetuneDataset)'
        )
    with eval_mode(policy):
        written = write_captions(policy, batch, max_new_tokens)
        results: list[dict[str, Any]] = [
            {
                'caption': text,
                'caption_return': None,
                'reference': batch.captions[i],
                'gt_mask': batch.gt_masks[i].cpu(),
                'target_mask': batch.target_masks[i].cpu(),
                'masks': {},
                'tracks': {},
                'attributes': data_samples[i].attributes if data_samples else None,
            }
            for i, text in enumerate(written)
        ]
        _segment_texts(policy, batch, written, data_samples or [], results)
        _describe_found_masks(policy, batch, max_new_tokens, results)
    return results


def _segment_texts(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    written: Sequence[str],
    data_samples: Sequence[RegionMeta],
    results: list[dict[str, Any]],
) -> None:
    """Fills in ``masks`` and ``tracks``, all by one forward pass."""
    # (sample, what, text, image): the generated caption is segmented on the target frame, the
    # others where they were written.
    asked = [(i, 'generated', text, batch.target_image[i]) for i, text in enumerate(written)]
    for i, meta in enumerate(data_samples):
        for what, text in (('reference', meta.caption), ('distractor', meta.distractor)):
            if text:
                asked.append((i, what, text, batch.image[i]))
    stills = len(asked)
    # What is carried through a clip starts on its first frame, where references are asked anyway.
    clips = [i for i, clip in enumerate(batch.clip) if len(clip) > 2]
    carried = [m for m, (i, what, *_) in enumerate(asked) if what == 'reference' and i in clips]
    carried += range(stills, stills + len(clips))
    asked += [(i, 'generated', written[i], batch.image[i]) for i in clips]
    # What data say is asked for as in training; what the model said, as it said it.
    descriptions = [
        strip_final_period(clean_caption(text))
        if what == 'generated'
        else policy.questions.description(clean_caption(text))
        for _, what, text, _ in asked
    ]
    names = [batch.names[i] for i, *_ in asked]
    images = [image for *_, image in asked]
    embeddings, _ = seg_embeddings(policy, batch, descriptions, images, names)
    low_res, _, _ = policy.segment(embeddings[:stills], batch.features, images[:stills])
    for (i, what, _, _), logits in zip(asked[:stills], low_res, strict=True):
        like = batch.target_masks[i] if what == 'generated' else batch.gt_masks[i]
        mask = upsample_masks(logits[None], (like.shape[0], like.shape[1]))[0, 0]
        results[i]['masks'][what] = mask.cpu()
    if not carried:
        return
    samples = [asked[m][0] for m in carried]
    prompts = embeddings[indices_on(embeddings.device, carried)]
    tracks = segment_clips(policy, batch, samples, prompts, [1] * len(samples))
    wanted = [[mask.any(0) for mask in batch.clip_masks[i]] for i in samples]
    for m, found, gt in zip(carried, tracks_at_size(tracks, wanted), wanted, strict=True):
        i, what, *_ = asked[m]
        results[i]['tracks'] |= {
            'gt': [mask.cpu() for mask in gt],
            what: [mask[0].cpu() for mask in found],
        }


def _describe_found_masks(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    max_new_tokens: int,
    results: list[dict[str, Any]],
) -> None:
    """Fills in ``caption_return`` where a mask was found for the reference."""
    found = [i for i, result in enumerate(results) if 'reference' in result['masks']]
    if not found:
        return
    described = write_captions(
        policy,
        batch,
        max_new_tokens,
        images=[batch.image[i] for i in found],
        prompt_masks=[
            prompt_mask_grid(results[i]['masks']['reference'][None], policy.grid_size)
            for i in found
        ],
        names=[batch.names[i] for i in found],
    )
    for i, text in zip(found, described, strict=True):
        results[i]['caption_return'] = text
