"""The wrapper: what a batch becomes, which parts run how often, what is trained and saved."""

from __future__ import annotations

import copy
import functools
import operator

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.models import DualLoopModel, SFTObjective
from projects.llava_sam2_rl.models import dual_loop as dual_loop_module
from projects.llava_sam2_rl.registry import TRANSFORMS
from projects.llava_sam2_rl.structures import RegionSample


@pytest.fixture(scope='module')
def transform(tiny_config):
    return TRANSFORMS.build(tiny_config.val_dataloader.dataset.transforms)


@pytest.fixture(scope='module')
def batch(transform) -> dict:
    """Four samples; the last two have a second frame, the second has no caption."""
    plain = GeneratedScenes(length=8, split='val', transforms=transform)
    paired = GeneratedScenes(length=8, split='val', paired=True, transforms=transform)
    items = [plain[0], plain[1], paired[0], paired[1]]
    collated = sa2va_collate(items)
    collated['data']['captions'][1] = None
    return collated


def only(batch: dict, i: int) -> dict:
    """Sample ``i`` by itself."""
    data, pair = batch['data'], batch['data']['pair']
    single = {key: [data[key][i]] for key in ('pixel_values', 'g_pixel_values', 'prompt_masks')}
    single.update(masks=[data['masks'][i]], captions=[data['captions'][i]], pair=None)
    single['vp_overall_mask'] = torch.tensor([True])
    if i in pair['index'].tolist():
        k = pair['index'].tolist().index(i)
        keys = ('pixel_values', 'g_pixel_values', 'prompt_masks', 'masks')
        single['pair'] = {
            **{key: [pair[key][k]] for key in keys},
            'index': torch.tensor([0]),
            'vp_overall_mask': torch.tensor([True]),
        }
    return {'data': single, 'data_samples': [batch['data_samples'][i]]}


def test_the_runners_init_weights_leaves_the_pretrained_model_as_it_is(tiny_loop):
    before = {key: value.clone() for key, value in tiny_loop.policy.state_dict().items()}
    tiny_loop.init_weights()
    tiny_loop.policy.init_weights()
    after = tiny_loop.policy.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    # peft starts LoRA as no change at all.
    zeros = [value for key, value in after.items() if '.lora_B.' in key]
    assert zeros
    assert not any(value.any() for value in zeros)


def test_every_frozen_encoder_runs_once_per_image_per_step(tiny_loop, batch, monkeypatch):
    images = {'vit': 0, 'sam': 0}
    policy = tiny_loop.policy
    sam = policy.grounding_encoder.sam2_model.image_encoder
    vit_forward, sam_forward = policy.vision_model.forward, sam.forward

    def count_vit(pixel_values, *args, **kwargs):
        images['vit'] += len(pixel_values)
        return vit_forward(*args, pixel_values=pixel_values, **kwargs)

    def count_sam(x):
        images['sam'] += len(x)
        return sam_forward(x)

    monkeypatch.setattr(policy.vision_model, 'forward', count_vit)
    monkeypatch.setattr(sam, 'forward', count_sam)
    tiny_loop.train()
    losses = tiny_loop(**batch, mode='loss')
    assert {'loop1/mask_loss', 'loop1/caption_loss', 'loop2/mask_loss'} <= set(losses)
    # Four first frames and two second frames, both directions, teacher and policy.
    assert images == {'vit': 6, 'sam': 6}


def test_the_return_trip_happens_on_the_second_frame(tiny_loop, batch):
    encoded = tiny_loop.encode(batch['data'])
    assert encoded.image == [0, 1, 2, 3]
    assert encoded.target_image == [0, 1, 4, 5]
    pair = batch['data']['pair']
    for i, expected in enumerate(
        [batch['data']['masks'][0], batch['data']['masks'][1], *pair['masks']]
    ):
        assert torch.equal(encoded.target_masks[i], expected[0])
    assert not torch.equal(encoded.target_masks[2], encoded.union_masks[2])


def test_captions_and_masks_of_a_batch_equal_one_by_one(tiny_loop, batch):
    encoded = tiny_loop.encode(batch['data'])
    captions = tiny_loop.write_captions(encoded)
    names = encoded.names
    texts = ['a red circle', '', 'a large star in the top left', 'x']
    with torch.no_grad():
        masks, _ = tiny_loop.segment_descriptions(encoded, texts, encoded.target_image, names)
        for i in range(4):
            single = tiny_loop.encode(only(batch, i)['data'])
            assert tiny_loop.write_captions(single) == [captions[i]]
            alone, _ = tiny_loop.segment_descriptions(
                single, [texts[i]], single.target_image, ['x']
            )
            torch.testing.assert_close(alone[0], masks[i], atol=1e-4, rtol=1e-4)


def test_caption_loss_is_the_mean_over_all_caption_tokens(tiny_loop, batch):
    encoded = tiny_loop.encode(batch['data'])
    tokenizer = tiny_loop.policy.tokenizer
    with torch.no_grad():
        both = tiny_loop.caption_loss(encoded, [0, 2])
        singles = [tiny_loop.caption_loss(encoded, [i]) for i in (0, 2)]
    counts = [
        len(tokenizer.encode(encoded.captions[i] + '<|end|>', add_special_tokens=False))
        for i in (0, 2)
    ]
    expected = sum(n * loss for n, loss in zip(counts, singles, strict=True)) / sum(counts)
    torch.testing.assert_close(both, expected)


def test_writing_captions_restores_the_training_mode(tiny_loop, batch):
    tiny_loop.train()
    modes = {name: module.training for name, module in tiny_loop.policy.named_modules()}
    assert modes['mlp1']
    assert not modes['vision_model']
    with tiny_loop.teacher_applied():
        tiny_loop.write_captions(tiny_loop.encode(batch['data']))
    assert {n: m.training for n, m in tiny_loop.policy.named_modules()} == modes


def test_gradients_reach_every_trained_part_and_nothing_else(tiny_loop, batch):
    shadows = {k: v.clone() for k, v in tiny_loop.teacher.state_dict()['shadows'].items()}
    tiny_loop.train()
    losses = tiny_loop(**batch, mode='loss')
    sum(value for key, value in losses.items() if 'loss' in key).backward()
    for name, parameter in tiny_loop.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
    for part in ('mlp1', 'text_hidden_fcs', 'lora_B', 'sam_mask_decoder.conv_s0'):
        gradients = [p.grad for n, p in tiny_loop.named_parameters() if part in n]
        assert any(g is not None and g.abs().max() > 0 for g in gradients), part
    after = tiny_loop.teacher.state_dict()['shadows']
    assert all(torch.equal(after[k], shadows[k]) for k in shadows)


def test_the_teacher_writes_the_caption(tiny_loop, batch, monkeypatch):
    seen = []
    write = DualLoopModel.write_captions

    def spy(self, encoded, **options):
        seen.append(
            next(p for n, p in self.policy.named_parameters() if 'lora_B' in n)[0, 0].item()
        )
        return write(self, encoded, **options)

    monkeypatch.setattr(DualLoopModel, 'write_captions', spy)
    with torch.no_grad():
        for name, parameter in tiny_loop.policy.named_parameters():
            if 'lora_B' in name:
                parameter.fill_(0.125)
    tiny_loop(**batch, mode='loss')
    assert seen == [0.0]  # the policy's is 0.125


def test_samples_without_caption_take_no_part_in_the_second_direction(tiny_loop, batch):
    data = {**batch['data'], 'captions': [None] * 4}
    losses = tiny_loop(data, batch['data_samples'], mode='loss')
    assert {key for key in losses if 'loss' in key} == {'loop1/mask_loss', 'loop1/answer_loss'}


@pytest.mark.parametrize('off', ['mask_to_caption', 'caption_to_mask'])
def test_a_direction_of_weight_zero_is_off(tiny_loop, batch, off):
    setattr(tiny_loop, f'{off}_weight', 0.0)
    losses = tiny_loop(**batch, mode='loss')
    left = 'loop2' if off == 'mask_to_caption' else 'loop1'
    assert {key.split('/')[0] for key in losses} == {left}


def test_the_weight_of_a_direction_scales_its_losses(tiny_loop, batch):
    tiny_loop.eval()
    torch.manual_seed(1)
    once = tiny_loop(**batch, mode='loss')
    tiny_loop.caption_to_mask_weight = 3.0
    torch.manual_seed(1)
    thrice = tiny_loop(**batch, mode='loss')
    for key in ('loop2/mask_loss', 'loop2/answer_loss'):
        torch.testing.assert_close(thrice[key], 3 * once[key])
    assert torch.equal(thrice['loop1/mask_loss'], once['loop1/mask_loss'])


def test_one_caption_for_two_regions_is_found_as_a_whole(tiny_loop, transform):
    masks = np.zeros((2, 100, 80), dtype=bool)
    masks[0, :20, :20] = masks[1, 60:, 50:] = True
    image = np.full((100, 80, 3), 90, np.uint8)
    item = transform(RegionSample(image=image, mask=masks, caption='two corners'))
    encoded = tiny_loop.encode(sa2va_collate([item])['data'])
    assert torch.equal(encoded.target_masks[0], torch.from_numpy(masks.any(0)))
    text = tiny_loop.region_text(encoded, 0)
    assert 'There are 2 part regions in the picture: region1<vp>' in text
    assert text.count('<IMG_CONTEXT>') == 36 + int(item['prompt_masks'].sum())
    assert len(tiny_loop.write_captions(encoded)) == 1


def test_an_answer_without_seg_raises_with_the_sample_and_both_numbers(
    tiny_loop, batch, monkeypatch
):
    monkeypatch.setattr(dual_loop_module, 'SEGMENTATION_ANSWERS', ('It is here.',))
    with pytest.raises(ValueError, match=r"'scenes/val-0-\d'.* 1 \[SEG\].*0"):
        tiny_loop(**batch, mode='loss')


def test_prediction_gives_masks_of_original_size_for_each_text(tiny_loop, batch):
    results = tiny_loop(**batch, mode='predict')
    assert [set(r['masks']) for r in results] == [{'generated', 'reference', 'distractor'}] * 4
    for result in results:
        for mask in result['masks'].values():
            assert mask.shape == (128, 128)
            assert mask.dtype == torch.bool
    assert results[1]['reference'] is None


def test_prediction_with_policy_or_teacher(tiny_loop, batch):
    before = tiny_loop.predict(**batch)
    with torch.no_grad():
        for parameter in tiny_loop.policy.text_hidden_fcs.parameters():
            parameter.zero_()

    def same(a, b):
        return all(
            torch.equal(x['masks']['generated'], y['masks']['generated'])
            for x, y in zip(a, b, strict=True)
        )

    assert not same(tiny_loop.predict(**batch), before)
    tiny_loop.predict_with = 'teacher'
    assert same(tiny_loop.predict(**batch), before)


def test_checkpoints_hold_trainable_tensors_only_and_load_back(tiny_loop, tiny_config):
    state = tiny_loop.state_dict()
    assert set(state) == {n for n, p in tiny_loop.named_parameters() if p.requires_grad}
    assert {key.split('.')[0] for key in state} == {'policy'}
    other = copy.deepcopy(tiny_loop)
    changed = {key: torch.randn_like(value) for key, value in state.items()}
    result = other.load_state_dict(changed, strict=False)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert all(torch.equal(other.state_dict()[k], changed[k]) for k in changed)
    key = next(iter(changed))
    del changed[key]
    assert other.load_state_dict(changed, strict=False).missing_keys == [key]


def test_bad_options(tiny_loop):
    policy = tiny_loop.policy
    with pytest.raises(ValueError, match='both directions have weight 0'):
        DualLoopModel(
            policy, SFTObjective(), mask_to_caption={'weight': 0}, caption_to_mask={'weight': 0}
        )
    with pytest.raises(TypeError, match="mask_to_caption has no option 'wieght': did you mean"):
        DualLoopModel(policy, SFTObjective(), mask_to_caption={'wieght': 1})
    with pytest.raises(ValueError, match='predict_with'):
        DualLoopModel(policy, SFTObjective(), predict_with='student')
    with pytest.raises(KeyError, match="'SFTObjectiv' is not registered.*did you mean 'SFTObj"):
        DualLoopModel(policy, {'type': 'SFTObjectiv'})


# -- conversations -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def mixed(transform) -> dict:
    """A region, a conversation, a region."""
    scenes = GeneratedScenes(length=8, split='val', transforms=transform)
    photo = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    talk = transform(
        RegionSample(
            image=photo,
            mask=np.zeros((0, 64, 80), bool),
            caption=None,
            source='chat',
            sample_id='talk',
            conversation=(('What is it?', 'a circle.'), ('Where?', 'in the center')),
        )
    )
    return sa2va_collate([scenes[0], {**talk, 'skipped': []}, scenes[1]])


def test_conversations_ride_along_with_cross_entropy_alone(tiny_loop, mixed):
    tiny_loop.eval()
    names = [meta.name for meta in mixed['data_samples']]
    encoded = tiny_loop.encode(mixed['data'], names)
    torch.manual_seed(0)
    losses, _ = tiny_loop.losses(encoded)
    torch.manual_seed(0)
    alone, _ = tiny_loop.objective(tiny_loop, encoded.subset([0, 2]))
    assert losses.pop('chat/caption_loss') > 0
    assert losses.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(losses[key], value)


def test_the_loss_of_a_conversation_is_that_of_the_models_own_forward(tiny_loop, mixed):
    tiny_loop.eval()
    policy = tiny_loop.policy
    encoded = tiny_loop.encode(mixed['data'])
    found = tiny_loop.chat_loss(encoded, [1])
    encode = policy.tokenizer.encode
    # Written out: xtuner's phi3_chat turns, the image before the first question.
    image = '<img>' + '<IMG_CONTEXT>' * policy.num_image_tokens + '</img>\n'
    parts = [
        (f'<|user|>\n{image}What is it?<|end|>\n<|assistant|>\n', False),
        ('a circle.<|end|>', True),
        ('\n', False),
        ('<|user|>\nWhere?<|end|>\n<|assistant|>\n', False),
        ('in the center<|end|>', True),
    ]
    ids = [encode(text, add_special_tokens=False) for text, _ in parts]
    labels = [row if said else [-100] * len(row) for row, (_, said) in zip(ids, parts)]
    flat = torch.tensor([functools.reduce(operator.iadd, ids, [])])
    expected = policy.forward(
        {
            'input_ids': flat,
            'attention_mask': torch.ones_like(flat, dtype=torch.bool),
            'labels': torch.tensor([functools.reduce(operator.iadd, labels, [])]),
            'pixel_values': [mixed['data']['pixel_values'][1]],
        },
        mode='tensor',
    )['loss']
    torch.testing.assert_close(found, expected)


def test_a_batch_of_conversations_alone_trains_on_them(tiny_loop, mixed):
    encoded = tiny_loop.encode(mixed['data']).subset([1])
    losses, _ = tiny_loop.losses(encoded)
    assert set(losses) == {'chat/caption_loss'}
    tiny_loop.chat_weight = 0.5
    tiny_loop.eval()
    half, _ = tiny_loop.losses(encoded)
    full = tiny_loop.chat_loss(encoded, [0])
    torch.testing.assert_close(half['chat/caption_loss'], 0.5 * full)


def test_the_cycle_is_not_measured_on_conversations(tiny_loop, mixed):
    with pytest.raises(ValueError, match='needs regions'):
        tiny_loop.predict(**mixed)
