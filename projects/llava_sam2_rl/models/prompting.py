"""From the text of a prompt to the embeddings that the language model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from projects.llava_sam2_rl.models.batch import RegionBatch
from projects.llava_sam2_rl.models.sa2va.model import VideoLLaVASAMModel
from projects.llava_sam2_rl.prompts import (
    IGNORE_INDEX,
    ChatTemplate,
    encode_prompt,
    encode_text,
    encode_turns,
    image_text,
    pad_batch,
    region_input,
    segmentation_answer,
    segmentation_input,
    without_brackets,
)
from projects.llava_sam2_rl.utils.devices import to_device
from projects.llava_sam2_rl.utils.masks import cell_counts

#: Stands in a question for a description that is given as embeddings.
_GAP = '\0'


@dataclass(frozen=True, eq=False)
class EmbeddedPrompts:
    """N prompts, with or without their answers, as the language model reads them."""

    #: ``(N, L)`` int64.
    input_ids: Tensor
    #: ``(N, L)`` bool.
    attention_mask: Tensor
    #: ``(N, L)`` int64.
    position_ids: Tensor
    #: ``(N, L, D)``.
    embeds: Tensor
    #: ``(N, L)`` int64, -100 where nothing is supervised.
    labels: Tensor
    #: N positions at which a description given as embeddings begins; 0 for texts.
    description_starts: Sequence[int] = ()
    #: N indices into the features of the batch's images.
    images: Sequence[int] = ()
    #: N numbers of ``[SEG]`` in the answers of the turns.
    num_masks: Sequence[int] = ()


def num_image_tokens(policy: VideoLLaVASAMModel, batch: RegionBatch, image: int) -> int:
    """``<IMG_CONTEXT>`` tokens of an image, over all its tiles."""
    return batch.features.num_tiles[image] * policy.num_image_tokens


def region_texts(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    images: Sequence[int],
    prompt_masks: Sequence[Tensor],
) -> list[str]:
    """N prompts that ask for descriptions of regions ``(R, h, w)`` of images."""
    asked = _region_inputs(policy, batch, images, prompt_masks)
    return [policy.chat_template.ask(text) for text in asked]


def caption_ids(policy: VideoLLaVASAMModel, caption: str) -> list[int]:
    """A caption as the model's answer, with what ends it: the tokens that SFT learns."""
    said = policy.chat_template.answer(without_brackets(caption))
    return encode_text(policy.tokenizer, said)


def segmentation_text(policy: VideoLLaVASAMModel, batch: RegionBatch, sample: int) -> str:
    """The prompt that asks for the mask of what a sample's own caption describes."""
    description = policy.questions.description(batch.reference(sample))
    tokens = num_image_tokens(policy, batch, batch.image[sample])
    return policy.chat_template.ask(
        segmentation_input(tokens, description, policy.questions.segmentation)
    )


def shared_length(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    images: Sequence[int],
    prompt_ids: Sequence[int],
) -> int:
    """Positions that all prompts about one image have in common: through the image's tokens.

    Args:
        policy: The network.
        batch: The batch.
        images: Of the prompts; the one with the fewest tokens says how much is certain.
        prompt_ids: One of the prompts; they differ behind the image only.
    """
    before = prompt_ids.index(policy.image_token_id)
    return before + min(num_image_tokens(policy, batch, image) for image in images)


def region_prompts(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    images: Sequence[int] | None = None,
    prompt_masks: Sequence[Tensor] | None = None,
    names: Sequence[str] | None = None,
) -> EmbeddedPrompts:
    """Prompts that ask for descriptions of regions, padded on the left.

    Args:
        policy: The network.
        batch: The batch.
        images: N indices into ``batch.features``. Defaults to the B first frames.
        prompt_masks: N × ``(R, h, w)`` bool. Defaults to the batch's own regions.
        names: N sample names. Defaults to the batch's own.
    """
    images = batch.image if images is None else images
    prompt_masks = batch.prompt_masks if prompt_masks is None else prompt_masks
    names = batch.names if names is None else names
    texts = region_texts(policy, batch, images, prompt_masks)
    ids = [encode_prompt(policy.tokenizer, text) for text in texts]
    data = _on_device(policy, pad_batch(ids, policy.pad_token_id, 'left'))
    embeds = policy.embed(
        data['input_ids'],
        batch.features,
        prompt_masks=prompt_masks,
        image_index=images,
        sample_ids=names,
    )
    return _embedded(data, embeds)


def region_prompts_with_captions(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    samples: Sequence[int],
    captions: Sequence[Sequence[int] | str],
    prompt_masks: Sequence[Tensor] | None = None,
    cell_weights: Sequence[Tensor] | None = None,
    questions: Sequence[str] | None = None,
) -> EmbeddedPrompts:
    """Prompts that ask for descriptions, with a given caption behind each, padded on the right.

    Args:
        policy: The network.
        batch: The batch.
        samples: N indices of samples.
        captions: N captions: texts, which become answers of the chat template, or token ids as
            they are.
        prompt_masks: N × ``(R, h, w)`` bool. Defaults to the samples' own regions.
        cell_weights: N × ``(R, h, w)``: factors of the regions' embeddings. Defaults to none.
        questions: N questions with ``region{i}``. Defaults to the policy's own.
    """
    images = [batch.image[i] for i in samples]
    if prompt_masks is None:
        prompt_masks = [batch.prompt_masks[i] for i in samples]
    tokenizer, template = policy.tokenizer, policy.chat_template
    pairs = []
    inputs = _region_inputs(policy, batch, images, prompt_masks, questions)
    for asked, caption in zip(inputs, captions, strict=True):
        if isinstance(caption, str):
            pairs.append(encode_turns(tokenizer, template, [(asked, without_brackets(caption))]))
        else:
            ids = encode_prompt(tokenizer, template.ask(asked))
            pairs.append((ids + list(caption), [IGNORE_INDEX] * len(ids) + list(caption)))
    data = _pad_right(policy, pairs)
    embeds = policy.embed(
        data['input_ids'],
        batch.features,
        prompt_masks=prompt_masks,
        image_index=images,
        sample_ids=[batch.names[i] for i in samples],
        cell_weights=cell_weights,
    )
    return _embedded(data, embeds)


def conversation_prompts(
    policy: VideoLLaVASAMModel, batch: RegionBatch, samples: Sequence[int]
) -> EmbeddedPrompts:
    """Conversations about whole images, questions and answers, padded on the right."""
    images = [batch.image[i] for i in samples]
    pairs = []
    for i, image in zip(samples, images, strict=True):
        turns = list(batch.conversations[i] or ())
        if turns:
            question, answer = turns[0]
            start = image_text(num_image_tokens(policy, batch, image))
            turns[0] = (f'{start}{question}', answer)
        pairs.append(encode_turns(policy.tokenizer, policy.chat_template, turns))
    data = _pad_right(policy, pairs)
    embeds = policy.embed(
        data['input_ids'],
        batch.features,
        image_index=images,
        sample_ids=[batch.names[i] for i in samples],
    )
    return _embedded(data, embeds)


def segmentation_prompts(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    descriptions: Sequence[str | Tensor],
    images: Sequence[int],
    names: Sequence[str],
    questions: Sequence[str] | None = None,
    template: ChatTemplate | None = None,
    dialogues: Sequence[int] | None = None,
    num_segs: Sequence[int] | None = None,
) -> EmbeddedPrompts:
    """Prompts that ask for masks, with the answer that holds ``[SEG]``, padded on the right.

    Args:
        policy: The network.
        batch: The batch.
        descriptions: N texts, or the embeddings ``(L, D)`` that stand in a text's place.
        images: N indices into ``batch.features``.
        names: N sample names.
        questions: N questions with ``{description}``. Defaults to the policy's own.
        template: Defaults to the policy's own.
        dialogues: N numbers: neighbours with the same one are turns of one conversation about
            their image. Defaults to a conversation each.
        num_segs: N numbers of ``[SEG]`` in the answers. Defaults to one each.

    Returns:
        A row per conversation, M ≤ N of them; their ``[SEG]``, row by row, are in the order of the
        descriptions.

    Raises:
        ValueError: The turns of a conversation are about different images, or one of several turns
            is given as embeddings.
    """
    if questions is None:
        questions = [policy.questions.segmentation] * len(images)
    template = policy.chat_template if template is None else template
    num_segs = [1] * len(images) if num_segs is None else num_segs
    answers = [segmentation_answer(count) for count in num_segs]
    rows = _conversations(dialogues, images, names)
    pairs = []
    for turns in rows:
        shown = _shown(policy, batch, images[turns[0]])
        said = [descriptions[n] for n in turns]
        asked = [questions[n] for n in turns]
        answered = [answers[n] for n in turns]
        if len(turns) == 1:
            pairs.append(
                _segmentation_pair(policy, shown, said[0], asked[0], answered[0], template)
            )
        else:
            found = _segmentation_turns(policy, shown, said, asked, answered, template)
            pairs.append((*found, 0))
    starts = [start for *_, start in pairs]
    images = [images[turns[0]] for turns in rows]
    data = _pad_right(policy, [(ids, labels) for ids, labels, _ in pairs])
    embeds = policy.embed(
        data['input_ids'],
        batch.features,
        image_index=images,
        sample_ids=[names[turns[0]] for turns in rows],
    )
    given = [x for x in descriptions if isinstance(x, Tensor)]
    if given:
        place = torch.zeros_like(data['input_ids'], dtype=torch.bool)
        for row, (turns, start) in enumerate(zip(rows, starts, strict=True)):
            description = descriptions[turns[0]]
            if isinstance(description, Tensor):
                place[row, start : start + len(description)] = True
        embeds = embeds.masked_scatter(place[..., None], torch.cat(given).to(embeds.dtype))
    num_masks = [sum(num_segs[n] for n in turns) for turns in rows]
    return replace(_embedded(data, embeds, starts), images=images, num_masks=num_masks)


def _region_inputs(
    policy: VideoLLaVASAMModel,
    batch: RegionBatch,
    images: Sequence[int],
    prompt_masks: Sequence[Tensor],
    questions: Sequence[str] | None = None,
) -> list[str]:
    if questions is None:
        questions = [policy.questions.region] * len(images)
    return [
        region_input(num_image_tokens(policy, batch, image), counts, question)
        for image, counts, question in zip(
            images, cell_counts(prompt_masks), questions, strict=True
        )
    ]


def _conversations(
    dialogues: Sequence[int] | None, images: Sequence[int], names: Sequence[str]
) -> list[list[int]]:
    """The descriptions of each conversation, in order."""
    if dialogues is None:
        return [[n] for n in range(len(images))]
    rows = [list(turns) for _, turns in groupby(range(len(dialogues)), key=lambda n: dialogues[n])]
    for turns in rows:
        if len({images[n] for n in turns}) > 1:
            raise ValueError(
                f'{[names[n] for n in turns]} are turns of one conversation but are about the '
                f'images {[images[n] for n in turns]}: one conversation has one image'
            )
    return rows


def _shown(policy: VideoLLaVASAMModel, batch: RegionBatch, image: int) -> tuple[str, int]:
    """What a prompt begins with before its last image, and how many tokens that one has.

    An image stands in one piece, whatever its tiles. The frames of a clip are images of their own.
    """
    if not batch.features.of_clips:
        return '', num_image_tokens(policy, batch, image)
    before = image_text(policy.num_image_tokens) * (batch.features.num_tiles[image] - 1)
    return before, policy.num_image_tokens


def _segmentation_turns(
    policy: VideoLLaVASAMModel,
    shown: tuple[str, int],
    descriptions: Sequence[str | Tensor],
    questions: Sequence[str],
    answers: Sequence[str],
    template: ChatTemplate,
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation that asks for several masks; its images stand first."""
    before, image_tokens = shown
    image = image_text(image_tokens)
    turns: list[tuple[str, str]] = []
    for description, question, answer in zip(descriptions, questions, answers, strict=True):
        if not isinstance(description, str):
            raise ValueError('a conversation of several turns takes texts, not embeddings')
        asked = segmentation_input(image_tokens, description, question)
        turns.append((asked.removeprefix(image) if turns else before + asked, answer))
    return encode_turns(policy.tokenizer, template, turns)


def _segmentation_pair(
    policy: VideoLLaVASAMModel,
    shown: tuple[str, int],
    description: str | Tensor,
    question: str,
    answer: str,
    template: ChatTemplate,
) -> tuple[list[int], list[int], int]:
    """Ids, labels, and where the description's embeddings go (padding ids stand there)."""
    tokenizer = policy.tokenizer
    before_image, image_tokens = shown
    if isinstance(description, str):
        asked = before_image + segmentation_input(image_tokens, description, question)
        return (*encode_turns(tokenizer, template, [(asked, answer)]), 0)
    asked = before_image + segmentation_input(image_tokens, _GAP, question)
    ids, labels = encode_turns(tokenizer, template, [(asked, answer)])
    before_text, behind_text = template.ask(asked).split(_GAP)
    # All but the question is as it is with a text in the description's place.
    start = len(encode_prompt(tokenizer, template.ask(asked)))
    before = encode_prompt(tokenizer, before_text)
    gap = [policy.pad_token_id] * len(description)
    prompt = [*before, *gap, *encode_text(tokenizer, behind_text)]
    return (
        prompt + ids[start:],
        [IGNORE_INDEX] * len(prompt) + labels[start:],
        len(before),
    )


def _pad_right(
    policy: VideoLLaVASAMModel, pairs: Sequence[tuple[list[int], list[int]]]
) -> dict[str, Tensor]:
    ids, labels = zip(*pairs, strict=True)
    return _on_device(policy, pad_batch(ids, policy.pad_token_id, 'right', labels))


def _on_device(policy: VideoLLaVASAMModel, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: to_device(tensor, policy.device) for key, tensor in data.items()}


def _embedded(
    data: dict[str, Tensor], embeds: Tensor, description_starts: Sequence[int] = ()
) -> EmbeddedPrompts:
    return EmbeddedPrompts(
        data['input_ids'],
        data['attention_mask'],
        data['position_ids'],
        embeds,
        # Nothing is supervised where there is no answer.
        data['labels'] if 'labels' in data else torch.full_like(data['input_ids'], IGNORE_INDEX),
        description_starts,
    )
