"""The second task: to find what a text describes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.prompting import segmentation_prompts
from projects.llava_sam2_rl.models.sa2va.masks import upsample_logits, upsample_masks
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.shared_prefix import (
    SharedPrefixForward,
    checked_seg_embeddings,
    per_seg,
)
from projects.llava_sam2_rl.prompts import ChatTemplate


def segment_descriptions(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    descriptions: Sequence[str | Tensor],
    images: Sequence[int],
    names: Sequence[str],
    *,
    weights: Sequence[Tensor | None] | None = None,
    answer_loss: bool = False,
    questions: Sequence[str] | None = None,
    template: ChatTemplate | None = None,
    dialogues: Sequence[int] | None = None,
    num_segs: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One mask per description in one forward pass; the answer with ``[SEG]`` is given.

    Args:
        policy: The network.
        batch: The batch.
        descriptions: N texts, or the embeddings ``(L, D)`` that stand in a text's place.
        images: N indices into ``batch.features``.
        names: N sample names.
        weights: N × ``(L,)`` in (0, 1]: how much each token of a description given as embeddings
            counts in the attention of what comes behind it; ``None`` for texts. Defaults to 1.
        answer_loss: Whether the answer's cross-entropy is computed. Defaults to False.
        questions: N questions with ``{description}``. Defaults to the policy's own.
        template: Chat template of the prompts. Defaults to the policy's own.
        dialogues: N numbers: neighbours with the same one are turns of one conversation. Defaults
            to a conversation each.
        num_segs: N numbers of ``[SEG]`` in the answers. Defaults to one each.

    Returns:
        ``(M, h, w)`` float32 mask logits at low resolution, one for each ``[SEG]``, and the mean
        cross-entropy of the answer's tokens or ``None``.
    """
    embeddings, loss = seg_embeddings(
        policy,
        batch,
        descriptions,
        images,
        names,
        weights=weights,
        answer_loss=answer_loss,
        questions=questions,
        template=template,
        dialogues=dialogues,
        num_segs=num_segs,
    )
    low_res, _, _ = policy.segment(embeddings, batch.features, per_seg(images, num_segs))
    return low_res.squeeze(1), loss


def seg_embeddings(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    descriptions: Sequence[str | Tensor],
    images: Sequence[int],
    names: Sequence[str],
    *,
    weights: Sequence[Tensor | None] | None = None,
    answer_loss: bool = False,
    questions: Sequence[str] | None = None,
    template: ChatTemplate | None = None,
    dialogues: Sequence[int] | None = None,
    num_segs: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(M, 256)``: what each ``[SEG]`` prompts SAM 2 with; see `segment_descriptions`.

    Raises:
        ValueError: A conversation has not as many ``[SEG]`` as it asks for masks.
    """
    conversations = len(images) if dialogues is None else len(set(dialogues))
    if len(set(images)) < conversations and weights is None:
        shared = SharedPrefixForward(policy, batch)
        handles = shared.add_descriptions(
            descriptions, images, names, questions, template, dialogues, num_segs
        )
        shared.forward()
        loss = shared.answer_loss(handles) if answer_loss else None
        return shared.seg_embeddings(handles), loss
    prompts = segmentation_prompts(
        policy, batch, descriptions, images, names, questions, template, dialogues, num_segs
    )
    key_weights = None
    if weights is not None:
        length = prompts.embeds.shape[1]
        key_weights = torch.stack(
            [
                prompts.embeds.new_ones(length, dtype=torch.float32)
                if row is None
                else F.pad(row.float(), (start, length - start - len(row)), value=1.0)
                for row, start in zip(weights, prompts.description_starts, strict=True)
            ]
        )
    hidden = policy.hidden_states(
        prompts.embeds, prompts.attention_mask, prompts.position_ids, key_weights
    )
    embeddings = checked_seg_embeddings(
        policy, hidden, prompts.input_ids, per_seg(names, num_segs), prompts.num_masks
    )
    return embeddings, policy.caption_loss(hidden, prompts.labels) if answer_loss else None


def caption_seg_embeddings(
    policy: VideoLLaVASAMModel, batch: RegionBatch, samples: Sequence[int]
) -> Tensor:
    """``(M, 256)`` float32: what the samples' own captions prompt SAM 2 with.

    Samples with several ``[SEG]`` have a row for each.
    """
    asked = captions_as_descriptions(policy, batch, samples)
    dialogues = [batch.dialogues[i] for i in samples]
    found, _ = seg_embeddings(
        policy, batch, *asked, dialogues=dialogues, num_segs=batch.num_segs(samples)
    )
    return found.float()


def captions_as_descriptions(
    policy: VideoLLaVASAMModel, batch: RegionBatch, samples: Sequence[int]
) -> tuple[list[str], list[int], list[str]]:
    """Descriptions, images and names of samples that have a caption."""
    return (
        [policy.questions.description(batch.reference(i)) for i in samples],
        [batch.image[i] for i in samples],
        [batch.names[i] for i in samples],
    )


def segment_clips(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    samples: Sequence[int],
    embeddings: Tensor,
    num_segs: Sequence[int],
) -> list[Tensor]:
    """Masks in all frames of clips: the first frame is prompted, SAM 2's memory carries them on.

    The masks of a clip are one batch, whatever their number; no frame is encoded again. A clip of
    one frame is an image: it has the masks that `VideoLLaVASAMModel.segment` gives. No gradient
    flows through the memory.

    Args:
        policy: The network.
        batch: The batch.
        samples: N indices of samples.
        embeddings: ``(M, D)``, what prompts SAM 2, in order of the samples.
        num_segs: N numbers of embeddings of each, M in all.

    Returns:
        N × ``(K, T, h, w)`` float32 logits at low resolution.
    """
    sample_of = per_seg(samples, num_segs)
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for m, i in enumerate(sample_of):
        rows_of.setdefault(tuple(batch.clip[i]), []).append(m)
    found: dict[int, Tensor] = {}
    still = sorted(m for clip, rows in rows_of.items() if len(clip) == 1 for m in rows)
    if still:
        images = [batch.image[sample_of[m]] for m in still]
        low_res, _, _ = policy.segment(embeddings[still], batch.features, images)
        found.update(zip(still, low_res, strict=True))
    for clip, rows in rows_of.items():
        if len(clip) == 1:
            continue
        if batch.frames is None:
            raise ValueError('the batch has clips but no g_pixel_values')
        frames = (batch.frames.select(slice(k, k + 1)) for k in clip)
        with torch.no_grad():
            tracks = policy.propagate(frames, embeddings[rows], num_cond_frames=1)
        found.update(zip(rows, tracks, strict=True))
    ordered = iter([found[m] for m in range(len(sample_of))])
    return [torch.stack([next(ordered) for _ in range(count)]) for count in num_segs]


def tracks_at_size(
    low_res: Sequence[Tensor], like: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """N × T × ``(K, H, W)`` bool, each at the size of the masks ``(…, H, W)`` it goes with.

    Args:
        low_res: N × ``(K, T, h, w)`` mask logits.
        like: N × T masks.
    """
    return [
        [
            upsample_masks(track[:, None, t], (mask.shape[-2], mask.shape[-1]))[:, 0]
            for t, mask in enumerate(masks)
        ]
        for track, masks in zip(low_res, like, strict=True)
    ]


def on_target_frame(
    batch: RegionBatch, samples: Sequence[int], low_res: Sequence[Tensor]
) -> list[Tensor]:
    """Of masks through clips those in the frames of the return trip.

    Args:
        batch: The batch.
        samples: N indices of samples.
        low_res: N × ``(K, T, h, w)``.

    Returns:
        N × ``(K, h, w)``.
    """
    return [
        track[:, batch.clip[i].index(batch.target_image[i])]
        for i, track in zip(samples, low_res, strict=True)
    ]


def masks_at_size(low_res: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """N × ``(1, H, W)`` float32 logits, each at the size of the mask ``(H, W)`` it goes with.

    Args:
        low_res: ``(N, h, w)`` mask logits.
        like: N masks ``(H, W)``.
    """
    return [
        upsample_logits(logits[None, None], (mask.shape[0], mask.shape[1]))[0]
        for logits, mask in zip(low_res, like, strict=True)
    ]
