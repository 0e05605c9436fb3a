"""Mean, best and the reward's own pick of n rollouts."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.evaluation import BestOfNMetric
from projects.llava_sam2_rl.evaluation.best_of_n import best_of
from projects.llava_sam2_rl.evaluation.tasks import predict
from projects.llava_sam2_rl.models import DualLoopModel, GRPOObjective


def test_one_region_by_hand():
    ious = [0.2, 0.8, 0.5, 0.9]
    found = best_of('own_iou', ious, [0.1, 0.7, 0.3, math.nan])
    assert found == {
        'n': 4.0,
        'own_iou_mean': pytest.approx(0.6),
        'own_iou_best': 0.9,
        'own_iou_picked': 0.8,
        'own_iou_zero_std': 0.0,
    }
    # A blind reward picks the first; one that scores nothing picks none.
    assert best_of('x', ious, [0.5] * 4)['x_picked'] == 0.2
    assert best_of('x', ious, [0.5] * 4)['x_zero_std'] == 1.0
    assert 'x_picked' not in best_of('x', ious, [math.nan] * 4)


def test_means_over_the_regions_that_have_the_number():
    metric = BestOfNMetric()
    both = {'iou': [0.0, 1.0], 'reward': [0.0, 1.0]}
    metric.process(None, [{'mask_to_caption': both, 'caption_to_mask': both}])
    metric.process(None, [{'mask_to_caption': {'iou': [0.4, 0.2], 'reward': [0.3, 0.4]}}, {}])
    numbers = metric.compute_metrics(metric.results)
    assert numbers['n'] == 2
    assert numbers['return_iou_mean'] == pytest.approx(0.4)
    assert numbers['return_iou_best'] == pytest.approx(0.7)
    assert numbers['return_iou_picked'] == pytest.approx(0.6)
    assert numbers['own_iou_mean'] == 0.5
    assert metric.compute_metrics([]) == {'n': 0}


@pytest.fixture
def scenes(tiny_transform) -> dict:
    """Three records, the second without a caption."""
    source = GeneratedScenes(length=8, split='val', transforms=tiny_transform)
    batch = sa2va_collate([source[i] for i in range(3)])
    batch['data']['captions'][1] = None
    return batch


def build(tiny_model, **options) -> DualLoopModel:
    objective = GRPOObjective(num_generations=3, **options)
    return DualLoopModel(tiny_model.policy, objective, max_new_tokens=6)


def test_rollouts_of_a_model_are_scored_as_in_training(tiny_model, scenes):
    """With the IoU itself as the reward its pick is the best."""
    iou = {'reward': {'type': 'MaskIoUReward'}}
    model = build(tiny_model, mask_to_caption=iou, caption_to_mask=iou)
    state = torch.get_rng_state()
    first = predict(model, scenes, ['rollouts'])['rollouts']
    assert torch.equal(torch.get_rng_state(), state)
    assert [sorted(sample) for sample in first] == [
        ['caption_to_mask', 'mask_to_caption'],
        ['mask_to_caption'],
        ['caption_to_mask', 'mask_to_caption'],
    ]
    for sample in first:
        for found in sample.values():
            assert len(found['iou']) == 3
            assert found['iou'] == pytest.approx(found['reward'])
    metric = BestOfNMetric()
    metric.process(None, first)
    numbers = metric.compute_metrics(metric.results)
    assert numbers['return_iou_picked'] == numbers['return_iou_best'] > 0
    assert numbers['own_iou_best'] >= numbers['own_iou_mean'] > 0
    # The same draws again, and no step of training was counted.
    assert predict(model, scenes, ['rollouts'])['rollouts'] == first
    assert model.objective.last_rollouts == {}


def test_the_command_and_its_config(root, tmp_path):
    """`tools/test.py` with the benchmark's file, on two regions."""
    spec = importlib.util.spec_from_file_location('test_command', root / 'tools/test.py')
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    config = root / 'configs/sa2va_tiny_dual_loop.py'
    benchmark = root / 'configs/_base_/benchmarks/best_of_n.py'
    options = ['test_dataloader.dataset.length=2', 'model.objective.num_generations=2']
    arguments = [config, '--benchmark', benchmark, '--work-dir', tmp_path, '--cfg-options']
    command.main([*map(str, arguments), *options, 'model.max_new_tokens=6'])
    metrics = json.loads((tmp_path / 'test_policy.json').read_text())['metrics']
    assert metrics['best_of_n/n'] == 2
    for name in ('return_iou', 'own_iou'):
        mean, best, picked = (metrics[f'best_of_n/{name}_{x}'] for x in ('mean', 'best', 'picked'))
        assert 0 <= mean <= best <= 1
        assert picked <= best


def test_what_has_no_rollouts_says_so(tiny_model, scenes):
    with pytest.raises(ValueError, match='SFTObjective has no rewards'):
        predict(tiny_model, scenes, ['rollouts'])
    model = build(tiny_model)
    model.predict_with = 'teacher'
    with pytest.raises(ValueError, match='--weights policy'):
        predict(model, scenes, ['rollouts'])
