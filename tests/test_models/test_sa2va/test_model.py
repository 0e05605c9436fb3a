"""Parity with the official forward, and the invariants of a batch."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va.official_batch import gt_masks

GOLDEN_KEYS = (
    'image_embeddings',
    'logits',
    'loss',
    'last_hidden_state',
    'seg_embeddings',
    'low_res_masks',
    'iou_predictions',
)


@pytest.fixture(scope='module')
def model(golden_folder, golden_ids) -> VideoLLaVASAMModel:
    return VideoLLaVASAMModel.from_pretrained(golden_folder, special_token_ids=golden_ids).eval()


@pytest.fixture(scope='module')
def data(golden) -> dict:
    keys = ('input_ids', 'attention_mask', 'position_ids', 'labels')
    return {
        **{key: golden[key] for key in keys},
        'pixel_values': [golden['pixel_values'][:1], golden['pixel_values'][1:]],
        'g_pixel_values': list(golden['g_pixel_values']),
        'prompt_masks': [golden['prompt_masks_0'], golden['prompt_masks_1']],
        'vp_overall_mask': torch.tensor([True, True]),
        'frames_per_batch': [1, 1],
    }


def one(data: dict, i: int, length: int | None = None) -> dict:
    """Sample ``i`` by itself, without padding."""
    length = int(data['attention_mask'][i].sum()) if length is None else length
    keys = ('input_ids', 'attention_mask', 'position_ids', 'labels')
    return {
        **{key: data[key][i : i + 1, :length] for key in keys},
        'pixel_values': data['pixel_values'][i : i + 1],
        'g_pixel_values': data['g_pixel_values'][i : i + 1],
        'prompt_masks': data['prompt_masks'][i : i + 1],
        'vp_overall_mask': data['vp_overall_mask'][i : i + 1],
        'frames_per_batch': [1],
    }


@pytest.mark.parametrize('key', GOLDEN_KEYS)
def test_golden_parity(model, data, golden, key):
    with torch.no_grad():
        out = model(data, mode='tensor')
    scale = golden[key].std() if golden[key].ndim else 1.0
    assert out[key].shape == golden[key].shape
    assert ((out[key] - golden[key]).abs().max() / scale).item() < 1e-4


def test_greedy_ids_are_the_official_ones(model, data, golden):
    for i, length in enumerate(golden['prompt_lens'].tolist()):
        ids = model.generate(one(data, i, length), max_new_tokens=golden['greedy_ids'].shape[1])
        assert ids[0].tolist() == golden['greedy_ids'][i].tolist()


def test_generation_in_a_batch_equals_one_by_one(model, data, golden):
    # Prompts of different length, padded on the right: generate() has to move the padding.
    mask = torch.zeros_like(data['attention_mask'])
    for i, length in enumerate(golden['prompt_lens'].tolist()):
        mask[i, :length] = True
    ids = model.generate({**data, 'attention_mask': mask}, max_new_tokens=10)
    assert ids.tolist() == golden['greedy_ids'].tolist()


def test_batched_equals_one_by_one(model, data):
    with torch.no_grad():
        both = model(data, mode='tensor')
        for i in range(2):
            single = model(one(data, i), mode='tensor')
            length = single['logits'].shape[1]
            torch.testing.assert_close(both['logits'][i, :length], single['logits'][0])
            torch.testing.assert_close(both['low_res_masks'][i], single['low_res_masks'][0])


def test_left_padding_equals_right_padding(model, data):
    padding = ~data['attention_mask']
    shift = int(padding[0].sum())
    assert shift
    assert not padding[1].any()
    left = dict(data)
    for key in ('input_ids', 'attention_mask', 'labels'):
        left[key] = torch.stack([data[key][0].roll(shift), data[key][1]])
    left['position_ids'] = (left['attention_mask'].long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        a, b = model(data, mode='tensor'), model(left, mode='tensor')
    torch.testing.assert_close(a['logits'][0, :-shift], b['logits'][0, shift:])
    for key in ('loss', 'seg_embeddings', 'low_res_masks'):
        torch.testing.assert_close(a[key], b[key])


def test_caption_loss_equals_cross_entropy_of_the_full_logits(model, data):
    with torch.no_grad():
        out = model(data, mode='tensor')
    expected = torch.nn.functional.cross_entropy(
        out['logits'][:, :-1].flatten(0, 1), data['labels'][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out['loss'], expected)


def test_loss_mode_has_both_losses_and_trains_only_trainable_parts(golden_folder, golden_ids, data):
    model = VideoLLaVASAMModel.from_pretrained(
        golden_folder, special_token_ids=golden_ids, lora=dict(r=4, lora_alpha=8)
    )
    masks = [torch.zeros(1, 40, 30, dtype=torch.bool) for _ in range(2)]
    for mask in masks:
        mask[:, 5:20, 5:20] = True
    losses = model({**data, 'masks': masks}, mode='loss')
    assert {k for k in losses if 'loss' in k} == {'llm_loss', 'mask_loss'}
    (losses['llm_loss'] + losses['mask_loss']).backward()
    trained = {n.split('.')[0] for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {'language_model', 'mlp1', 'text_hidden_fcs', 'grounding_encoder'}
    for name, parameter in model.named_parameters():
        frozen = not (
            '.lora_' in name
            or name.startswith(('mlp1', 'text_hidden_fcs'))
            or '.sam_mask_decoder.' in name
        )
        assert parameter.requires_grad is not frozen, name
        if frozen:
            assert parameter.grad is None, name


def test_features_at_hand_give_the_same_and_run_no_encoder(model, data, monkeypatch):
    with torch.no_grad():
        expected = model(data, mode='tensor')
        features = model.encode_images(data)

        def refuse(*args, **kwargs):
            raise AssertionError('an encoder ran again')

        monkeypatch.setattr(model.vision_model, 'forward', refuse)
        monkeypatch.setattr(model.grounding_encoder.sam2_model.image_encoder, 'forward', refuse)
        again = model({**data, 'features': features}, mode='tensor')
    assert torch.equal(again['logits'], expected['logits'])
    assert torch.equal(again['low_res_masks'], expected['low_res_masks'])


def test_several_frames_are_segmented_frame_by_frame(model, data):
    """Two [SEG] on two frames: prediction order is frame-major, ground truth object-major."""
    single = one(data, 0)
    seg = model.seg_token_id
    ids = single['input_ids'].clone()
    ids[0, -2] = seg  # a second [SEG]
    assert (ids == seg).sum() == 2
    frames = [data['g_pixel_values'][0], data['g_pixel_values'][1]]
    batch = {**single, 'input_ids': ids, 'g_pixel_values': frames, 'frames_per_batch': [2]}
    with torch.no_grad():
        out = model(batch, mode='tensor')
        for frame in range(2):
            alone = model(
                {**batch, 'g_pixel_values': [frames[frame]], 'frames_per_batch': [1]}, mode='tensor'
            )
            torch.testing.assert_close(
                out['low_res_masks'][2 * frame : 2 * frame + 2], alone['low_res_masks']
            )
    masks = torch.zeros(4, 8, 8)
    masks += torch.tensor([00, 0.1, 1.0, 1.1]).view(4, 1, 1)  # object.frame
    ordered = gt_masks({**batch, 'masks': [masks]}, [2])
    assert [round(float(m.max()), 1) for m in ordered] == [0.0, 1.0, 0.1, 1.1]


def test_wrong_number_of_image_tokens_names_sample_and_both_numbers(model, data):
    ids = data['input_ids'].clone()
    where = (ids[1] == model.image_token_id).nonzero()[0]
    ids[1, where] = 5
    with pytest.raises(ValueError, match=r"'refcoco/17'.*: 7 .*8 image embeddings") as error:
        model({**data, 'input_ids': ids, 'sample_ids': ['refcoco/16', 'refcoco/17']}, mode='tensor')
    assert '\n' not in str(error.value)


def test_lost_seg_token_names_sample_and_both_numbers(model, data):
    ids = data['input_ids'].clone()
    ids[0][ids[0] == model.seg_token_id] = 5
    masks = [torch.ones(1, 8, 8), torch.ones(1, 8, 8)]
    batch = {**data, 'input_ids': ids, 'masks': masks, 'sample_ids': ['a/0', 'a/1']}
    with pytest.raises(ValueError, match=r"'a/0': 0 \[SEG\].*1 ground-truth"):
        model(batch, mode='loss')


def test_unknown_trainable_part_and_template_name_the_nearest(golden_folder, golden_ids):
    with pytest.raises(ValueError, match="'mask_decodr': did you mean 'mask_decoder'"):
        VideoLLaVASAMModel.from_pretrained(
            golden_folder, special_token_ids=golden_ids, trainable=['mask_decodr']
        )
    with pytest.raises(ValueError, match='phi3_cht.* phi3_chat, qwen_chat, internlm2_chat'):
        VideoLLaVASAMModel.from_pretrained(
            golden_folder, special_token_ids=golden_ids, template='phi3_cht'
        )


def weighted_keys_are_between_there_and_absent(model: VideoLLaVASAMModel) -> None:
    """Weight 1 changes nothing, weight 0 in the limit is a position nobody attends to."""
    table = model.language_model.get_input_embeddings().weight.detach()
    embeds = table[torch.randint(3, 290, (2, 12))]
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 10:] = False
    positions = torch.arange(12).expand(2, 12)
    weights = torch.ones(2, 12)
    absent = mask.clone()
    absent[:, 4:7] = False
    with torch.no_grad():
        plain = model.hidden_states(embeds, mask, positions)
        same = model.hidden_states(embeds, mask, positions, weights)
        torch.testing.assert_close(same[mask], plain[mask], rtol=0, atol=1e-5)
        weights[:, 4:7] = 1e-30
        without = model.hidden_states(embeds, absent, positions)
        faded = model.hidden_states(embeds, mask, positions, weights)
    torch.testing.assert_close(faded[absent], without[absent], rtol=0, atol=1e-5)
    assert (without - plain)[1, 8:].abs().max() > 1e-2
    weights = torch.ones(2, 12, requires_grad=True)
    model.hidden_states(embeds, mask, positions, weights)[1, -1].pow(2).sum().backward()
    assert weights.grad[0].eq(0).all()
    assert weights.grad[1].abs().min() > 0


def test_weighted_keys(golden_folder, golden_ids):
    model = VideoLLaVASAMModel.from_pretrained(golden_folder, special_token_ids=golden_ids).eval()
    weighted_keys_are_between_there_and_absent(model)


@pytest.mark.parametrize('architecture', ['Phi3ForCausalLM', 'InternLM2ForCausalLM'])
def test_other_language_models_batch_pad_generate_and_export(
    golden_folder, golden_ids, architecture, tmp_path
):
    """16 tokens a tile, two regions an image; greedy decoding against full forwards."""
    import json

    config = json.loads((golden_folder / 'config.json').read_text())
    llm = {**config['llm_config'], 'architectures': [architecture]}
    llm.pop('model_type')
    if architecture == 'InternLM2ForCausalLM':
        llm['bias'] = False
    torch.manual_seed(0)
    model = VideoLLaVASAMModel(
        {**config['vision_config'], 'image_size': 112},
        llm,
        config['grounding_encoder_config'],
        template='phi3_chat',
        force_image_size=112,
        special_token_ids=golden_ids,
        lora=dict(r=4, lora_alpha=8),
    ).eval()
    for name, parameter in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(parameter, std=0.02)
    assert model.num_image_tokens == 16
    weighted_keys_are_between_there_and_absent(model)
    image, seg = model.image_token_id, model.seg_token_id
    ids = torch.randint(3, 290, (2, 40))
    ids[:, 2:18] = image
    ids[0, 20] = ids[1, 20:24] = image
    ids[0, 22:24] = ids[1, 25:26] = image
    ids[:, 35] = seg
    regions = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    regions[0, 0, 1, 1] = regions[0, 1, 2:, 1] = True
    regions[1, 0, 0] = regions[1, 1, 3, 3] = True
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 37:] = False
    data = {
        'input_ids': ids,
        'attention_mask': mask,
        'pixel_values': [torch.randn(1, 3, 112, 112) for _ in range(2)],
        'prompt_masks': list(regions),
        'vp_overall_mask': torch.tensor([True, True]),
        'g_pixel_values': list(torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)),
    }

    def single(i: int, tokens: torch.Tensor) -> dict:
        return {
            'input_ids': tokens,
            'attention_mask': torch.ones_like(tokens, dtype=torch.bool),
            'pixel_values': data['pixel_values'][i : i + 1],
            'prompt_masks': data['prompt_masks'][i : i + 1],
            'vp_overall_mask': torch.tensor([True]),
            'g_pixel_values': data['g_pixel_values'][i : i + 1],
        }

    with torch.no_grad():
        out = model(data, mode='tensor')
        for i, length in enumerate((37, 40)):
            alone = model(single(i, ids[i : i + 1, :length]), mode='tensor')
            torch.testing.assert_close(out['logits'][i, :length], alone['logits'][0])
            torch.testing.assert_close(out['low_res_masks'][i], alone['low_res_masks'][0])
        prompts = mask.clone()
        prompts[0, 30:] = prompts[1, 32:] = False
        generated = model.generate({**data, 'attention_mask': prompts}, max_new_tokens=4)
        for i, length in enumerate((30, 32)):
            tokens = ids[i : i + 1, :length]
            for step in range(4):
                logits = model(single(i, tokens), mode='tensor')['logits']
                token = logits[:, -1].argmax(dim=-1, keepdim=True)
                assert generated[i, step] == token.item()
                if token.item() in (image, seg):
                    break
                tokens = torch.cat([tokens, token], dim=1)
        model.save_pretrained(tmp_path)
        loaded = VideoLLaVASAMModel.from_pretrained(tmp_path, special_token_ids=golden_ids).eval()
        torch.testing.assert_close(
            loaded(data, mode='tensor')['logits'], out['logits'], atol=1e-5, rtol=1e-5
        )


def test_sa2va_4b_has_the_official_names_and_shapes(root, golden_folder):
    """On the meta device; the fixture's key list, with the 4B model's numbers of layers."""
    from mmengine.config import Config
    from safetensors import safe_open

    from projects.llava_sam2_rl.models.sa2va.layout import official_shapes
    from projects.llava_sam2_rl.utils.pretrained import SA2VA_4B, complete_sizes

    config = Config.fromfile(root / 'configs/_base_/models/sa2va_4b.py').model.policy
    options = {k: v for k, v in config.items() if k not in ('type', 'pretrained')}
    options.update(complete_sizes(SA2VA_4B, {}), lora=None)
    with torch.device('meta'):
        model = VideoLLaVASAMModel(
            **options, special_token_ids={'<IMG_CONTEXT>': 151667, '[SEG]': 151674}
        )
    shapes = {name: tuple(shape) for name, shape in official_shapes(model).items()}
    expected = {
        'vision_model.embeddings.position_embedding': (1, 1025, 1024),
        'vision_model.encoder.layers.23.attn.qkv.weight': (3072, 1024),
        'mlp1.0.weight': (4096,),
        'mlp1.1.weight': (2048, 4096),
        'mlp1.3.weight': (2048, 2048),
        'language_model.model.embed_tokens.weight': (151679, 2048),
        'language_model.lm_head.weight': (151679, 2048),
        'language_model.model.layers.35.self_attn.k_proj.weight': (256, 2048),
        'language_model.model.layers.35.mlp.gate_proj.weight': (11008, 2048),
        'text_hidden_fcs.0.weight': (2048, 2048),
        'text_hidden_fcs.2.weight': (256, 2048),
        'grounding_encoder.sam2_model.maskmem_tpos_enc': (7, 1, 1, 64),
        'grounding_encoder.sam2_model.image_encoder.trunk.blocks.47.attn.qkv.weight': (3456, 1152),
        'grounding_encoder.sam2_model.memory_encoder.fuser.layers.1.g_weight': (256,),
        'grounding_encoder.sam2_model.memory_attention.layers.3.linear1.weight': (2048, 256),
        'grounding_encoder.sam2_model.sam_mask_decoder.iou_prediction_head.layers.2.weight': (
            4,
            256,
        ),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    # Published sizes: InternViT-300M, Qwen2.5-3B untied, SAM 2 Hiera-L 224.4 M.
    count = {
        part: sum(
            torch.Size(shape).numel() for key, shape in shapes.items() if key.startswith(part)
        )
        for part in ('vision_model', 'language_model', 'grounding_encoder')
    }
    assert abs(count['vision_model'] / 1e6 - 304) < 2
    assert abs(count['language_model'] / 1e9 - 3.4) < 0.05
    assert abs(count['grounding_encoder'] / 1e6 - 224.4) < 0.5

    def pattern(key: str) -> str:
        return '.'.join('N' if part.isdigit() else part for part in key.split('.'))

    with safe_open(golden_folder / 'model.safetensors', framework='pt') as file:
        official = {pattern(key) for key in file.keys()}  # noqa: SIM118
    assert {pattern(key) for key in shapes} == official


def test_trained_weights_stay_float32_in_a_bfloat16_model(
    golden_folder, golden_ids, data, tmp_path
):
    from safetensors.torch import load_file

    model = VideoLLaVASAMModel.from_pretrained(
        golden_folder,
        special_token_ids=golden_ids,
        lora=dict(r=4, lora_alpha=8),
        torch_dtype='bfloat16',
    ).eval()
    for name, parameter in model.named_parameters():
        expected = torch.float32 if parameter.requires_grad else torch.bfloat16
        assert parameter.dtype == expected, name
    masks = [torch.zeros(1, 16, 16), torch.ones(1, 16, 16)]
    losses = model({**data, 'masks': masks}, mode='loss')
    assert 6.5 < losses['llm_loss'].item() < 7.7  # 7.13 in float32
    (losses['llm_loss'] + losses['mask_loss']).backward()
    assert model.mlp1[1].weight.grad.dtype == torch.float32
    assert model.mlp1[1].weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / 'model.safetensors')
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
