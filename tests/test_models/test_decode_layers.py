"""The short ways through a language model's layers give what the layers themselves give."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import transformers
from peft.tuners.lora import Linear as LoraLinear
from torch.utils._python_dispatch import TorchDispatchMode

from projects.llava_sam2_rl.models import decode_layers, generation
from projects.llava_sam2_rl.models.decode_layers import fast_layers
from projects.llava_sam2_rl.models.generation import Sampling, sample_completions
from projects.llava_sam2_rl.models.sa2va import internvl, self_test
from projects.llava_sam2_rl.models.sa2va.trainable import add_lora
from projects.llava_sam2_rl.models.teacher import EMATeacher

BF16 = torch.bfloat16
FAMILIES = ['Qwen2ForCausalLM', 'Phi3ForCausalLM', 'InternLM2ForCausalLM']
# From 4.51 on.
FAMILIES += ['Qwen3ForCausalLM'] if hasattr(transformers, 'Qwen3ForCausalLM') else []


@pytest.fixture
def build(monkeypatch):
    """A tiny language model with adapters that have learnt, as the sampler takes it."""
    if 'Qwen3ForCausalLM' in FAMILIES:
        kinds = (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)
        monkeypatch.setitem(internvl.LANGUAGE_MODELS, 'Qwen3ForCausalLM', kinds)
        targets = internvl.LORA_TARGETS['Qwen2ForCausalLM']
        monkeypatch.setitem(internvl.LORA_TARGETS, 'Qwen3ForCausalLM', targets)
    monkeypatch.setitem(self_test._SIZES, 'head_dim', 4)

    def make(architecture='Qwen2ForCausalLM', layers=2, dtype=torch.float32, adapters=None):
        monkeypatch.setitem(self_test._SIZES, 'num_hidden_layers', layers)
        torch.manual_seed(0)
        with torch.no_grad():
            model = self_test._TinyModel(architecture)
        config = {**self_test._SIZES, 'architectures': [architecture]}
        adapted = add_lora(model.language_model.to(dtype), {'r': 4, 'lora_alpha': 8}, config)
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_('lora_' in name)
            if 'lora_' in name:
                parameter.data = (0.3 * torch.randn(parameter.shape)).to(adapters or dtype)
        model.language_model = adapted.eval()
        return model

    return make


def draw(model, tokens=18):
    dtype = model.language_model.get_input_embeddings().weight.dtype
    embeds = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.arange(7) >= torch.tensor([[0], [3]])
    options = Sampling(max_new_tokens=tokens, stop_strings=(), eos_token_id=())
    return (
        embeds,
        mask,
        sample_completions(model, embeds, mask, 3, options, torch.Generator().manual_seed(2)),
    )


@pytest.mark.parametrize('architecture', FAMILIES)
@torch.no_grad()
def test_sampled_log_probs_are_those_of_one_pass_over_the_sequence(build, architecture):
    """By transformers and peft alone, a sequence at a time."""
    model = build(architecture)
    with fast_layers(model.language_model, 6, 18) as complete:
        assert complete
    embeds, mask, drawn = draw(model)
    for n, ids in enumerate(drawn.completion_ids):
        prompt = embeds[n // 3][mask[n // 3]]
        hidden = model.alone(torch.cat([prompt, model.embed(ids[:-1])]))[len(prompt) - 1 :]
        expected = model.lm_head(hidden).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(drawn.per_token_logps[n], expected, atol=1e-4, rtol=1e-4)


MODES = {
    'deepspeed': (BF16, BF16, False),
    'autocast': (BF16, torch.float32, True),
    'autocast, float32 base': (torch.float32, torch.float32, True),
}


@pytest.mark.parametrize('architecture', FAMILIES)
@pytest.mark.parametrize('mode', MODES)
@torch.no_grad()
def test_low_precision_rounds_as_the_layers_do(build, monkeypatch, architecture, mode):
    """The same tokens' log-probs by the layers' own forwards, to the rounding of bfloat16."""
    dtype, adapters, autocast = MODES[mode]
    model = build(architecture, dtype=dtype, adapters=adapters)
    found = {}
    for way in ('fast', 'own'):
        if way == 'own':
            monkeypatch.setattr(generation, 'fast_layers', lambda *_: nullcontext(False))
        with torch.autocast('cpu', BF16) if autocast else nullcontext():
            found[way] = draw(model)[2]
    same = (found['fast'].completion_ids == found['own'].completion_ids).cumprod(1).bool()
    assert same[:, 0].all()
    gap = (found['fast'].per_token_logps - found['own'].per_token_logps).abs()[same]
    assert gap.max() < 0.2
    assert gap.mean() < 0.03


@torch.no_grad()
def test_a_small_adapter_is_not_rounded_away(build):
    """Merged into weights of bfloat16 it would be: a part in 1000 of each is below the rounding."""
    model = build(dtype=BF16)
    layer = next(m for m in model.language_model.modules() if isinstance(m, LoraLinear))
    layer.base_layer.weight.fill_(1.0)
    layer.lora_A['default'].weight.zero_()[:, 0] = 0.01
    layer.lora_B['default'].weight.fill_(0.0125)
    product = decode_layers._Makers(model.language_model, None).product([layer])
    x = torch.zeros(2, layer.in_features, dtype=BF16)
    x[:, 0], x[:, 1] = 1.0, -1.0  # what the base makes of it is nothing
    # Four rows of A, alpha / r = 2: 2 · 4 · 0.01 · 0.0125.
    torch.testing.assert_close(product(x).float(), torch.full((2, 16), 1e-3), atol=1e-5, rtol=0)


@torch.no_grad()
def test_weights_and_layers_are_themselves_again(build):
    """Frozen weights are laid together once, and never twice."""
    model = build(dtype=BF16)
    before = {name: x.clone() for name, x in model.language_model.state_dict().items()}
    held = []
    for _ in range(2):
        draw(model)
        assert not any('forward' in vars(m) for m in model.language_model.modules())
        for name, value in model.language_model.state_dict().items():
            assert torch.equal(value, before[name]), name
        held.append([p.data_ptr() for p in model.language_model.parameters()])
    assert held[0] == held[1]
    with pytest.raises(ZeroDivisionError), fast_layers(model.language_model, 6, 18):
        raise ZeroDivisionError
    assert not any('forward' in vars(m) for m in model.language_model.modules())


@torch.no_grad()
def test_the_teacher_writes_its_own_text_and_the_policy_its_own(build):
    model = build(dtype=BF16, adapters=torch.float32)
    with torch.autocast('cpu', BF16):
        first = draw(model)[2]
        teacher = EMATeacher(model.language_model)
        for name, parameter in model.language_model.named_parameters():
            if 'lora_B' in name:
                parameter.mul_(-1)
        changed = draw(model)[2]
        with teacher.applied_to(model.language_model):
            by_teacher = draw(model)[2]
        again = draw(model)[2]
    assert torch.equal(first.per_token_logps, by_teacher.per_token_logps)
    assert torch.equal(changed.per_token_logps, again.per_token_logps)
    assert not torch.equal(first.per_token_logps, changed.per_token_logps)


@torch.no_grad()
def test_what_is_not_known_is_left_to_its_own_forward(build):
    model = build()
    layer = next(m for m in model.language_model.modules() if isinstance(m, LoraLinear))
    for change, back in (
        (lambda: layer.train(), lambda: layer.eval()),
        (lambda: layer.enable_adapters(False), lambda: layer.enable_adapters(True)),
    ):
        change()
        with fast_layers(model.language_model, 6, 18) as complete:
            assert not complete
        back()
    # Too few steps for a copy of the weights.
    with fast_layers(model.language_model, 6, 15) as complete:
        assert not complete


# -- launches --------------------------------------------------------------------------------------

#: What runs nothing on a device.
_VIEWS = {
    *('view', '_unsafe_view', '_reshape_alias', 'as_strided', 'alias', 'detach', 'lift_fresh'),
    *('t', 'transpose', 'permute', 'expand', 'unsqueeze', 'squeeze', 'unfold'),
    *('select', 'slice', 'split', 'split_with_sizes', 'unbind'),
    *('empty', 'empty_like', 'empty_strided', 'new_empty'),
}


class CountLaunches(TorchDispatchMode):
    """Operations that a GPU would be given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split('::')[1]
        if name not in _VIEWS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def launches_of_a_token(model, autocast):
    """One token more, once what a rollout does once is taken off."""
    counts = []
    with torch.autocast('cpu', BF16) if autocast else nullcontext():
        for tokens in (17, 18):
            with CountLaunches() as counter:
                draw(model, tokens)
            counts.append(counter.found.total())
    return counts[1] - counts[0]


@pytest.mark.parametrize('applied', [False, True], ids=['policy', 'teacher'])
@pytest.mark.parametrize('mode', ['deepspeed', 'autocast'])
@torch.no_grad()
def test_launches_of_a_token_at_36_layers(build, mode, applied):
    """2 000 and 3 500 before: on a GPU each takes some microseconds, whatever it computes."""
    dtype, adapters, autocast = MODES[mode]
    counts = []
    for layers in (2, 3):
        model = build(layers=layers, dtype=dtype, adapters=adapters)
        teacher = EMATeacher(model.language_model)
        scope = teacher.applied_to(model.language_model) if applied else nullcontext()
        with scope:
            counts.append(launches_of_a_token(model, autocast))
    a_layer = counts[1] - counts[0]
    assert 15 < a_layer <= 27
    assert counts[0] + 34 * a_layer <= 1100


def test_a_draw_at_the_ends_of_the_interval(tiny_model, monkeypatch):
    """Neither end draws what has no probability."""
    policy = tiny_model.policy
    size = policy.lm_head.weight.shape[0]
    logits = torch.full((1, size), -torch.inf)
    logits[0, [40, 44]] = torch.tensor([0.25, 0.75]).log()
    choose = generation._TokenChooser(policy, Sampling(stop_strings=()), None, logits.device)
    for drawn, expected in ((0.0, 40), (0.2499, 40), (0.2501, 44), (1 - 2**-53, 44), (1.0, 44)):
        monkeypatch.setattr(
            torch, 'rand', lambda *shape, x=drawn, **_: torch.full(shape, x, dtype=torch.float64)
        )
        assert choose(logits, 0).tolist() == [expected]
