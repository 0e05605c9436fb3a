"""How likely the teacher finds a caption of a region: a reward for which nothing is written."""

from __future__ import annotations

import torch
from torch import Tensor

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.rewards.base import RolloutBatch

#: What a likelihood is compared with, and the field that holds it.
CONTRASTS = {
    'none': None,
    'no_mask': 'caption_logps_no_mask',
    'other_region': 'caption_logps_other_regions',
}


@REWARDS.register_module()
class CaptionLikelihoodReward:
    """The teacher's likelihood of a caption, given the image and a mask.

    In caption_to_mask it is that of the reference caption given the sampled mask: a mask earns as
    much as it explains of what was said. In mask_to_caption it is that of the sampled caption given
    the true mask, where a contrast is wanted: the most likely caption says nothing in particular.
    The captions are read in one pass with all else the teacher is asked; none is written.

    With ``l = log p(caption | image, mask)``, a mean or a sum over the T tokens, end included:

    - ``contrast='none'``: ``exp(l)``, of a mean the geometric mean of the tokens' probabilities.
    - ``'no_mask'``: ``exp(l) / (exp(l) + exp(l_0)) = sigmoid(l - l_0)``, ``l_0`` given the whole
      image as region. It is 0.5 where the mask explains nothing that the image does not.
    - ``'other_region'``: ``exp(l) / (exp(l) + sum_k exp(l_k))`` over the image's K other regions:
      does the caption tell this region from them? ``1 / (K + 1)`` is chance. It is the softmax
      over regions of Mao et al. 2016 ("Generation and Comprehension of Unambiguous Object
      Descriptions"). An image with one region is compared as by ``'no_mask'``.

    In caption_to_mask what is compared with is the same for all rollouts of a caption, since their
    masks are the policy's: a contrast changes by how much one is better than another, never which.

    A mask without a cell scores 0. Without a caption it declines.

    Args:
        reduction: ``'mean'`` or ``'sum'`` of the tokens' log-probs. The likelihood of a sum is that
            of the whole caption, which is tiny: take it with a contrast. Defaults to ``'mean'``.
        contrast: ``'none'``, ``'no_mask'`` or ``'other_region'``. Defaults to ``'none'``.

    Raises:
        ValueError: An option is unknown.
    """

    name = 'caption_likelihood'

    def __init__(self, reduction: str = 'mean', contrast: str = 'none') -> None:
        if reduction not in ('mean', 'sum'):
            raise ValueError(f'reduction={reduction!r} is unknown: use mean or sum')
        if contrast not in CONTRASTS:
            raise ValueError(f'contrast={contrast!r} is unknown: use one of {", ".join(CONTRASTS)}')
        self.reduction = reduction
        self.compared_with = CONTRASTS[contrast]
        self.needs: tuple[str, ...] = ('caption_logps',)
        if self.compared_with is not None:
            self.needs = ('caption_logps', self.compared_with)

    def __call__(self, rollouts: RolloutBatch) -> list[float | None]:
        """A number in [0, 1] per rollout, ``None`` where there is no reference caption.

        Raises:
            ValueError: The batch lacks the log-probs.
        """
        own = rollouts.required('caption_logps', self)
        others: list[Tensor | None] = [None] * len(rollouts)
        if self.compared_with is not None:
            others = list(rollouts.required(self.compared_with, self))
        there = [True] * len(rollouts)
        if rollouts.direction == 'caption_to_mask':
            references = rollouts.references or [None] * len(rollouts)
            there = [reference is not None and bool(reference.strip()) for reference in references]
        return [
            self._score(logps, other) if caption else None
            for caption, logps, other in zip(there, own, others, strict=True)
        ]

    def _score(self, logps: Tensor | None, others: Tensor | None) -> float:
        if logps is None:
            return 0.0
        likelihood = self._reduced(logps)
        if others is None:
            return float(likelihood.exp().clamp(max=1))
        rows = others if others.ndim == 2 else others[None]
        each = torch.cat([likelihood[None], self._reduced(rows)])
        return float(each.softmax(0)[0])

    def _reduced(self, logps: Tensor) -> Tensor:
        logps = logps.detach().double()
        return logps.mean(-1) if self.reduction == 'mean' else logps.sum(-1)
