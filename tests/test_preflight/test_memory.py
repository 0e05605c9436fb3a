import json
from dataclasses import replace

import pytest
from mmengine.config import Config

from projects.llava_sam2_rl.models.sa2va.quantization import OLDEST
from projects.llava_sam2_rl.preflight.memory import (
    MARGIN,
    PERSISTENT,
    Sizes,
    fits_whole,
    predict,
    predict_rollout,
    read_sizes,
)


@pytest.fixture
def sizes():
    return Sizes(
        frozen=1000, trained=100, bytes=2, layers=3, width=8, inner=16, heads=2, kv_width=4,
        vocabulary=50, chunk=2, grounding=32, prompt=10, batch=2, group=4, tokens=5,
    )  # fmt: skip


def test_one_process_under_autocast(sizes):
    parts = predict(sizes)
    assert parts['frozen weights'] == 2000
    assert parts['trained weights'] == 400
    assert parts['their copies under autocast'] == 200
    assert parts['gradients'] == 400
    assert parts['float32 masters'] == 0
    assert parts['AdamW moments'] == 800
    assert parts['teacher'] == 400
    # Keys and values, 3 layers of 4 numbers of 2 bytes: 2 prompts of 10, once as they were
    # read and once for the group, 8 rollouts of 5.
    assert parts['key/value cache'] == 2 * 3 * 4 * 2 * (20 + 20 + 40)
    # 2 prompts of 10 with 4 completions of 5 each: 60 positions of 3 layers of 8 numbers.
    assert parts['activations, checkpoints'] == 60 * 3 * 8 * 2


def test_zero_shares_the_optimizers_states_alone(sizes):
    parts = predict(sizes, gpus=4, zero=2)
    assert parts['frozen weights'] == 2000
    assert parts['trained weights'] == 200
    assert parts['their copies under autocast'] == 0
    assert parts['gradients'] == 200
    assert parts['float32 masters'] == 100
    assert parts['AdamW moments'] == 200
    assert parts['teacher'] == 400


def test_zero_3_shares_large_weights_out(sizes, root):
    whole = predict(sizes, gpus=4, zero=2)
    parts = predict(replace(sizes, small_frozen=100, small_trained=40), gpus=4, zero=3)
    # Two bytes of a quarter of 1000, and of the 100 of small tensors, which are whole as well.
    assert parts['frozen weights'] == 2 * (250 + 100)
    assert parts['trained weights'] == 2 * (25 + 40)
    assert parts['teacher'] == 4 * (25 + 40)
    # A layer: q and o of 8 x 8, k and v of 8 x 4, three of 8 x 16; more than a table of 50 x 8.
    assert parts['weights put together'] == 2 * (2 * 64 + 2 * 32 + 3 * 128)
    for name in ('gradients', 'float32 masters', 'AdamW moments', 'key/value cache'):
        assert parts[name] == whole[name]
    for path in ('zero3.json', 'zero3_fp32.json'):
        zero = json.loads((root / 'configs/deepspeed' / path).read_text())['zero_optimization']
        assert zero['stage3_param_persistence_threshold'] == PERSISTENT


def test_the_whole_language_model_has_room_where_no_gradients_are_yet(sizes):
    parts = predict_rollout(replace(sizes, language=700), gpus=4)
    assert parts == {
        'frozen weights': 2 * 250,
        'trained weights': 2 * 25,
        'language model put together': 2 * 700,
        'their copies under autocast': 0,
        'float32 masters': 4 * 25,
        'AdamW moments': 8 * 25,
        'teacher': 4 * 25,
        'key/value cache': 2 * 3 * 4 * 2 * (20 + 20 + 40),
        # 60 positions of 6 x 8, 2 x 4 and 3 x 16 numbers, with their gradients.
        'activations, one layer or logits': 2 * 60 * 2 * (48 + 8 + 48),
        # Two images of 2 x 2 cells: 256 + 4 x 64 + 16 x 32 numbers.
        'SAM 2 features': 2 * 4 * 4 * 1024,
    }
    needed = 500 + 50 + 1400 + 100 + 200 + 100 + 3840 + 24960 + 32768
    assert fits_whole(replace(sizes, language=700), 4, MARGIN + needed)
    assert not fits_whole(replace(sizes, language=700), 4, MARGIN + needed - 1)


def test_what_is_in_4_bits_is_counted_apart(sizes):
    whole = predict(sizes)
    found = predict(replace(sizes, rounded=600, rounded_bytes=310, largest=60))
    assert found.pop('frozen weights in 4 or 8 bits') == 310
    assert found.pop('one of them as it is used') == 120
    assert found.pop('frozen weights') == 2 * (1000 - 600)
    whole.pop('frozen weights')
    assert found == whole


def test_4b_in_4_bits(root):
    """Qwen2.5-3B: 36 layers of width 2048, MLP 11008, two key/value heads of 128."""
    pytest.importorskip('bitsandbytes', minversion=OLDEST)
    plain = read_sizes(Config.fromfile(root / 'configs/sa2va_4b_dual_loop.py'))
    sizes = read_sizes(Config.fromfile(root / 'configs/sa2va_4b_dual_loop_qlora.py'))
    layers = 36 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 2048 * 11008)
    assert (sizes.rounded, sizes.largest) == (layers, 2048 * 11008)
    # Half a byte a weight, a byte for 64, a float32 for 16384, and the tables.
    assert sizes.rounded_bytes == pytest.approx(layers * (1 / 2 + 1 / 64 + 4 / 16384), rel=1e-3)
    assert sizes.rounded_bytes <= 0.3 * 2 * layers
    assert replace(sizes, rounded=0, rounded_bytes=0, largest=0) == plain
    saved = sum(predict(plain).values()) - sum(predict(sizes).values())
    assert saved == pytest.approx(4.07e9, rel=0.01)


def test_more_of_everything_needs_more(sizes):
    total = sum(predict(sizes).values())
    for name in ('frozen', 'trained', 'layers', 'prompt', 'batch', 'group', 'tokens', 'grounding'):
        larger = replace(sizes, **{name: 2 * getattr(sizes, name)})
        assert sum(predict(larger).values()) > total, name


def test_sizes_of_a_config(root, tiny_model):
    sizes = read_sizes(Config.fromfile(root / 'configs/sa2va_tiny_dual_loop.py'), batch=3)
    parameters = list(tiny_model.policy.parameters())
    assert sizes.trained == sum(p.numel() for p in parameters if p.requires_grad)
    assert sizes.frozen == sum(p.numel() for p in parameters if not p.requires_grad)
    # assets/sa2va_tiny/config.json; 96 px in patches of 8, halved: 36 cells, a quarter more for
    # the region, and text.
    assert (sizes.layers, sizes.width, sizes.kv_width, sizes.vocabulary) == (3, 128, 64, 1024)
    assert (sizes.batch, sizes.group, sizes.prompt) == (3, 8, 36 + 9 + 60)
    assert (sizes.bytes, sizes.autocast) == (4, False)
    # Every tensor of it is small.
    assert sizes.language == 0


def test_the_language_model_of_4b(root):
    sizes = read_sizes(Config.fromfile(root / 'configs/sa2va_4b_dual_loop.py'))
    # Qwen2.5-3B: 36 layers whose q, o and MLP are above the threshold, k and v of 2048 x 256 are
    # not, nor is LoRA; the embeddings and the head of 151679 tokens.
    layers = 36 * (2 * 2048 * 2048 + 3 * 2048 * 11008)
    assert sizes.language == layers + 2 * 151_679 * 2048
