"""Each family at tiny size in the official layout: read, trained, written, and read without us.

The lists of keys are written out here, from the official layout, and not asked of the package.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from projects.llava_sam2_rl.export import export
from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.sa2va import quantization
from projects.llava_sam2_rl.prompts import encode_turns, image_text
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.utils.pretrained import resolve
from test_models.test_sa2va.sentencepiece_folder import write_folder

TINY = resolve('llava_sam2_rl://assets/sa2va_tiny')
#: Width, MLP, and key-value width of the language models; width and MLP of the image encoders.
D, F, KV = 64, 128, 32
C, M = 48, 96
LAYERS = 2


@dataclass(frozen=True)
class Family:
    template: str
    #: Of ``llm_config``, beside the sizes that all have.
    llm: dict[str, Any]
    #: Whether the image encoder is of InternViT-6B's kind.
    rms_norm: bool = False

    @property
    def architecture(self) -> str:
        return self.llm['architectures'][0]


QWEN2 = {'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2'}
INTERNLM2 = {
    'architectures': ['InternLM2ForCausalLM'],
    'auto_map': {'AutoConfig': 'configuration_internlm2.InternLM2Config'},
    'attn_implementation': 'flash_attention_2',
    'model_type': 'internlm2',
    'bias': False,
    'rope_scaling': {'type': 'dynamic', 'factor': 2.0},
}
FAMILIES = {
    'Sa2VA-1B': Family('qwen_chat', QWEN2),
    # As some config.json write it.
    'Sa2VA-4B': Family('phi3-chat', QWEN2),
    'Sa2VA-InternVL3': Family(
        'qwen_chat',
        QWEN2
        | {
            'eos_token_id': 0,
            'rope_scaling': {'type': 'dynamic', 'rope_type': 'dynamic', 'factor': 2.0},
        },
    ),
    'Sa2VA on Phi-3': Family(
        'phi3_chat',
        {'architectures': ['Phi3ForCausalLM'], 'model_type': 'phi3', 'sliding_window': 2047},
    ),
    'Sa2VA-8B': Family('internlm2_chat', INTERNLM2),
    'Sa2VA-26B': Family('internlm2_chat', INTERNLM2, rms_norm=True),
}


def vision_keys(family: Family) -> dict[str, tuple[int, ...]]:
    keys: dict[str, tuple[int, ...]] = {
        'embeddings.class_embedding': (1, 1, C),
        'embeddings.position_embedding': (1, 4 * 4 + 1, C),
        'embeddings.patch_embedding.weight': (C, 3, 14, 14),
        'embeddings.patch_embedding.bias': (C,),
    }
    for i in range(LAYERS):
        layer: dict[str, tuple[int, ...]] = {
            'ls1': (C,),
            'ls2': (C,),
            'norm1.weight': (C,),
            'norm2.weight': (C,),
            'attn.qkv.weight': (3 * C, C),
            'attn.proj.weight': (C, C),
            'attn.proj.bias': (C,),
            'mlp.fc1.weight': (M, C),
            'mlp.fc1.bias': (M,),
            'mlp.fc2.weight': (C, M),
            'mlp.fc2.bias': (C,),
        }
        if family.rms_norm:
            # Over the full width, all heads together.
            layer |= {'attn.q_norm.weight': (C,), 'attn.k_norm.weight': (C,)}
        else:
            layer |= {'attn.qkv.bias': (3 * C,), 'norm1.bias': (C,), 'norm2.bias': (C,)}
        keys |= {f'encoder.layers.{i}.{name}': shape for name, shape in layer.items()}
    return {f'vision_model.{name}': shape for name, shape in keys.items()}


def language_keys(family: Family, rows: int) -> dict[str, tuple[int, ...]]:
    if family.architecture == 'InternLM2ForCausalLM':
        layer: dict[str, tuple[int, ...]] = {
            'attention.wqkv.weight': (D + 2 * KV, D),
            'attention.wo.weight': (D, D),
            'feed_forward.w1.weight': (F, D),
            'feed_forward.w2.weight': (D, F),
            'feed_forward.w3.weight': (F, D),
            'attention_norm.weight': (D,),
            'ffn_norm.weight': (D,),
        }
        outer = {'model.tok_embeddings.weight': (rows, D), 'output.weight': (rows, D)}
    else:
        layer = {
            'self_attn.o_proj.weight': (D, D),
            'mlp.down_proj.weight': (D, F),
            'input_layernorm.weight': (D,),
            'post_attention_layernorm.weight': (D,),
        }
        if family.architecture == 'Phi3ForCausalLM':
            layer |= {
                'self_attn.qkv_proj.weight': (D + 2 * KV, D),
                'mlp.gate_up_proj.weight': (2 * F, D),
            }
        else:
            for part, width in (('q', D), ('k', KV), ('v', KV)):
                layer[f'self_attn.{part}_proj.weight'] = (width, D)
                layer[f'self_attn.{part}_proj.bias'] = (width,)
            layer |= {'mlp.gate_proj.weight': (F, D), 'mlp.up_proj.weight': (F, D)}
        outer = {'model.embed_tokens.weight': (rows, D), 'lm_head.weight': (rows, D)}
    keys = {**outer, 'model.norm.weight': (D,)}
    for i in range(LAYERS):
        keys |= {f'model.layers.{i}.{name}': shape for name, shape in layer.items()}
    return {f'language_model.{name}': shape for name, shape in keys.items()}


def official_keys(family: Family, rows: int, golden_folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(str(golden_folder / 'model.safetensors'), framework='pt') as file:
        # SAM 2 is the same in all families; the official code reads this file.
        sam = {
            key: tuple(file.get_slice(key).get_shape())
            for key in file.keys()  # noqa: SIM118 (not a dict)
            if key.startswith('grounding_encoder.sam2_model.')
        }
    assert len(sam) > 100
    return {
        **vision_keys(family),
        'mlp1.0.weight': (4 * C,),
        'mlp1.0.bias': (4 * C,),
        'mlp1.1.weight': (D, 4 * C),
        'mlp1.1.bias': (D,),
        'mlp1.3.weight': (D, D),
        'mlp1.3.bias': (D,),
        **language_keys(family, rows),
        'text_hidden_fcs.0.weight': (D, D),
        'text_hidden_fcs.0.bias': (D,),
        'text_hidden_fcs.2.weight': (64, D),
        'text_hidden_fcs.2.bias': (64,),
        **sam,
    }


def official_config(family: Family, rows: int, golden_folder: Path) -> dict[str, Any]:
    """The golden checkpoint's, its sections changed to the family's."""
    config = json.loads((golden_folder / 'config.json').read_text())
    config['llm_config'] |= {'vocab_size': rows} | family.llm
    if family.rms_norm:
        config['vision_config'] |= {
            'norm_type': 'rms_norm',
            'qk_normalization': True,
            'qkv_bias': False,
        }
    return config | {
        'template': family.template,
        'auto_map': {'AutoModel': 'modeling_sa2va_chat.Sa2VAChatModel'},
        'torch_dtype': 'bfloat16',
    }


@pytest.fixture(scope='module', params=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope='module')
def folder(family, golden_folder, tmp_path_factory):
    """A checkpoint of the family with random weights in bfloat16, and a tokenizer of its kind."""
    path = tmp_path_factory.mktemp('family') / 'model'
    if family.architecture == 'InternLM2ForCausalLM':
        write_folder(path, add_dummy_prefix=False)
        rows = len(json.loads((path / 'added_tokens.json').read_text())) + 360
    else:
        path.mkdir()
        for file in ('tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt'):
            shutil.copy(TINY / file, path)
        rows = len(AutoTokenizer.from_pretrained(path))
    torch.manual_seed(0)
    tensors = {
        key: (0.1 * torch.randn(shape) + ('norm' in key)).bfloat16()
        for key, shape in official_keys(family, rows, golden_folder).items()
    }
    save_file(tensors, path / 'model.safetensors', metadata={'format': 'pt'})
    config = official_config(family, rows, golden_folder)
    (path / 'config.json').write_text(json.dumps(config))
    (path / 'modeling_sa2va_chat.py').write_text('raise SystemExit("this code was run")\n')
    return path


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / 'model.safetensors'), json.loads((folder / 'config.json').read_text())


def test_read_and_written_are_the_same_keys_bits_and_config(folder, family, tmp_path):
    model = VideoLLaVASAMModel.from_pretrained(folder, torch_dtype='bfloat16')
    assert model.template == family.template.replace('-', '_')
    model.save_pretrained(tmp_path)
    (before, config), (after, written) = read(folder), read(tmp_path)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(after[key], tensor), key
    assert written == config
    assert list(written) == list(config)
    assert written['template'] == family.template
    again = VideoLLaVASAMModel.from_pretrained(tmp_path, torch_dtype='bfloat16')
    text = '<img><IMG_CONTEXT></img>\nWhere is it? [SEG]<|im_end|>'
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
    assert again.special_token_ids == model.special_token_ids


@pytest.mark.parametrize('kind', ['nf4', 'int8'])
def test_a_model_in_4_or_8_bits_is_written_as_it_was_read(folder, tmp_path, kind):
    """Fused matrices and all: what was rounded is read from the folder again."""
    pytest.importorskip('bitsandbytes', minversion=quantization.OLDEST)
    model = VideoLLaVASAMModel.from_pretrained(
        folder, torch_dtype='bfloat16', quantization=kind, lora=dict(r=2, lora_alpha=4)
    )
    assert quantization.quantized_layers(model)
    model.save_pretrained(tmp_path)
    (before, config), (after, written) = read(folder), read(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert written == config


def one_batch(policy: VideoLLaVASAMModel) -> dict[str, Any]:
    """A question about a random image, its answer with [SEG], and the mask."""
    torch.manual_seed(1)
    question = f'{image_text(policy.num_image_tokens)}Please segment the red cup in this image.'
    ids, labels = encode_turns(policy.tokenizer, policy.template, [(question, 'It is [SEG].')])
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[:, 10:30, 5:25] = True
    return {
        'input_ids': torch.tensor([ids]),
        'labels': torch.tensor([labels]),
        'attention_mask': torch.ones(1, len(ids), dtype=torch.bool),
        'pixel_values': [torch.randn(1, 3, 56, 56)],
        'g_pixel_values': [255 * torch.rand(3, 128, 128)],
        'masks': [mask],
    }


def run_config(folder: Path, **policy: Any) -> Config:
    return Config(
        dict(
            model=dict(
                type='llava_sam2_rl.DualLoopModel',
                policy=dict(
                    type='llava_sam2_rl.VideoLLaVASAMModel', pretrained=str(folder), **policy
                ),
                objective=dict(type='SFTObjective'),
            )
        )
    )


@pytest.fixture(scope='module')
def exported(folder, tmp_path_factory):
    """Three steps with LoRA, embeddings and head trained whole as officially; then exported."""
    path = tmp_path_factory.mktemp('export')
    config = run_config(
        folder, lora=dict(r=2, lora_alpha=4, modules_to_save=['embed_tokens', 'lm_head'])
    )
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    policy, data = model.policy, one_batch(model.policy)
    policy.train()
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        found = policy(data, mode='loss')
        loss = found['llm_loss'] + found['mask_loss']
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.save({'meta': {'iter': 3}, 'state_dict': model.state_dict()}, path / 'iter_3.pth')
    export(config, path / 'iter_3.pth', path / 'out')
    return policy.eval(), path / 'out'


def test_heads_are_trained_apart_from_embeddings_and_exported(exported, folder, family):
    policy, out = exported
    embedding, head = policy.language_model.get_input_embeddings().weight, policy.lm_head.weight
    assert embedding.data_ptr() != head.data_ptr()
    before, after = read(folder)[0], read(out)[0]
    names = ['model.embed_tokens', 'lm_head', 'model.layers.1.mlp.down_proj']
    if family.architecture == 'InternLM2ForCausalLM':
        names = ['model.tok_embeddings', 'output', 'model.layers.1.feed_forward.w2']
    keys = [f'language_model.{name}.weight' for name in names]
    assert all(not torch.equal(after[key], before[key].float()) for key in keys)
    assert torch.equal(after[keys[0]], embedding)
    assert torch.equal(after[keys[1]], head)
    # What is frozen keeps its bits.
    for key, tensor in before.items():
        if key.startswith('vision_model.') or 'image_encoder' in key:
            assert torch.equal(after[key], tensor.float()), key
    again = VideoLLaVASAMModel.from_pretrained(out).eval()
    data = one_batch(policy)
    with torch.no_grad():
        expected, found = policy(data, mode='tensor'), again(data, mode='tensor')
    for key in ('logits', 'low_res_masks'):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)


def plain_language_model(
    config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> torch.nn.Module:
    """The language model of an official folder, by transformers alone."""
    llm = {
        k: v
        for k, v in config['llm_config'].items()
        if k not in ('auto_map', 'attn_implementation', 'model_type')
    }
    weights = {
        key.removeprefix('language_model.'): tensor
        for key, tensor in tensors.items()
        if key.startswith('language_model.')
    }
    kind = config['llm_config']['architectures'][0]
    if kind == 'Qwen2ForCausalLM':
        model: torch.nn.Module = Qwen2ForCausalLM(Qwen2Config(**llm))
    elif kind == 'Phi3ForCausalLM':
        model = Phi3ForCausalLM(Phi3Config(**llm))
    else:
        llm['rope_scaling'] = {'rope_type': 'dynamic', 'factor': llm['rope_scaling']['factor']}
        model = LlamaForCausalLM(LlamaConfig(**{**llm, 'attention_bias': llm.pop('bias')}))
        weights = llama_weights(
            weights, llm['num_key_value_heads'], D // llm['num_attention_heads']
        )
    model.load_state_dict(weights)
    return model.eval()


def llama_weights(
    weights: dict[str, torch.Tensor], groups: int, width: int
) -> dict[str, torch.Tensor]:
    """InternLM2's forward views ``wqkv`` as (groups, heads of a group + 2, width of a head)."""
    renamed = {}
    for key, tensor in weights.items():
        for old, new in (
            ('tok_embeddings', 'embed_tokens'),
            ('output.', 'lm_head.'),
            ('attention_norm', 'input_layernorm'),
            ('ffn_norm', 'post_attention_layernorm'),
            ('attention.wo', 'self_attn.o_proj'),
            ('feed_forward.w1', 'mlp.gate_proj'),
            ('feed_forward.w2', 'mlp.down_proj'),
            ('feed_forward.w3', 'mlp.up_proj'),
        ):
            key = key.replace(old, new)
        if 'wqkv' not in key:
            renamed[key] = tensor
            continue
        heads = tensor.view(groups, -1, width, tensor.shape[-1])
        for part, rows in (('q', heads[:, :-2]), ('k', heads[:, -2]), ('v', heads[:, -1])):
            name = key.replace('attention.wqkv', f'self_attn.{part}_proj')
            renamed[name] = rows.reshape(-1, tensor.shape[-1])
    return renamed


def test_the_exported_folder_is_complete_without_our_code(exported, folder, family, golden_folder):
    """By key and config alone: what the official classes look for, and what they make of it."""
    policy, out = exported
    tensors, config = read(out)
    rows = config['llm_config']['vocab_size']
    expected = official_keys(family, rows, golden_folder)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert config == read(folder)[1]
    assert (config['model_type'], config['architectures']) == ('sa2va_chat', ['Sa2VAChatModel'])
    assert config['vision_config']['architectures'] == ['InternVisionModel']
    assert config['llm_config']['architectures'] == family.llm['architectures']
    assert (out / 'modeling_sa2va_chat.py').is_file()

    model = plain_language_model(config, tensors)
    ids = torch.randint(0, rows, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        ours = policy.language_model(input_ids=ids).logits
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-4)

    tokenizer = json.loads((out / 'tokenizer_config.json').read_text())
    if family.architecture == 'InternLM2ForCausalLM':
        # Official inference runs the folder's own code on the folder's own vocabulary.
        assert tokenizer['auto_map']['AutoTokenizer'][0].endswith('.InternLM2Tokenizer')
        for file in ('tokenizer.model', 'tokenization_internlm2.py'):
            assert (out / file).read_bytes() == (folder / file).read_bytes()
        added = {t['content']: int(i) for i, t in tokenizer['added_tokens_decoder'].items()}
    else:
        read_again = AutoTokenizer.from_pretrained(out)
        assert len(read_again) == rows
        added = read_again.get_added_vocab()
    assert max(added.values()) == rows - 1
    assert added['[SEG]'] == policy.seg_token_id
