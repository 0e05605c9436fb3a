"""tools/benchmark.py: what it prints, what it writes, and that its two sides are the same work."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch
from mmengine.config import Config
from PIL import Image

from projects.llava_sam2_rl.registry import REWARDS
from projects.llava_sam2_rl.report.logs import read_scalars
from projects.llava_sam2_rl.rewards import needs_of


@pytest.fixture
def benchmark(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools'))
    import benchmark

    yield benchmark
    for name in [name for name in sys.modules if name.split('.')[0].startswith('benchmark')]:
        sys.modules.pop(name)


def test_a_table_keeps_the_order_and_fills_gaps(benchmark):
    rows = [{'name': 'a', 'ratio': 3.14159}, {'name': 'b', 'note': 'x'}]
    assert benchmark.table(rows).splitlines() == [
        '| name | ratio | note |',
        '| --- | --- | --- |',
        '| a | 3.14 |  |',
        '| b |  | x |',
    ]


def test_only_the_named_section_is_rewritten(benchmark):
    page = 'top\n<!-- a -->\nold\n<!-- /a -->\nmiddle\n<!-- b -->\nkept\n<!-- /b -->\n'
    assert benchmark.update_section(page, 'a', 'new') == page.replace('old', 'new')
    with pytest.raises(ValueError, match='<!-- c -->'):
        benchmark.update_section(page, 'c', 'new')


def test_every_sub_command_has_a_section_in_the_docs(benchmark):
    page = benchmark.PAGE.read_text(encoding='utf-8')
    for name in benchmark.COMMANDS:
        assert benchmark.update_section(page, name, 'x').count(f'<!-- {name} -->\nx') == 1


def test_the_machine_is_named(benchmark):
    line = benchmark.machine()
    assert f'torch {torch.__version__.split("+")[0]}' in line
    assert ' cores, ' in line
    assert ' GiB, ' in line


def parse(module, arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument('--update-docs', action='store_true')
    module.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_gathers_compute_what_gumbel_embeds_does(benchmark):
    module = benchmark.COMMANDS['gumbel']
    sizes = '--batch 2 --tokens 5 --top-k 40 --width 8 --vocab 100 --rounds 1 --device cpu'
    rows = module.run(parse(module, sizes.split()))
    assert [row['way'] for row in rows] == ['ours', 'plain gather', 'chunked gather']
    assert all(row['max difference'] < 1e-5 for row in rows)
    assert rows[0]['B·T·k·12 in MB'] == pytest.approx(2 * 5 * 40 * 12 / 1e6)


def test_both_ways_to_log_probs_agree(benchmark):
    module = benchmark.COMMANDS['logprobs']
    sizes = '--batch 2 --tokens 5 --width 8 --vocab 100 --rounds 1 --device cpu'
    rows = module.run(parse(module, sizes.split()))
    assert [row['way'] for row in rows] == ['ours', 'full logits']
    assert all(float(x) < 1e-5 for x in rows[0]['max difference (value, gradient)'].split(', '))
    assert rows[1]['memory of full'] == 1


@pytest.mark.parametrize('name', ['grpo/mask_to_caption', 'grpo/caption_to_mask'])
def test_the_control_differs_in_nothing_but_its_reward(benchmark, name, tmp_path):
    module = benchmark.COMMANDS['learn']
    args = parse(module, ['--work-dir', str(tmp_path)])
    run, control = (
        Config.fromfile(module.write_config(module.Job(name, 3, 'real', flag), 'start', args))
        for flag in (False, True)
    )
    direction = name.split('/')[1]
    rewards = [c.model.objective[direction].pop('reward') for c in (run, control)]
    assert rewards[1].type.endswith('PermutedReward')
    assert set(rewards[1]) == {'type', 'reward'}
    assert rewards[1].reward.type.split('.')[-1] == rewards[0].type.split('.')[-1]
    assert run.to_dict() == control.to_dict()
    assert run.model.policy.pretrained == 'start'
    captions = name == 'grpo/caption_to_mask'
    withheld = [d.withhold_captions for d in run.train_dataloader.dataset.datasets]
    assert withheld == [not captions] * len(withheld)


def test_clips_are_rewarded_by_all_frames_or_by_one(benchmark, tmp_path):
    module = benchmark.COMMANDS['learn']
    args = parse(module, ['--work-dir', str(tmp_path)])
    names = ('grpo/clips_propagated', 'grpo/clips_later_frame')
    configs = [
        Config.fromfile(module.write_config(module.Job(name, 0, 'real', False), 'start', args))
        for name in names
    ]
    trips = [c.model.objective.mask_to_caption.pop('return_trip') for c in configs]
    assert trips == ['propagate', 'later_frame']
    assert configs[0].to_dict() == configs[1].to_dict()
    assert configs[0].val_dataloader.dataset.type.endswith('GeneratedMovingScenes')
    # They keep to their sources.
    jobs = module.plan(parse(module, ['--only', *names, '--worlds', 'scenes', 'collages']))
    assert {job.world for job in jobs} == {'both'}
    assert len(jobs) == 12


def test_every_named_reward_is_one_and_takes_the_place_of_the_configs(benchmark, tmp_path):
    module = benchmark.COMMANDS['learn']
    args = parse(module, ['--work-dir', str(tmp_path), '--rewards', 'meteor', 'likelihood', 'iou'])
    experiment = module.EXPERIMENTS['grpo/caption_to_mask']
    assert module.rewards_of(experiment, args.rewards) == ['meteor', 'likelihood']
    assert module.rewards_of(module.EXPERIMENTS['sft/mask_to_caption'], args.rewards) == ['real']
    for name in ('grpo/mask_to_caption', 'grpo/caption_to_mask'):
        direction = name.split('/')[1]
        for reward, expected in module.REWARDS[direction].items():
            for control in (False, True):
                job = module.Job(name, 3, reward, control)
                path = module.write_config(job, 'start', args)
                built = REWARDS.build(Config.fromfile(path).model.objective[direction].reward)
                assert (type(built).__name__ == 'PermutedReward') == control
                assert needs_of(built) == needs_of(REWARDS.build(dict(expected)))
                assert ('caption_logps' in built.needs) == ('likelihood' in reward)
                # Regions that a reward compares come two an image, as many a step as ever.
                loader = Config.fromfile(path).train_dataloader
                each = {dataset.get('num_regions', 1) for dataset in loader.dataset.datasets}
                assert each == {2 if reward == 'iou+likelihood' else 1}
                assert loader.batch_size * each.pop() == 8
    assert len({path.parent.name for path in tmp_path.glob('*/*/config.py')}) == 12


def test_the_matrix_of_runs_leaves_out_what_an_experiment_does_not_know(benchmark):
    module = benchmark.COMMANDS['learn']
    options = '--only grpo/caption_to_mask sft/mask_to_caption --rewards meteor likelihood iou '
    options += '--reductions grpo dapo --worlds scenes collages --seeds 0 1'
    jobs = module.plan(parse(module, options.split()))
    # 2 rewards of the direction x 2 reductions x 2 worlds x 2 seeds, each with its control; SFT has
    # neither reward nor reduction nor control: 2 worlds x 2 seeds.
    assert len([job for job in jobs if job.name == 'grpo/caption_to_mask']) == 32
    assert len([job for job in jobs if job.name == 'sft/mask_to_caption']) == 4
    assert len(jobs) == len({job.folder for job in jobs}) == 36
    # Of three seeds of each: a curve with its spread.
    assert len({job.series for job in jobs}) == 18


def test_an_experiment_with_a_world_of_its_own_is_run_there_once(benchmark):
    module = benchmark.COMMANDS['learn']
    options = '--only grpo/clips_propagated sft/mask_to_caption --worlds scenes collages --seeds 0'
    jobs = module.plan(parse(module, options.split()))
    assert [(job.name, job.world, job.control) for job in jobs] == [
        ('grpo/clips_propagated', 'both', False),
        ('grpo/clips_propagated', 'both', True),
        ('sft/mask_to_caption', 'scenes', False),
        ('sft/mask_to_caption', 'collages', False),
    ]


def test_a_world_is_trained_and_validated_on_alone(benchmark, tmp_path):
    module = benchmark.COMMANDS['learn']
    args = parse(module, ['--work-dir', str(tmp_path)])
    found = {}
    for world in module.WORLDS:
        job = module.Job('grpo/both', 0, 'real', False, 'dr_grpo', world)
        config = Config.fromfile(module.write_config(job, 'start', args))
        assert config.model.objective.reduction == 'dr_grpo'
        found[world] = [
            dataset.type.rsplit('.', 1)[-1]
            for dataset in (
                *config.train_dataloader.dataset.datasets,
                config.val_dataloader.dataset,
            )
        ]
    scenes, collages = 'GeneratedScenes', 'GeneratedCollages'
    assert found == {
        'both': [scenes, scenes, collages, collages, collages],
        'scenes': [scenes] * 3,
        'collages': [collages] * 3,
    }


@pytest.mark.slow
def test_learn_trains_and_measures_both_runs(benchmark, tmp_path):
    module = benchmark.COMMANDS['learn']
    options = ['--only', 'grpo/damaged_ear', '--seeds', '4', '--iters', '2', '--regions', '8']
    rows = module.run(parse(module, [*options, '--jobs', '2', '--work-dir', str(tmp_path)]))
    assert [(row['reward'], row['seed']) for row in rows] == [('real', 4), ('shuffled', 4)]
    for row in rows:
        before = row['own_iou'].strip('*').split(' → ')[0]
        # The damaged ear: the tiny model itself finds more than 0.5 of the first regions.
        assert 0 < float(before) < 0.5
        assert row['return_iou'].count('→') == 1
        assert 'return_j' not in row  # of clips alone
    for kind in ('run', 'control'):
        folder = tmp_path / f'grpo_damaged_ear/{kind}_4'
        assert (folder / 'held_out.json').is_file()
        # A curve from the start to the end.
        steps = [step for step, _ in read_scalars(folder).curve('cycle/own_iou')]
        assert steps == [0, 1, 2]
    with Image.open(tmp_path / 'learning.png') as picture:
        assert min(picture.size) > 200


@pytest.mark.slow
def test_zero_3_is_compared_with_zero_2_on_the_same_steps(benchmark):
    module = benchmark.COMMANDS['zero']
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    sizes = '--models tiny --batch 1 --group 2 --tokens 4 --rounds 1 --threshold 1000'
    whole, layers, at_once = module.run(parser.parse_args(sizes.split()))
    assert whole['way'] == 'ZeRO-2'
    assert (whole['to ZeRO-2'], whole['agreements'], whole['gathers']) == (1, 0, 0)
    # A message before each gather, and the last one of each exchange.
    for row in (layers, at_once):
        assert row['agreements'] > row['gathers'] > 0
    assert layers['gathers'] > at_once['gathers']
    assert layers['gathered MB'] > at_once['gathered MB'] > 1
