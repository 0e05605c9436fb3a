"""To find what a text describes in all frames of a clip that the language model is shown at once.

As the official training on videos: the frames stand in the prompt one behind another, each
``[SEG]`` prompts SAM 2 on every frame by itself, and SAM 2's memory has no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.segmentation import captions_as_descriptions, seg_embeddings
from projects.llava_sam2_rl.models.segmentation_losses import FoundMasks, matched_masks
from projects.llava_sam2_rl.prompts import ChatTemplate
from projects.llava_sam2_rl.prompts.questions import DESCRIPTION


def find_masks_in_clips(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    samples: Sequence[int],
    *,
    answer_loss: bool,
    questions: Sequence[str],
    template: ChatTemplate,
) -> FoundMasks:
    """The masks of the captions of clips, each in all T frames of its clip.

    Args:
        policy: The network.
        batch: Has the clips (`encode_batch` with ``clips_for_language``).
        samples: N samples that are clips of more than two frames and have a caption.
        answer_loss: Whether the answers' cross-entropy is computed.
        questions: N questions with ``{description}``. A caption that is a question itself (told by
            its ``?``) is asked as it is.
        template: Chat template of the prompts.

    Returns:
        Object by object its T frames: ``[SEG]`` 1 in frames 1 … T, then ``[SEG]`` 2. Where an
        answer has several ``[SEG]``, each object is given to the one that comes closest to it over
        all frames.

    Raises:
        ValueError: The batch has no frames for the language model, or a sample is no such clip.
    """
    if batch.clips is None or batch.frames is None:
        raise ValueError('the batch has no clips that were encoded for the language model')
    images: list[int] = []
    for i in samples:
        image = batch.clip_image[i]
        if image is None:
            raise ValueError(f'sample {batch.names[i]!r} is no clip of more than two frames')
        images.append(image)
    descriptions, _, names = captions_as_descriptions(policy, batch, samples)
    num_segs = batch.num_segs(samples)
    asked = [
        DESCRIPTION if '?' in description else question
        for description, question in zip(descriptions, questions, strict=True)
    ]
    embeddings, answer = seg_embeddings(
        policy,
        replace(batch, features=batch.clips),
        descriptions,
        images,
        names,
        answer_loss=answer_loss,
        questions=asked,
        template=template,
        dialogues=[batch.dialogues[i] for i in samples],
        num_segs=num_segs,
    )
    lengths = [len(batch.clip[i]) for i in samples for _ in range(len(batch.seg_masks[i]))]
    frames = [frame for i in samples for _ in batch.seg_masks[i] for frame in batch.clip[i]]
    repeats = torch.tensor(lengths, device=embeddings.device)
    prompts = embeddings.repeat_interleave(repeats, dim=0, output_size=len(frames))
    low_res, _, _ = policy.segment(prompts, replace(batch.features, sam=batch.frames), frames)
    masks: list[Tensor] = []
    first = 0
    for i, count in zip(samples, num_segs, strict=True):
        length = len(batch.clip[i])
        found = low_res[first : first + count * length, 0]
        first += count * length
        # (K, T·H, W): the frames of an object below one another.
        wanted = torch.cat(list(batch.clip_masks[i]), dim=1)
        tall = found.unflatten(0, (count, length)).flatten(1, 2)
        for mask in matched_masks(tall, list(wanted), [count]):
            masks += mask.chunk(length)
    return FoundMasks(low_res.squeeze(1), masks, answer, len(descriptions))
