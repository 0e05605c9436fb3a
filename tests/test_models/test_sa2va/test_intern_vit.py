"""InternViT: held to xtuner's, which is the official one."""

from __future__ import annotations

import pytest
import torch

from projects.llava_sam2_rl.models.sa2va.internvl import build_vision_model
from test_models.test_sa2va import reference

CASES = ('vit_layer_norm', 'vit_rms_norm')
SIZES = dict(
    hidden_size=16,
    num_attention_heads=2,
    num_hidden_layers=3,
    intermediate_size=32,
    image_size=8,
    patch_size=4,
)


@pytest.mark.parametrize('case', CASES)
def test_every_hidden_state_is_xtuners(case):
    expected = reference.load(case)
    model = build_vision_model(expected['config']).eval()
    model.load_state_dict(expected['weights'])  # strict: the official names, key for key
    states = expected['hidden_states']
    assert len(states) == 3
    with torch.no_grad():
        for layer in range(-3, 3):
            torch.testing.assert_close(
                model(expected['pixel_values'], layer), states[layer], rtol=0, atol=1e-5
            )
        last = model(expected['pixel_values'])
    torch.testing.assert_close(last, states[-1], rtol=0, atol=1e-5)
    # The states differ by far more than that.
    assert (states[1:] - states[:-1]).flatten(1).std(dim=1).min() > 0.1


@pytest.mark.parametrize('case', CASES)
def test_the_file_holds_what_xtuners_class_gives(case):
    module = pytest.importorskip(
        'xtuner._lite.modelings.internvl2.modeling_intern_vit', exc_type=ImportError
    )
    expected = reference.load(case)
    model = module.InternVisionModel(module.InternVisionConfig(**expected['config'])).eval()
    model.load_state_dict(expected['weights'])
    with torch.no_grad():
        out = model(expected['pixel_values'], output_hidden_states=True, return_dict=True)
    # Values reach 16, where float32 resolves 1e-6 to 2e-6: another number of threads rounds
    # otherwise.
    torch.testing.assert_close(
        torch.stack(out.hidden_states), expected['hidden_states'], rtol=0, atol=1e-5
    )


def test_what_a_config_leaves_out_is_as_in_internvit_6b():
    with torch.device('meta'):
        model = build_vision_model({'num_hidden_layers': 1})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layer = 'encoder.layers.0.'
    # Width 3200, MLP 12 800, 224 px in patches of 14; no bias of q, k, v; norms without a bias.
    assert shapes == {
        'embeddings.class_embedding': (1, 1, 3200),
        'embeddings.patch_embedding.weight': (3200, 3, 14, 14),
        'embeddings.patch_embedding.bias': (3200,),
        'embeddings.position_embedding': (1, 257, 3200),
        layer + 'attn.qkv.weight': (9600, 3200),
        layer + 'attn.q_norm.weight': (3200,),
        layer + 'attn.k_norm.weight': (3200,),
        layer + 'attn.proj.weight': (3200, 3200),
        layer + 'attn.proj.bias': (3200,),
        layer + 'mlp.fc1.weight': (12800, 3200),
        layer + 'mlp.fc1.bias': (12800,),
        layer + 'mlp.fc2.weight': (3200, 12800),
        layer + 'mlp.fc2.bias': (3200,),
        layer + 'norm1.weight': (3200,),
        layer + 'norm2.weight': (3200,),
        layer + 'ls1': (3200,),
        layer + 'ls2': (3200,),
    }


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'norm_type': 'layernorm'}, "norm_type 'layernorm': did you mean 'layer_norm'"),
        ({'hidden_act': 'gelu_neww'}, "hidden_act 'gelu_neww': did you mean 'gelu_new'"),
        ({'num_attention_heads': 3}, 'hidden_size 16 is no multiple of num_attention_heads 3'),
    ],
)
def test_a_config_that_means_no_network_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build_vision_model({**SIZES, **options})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('layer', [4, -5])
def test_a_layer_that_is_not_there(layer):
    with pytest.raises(IndexError, match=rf'select_layer {layer}: InternViT has 3 layers'):
        build_vision_model(SIZES)(torch.zeros(1, 3, 8, 8), layer)


def test_layers_behind_the_chosen_one_do_not_run():
    model = build_vision_model(SIZES)
    model.encoder.layers[2].forward = None  # would raise
    assert model(torch.randn(1, 3, 8, 8), -2).shape == (1, 5, 16)


def test_no_images_give_no_features():
    assert build_vision_model(SIZES)(torch.zeros(0, 3, 8, 8)).shape == (0, 5, 16)


def test_stochastic_depth_leaves_layers_out_by_sample_in_training_alone():
    torch.manual_seed(0)
    # The last of two layers is always left out, the first never.
    model = build_vision_model({**SIZES, 'num_hidden_layers': 2, 'drop_path_rate': 0.5})
    images = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        first, whole = model.eval()(images, 1), model(images)
        assert torch.equal(model.train()(images, 1), first)
        dropped = (model(images) - first).flatten(1).abs().amax(1) == 0
    assert ((whole - first).flatten(1).abs().amax(1) > 0).all()
    # Both halves of the layer with probability 1/4: 16 of 64, within three standard deviations.
    assert 6 <= int(dropped.sum()) <= 26


@pytest.mark.parametrize('training', [True, False])
def test_checkpointed_layers_give_the_same_gradients_whatever_the_mode_is_later(training):
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        options = {'dropout': 0.2, 'attention_dropout': 0.2, 'drop_path_rate': 0.3}
        model = build_vision_model({**SIZES, **options}).train(training)
        model.encoder.gradient_checkpointing = checkpointed
        ran: list[int] = []
        for layer in model.encoder.layers:
            layer.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        loss = model(torch.randn(4, 3, 8, 8)).pow(2).sum()
        model.train(not training)
        loss.backward()
        assert len(ran) == (6 if checkpointed else 3)
        gradients.append([p.grad for p in model.parameters()])
    for plain, repeated in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(repeated, plain)
