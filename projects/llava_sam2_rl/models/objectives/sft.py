"""Plain supervision: the mask loss of the return trip, and caption cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.captioning import caption_loss, write_captions
from projects.llava_sam2_rl.models.clip_segmentation import find_masks_in_clips
from projects.llava_sam2_rl.models.objectives.base import (
    LossesAndMetrics,
    Objective,
    with_prefix,
)
from projects.llava_sam2_rl.models.objectives.rollouts import Rollout
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.schedule import current_iteration
from projects.llava_sam2_rl.models.segmentation import captions_as_descriptions
from projects.llava_sam2_rl.models.segmentation_losses import (
    FoundMasks,
    find_masks,
    segmentation_losses,
)
from projects.llava_sam2_rl.models.teacher import EMATeacher
from projects.llava_sam2_rl.prompts import (
    REGION_QUESTIONS,
    SEGMENTATION_QUESTIONS,
    check_referring_instruction,
    check_region_question,
    check_segmentation_question,
    draw_question,
    strip_final_period,
)
from projects.llava_sam2_rl.registry import OBJECTIVES
from projects.llava_sam2_rl.rewards.base import Direction
from projects.llava_sam2_rl.structures import MeanLoss


@OBJECTIVES.register_module()
class SFTObjective(Objective):
    """Supervised training of both directions.

    mask_to_caption: the teacher writes a caption greedily; the policy segments what it describes,
    on the paired frame where there is one, and is trained on the mask loss. Where a reference
    caption exists, its cross-entropy is added. caption_to_mask: the policy segments what the
    reference caption describes. Of a clip of more than two frames (five, officially: the source's
    ``num_frames``) it is shown all of them, and each ``[SEG]`` is to be the object's mask in every
    one; captions are of its first frame. Where a record has a caption for each of several regions,
    they are asked for in the turns of one conversation, as in the official training; one caption
    that wants a mask for each of its regions has as many ``[SEG]`` in its answer; where nothing in
    the image fits a caption, the answer has a ``[SEG]`` whose mask is to be empty.

    Args:
        caption_weight: Weight of the caption cross-entropy. Defaults to 1.0.
        mask_weight: Weight of the mask loss (2·CE + 0.5·Dice, as in the official recipe). Defaults
            to 1.0.
        return_weight: Weight of the return trip's mask loss, on top of ``mask_weight``. A generated
            caption may fit several regions; a segmenter that is taught to guess which one was
            meant listens less, so keep it low where captions are vague. Defaults to 1.0.
        answer_weight: Weight of the cross-entropy of the answer that holds ``[SEG]``, so that it
            stays generated. Defaults to 0.1.
        num_points: Points sampled on each mask. Defaults to 12544.
        region_questions: Questions with ``region{i}``, of which one is drawn for each reference
            caption. Defaults to None: the eight of ``prompts.REGION_QUESTIONS``.
        segmentation_questions: Questions with ``{description}``, of which one is drawn for each
            description. Defaults to None: the six of ``prompts.SEGMENTATION_QUESTIONS``.
        referring_instruction: ``'template'``: segmentation is asked in the chat template, as all
            inference does. ``'v1'``: as the first code base trained Sa2VA-1B, -4B, -8B and -26B,
            see `ChatTemplate.referring`. Defaults to ``'template'``.

    Raises:
        ValueError: There is no question, one has no place for what it asks about, or
            ``referring_instruction`` is unknown.
    """

    def __init__(
        self,
        caption_weight: float = 1.0,
        mask_weight: float = 1.0,
        return_weight: float = 1.0,
        answer_weight: float = 0.1,
        num_points: int = 12544,
        region_questions: Sequence[str] | None = None,
        segmentation_questions: Sequence[str] | None = None,
        referring_instruction: str = 'template',
    ):
        super().__init__()
        self.caption_weight = caption_weight
        self.mask_weight = mask_weight
        self.return_weight = return_weight
        self.answer_weight = answer_weight
        self.num_points = num_points
        if region_questions is None:
            region_questions = REGION_QUESTIONS
        if segmentation_questions is None:
            segmentation_questions = SEGMENTATION_QUESTIONS
        if not (region_questions and segmentation_questions):
            raise ValueError('region_questions and segmentation_questions need one question each')
        self.region_questions = [check_region_question(q) for q in region_questions]
        self.segmentation_questions = [
            check_segmentation_question(q) for q in segmentation_questions
        ]
        self.referring_instruction = check_referring_instruction(referring_instruction)

    reads_clips = True

    def rollout(
        self, policy: VideoLLaVASAMModel, teacher: EMATeacher, batch: RegionBatch
    ) -> dict[Direction, Rollout]:
        """The teacher's greedy captions of all regions."""
        samples = batch.describable
        if 'mask_to_caption' not in self.directions or not samples:
            return {}
        with teacher.applied_to(policy):
            captions = write_captions(policy, batch.subset(samples), self.max_new_tokens)
        return {'mask_to_caption': Rollout(samples=samples, captions=captions)}

    def losses(
        self,
        policy: VideoLLaVASAMModel,
        batch: RegionBatch,
        rollouts: Mapping[Direction, Rollout],
    ) -> LossesAndMetrics:
        """Mask loss of both directions, and cross-entropy of the reference captions."""
        losses: dict[str, MeanLoss] = {}
        metrics: dict[str, Tensor | float] = {}

        if 'mask_to_caption' in rollouts:
            regions = batch.subset(rollouts['mask_to_caption'].samples)
            captions = rollouts['mask_to_caption'].captions
            descriptions = [strip_final_period(text) for text in captions]
            masks = find_masks(
                policy,
                regions,
                descriptions,
                regions.target_image,
                regions.target_masks,
                regions.names,
                **self._asked(policy, regions.names, self.return_weight),
            )
            found, logs = self._losses([masks], self.return_weight)
            logs['empty_captions'] = float(sum(not text for text in captions))
            if regions.captioned and self.caption_weight > 0:
                names = [regions.names[i] for i in regions.captioned]
                questions = self._draw(self.region_questions, names)
                loss = caption_loss(policy, regions, regions.captioned, questions=questions)
                found['caption_loss'] = loss.weighted(self.caption_weight)
            losses |= with_prefix('mask_to_caption', found)
            metrics |= with_prefix('mask_to_caption', logs)

        if 'caption_to_mask' in self.directions and batch.captioned:
            found, logs = self._losses(self._find_captions(policy, batch))
            losses |= with_prefix('caption_to_mask', found)
            metrics |= with_prefix('caption_to_mask', logs)
        return losses, metrics

    def _find_captions(self, policy: VideoLLaVASAMModel, batch: RegionBatch) -> list[FoundMasks]:
        """What the policy finds for the samples' captions, in images and in all frames of clips."""
        clips = [i for i in batch.captioned if batch.clip_image[i] is not None]
        stills = [i for i in batch.captioned if batch.clip_image[i] is None]
        found: list[FoundMasks] = []
        if stills:
            descriptions, images, names = captions_as_descriptions(policy, batch, stills)
            masks = find_masks(
                policy,
                batch,
                descriptions,
                images,
                [mask for i in stills for mask in batch.seg_masks[i]],
                names,
                num_segs=batch.num_segs(stills),
                dialogues=[batch.dialogues[i] for i in stills],
                **self._asked(policy, names),
            )
            found.append(masks)
        if clips:
            asked = self._asked(policy, [batch.names[i] for i in clips])
            found.append(find_masks_in_clips(policy, batch, clips, **asked))
        return found

    def _asked(
        self, policy: VideoLLaVASAMModel, names: Sequence[str], weight: float = 1.0
    ) -> dict[str, Any]:
        """How samples are asked for masks."""
        return {
            'answer_loss': weight * self.answer_weight > 0,
            'questions': self._draw(self.segmentation_questions, names),
            'template': policy.chat_template.referring(self.referring_instruction),
        }

    def _losses(self, found: Sequence[FoundMasks], weight: float = 1.0) -> LossesAndMetrics:
        return segmentation_losses(
            found,
            mask_weight=weight * self.mask_weight,
            answer_weight=weight * self.answer_weight,
            num_points=self.num_points,
        )

    @staticmethod
    def _draw(questions: Sequence[str], names: Sequence[str]) -> list[str]:
        iteration = current_iteration()
        return [draw_question(questions, name, iteration) for name in names]
