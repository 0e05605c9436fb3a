"""The tiny pretrained model every claim rests on: it listens, and it has something to learn."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from projects.llava_sam2_rl.datasets import (
    GeneratedCollages,
    GeneratedMovingScenes,
    GeneratedScenes,
)
from projects.llava_sam2_rl.evaluation import evaluate_cycle
from projects.llava_sam2_rl.models.sa2va.masks import upsample_masks
from projects.llava_sam2_rl.prompts import encode_prompt, encode_text, pad_batch, segmentation_input
from projects.llava_sam2_rl.rewards import mask_iou
from projects.llava_sam2_rl.utils.pretrained import resolve

FOLDER = resolve('llava_sam2_rl://assets/sa2va_tiny')


def test_it_is_small_half_precision_and_in_the_official_layout(golden_folder):
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    assert size < 12 * 2**20
    with safe_open(FOLDER / 'model.safetensors', framework='pt') as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    with safe_open(golden_folder / 'model.safetensors', framework='pt') as file:
        official = set(file.keys())

    def pattern(key):
        return '.'.join('N' if part.isdigit() else part for part in key.split('.'))

    assert {pattern(name) for name in names} == {pattern(name) for name in official}
    record = json.loads((FOLDER / 'pretraining.json').read_text())
    assert record['log'][-1]['step'] == record['arguments']['steps'] == 1600


@pytest.mark.slow
def test_it_listens_and_describes_so_so(tiny_model, tiny_config):
    """Held-out regions; the bounds are those that the learning claims are made from."""
    options = {k: v for k, v in tiny_config.val_dataloader.dataset.items() if k != 'type'}
    options |= {'length': 100, 'seed': 7}
    bounds = {GeneratedCollages: (0.45, 0.65), GeneratedScenes: (0.65, 0.85)}
    for world, (least, most) in bounds.items():
        numbers, results = evaluate_cycle(tiny_model, world(**options))
        assert len(results) == 100
        assert least <= numbers['own_iou'] <= most
        assert numbers['other_iou'] <= 0.1
        assert 0.4 <= numbers['meteor'] <= 0.65
        assert 0.5 <= numbers['attribute_recall'] <= 0.65


@pytest.mark.slow
def test_its_memory_follows_what_the_first_frame_shows(tiny_model, tiny_transform):
    clips = GeneratedMovingScenes(
        length=48, seed=7, num_frames=4, split='val', transforms=tiny_transform
    )
    numbers, results = evaluate_cycle(tiny_model, clips)
    behind, still = [], []
    for result in results:
        tracks = result['tracks']
        for found, gt in list(zip(tracks['reference'], tracks['gt'], strict=True))[1:]:
            behind.append(mask_iou(found[None], gt[None])[0])
            # The first frame's mask, held up to the others: no memory at all.
            still.append(mask_iou(tracks['reference'][0][None], gt[None])[0])
    assert len(results) == 48
    assert len(behind) == 48 * 3
    assert sum(behind) / len(behind) > 0.5
    assert sum(behind) / len(behind) > 1.5 * sum(still) / len(still)
    assert numbers['own_j'] > 0.55


def test_its_chat_markers_are_plain_text_as_with_the_real_tokenizer(tiny_model):
    tokenizer = tiny_model.policy.tokenizer
    for marker in ('<|user|>', '<|end|>', '<|assistant|>'):
        assert len(encode_text(tokenizer, marker)) > 1
        assert marker not in tokenizer.get_vocab()


@pytest.mark.slow
def test_free_generation_says_seg_and_segments_as_the_given_answer_does(tiny_model, tiny_transform):
    policy = tiny_model.policy.eval()
    dataset = GeneratedScenes(length=4, split='val', transforms=tiny_transform)
    items = [dataset[i] for i in range(4)]
    texts = [item['meta'].caption for item in items]
    ids = [
        encode_prompt(
            policy.tokenizer,
            policy.chat_template.ask(segmentation_input(policy.num_image_tokens, text)),
        )
        for text in texts
    ]
    data = {
        **pad_batch(ids, policy.pad_token_id, 'left'),
        'pixel_values': [item['pixel_values'] for item in items],
        'g_pixel_values': [item['g_pixel_values'] for item in items],
    }
    results = policy(data, [item['meta'] for item in items], mode='predict')
    assert [len(result['masks']) for result in results] == [1] * 4
    for i, result in enumerate(results):
        assert result['masks'].shape == (1, 128, 128)
        # The mask of the answer that was generated, from a plain forward by itself.
        answer = [t for t in result['token_ids'].tolist() if t != policy.pad_token_id]
        sequence = torch.tensor([ids[i] + answer])
        with torch.no_grad():
            out = policy(
                {
                    'input_ids': sequence,
                    'attention_mask': torch.ones_like(sequence, dtype=torch.bool),
                    'pixel_values': data['pixel_values'][i : i + 1],
                    'g_pixel_values': data['g_pixel_values'][i : i + 1],
                },
                mode='tensor',
            )
        expected = upsample_masks(out['low_res_masks'], (128, 128))[:, 0]
        assert (expected ^ result['masks']).float().mean() < 1e-3
