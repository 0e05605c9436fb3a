"""What the model is asked in evaluation and inference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.evaluation.tasks import TASKS, split_batch
from projects.llava_sam2_rl.inference import Sa2VA
from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.prompts import decode_text

MODEL = 'llava_sam2_rl://assets/sa2va_tiny'
IMAGE = f'<|user|>\n<img>{36 * "<IMG_CONTEXT>"}</img>\n'
END = '<|end|>\n<|assistant|>\n'


@pytest.fixture
def asked(tiny_model, monkeypatch):
    """The prompts that `generate` is given."""
    return spy_on(tiny_model.policy, monkeypatch)


def spy_on(policy, monkeypatch):
    texts: list[str] = []
    generate = policy.generate

    def spy(data, *args, **options):
        for row, real in zip(data['input_ids'], data['attention_mask'], strict=True):
            texts.append(decode_text(policy.tokenizer, row[real]))
        return generate(data, *args, **{**options, 'max_new_tokens': 2})

    monkeypatch.setattr(policy, 'generate', spy)
    return texts


@pytest.fixture
def batch(tiny_transform):
    scenes = GeneratedScenes(length=1, split='val', transforms=tiny_transform)
    return sa2va_collate([scenes[0]])


def test_referring_asks_the_official_question_behind_a_blank(tiny_model, batch, asked):
    TASKS['referring'](tiny_model, batch['data'], batch['data_samples'])
    caption = batch['data_samples'][0].caption
    assert asked == [f'{IMAGE} Please segment {caption} in this image.{END}']


def test_captioning_names_its_region(tiny_model, batch, asked):
    TASKS['captioning'](tiny_model, batch['data'], batch['data_samples'])
    cells = int(batch['data']['prompt_masks'][0].sum())
    assert asked == [
        f'{IMAGE}There are 1 part regions in the picture: region1<vp>{cells * "<IMG_CONTEXT>"}'
        f'</vp>.\nPlease describe the region region1 in the image in detail.{END}'
    ]


def test_inference_asks_without_the_blank_and_as_the_policy_says(monkeypatch):
    image, mask = np.zeros((40, 40, 3), np.uint8), np.ones((40, 40), bool)
    model = Sa2VA.from_pretrained(MODEL, device='cpu')
    texts = spy_on(model.policy, monkeypatch)
    model.segment(image, 'the red cup.')
    assert texts == [f'{IMAGE}Please segment the red cup in this image.{END}']

    questions = dict(region='What is region{i}?', segmentation='Find {description}!')
    policy = VideoLLaVASAMModel(pretrained=MODEL, questions=questions, template='qwen_chat')
    texts = spy_on(policy, monkeypatch)
    model = Sa2VA(policy)
    model.segment(image, 'the red cup')
    model.describe(image, mask)
    end = '<|im_end|>\n<|im_start|>assistant\n'
    assert texts[0].endswith(f'</img>\nFind the red cup!{end}')
    assert texts[1].endswith(f'</vp>.\nWhat is region1?{end}')
    assert all(text.startswith('<|im_start|>user\n<img>') for text in texts)
    with pytest.raises(TypeError, match=r'questions.*regoin'):
        VideoLLaVASAMModel(pretrained=MODEL, questions=dict(regoin='region{i}'))


def test_large_batches_are_answered_in_parts():
    tiles = [3, 2, 4, 9, 1]
    data = {
        'pixel_values': [torch.full((t, 3, 2, 2), float(i)) for i, t in enumerate(tiles)],
        'vp_overall_mask': torch.arange(sum(tiles)) % 2 == 0,
        'captions': list('abcde'),
        'pair': None,
        'skipped': [('s', '1', 'why')] * 5,
    }
    batch = {'data': data, 'data_samples': list(range(5))}
    parts = list(split_batch(batch, tokens_per_tile=10, limit=60))
    # 3 + 2 tiles, 4 (with the next they were 13), 9 alone though above the limit, 1.
    assert [samples for _, samples in parts] == [[0, 1], [2], [3], [4]]
    assert [part['captions'] for part, _ in parts] == [['a', 'b'], ['c'], ['d'], ['e']]
    flags = torch.cat([part['vp_overall_mask'] for part, _ in parts])
    assert torch.equal(flags, data['vp_overall_mask'])
    assert [len(part['vp_overall_mask']) for part, _ in parts] == [5, 4, 9, 1]
    assert all(part['skipped'] == data['skipped'] for part, _ in parts)
    assert list(split_batch(batch, 10, limit=190)) == [(data, batch['data_samples'])]
