"""From the text of a prompt to what the language model reads."""

from __future__ import annotations

import numpy as np
import torch

from projects.llava_sam2_rl.datasets import sa2va_collate
from projects.llava_sam2_rl.models.captioning import write_captions
from projects.llava_sam2_rl.models.prompting import (
    conversation_prompts,
    region_prompts,
    region_prompts_with_captions,
    region_texts,
    segmentation_prompts,
    segmentation_text,
    shared_length,
)
from projects.llava_sam2_rl.prompts import encode_prompt, encode_text, region_input
from projects.llava_sam2_rl.structures import RegionSample
from test_models.batches import encode


def row(prompts, i):
    return prompts.input_ids[i][prompts.attention_mask[i]].tolist()


def test_two_regions_are_named_in_one_prompt(tiny_model, tiny_transform):
    masks = np.zeros((2, 100, 80), dtype=bool)
    masks[0, :20, :20] = masks[1, 60:, 50:] = True
    image = np.full((100, 80, 3), 90, np.uint8)
    item = tiny_transform(RegionSample(image=image, mask=masks, caption='two corners'))
    encoded = tiny_model.encode(sa2va_collate([item])['data'])
    text = region_texts(tiny_model.policy, encoded, [0], [encoded.prompt_masks[0]])[0]
    assert 'There are 2 part regions in the picture: region1<vp>' in text
    assert text.count('<IMG_CONTEXT>') == 36 + int(item['prompt_masks'].sum())
    assert len(write_captions(tiny_model.policy, encoded, 24)) == 1


def test_region_prompts_are_padded_on_the_left(tiny_model, batch):
    policy, encoded = tiny_model.policy, encode(tiny_model, batch)
    prompts = region_prompts(policy, encoded)
    assert prompts.attention_mask[:, -1].all()
    assert prompts.embeds.shape[:2] == prompts.input_ids.shape
    # Without answers nothing is supervised.
    assert (prompts.labels == -100).all()
    for i, grid in enumerate(encoded.prompt_masks):
        text = policy.chat_template.ask(
            region_input(policy.num_image_tokens, grid.flatten(1).sum(1).tolist())
        )
        assert row(prompts, i) == encode_prompt(policy.tokenizer, text)
    # Other regions of chosen images.
    some = region_prompts(policy, encoded, [2], encoded.prompt_masks[2:3], ['x'])
    assert row(some, 0) == row(prompts, 2)
    torch.testing.assert_close(some.embeds[0], prompts.embeds[2][prompts.attention_mask[2]])


def test_captions_behind_prompts_are_supervised(tiny_model, batch):
    policy, encoded = tiny_model.policy, encode(tiny_model, batch)
    prompts = region_prompts_with_captions(policy, encoded, [0, 2], ['a dog', [30, 31, 32]])
    for n, (i, expected) in enumerate(
        [(0, encode_text(policy.tokenizer, 'a dog<|end|>')), (2, [30, 31, 32])]
    ):
        supervised = prompts.labels[n][prompts.labels[n] != -100].tolist()
        assert supervised == expected
        prompt = encode_prompt(
            policy.tokenizer, region_texts(policy, encoded, [i], [encoded.prompt_masks[i]])[0]
        )
        assert row(prompts, n)[: len(prompt)] == prompt


def test_conversations_start_with_their_image(tiny_model, mixed):
    policy, encoded = tiny_model.policy, encode(tiny_model, mixed)
    prompts = conversation_prompts(policy, encoded, [1])
    text = policy.tokenizer.decode(row(prompts, 0))
    assert text.count('<IMG_CONTEXT>') == policy.num_image_tokens
    assert text.index('<IMG_CONTEXT>') < text.index('What is it?') < text.index('Where?')
    said = policy.tokenizer.decode(prompts.labels[0][prompts.labels[0] != -100])
    assert 'a circle.' in said
    assert 'Where?' not in said


def test_embeddings_stand_where_a_description_would(tiny_model, batch):
    policy, encoded = tiny_model.policy, encode(tiny_model, batch)
    given = torch.randn(5, policy.language_model.config.hidden_size)
    prompts = segmentation_prompts(policy, encoded, ['a dog', given], [0, 1], ['a', 'b'])
    start = prompts.description_starts[1]
    assert torch.equal(prompts.embeds[1, start : start + 5], given)
    assert prompts.description_starts[0] == 0
    seg = policy.seg_token_id
    assert (prompts.input_ids == seg).sum(1).tolist() == [1, 1]
    # Text before and behind is the same in both.
    table = policy.language_model.get_input_embeddings()
    text = row(prompts, 1)
    assert torch.equal(prompts.embeds[1, start - 1], table(torch.tensor(text[start - 1])))
    assert torch.equal(prompts.embeds[1, start + 5], table(torch.tensor(text[start + 5])))


def test_the_prompt_that_a_reward_is_shown_is_the_one_that_was_read(tiny_model, batch):
    policy, encoded = tiny_model.policy, encode(tiny_model, batch)
    text = segmentation_text(policy, encoded, 0)
    description = encoded.captions[0].rstrip('.')
    prompts = segmentation_prompts(policy, encoded, [description], [0], ['a'])
    ids = encode_prompt(policy.tokenizer, text)
    assert row(prompts, 0)[: len(ids)] == ids


def test_prompts_about_an_image_share_all_through_the_image(tiny_model, batch):
    policy, encoded = tiny_model.policy, encode(tiny_model, batch)
    prompts = region_prompts(policy, encoded)
    rows = [row(prompts, i) for i in range(4)]
    length = shared_length(policy, encoded, [0, 1, 2, 3], rows[0])
    assert len({tuple(ids[:length]) for ids in rows}) == 1
    image = policy.special_token_ids['<IMG_CONTEXT>']
    assert rows[0][:length].count(image) == policy.num_image_tokens
    # The picture of another kind of prompt lies in the same place.
    other = segmentation_prompts(policy, encoded, ['a dog'], [0], ['a'])
    assert row(other, 0)[:length] == rows[0][:length]
