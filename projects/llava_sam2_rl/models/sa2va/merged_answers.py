"""How far a model that was written is from the one in 4 or 8 bits that was trained.

LoRA learns beside rounded weights, and corrects for some of their rounding. Merged into the weights
as they were before, it stands beside others than it was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from projects.llava_sam2_rl.models.generation import no_gradient
from projects.llava_sam2_rl.prompts import encode_turns, region_input

_ANSWER = 'a woman in a red coat who holds an open umbrella beside a parked bicycle'


@dataclass(frozen=True)
class AnswerDifference:
    """Of two models, at every token of one fixed answer about one fixed picture.

    Args:
        tokens: Of the answer.
        logits: Mean absolute difference of the logits.
        spread: Standard deviation of the trained model's logits, to compare that with.
        divergence: Mean Kullback-Leibler divergence of the written model's distribution from the
            trained one's, in nats a token.
        same_token: Share of tokens at which both have the same most likely one.
        trained_loss: Cross-entropy of the answer by the trained model, in nats a token.
        written_loss: The same by the model that was written.
    """

    tokens: int
    logits: float
    spread: float
    divergence: float
    same_token: float
    trained_loss: float
    written_loss: float

    def __str__(self) -> str:
        return (
            f'over {self.tokens} tokens of a fixed answer logits differ by {self.logits:.3g} on '
            f'average (their standard deviation is {self.spread:.3g}), KL divergence '
            f'{self.divergence:.3g} nats a token, the most likely token is the same at '
            f'{self.same_token:.0%}, cross-entropy {self.trained_loss:.3f} as trained and '
            f'{self.written_loss:.3f} as written'
        )


def compare(trained: Tensor, written: Tensor, targets: Tensor) -> AnswerDifference:
    """The numbers of two sets of logits.

    Args:
        trained: ``(T, V)`` float.
        written: ``(T, V)`` float.
        targets: ``(T,)`` int64, the tokens that come.
    """
    trained, written = trained.double(), written.double()
    expected, found = trained.log_softmax(-1), written.log_softmax(-1)
    return AnswerDifference(
        tokens=len(targets),
        logits=float((written - trained).abs().mean()),
        spread=float(trained.std()),
        divergence=float((expected.exp() * (expected - found)).sum(-1).mean()),
        same_token=float((trained.argmax(-1) == written.argmax(-1)).double().mean()),
        trained_loss=float(F.nll_loss(expected, targets)),
        written_loss=float(F.nll_loss(found, targets)),
    )


def merged_answers(model: Any, folder: str | Path, dtype: torch.dtype) -> AnswerDifference:
    """Reads a model that was written, compares it with the one that was trained, and logs it.

    Args:
        model: A `VideoLLaVASAMModel` in 4 or 8 bits; its mode is left as it is.
        folder: What its ``save_pretrained`` wrote.
        dtype: In which it was written.
    """
    logits, targets = probe(model)
    written = type(model).from_pretrained(
        folder,
        model.tokenizer,
        special_token_ids=model.special_token_ids,
        trainable=(),
        torch_dtype=dtype,
    )
    found = compare(logits, probe(written.to(model.device))[0], targets)
    print_log(
        f'{folder}: LoRA is merged into the weights before they were rounded ({model.quantization})'
        f'; {found}',
        logger='current',
    )
    return found


@no_gradient()
def probe(model: Any) -> tuple[Tensor, Tensor]:
    """Logits ``(T, V)`` float32 at a fixed answer about a fixed picture, and its T tokens.

    Args:
        model: A `VideoLLaVASAMModel`. Without a tokenizer the text is tokens in their order.
    """
    side, grid, device = model.config['force_image_size'], model.grid_size, model.device
    ramp = torch.linspace(-2, 2, side, device=device)
    picture = torch.stack(
        [ramp.expand(side, side), ramp[:, None].expand(side, side), -ramp.expand(side, side)]
    )
    region = torch.zeros(1, grid, grid, dtype=torch.bool, device=device)
    region[:, : (grid + 1) // 2, : (grid + 1) // 2] = True
    if model.tokenizer is None:
        places = [model.image_token_id] * (model.num_image_tokens + int(region.sum()))
        ordinary = set(range(model.language_model.config.vocab_size))
        answer = sorted(ordinary - set(model.special_token_ids.values()))[:16]
        ids, labels = places + answer, [-100] * len(places) + answer
    else:
        question = region_input(model.num_image_tokens, [int(region.sum())])
        ids, labels = encode_turns(model.tokenizer, model.template, [(question, _ANSWER)])
    data = {
        'pixel_values': picture[None, None],
        'vp_overall_mask': torch.ones(1, dtype=torch.bool, device=device),
    }
    input_ids, target = (torch.tensor([x], device=device) for x in (ids, labels))
    training = model.training
    model.eval()
    try:
        features = model.encode_images(data, grounding=False)
        embeds = model.embed(input_ids, features, prompt_masks=[region])
        hidden = model.hidden_states(embeds, torch.ones_like(input_ids, dtype=torch.bool))
        learnt = target[:, 1:] != -100
        return model.lm_head(hidden[:, :-1][learnt]).float(), target[:, 1:][learnt]
    finally:
        model.train(training)
