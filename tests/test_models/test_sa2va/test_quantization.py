"""The language model in 4 and 8 bits: rounded as published, trained beside, written whole."""

from __future__ import annotations

import copy
from importlib import metadata

import pytest
import torch
from mmengine.optim import OptimWrapper
from safetensors.torch import load_file
from torch import nn

from projects.llava_sam2_rl.export import export, official_to_xtuner
from projects.llava_sam2_rl.models import DualLoopModel, VideoLLaVASAMModel
from projects.llava_sam2_rl.models.generation import Sampling, sample_completions
from projects.llava_sam2_rl.models.sa2va import quantization
from projects.llava_sam2_rl.models.sa2va.quantization import (
    KINDS,
    check_quantization,
    packed_bytes,
    quantized_layers,
)
from projects.llava_sam2_rl.registry import MODELS
from projects.llava_sam2_rl.utils.errors import CheckpointError, StackError
from projects.llava_sam2_rl.utils.pretrained import resolve
from test_models.batches import encode, randomize_lora

bnb = pytest.importorskip('bitsandbytes', minversion=quantization.OLDEST)

TINY = 'llava_sam2_rl://assets/sa2va_tiny'
#: Appendix E of Dettmers et al. 2023, in the order of the codes.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
LAYER = 'language_model.base_model.model.model.layers.0.mlp.down_proj'


def build(kind: str | None, **options) -> VideoLLaVASAMModel:
    """The tiny model with adapters that do something, the same for every kind."""
    torch.manual_seed(0)
    options = {'lora': dict(r=4, lora_alpha=8), **options}
    model = VideoLLaVASAMModel.from_pretrained(TINY, quantization=kind, **options).eval()
    torch.manual_seed(1)
    randomize_lora(model, std=0.05)
    return model


@pytest.fixture(scope='module')
def plain():
    return build(None)


@pytest.fixture(scope='module', params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope='module')
def model(kind):
    return build(kind)


def rounded(layer: nn.Module) -> torch.Tensor:
    """The weight that a layer stands for, by bitsandbytes' own way back."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return layer.state.CB.float() * layer.state.SCB[:, None] / 127


def by_hand(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A weight to the nearest level and back, as published; scales are not rounded."""
    if kind == 'int8':
        # LLM.int8(): a scale a row, 127 levels on either side; the weight comes in float16.
        weight = weight.half().float()
        scale = weight.abs().amax(1, keepdim=True)
        return (weight * 127 / scale).round() * scale / 127
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = (blocks / scale)[..., None].sub(levels).abs().argmin(-1)
    return (levels[nearest] * scale).reshape(weight.shape)


def test_weights_are_rounded_as_published(model, plain, kind):
    layers = quantized_layers(model)
    # Three layers of q, k, v, o, gate, up, down.
    assert len(layers) == 21
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight.detach()
        found, expected = rounded(layer), by_hand(weight, kind)
        # Double quantisation moves the scales of nf4 themselves, by some per mille.
        allowed = 0.02 if kind == 'nf4' else 1e-3
        assert (found - expected).norm() <= allowed * expected.norm(), name
        off = float((found - weight).norm() / weight.norm())
        assert 0.0 < off < (0.12 if kind == 'nf4' else 0.02), name


def test_the_rest_keeps_its_precision(model, plain):
    for part in (model.vision_model, model.mlp1, model.text_hidden_fcs, model.grounding_encoder):
        assert not quantized_layers(part)
    for found, expected in (
        (model.lm_head, plain.lm_head),
        (
            model.language_model.get_input_embeddings(),
            plain.language_model.get_input_embeddings(),
        ),
    ):
        assert type(found) is type(expected)
        assert torch.equal(found.weight, expected.weight)


@torch.no_grad()
def logits(model: VideoLLaVASAMModel, ids: torch.Tensor) -> torch.Tensor:
    embeds = model.language_model.get_input_embeddings()(ids)
    return model.lm_head(model.hidden_states(embeds, torch.ones_like(ids, dtype=torch.bool)))


@pytest.fixture
def ids():
    torch.manual_seed(2)
    return torch.randint(20, 900, (2, 24))


def test_the_forward_is_that_of_the_rounded_weights(model, plain, kind, ids):
    expected = copy.deepcopy(plain)
    for name, layer in quantized_layers(model).items():
        expected.get_submodule(name).weight.data = rounded(layer)
    by_weights, whole = logits(expected, ids), logits(plain, ids)
    found = logits(model, ids)
    # On a CPU activations are rounded as well in eval mode alone; on a GPU in both (LLM.int8()).
    exact = logits(model.train(), ids)
    model.eval()
    torch.testing.assert_close(exact, by_weights, rtol=0, atol=1e-4)
    off = float((found - by_weights).norm() / by_weights.norm())
    assert off < (1e-5 if kind == 'nf4' else 0.03)
    assert 0.0 < float((found - whole).norm() / whole.norm()) < (0.3 if kind == 'nf4' else 0.05)


def test_what_they_take(model, kind):
    layers = quantized_layers(model)
    state = {name: layer.state_dict() for name, layer in layers.items()}
    # Weights, scales and tables; the text of bitsandbytes' own format is made for the file.
    held = {
        name: sum(
            tensor.numel() * tensor.element_size()
            for key, tensor in tensors.items()
            if key not in ('bias', 'weight_format') and 'bitsandbytes__' not in key
        )
        for name, tensors in state.items()
    }
    in_bfloat16 = sum(2 * layer.in_features * layer.out_features for layer in layers.values())
    assert sum(held.values()) <= (0.3 if kind == 'nf4' else 0.52) * in_bfloat16
    for name, layer in layers.items():
        # Of nf4 the mean of the scales lies in that text.
        expected = held[name] + (4 if kind == 'nf4' else 0)
        assert packed_bytes(layer.out_features, layer.in_features, kind) == expected, name


def test_gradients_go_through_them_and_not_into_them(model, ids):
    """Also in eval mode behind passes without gradients, as GRPO takes them."""
    logits(model, ids)
    for training in (False, True):
        model.train(training)
        model.zero_grad(set_to_none=True)
        embeds = model.language_model.get_input_embeddings()(ids).requires_grad_()
        hidden = model.hidden_states(embeds, torch.ones_like(ids, dtype=torch.bool))
        model.caption_loss(hidden, ids).backward()
        assert embeds.grad.abs().sum() > 0
        for name, parameter in model.language_model.named_parameters():
            assert parameter.requires_grad is ('.lora_' in name), name
            if '.lora_' in name:
                assert parameter.grad.abs().sum() > 0, name
            else:
                assert parameter.grad is None, name
    model.eval()
    model.zero_grad(set_to_none=True)


def test_eval_mode_does_not_change_them(kind, ids):
    """bitsandbytes rearranges 4-bit weights in eval mode on some CPUs, rounding once more."""
    model = build(kind)
    before = {name: rounded(layer).clone() for name, layer in quantized_layers(model).items()}
    logits(model, ids)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(rounded(layer), before[name]), name


def test_the_sampler_gives_what_the_layers_give(model, kind):
    torch.manual_seed(3)
    width = model.language_model.config.hidden_size
    prompts = 0.1 * torch.randn(2, 9, width)
    options = Sampling(max_new_tokens=6, stop_strings=(), eos_token_id=())
    drawn = sample_completions(model, prompts, torch.ones(2, 9, dtype=torch.bool), 3, options)
    table = model.language_model.get_input_embeddings()
    for n, (ids, logps) in enumerate(zip(drawn.completion_ids, drawn.per_token_logps, strict=True)):
        with torch.no_grad():
            embeds = torch.cat([prompts[n // 3], table(ids[:-1])])[None]
            hidden = model.hidden_states(embeds, torch.ones(1, 14, dtype=torch.bool))[0, 8:]
            expected = model.lm_head(hidden).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        # A sum in another order may move an activation to the next of its 127 levels.
        tolerance = 1e-4 if kind == 'nf4' else 0.1
        torch.testing.assert_close(logps, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------ training


def dual_loop(tiny_config, kind: str, objective: str = 'SFTObjective', **options) -> DualLoopModel:
    config = copy.deepcopy(tiny_config.model)
    config.policy.quantization = kind
    config.policy.lora.lora_dropout = 0.0
    config.objective = dict(type=objective, **options)
    torch.manual_seed(0)
    return MODELS.build(config)


def optimizer_of(model: DualLoopModel) -> OptimWrapper:
    trained = [p for p in model.parameters() if p.requires_grad]
    return OptimWrapper(torch.optim.Adam(trained, lr=5e-4))


def step(model: DualLoopModel, optimizer: OptimWrapper, batch: dict, seed: int) -> float:
    torch.manual_seed(seed)
    model.train()
    found = model.train_step(batch, optimizer)
    model.update_teacher()
    return float(found['loss'])


GRPO = dict(
    num_generations=2,
    num_iterations=2,
    mask_to_caption=dict(reward=dict(type='MaskIoUReward')),
    caption_to_mask=dict(reward=dict(type='MeteorReward'), sigma=0.5, aux_mask_weight=1.0),
)


@pytest.mark.parametrize(
    ('objective', 'options'), [('GumbelObjective', {}), ('GRPOObjective', GRPO)]
)
def test_an_objective_takes_its_steps(tiny_config, batch, kind, objective, options):
    model = dual_loop(tiny_config, kind, objective, **options)
    optimizer = optimizer_of(model)
    frozen = {name: rounded(layer).clone() for name, layer in quantized_layers(model).items()}
    before = {name: p.clone() for name, p in model.named_parameters() if '.lora_B.' in name}
    for seed in range(2):
        assert step(model, optimizer, batch, seed) == pytest.approx(0.0, abs=100.0)  # finite
    moved = [name for name, p in model.named_parameters() if '.lora_B.' in name]
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in moved)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(rounded(layer), frozen[name]), name


def test_sft_learns_and_a_resumed_run_is_the_straight_one(tiny_config, batch, tmp_path):
    model = dual_loop(tiny_config, 'nf4')
    optimizer = optimizer_of(model)
    losses = []
    for n in range(6):
        if n == 3:
            content = {'state_dict': model.state_dict(), 'teacher': model.teacher.state_dict()}
            torch.save({**content, 'optimizer': optimizer.state_dict()}, tmp_path / 'iter_3.pth')
        losses.append(step(model, optimizer, batch, n))
    # Captions are drawn at every step, so that single losses go up and down.
    assert sum(losses[3:]) < sum(losses[:3])
    assert not any('.base_layer.' in name for name in content['state_dict'])

    again = dual_loop(tiny_config, 'nf4')
    resumed = optimizer_of(again)
    saved = torch.load(tmp_path / 'iter_3.pth', weights_only=True)
    again.load_state_dict(saved['state_dict'])
    again.teacher.load_state_dict(saved['teacher'])
    resumed.load_state_dict(saved['optimizer'])
    assert [step(again, resumed, batch, n) for n in (3, 4, 5)] == losses[3:]
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for name, shadow in model.teacher.state_dict()['shadows'].items():
        assert torch.equal(again.teacher.state_dict()['shadows'][name], shadow), name


def test_the_teacher_is_applied_and_taken_off(tiny_config, batch, ids):
    model = dual_loop(tiny_config, 'nf4')
    encode(model, batch)
    before = logits(model.policy, ids)
    randomize_lora(model.policy, std=0.05)
    after = logits(model.policy, ids)
    with model.teacher_applied():
        assert torch.equal(logits(model.policy, ids), before)
    assert torch.equal(logits(model.policy, ids), after)
    assert not torch.equal(before, after)


# ------------------------------------------------------------------------- writing


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_the_float_model_writes(model, plain, kind, tmp_path, dtype):
    model.save_pretrained(tmp_path / 'rounded', dtype)
    plain.save_pretrained(tmp_path / 'plain', dtype)
    found, expected = (load_file(tmp_path / x / 'model.safetensors') for x in ('rounded', 'plain'))
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert found.keys() == load_file(resolve(TINY) / 'model.safetensors').keys()
    for name in ('config.json', 'tokenizer.json'):
        assert (tmp_path / 'rounded' / name).read_bytes() == (
            tmp_path / 'plain' / name
        ).read_bytes()


def test_it_says_how_far_its_answers_moved(model, plain, kind, tmp_path, monkeypatch):
    from projects.llava_sam2_rl.models.sa2va import merged_answers

    said = []
    monkeypatch.setattr(merged_answers, 'print_log', lambda text, **_: said.append(text))
    model.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path / 'plain')
    (text,) = said
    assert f'weights before they were rounded ({kind})' in text
    # The model that was written is the float model with the same adapters.
    expected = merged_answers.compare(merged_answers.probe(model)[0], *merged_answers.probe(plain))
    assert 0 < expected.divergence < 0.5
    assert f'KL divergence {expected.divergence:.3g} nats' in text
    assert f'logits differ by {expected.logits:.3g} on average' in text


@pytest.mark.parametrize('weights', ['policy', 'teacher'])
def test_a_checkpoint_is_exported(tiny_config, tmp_path, weights):
    model = dual_loop(tiny_config, 'int8')
    randomize_lora(model.policy, std=0.05)
    content = {'meta': {'iter': 1}, 'state_dict': model.state_dict()}
    torch.save({**content, 'teacher': model.teacher.state_dict()}, tmp_path / 'iter_1.pth')
    for kind in (None, 'int8'):
        config = copy.deepcopy(tiny_config)
        config.model.policy.quantization = kind
        export(config, tmp_path / 'iter_1.pth', tmp_path / str(kind), weights)
    found, expected = (load_file(tmp_path / x / 'model.safetensors') for x in ('int8', 'None'))
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


# -------------------------------------------------------------------------- errors


def test_options_that_cannot_be_together():
    with pytest.raises(ValueError, match=r"quantization='nf5': did you mean 'nf4'\?"):
        build('nf5')
    with pytest.raises(ValueError, match='freezes the language model and trainable names'):
        build('nf4', trainable=['lora', 'language_model'])
    lora = dict(r=2, modules_to_save=['lm_head', 'q_proj'])
    with pytest.raises(ValueError, match='lora.modules_to_save trains q_proj whole'):
        build('int8', lora=lora)
    check_quantization('nf4', ('lora',), dict(modules_to_save=['output', 'tok_embeddings']))
    check_quantization(None, ('language_model',))


def test_embeddings_and_head_may_be_trained_whole(tmp_path):
    lora = dict(r=2, modules_to_save=['embed_tokens', 'lm_head'])
    model = build('nf4', lora=lora)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    before, after = (load_file(x / 'model.safetensors') for x in (resolve(TINY), tmp_path))
    key = 'language_model.lm_head.weight'
    assert torch.equal(after[key], before[key].float() + 1.0)


def test_no_bitsandbytes(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(quantization.metadata, 'version', missing)
    with pytest.raises(StackError, match='which is not installed: pip install "bitsandbytes>=0.49'):
        build('nf4')


def test_an_old_bitsandbytes(monkeypatch):
    monkeypatch.setattr(quantization.metadata, 'version', lambda name: '0.45.0')
    with pytest.raises(StackError, match=r'bitsandbytes 0\.45\.0 is too old .* pip install'):
        build('int8')


@pytest.fixture
def tried_anew():
    quantization.check_kernels.cache_clear()
    yield
    quantization.check_kernels.cache_clear()


def test_no_kernel_for_the_device(monkeypatch, tried_anew):
    def fail(*args, **kwargs):
        raise RuntimeError('no kernel image is available\nmore')

    monkeypatch.setattr(bnb, 'matmul_4bit', fail)
    with pytest.raises(StackError, match=r'cannot compute nf4 on the CPU \(no kernel image is av'):
        build('nf4')


def test_a_kernel_that_computes_something_else(monkeypatch, tried_anew):
    right = bnb.matmul
    monkeypatch.setattr(bnb, 'matmul', lambda x, *args, **more: 2 * right(x, *args, **more))
    with pytest.raises(StackError, match='computes int8 wrongly on the CPU: off by 1'):
        build('int8')


def test_float_weights_are_not_loaded_over_them(tmp_path, kind, plain):
    official_to_xtuner(TINY, tmp_path / 'whole.pth')
    with pytest.raises(CheckpointError, match=r'whole\.pth holds weights of 21 layers that are in'):
        build(kind, lora=None, checkpoint=str(tmp_path / 'whole.pth'))
    state = {key: value for key, value in plain.state_dict().items() if LAYER in key}
    with pytest.raises(CheckpointError, match='holds weights of 1 layers'):
        build(kind).load_state_dict(state, strict=False)


def test_nothing_to_merge_into(tmp_path, tiny_config):
    policy = {**tiny_config.model.policy, 'pretrained': None, 'quantization': 'nf4'}
    policy['tokenizer'] = TINY
    with pytest.raises(CheckpointError, match='no `pretrained` folder to read them from again'):
        MODELS.build(policy).save_pretrained(tmp_path)


def test_scales_of_8_bits_follow_the_weight_to_its_device():
    layer = quantization._quantized(nn.Linear(4, 4), 'int8', torch.float32, 'cpu')
    layer.weight = nn.Parameter(torch.empty(4, 4, dtype=torch.int8, device='meta'), False)
    quantization._follow_weight(layer, None)
    assert (layer.state.SCB.device.type, layer.state.CB.device.type) == ('meta', 'meta')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_gpu_computes_what_the_cpu_does(kind, ids):
    here = build(kind)
    expected = logits(here, ids)
    found = logits(here.to('cuda'), ids.cuda()).cpu()
    assert float((found - expected).norm() / expected.norm()) < 0.03
    torch.testing.assert_close(logits(here.cpu(), ids), expected, rtol=0, atol=1e-3)
    embeds = torch.randn(1, 5, 128, device='cuda', requires_grad=True)
    mask = torch.ones(1, 5, dtype=torch.bool, device='cuda')
    here.to('cuda').hidden_states(embeds, mask).sum().backward()
    assert embeds.grad.abs().sum() > 0
