"""The second task: from descriptions, as text or as embeddings, to masks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from projects.llava_sam2_rl.losses.mask import mask_loss
from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective, captioning, prompting
from projects.llava_sam2_rl.models.sa2va.masks import upsample_logits
from projects.llava_sam2_rl.models.segmentation import (
    captions_as_descriptions,
    masks_at_size,
    on_target_frame,
    seg_embeddings,
    segment_descriptions,
)
from projects.llava_sam2_rl.models.segmentation_losses import find_masks, segmentation_losses
from projects.llava_sam2_rl.prompts import encode_text, questions, segmentation_input
from test_models.batches import encode, only


def as_embeddings(policy, text):
    table = policy.language_model.get_input_embeddings().weight
    return table[torch.tensor(encode_text(policy.tokenizer, text))]


def test_masks_of_a_batch_equal_one_by_one(tiny_model, batch):
    policy, encoded = tiny_model.policy, encode(tiny_model, batch)
    texts = ['a red circle', '', 'a large star in the top left', 'x']
    with torch.no_grad():
        masks, _ = segment_descriptions(policy, encoded, texts, encoded.target_image, encoded.names)
        for i in range(4):
            single = encode(tiny_model, only(batch, i))
            alone, _ = segment_descriptions(policy, single, [texts[i]], single.target_image, ['x'])
            torch.testing.assert_close(alone[0], masks[i], atol=1e-4, rtol=1e-4)


def test_several_descriptions_of_an_image_equal_one_by_one(tiny_model, batch):
    """They share the image's tokens; embeddings of `weights` 1 do not."""
    policy, encoded = tiny_model.policy.eval(), encode(tiny_model, batch)
    texts, images = ['a red circle', 'a star', 'x'], [0, 1, 0]
    found, loss = seg_embeddings(policy, encoded, texts, images, 'abc', answer_loss=True)
    plain, plain_loss = seg_embeddings(
        policy, encoded, texts, images, 'abc', weights=[None] * 3, answer_loss=True
    )
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(loss, plain_loss, atol=1e-5, rtol=1e-4)
    for i, text in enumerate(texts):
        alone, none = seg_embeddings(policy, encoded, [text], images[i : i + 1], ['x'])
        torch.testing.assert_close(found[i : i + 1], alone, atol=2e-5, rtol=1e-4)
        assert none is None


def test_spliced_embeddings_are_read_where_the_description_stands(tiny_model, batch):
    policy, encoded = tiny_model.policy.eval(), encode(tiny_model, batch)
    tokenizer = policy.tokenizer
    texts = ('a small red cross', 'a circle')
    spliced = [as_embeddings(policy, text) for text in texts]
    found, _ = seg_embeddings(policy, encoded, spliced, [0, 1], ['a', 'b'])
    for i, described in enumerate(texts):
        tokens = encoded.features.num_tiles[i] * policy.num_image_tokens
        text = policy.chat_template.ask(segmentation_input(tokens, '@@'))
        before, behind = text.split('@@')
        whole = (
            encode_text(tokenizer, before)
            + encode_text(tokenizer, described)
            + encode_text(tokenizer, behind)
            + encode_text(tokenizer, 'It is [SEG].<|end|>\n')
        )
        expected = policy.forward(
            {
                'input_ids': torch.tensor([whole]),
                'attention_mask': torch.ones(1, len(whole), dtype=torch.bool),
                'pixel_values': [batch['data']['pixel_values'][i]],
            },
            mode='tensor',
        )['seg_embeddings']
        torch.testing.assert_close(found[i : i + 1], expected, rtol=0, atol=2e-5)


def test_words_and_embeddings_may_stand_side_by_side(tiny_model, batch):
    policy, encoded = tiny_model.policy.eval(), encode(tiny_model, batch)
    spliced = as_embeddings(policy, 'a circle')
    mixed, _ = segment_descriptions(policy, encoded, ['a red square', spliced], [0, 2], ['a', 'b'])
    first, _ = segment_descriptions(policy, encoded, ['a red square'], [0], ['a'])
    second, _ = segment_descriptions(policy, encoded, [spliced], [2], ['b'])
    torch.testing.assert_close(mixed, torch.cat([first, second]), rtol=0, atol=2e-4)


def test_weights_of_words_and_embeddings(tiny_model, batch):
    """1 changes nothing, a small weight does, and for a text there is none."""
    policy, encoded = tiny_model.policy.eval(), encode(tiny_model, batch)
    given = ['a red square', as_embeddings(policy, 'a large star')]
    count = len(given[1])

    def found(weights):
        return seg_embeddings(policy, encoded, given, [0, 2], ['a', 'b'], weights=weights)[0]

    plain = found(None)
    torch.testing.assert_close(found([None, torch.ones(count)]), plain, rtol=0, atol=2e-5)
    changed = found([None, torch.full((count,), 0.01)])
    torch.testing.assert_close(changed[0], plain[0], rtol=0, atol=2e-5)
    assert not torch.allclose(changed[1], plain[1], atol=1e-3)


def test_an_answer_without_seg_raises_with_the_sample_and_both_numbers(
    tiny_model, batch, monkeypatch
):
    monkeypatch.setattr(questions, 'SEGMENTATION_ANSWERS', ('It is here.',))
    with pytest.raises(ValueError, match=r"'scenes/val-0-\d'.* 1 \[SEG\].*0"):
        tiny_model(**batch, mode='loss')


def test_captions_are_descriptions_without_their_period(tiny_model, batch):
    encoded = encode(tiny_model, {**batch, 'data': {**batch['data'], 'captions': ['a b.'] * 4}})
    texts, images, names = captions_as_descriptions(tiny_model.policy, encoded, [2, 0])
    assert texts == ['a b', 'a b']
    # Where they were written: the first frame.
    assert images == [2, 0]
    assert names == [encoded.names[2], encoded.names[0]]


@pytest.mark.parametrize('lowercase', [True, False])
def test_training_asks_in_lower_case_as_officially(tiny_model, batch, monkeypatch, lowercase):
    """Captions of the data, in training and validation; not what is learnt or what was written."""
    policy, given, written = tiny_model.policy, 'The RED Circle.', 'A big Star.'
    asked = {'the red circle' if lowercase else 'The RED Circle', 'A big Star'}
    monkeypatch.setattr(policy, 'questions', replace(policy.questions, lowercase=lowercase))
    seen, learnt = set(), []

    def ask(tokens, description, question):
        seen.add(description)
        return segmentation_input(tokens, description, question)

    def learn(policy, batch, samples, captions, *args, **options):
        learnt.extend(captions)
        return with_captions(policy, batch, samples, captions, *args, **options)

    def write(policy, batch, *args, **options):
        return [written] * len(options.get('names') or batch)

    with_captions = captioning.region_prompts_with_captions
    monkeypatch.setattr(prompting, 'segmentation_input', ask)
    monkeypatch.setattr(captioning, 'region_prompts_with_captions', learn)
    for module in ('objectives.sft', 'objectives.grpo_caption_to_mask', 'cycle'):
        monkeypatch.setattr(f'projects.llava_sam2_rl.models.{module}.write_captions', write)
    batch = {**batch, 'data': {**batch['data'], 'captions': [given] * 4}}
    batch['data_samples'] = [replace(meta, caption=given) for meta in batch['data_samples']]

    tiny_model(**batch, mode='loss')
    assert seen == asked
    assert set(learnt) == {given}
    seen.clear()
    tiny_model(**batch, mode='predict')
    assert seen - {meta.distractor for meta in batch['data_samples']} == asked
    seen.clear()

    model = DualLoopModel(policy, GRPOObjective(num_generations=2), max_new_tokens=4)
    model(**batch, mode='loss')
    assert seen & {'the red circle', 'The RED Circle'} == asked - {'A big Star'}


def test_masks_are_brought_to_the_size_of_what_they_go_with(tiny_model):
    low_res = torch.randn(2, 8, 8)
    like = [torch.zeros(20, 30), torch.zeros(16, 12)]
    found = masks_at_size(low_res, like)
    assert [tuple(mask.shape) for mask in found] == [(1, 20, 30), (1, 16, 12)]
    assert torch.equal(found[1], upsample_logits(low_res[1][None, None], (16, 12))[0])


@pytest.mark.parametrize('answer_weight', [0.0, 0.5])
def test_the_losses_are_weighted_and_count_the_masks(tiny_model, batch, answer_weight):
    policy, encoded = tiny_model.policy.eval(), encode(tiny_model, batch)
    texts, images = ['a red circle', 'a star'], [0, 1]
    masks = [encoded.gt_masks[i] for i in images]
    torch.manual_seed(0)
    found = find_masks(policy, encoded, texts, images, masks, 'ab', answer_loss=answer_weight > 0)
    losses, metrics = segmentation_losses(
        [found], mask_weight=3.0, answer_weight=answer_weight, num_points=500
    )
    low_res, answer = segment_descriptions(policy, encoded, texts, images, 'ab', answer_loss=True)
    torch.manual_seed(0)
    expected, _ = mask_loss(low_res, masks, num_points=500)
    torch.testing.assert_close(losses['mask_loss'].value, 3 * expected)
    assert {loss.count for loss in losses.values()} == {2}
    assert metrics
    assert ('answer_loss' in losses) is (answer_weight > 0)
    if answer_weight:
        torch.testing.assert_close(losses['answer_loss'].value, 0.5 * answer)


def test_the_frame_of_the_return_trip_need_not_be_the_last():
    # Two clips of four frames; the objects are looked for again on their second and third frame.
    batch = SimpleNamespace(clip=[[0, 4, 5, 6], [1, 7, 8, 9]], target_image=[4, 8])
    tracks = [torch.arange(8.0).view(2, 4, 1, 1), torch.arange(4.0).view(1, 4, 1, 1)]
    found = on_target_frame(batch, [0, 1], tracks)
    assert [x.flatten().tolist() for x in found] == [[1.0, 5.0], [2.0]]
