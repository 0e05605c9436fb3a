"""A tiny model in each chat template trains, and its greedy answers stop at the template's text."""

from __future__ import annotations

import json

import pytest
import torch
from mmengine.optim import OptimWrapper

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.models import (
    DualLoopModel,
    GRPOObjective,
    GumbelObjective,
    SFTObjective,
    VideoLLaVASAMModel,
)
from projects.llava_sam2_rl.models.free_generation import answer_segmentation
from projects.llava_sam2_rl.models.generation import Sampling, sample_completions
from projects.llava_sam2_rl.models.prompting import region_prompts
from projects.llava_sam2_rl.prompts import decode_text, find_template
from projects.llava_sam2_rl.utils.pretrained import resolve
from test_models.batches import encode
from test_models.test_sa2va.sentencepiece_folder import write_folder

TINY = resolve('llava_sam2_rl://assets/sa2va_tiny')
TRAINABLE = ('mlp1', 'language_model', 'text_hidden_fcs', 'mask_decoder')
LIMIT = 48


def build_policy(template: str, folder) -> VideoLLaVASAMModel:
    """The tiny weights; InternLM2 with its own kind of tokenizer is random."""
    torch.manual_seed(0)
    if template != 'internlm2_chat':
        return VideoLLaVASAMModel(pretrained=str(TINY), template=template, trainable=TRAINABLE)
    sizes = json.loads((TINY / 'config.json').read_text())
    keys = ('vision_config', 'grounding_encoder_config', 'force_image_size', 'downsample_ratio')
    llm = {k: v for k, v in sizes['llm_config'].items() if k != 'model_type'}
    llm |= {'architectures': ['InternLM2ForCausalLM'], 'bias': False, 'vocab_size': 360}
    return VideoLLaVASAMModel(
        **{key: sizes[key] for key in keys},
        llm_config=llm,
        template=template,
        tokenizer=str(write_folder(folder, add_dummy_prefix=False)),
        trainable=TRAINABLE,
    )


def train(policy, objective, batch, steps, lr):
    """Both directions; every loss is finite, no step is skipped and weights move."""
    model = DualLoopModel(policy, objective, teacher=dict(decay=0.9), max_new_tokens=LIMIT)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = OptimWrapper(torch.optim.AdamW(parameters, lr=lr), clip_grad=dict(max_norm=1.0))
    before = [p.detach().clone() for p in parameters]
    log = []
    for _ in range(steps):
        log.append(model.train_step(batch, optimizer))
        model.update_teacher()
    assert model.skipped_steps == 0
    assert len(log) == steps
    assert all(torch.isfinite(torch.as_tensor(v)) for losses in log for v in losses.values())
    for losses in log:
        assert {key.partition('/')[0] for key in losses if 'loss' in key} >= {'loop1', 'loop2'}
    assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    return model, log


@pytest.mark.slow
@pytest.mark.parametrize('template', ['phi3_chat', 'qwen_chat', 'internlm2_chat'])
def test_each_objective_trains_and_answers_stop(template, tmp_path, tiny_transform):
    scenes = GeneratedScenes(length=2, split='val', transforms=tiny_transform)
    batch = sa2va_collate([scenes[0], scenes[1]])
    policy = build_policy(template, tmp_path / 'internlm2')
    assert policy.template == template
    stop = find_template(template).suffix

    # Answers are learnt by cross-entropy, so that the others have captions to work with.
    sft = SFTObjective(answer_weight=1.0, num_points=64)
    model, log = train(policy, sft, batch, 60, 1e-3)
    assert log[-1]['loop1/caption_loss'] < 0.5 * log[0]['loop1/caption_loss']
    assert_answers_stop(model, batch, stop)
    for objective in (GumbelObjective(top_k=64, num_points=64), GRPOObjective(num_generations=2)):
        model, _ = train(policy, objective, batch, 20, 1e-5)
        assert_answers_stop(model, batch, stop)


def assert_answers_stop(model, batch, stop):
    """Greedy descriptions and answers with [SEG] end at the stop text, which stands there once."""
    policy = model.policy.eval()
    prompts = region_prompts(policy, encode(model, batch))
    greedy = Sampling(max_new_tokens=LIMIT, greedy=True)
    drawn = sample_completions(policy, prompts.embeds, prompts.attention_mask, 1, greedy)
    assert not drawn.truncated.any()
    for ids, mask, text in zip(
        drawn.completion_ids, drawn.completion_mask, drawn.texts, strict=True
    ):
        raw = decode_text(policy.tokenizer, ids[mask])
        assert raw.count(stop) == 1
        assert raw.endswith(stop)
        assert text
        assert '<|' not in text
    captions = [meta.caption for meta in batch['data_samples']]
    answers = answer_segmentation(policy, batch['data'], captions, batch['data_samples'], LIMIT)
    for answer in answers:
        assert answer.num_seg == 1
        assert answer.text.endswith(stop)
        assert answer.text.count(stop) == 1


@pytest.mark.parametrize('template', ['phi3_chat', 'qwen_chat'])
def test_v1_instructions_are_for_the_segmentation_of_sft_alone(
    template, monkeypatch, tiny_transform, tmp_path
):
    """What is read, by objective: the first code base's instruction, or the template's."""
    scenes = GeneratedScenes(length=1, split='val', transforms=tiny_transform)
    batch = sa2va_collate([scenes[0]])
    policy = build_policy(template, tmp_path)
    seen: list[str] = []
    embed = policy.embed

    def spy(input_ids, *args, **options):
        seen.extend(decode_text(policy.tokenizer, row) for row in input_ids)
        return embed(input_ids, *args, **options)

    monkeypatch.setattr(policy, 'embed', spy)
    for form in ('template', 'v1'):
        seen.clear()
        objective = SFTObjective(num_points=64, referring_instruction=form)
        DualLoopModel(policy, objective, max_new_tokens=8)(
            batch['data'], batch['data_samples'], mode='loss'
        )
        asked = [text for text in seen if '[SEG]' in text]
        others = [text for text in seen if '[SEG]' not in text]
        assert asked
        assert others
        v1 = form == 'v1'
        assert all(('<|end|><|assistant|>\n' in text) == v1 for text in asked)
        assert all(find_template(template).suffix in text for text in asked)
        assert not any('<|end|><|assistant|>' in text for text in others)
    with pytest.raises(ValueError, match="'v2', expected one of 'template', 'v1'"):
        SFTObjective(referring_instruction='v2')
    with pytest.raises(ValueError, match=r'region\{i\}'):
        SFTObjective(region_questions=['Describe it.'])
    with pytest.raises(ValueError, match='need one question each'):
        SFTObjective(segmentation_questions=[])
