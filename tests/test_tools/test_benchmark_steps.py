"""The benchmarks of whole steps at tiny sizes: their rows, and that both sides do the same work."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import pytest
import torch

SIZES = ['--models', 'tiny', '--batch', '2', '--tokens', '4', '--rounds', '1', '--device', 'cpu']


@pytest.fixture
def benchmark(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools'))
    import benchmark

    yield benchmark
    for name in [name for name in sys.modules if name.split('.')[0].startswith('benchmark')]:
        sys.modules.pop(name)


def run(benchmark, name, *options):
    module = benchmark.COMMANDS[name]
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([*SIZES, *options]))


def test_make_bench_runs_every_command_and_learn_last(benchmark, root):
    (line,) = [
        x for x in (root / 'Makefile').read_text().splitlines() if x.startswith('BENCHMARKS')
    ]
    assert line.split(':=')[1].split() == list(benchmark.COMMANDS)
    assert list(benchmark.COMMANDS)[-1] == 'learn'


def test_propagation(benchmark):
    sizes = ['--frames', '7', '--objects', '2', '--clip', '3', '--group', '2', '--long', '24']
    (row,) = run(benchmark, 'propagation', *sizes)
    # The modules are part of the whole, and most of it.
    assert 0 < row['its modules s'] < row['propagate s']
    assert 1 < row['of its modules'] < 3
    assert row['images encoded'] == 2 * 3
    # Pointers reach back 16 frames, memories six.
    assert row['peak MB, 72 frames'] < 1.05 * row['peak MB, 24 frames']
    assert row['of T = 1'] == pytest.approx(row['step, T = 3, s'] / row['step, T = 1, s'])


def test_step(benchmark):
    (row,) = run(benchmark, 'step', '--group', '2')
    assert (row['model'], row['B'], row['G'], row['tokens']) == ('tiny', 2, 2, 4)
    assert row['faster'] == pytest.approx(row['original s'] / row['ours s'])
    total, copy = (float(x) for x in row['original extra MB (teacher)'].rstrip(')').split(' ('))
    assert copy == pytest.approx(17, abs=1)  # 4.3 M parameters in float32
    assert total > copy


def test_a_step_by_its_reward_writes_captions_or_reads_them(benchmark, monkeypatch):
    from projects.llava_sam2_rl.models.objectives import grpo_caption_to_mask

    write, written = grpo_caption_to_mask.write_captions, []
    monkeypatch.setattr(
        grpo_caption_to_mask,
        'write_captions',
        lambda *args, **options: written.append(1) or write(*args, **options),
    )
    (row,) = run(benchmark, 'reward-step', '--group', '2')
    assert (row['model'], row['B'], row['G'], row['tokens']) == ('tiny', 2, 2, 4)
    assert row['share'] == pytest.approx(row['likelihood s'] / row['meteor s'])
    assert len(written) == 2  # of four steps, the warm-up's included


def test_rollout_counts_the_tokens_of_both(benchmark):
    (row,) = run(benchmark, 'rollout', '--group', '3', '--prompt', '20')
    assert row['prompt'] == '2 x 20'
    assert 2 * 3 <= row['tokens drawn'] <= 2 * 3 * 4
    assert row['faster'] == pytest.approx(row['ours tokens/s'] / row['generate tokens/s'])


def test_the_return_trip_finds_the_same_masks(benchmark):
    (row,) = run(benchmark, 'return-trip', '--group', '3', '--words', '5')
    assert row['B·G'] == 6
    assert row['largest difference of logits'] < 2e-3


def test_the_teacher_holds_four_bytes_a_trainable_parameter(benchmark):
    (row,) = run(benchmark, 'teacher', '--group', '2')
    assert row['bytes per trainable parameter'] == 4
    assert row['MB'] < row['MB of a copy']
    share = (row['move ms'] + row['two swaps ms']) / row['step s'] / 10
    assert row['share of the step %'] == pytest.approx(share)


def test_growth_starts_at_the_ideal(benchmark):
    rows = run(
        benchmark, 'growth', '--groups', '2', '3', '--batches', '1', '2', '--images', '1', '2'
    )
    assert [(row['grows'], row['number']) for row in rows] == [
        ('G (B 2)', 2), ('G (B 2)', 3), ('B (G 2)', 1), ('B (G 2)', 2),
        ('images (encoders)', 1), ('images (encoders)', 2),
    ]  # fmt: skip
    assert [rows[i]['measured / ideal'] for i in (0, 2, 4)] == pytest.approx([1, 1, 1])
    assert rows[3]['ideal s'] == pytest.approx(2 * rows[2]['seconds'])
    # Encoders and prefill do not grow with G, all else does.
    assert rows[0]['seconds'] < rows[1]['ideal s'] < 1.5 * rows[0]['seconds']


def test_a_gumbel_step_has_the_losses_of_the_original_way(benchmark, monkeypatch):
    from benchmarks import common, gumbel_step

    from projects.llava_sam2_rl.models.objectives import gumbel

    embed = gumbel.gumbel_embeds

    def with_noise_drawn_at_once(logits, table, *, tau, top_k):
        noise = -torch.empty(*logits.shape[:-1], top_k).exponential_().log()
        return embed(logits, table, tau=tau, top_k=top_k, noise=noise)

    monkeypatch.setattr(gumbel, 'gumbel_embeds', with_noise_drawn_at_once)

    model = common.build_model(
        'tiny',
        gumbel_step.objective(64),
        SimpleNamespace(tokens=10, device='cpu'),
        caption_to_mask=dict(weight=0.0),
    )
    model.eval()
    data = common.make_batch(model, 2)['data']
    torch.manual_seed(5)
    encoded = model.encode(data)
    ours, _ = model.objective.losses(model.policy, encoded, model.rollout(encoded))
    torch.manual_seed(5)
    theirs = gumbel_step.OriginalGumbel(model).losses(data)
    assert set(ours) == {f'loop1/{key}' for key in theirs}
    for key, value in theirs.items():
        torch.testing.assert_close(ours[f'loop1/{key}'].value, value, atol=1e-4, rtol=1e-3)


def test_the_frame_is_what_is_left_of_the_work(benchmark):
    from benchmarks import scale

    step = {'time': 4.0, 'time/decode': 1.0, 'time/backward': 2.0, 'time/data_wait': 0.1}
    step |= {'time/optimizer': 0.5, 'time/exchange': 0.2, 'time/teacher': 0.04}
    slow = {key: 10 * value for key, value in step.items()}
    row = scale.row([step, slow, step])
    assert row['step s'] == 4
    assert row['generation %'] == pytest.approx(25)
    assert row['backward %'] == pytest.approx(50)
    assert row['frame %'] == pytest.approx(12.5)
    assert row['exchange of losses %'] == pytest.approx(5)
    assert row['data wait %'] == pytest.approx(2.5)
    assert row['teacher %'] == pytest.approx(1)


def test_scale_trains_on_two_ranks(benchmark):
    module = benchmark.COMMANDS['scale']
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    sizes = '--models tiny --ranks 2 --batch 1 --group 2 --tokens 4 --steps 2 --warm-up 1'
    (row,) = module.run(parser.parse_args(sizes.split()))
    assert (row['model'], row['ranks'], row['speed of a rank']) == ('tiny', 2, 1)
    assert 0 < row['frame %'] < 100
    assert 0 < row['optimizer %'] < 100
    with pytest.raises(RuntimeError, match=r'2 ranks failed:(.|\n)*no-such'):
        module.run(parser.parse_args([*sizes.split(), '--deepspeed', 'no-such.json']))
