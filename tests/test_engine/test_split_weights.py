"""ZeRO-3 with weights in parts, on ranks that have nothing in common but the model."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import PATIENCE, run_ranks
from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from safetensors.torch import load_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from projects.llava_sam2_rl.datasets import Sa2VATransform, sa2va_collate
from projects.llava_sam2_rl.engine.deepspeed_runner import check_even_batches
from projects.llava_sam2_rl.engine.distributed import full_parameter
from projects.llava_sam2_rl.engine.launch import prepare
from projects.llava_sam2_rl.engine.split_weights import SplitWeights, WholeWeights
from projects.llava_sam2_rl.engine.zero_state import full_weights
from projects.llava_sam2_rl.evaluation.tasks import predict
from projects.llava_sam2_rl.export import export
from projects.llava_sam2_rl.models.objectives import GRPOObjective
from projects.llava_sam2_rl.models.schedule import Curriculum
from projects.llava_sam2_rl.structures import MeanLoss, RegionSample
from projects.llava_sam2_rl.utils.pretrained import complete_sizes, image_sizes, resolve
from test_engine.test_distributed import (
    OBJECTIVES,
    PARTS,
    ROOT,
    collate,
    engine,
    model,
    samples,
    take_randomness_away,
)

#: What a rank may be given in a step.
KINDS = ('two captions', 'talk', 'no caption', 'all dropped', 'not finite', 'paired')


def conversation() -> dict:
    """A sample with a conversation and no region."""
    config = Config.fromfile(ROOT / 'configs/sa2va_tiny_dual_loop_sft.py')
    transform = Sa2VATransform(**image_sizes(complete_sizes(config.model.policy.pretrained, {})))
    photo = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    talk = RegionSample(
        image=photo,
        mask=np.zeros((0, 64, 80), bool),
        caption=None,
        source='chat',
        sample_id='talk',
        conversation=(('What is it?', 'a circle.'), ('Where?', 'in the center')),
    )
    return {**transform(talk), 'skipped': []}


def batch_of(kind: str) -> dict:
    (plain, _), (paired, _) = samples([True, True])
    if kind == 'talk':
        return sa2va_collate([conversation()])
    if kind == 'two captions':
        return collate([(plain, 'a ball'), (paired, 'the small red thing in the corner')])
    if kind == 'paired':
        return collate([(paired, 'a ball')])
    return collate([(plain, None if kind == 'no caption' else 'a ball')])


def make_hostile(dual_loop: Any, kind: str) -> None:
    """What is not in the data: a curriculum without samples, a loss that is not finite."""
    dual_loop.curriculum = None
    if kind == 'all dropped':
        dual_loop.curriculum = Curriculum(by='region_size', start=1.0, end=1.0, steps=1)
    vars(dual_loop.objective).pop('losses', None)
    if kind == 'not finite':
        losses = dual_loop.objective.losses

        def broken(*args: Any) -> Any:
            found, metrics = losses(*args)
            return {k: MeanLoss(x.value * torch.nan, x.count) for k, x in found.items()}, metrics

        dual_loop.objective.losses = broken


def whole_bytes(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def resident_bytes(module: Any) -> int:
    """Of the weights that this rank holds: whole ones, what stands for others, and its parts."""
    held = {p.data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    parts = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in module.parameters())
    return sum(held.values()) + parts


def split(objective: str, change: Any = None) -> tuple[Any, Any, Any, list]:
    """Model, engine, optimizer wrapper, and the gathers to come."""
    dual_loop = model(objective)
    if change is not None:
        change(dual_loop)
    trained = [p for p in dual_loop.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    wrapped = engine(dual_loop, optimizer, PARTS)
    wrapped.after_step.append(dual_loop.update_teacher)
    optim_wrapper = DeepSpeedOptimWrapper(optimizer)
    optim_wrapper.model = wrapped
    gathers: list[tuple[int, int]] = []
    wrapped.weights.watchers.append(lambda *unit: gathers.append(unit))
    return dual_loop, wrapped, optim_wrapper, gathers


def refilling(dual_loop: Any) -> None:
    if isinstance(dual_loop.objective, GRPOObjective):
        dual_loop.objective.max_refills = 1


def record_calls(policy: Any) -> list[str]:
    calls: list[str] = []
    for name, module in policy.named_modules():
        if name.endswith(('layers.0', 'lm_head', 'embed_tokens')):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def hostile_steps(rank: int, ranks: int, steps_of: dict[str, int]) -> dict[str, Any]:
    """What ranks gathered in training steps and in validation, and what they computed meanwhile."""
    prepare('pytorch', 'a.json')
    found: dict[str, Any] = {}
    for objective, steps in steps_of.items():
        torch.manual_seed(rank)
        dual_loop, wrapped, optim_wrapper, gathers = split(objective, refilling)
        dual_loop.max_skipped_steps = steps
        calls = record_calls(dual_loop.policy)
        resident = [resident_bytes(dual_loop)]
        for step in range(steps):
            kind = KINDS[(ranks * step + rank) % len(KINDS)]
            make_hostile(dual_loop, kind)
            wrapped.train_step(batch_of(kind), optim_wrapper)
            resident.append(resident_bytes(dual_loop))
        # A rank alone has a second sample; the others would not wait for it, as the sampler repeats
        # what is missing, so all have a batch.
        kinds = ('two captions', 'no caption', 'paired')
        with torch.no_grad():
            wrapped.val_step(batch_of(kinds[rank]))
            predict(dual_loop, batch_of(kinds[rank]), ['cycle', 'captioning'])
        found[objective] = {
            'gathers': gathers,
            'calls': calls,
            'resident': max(resident),
            'whole': whole_bytes(dual_loop),
            'steps': wrapped.optimizer_steps,
            'skipped': dual_loop.skipped_steps,
            'teacher': dual_loop.teacher.state_dict()['shadows'],
        }
    return found


@pytest.mark.slow
def test_ranks_with_different_data_gather_the_same_in_the_same_order(tmp_path, pytestconfig):
    wanted = pytestconfig.getoption('--hostile-steps')
    steps_of = {'sft': wanted // 3, 'gumbel': wanted // 3, 'grpo': wanted - 2 * (wanted // 3)}
    patience = PATIENCE + 60 * wanted
    ranks = run_ranks(hostile_steps, 3, tmp_path, 3, steps_of, timeout=patience)
    for objective, steps in steps_of.items():
        first, *others = [found[objective] for found in ranks]
        print(
            f'{objective}: {steps} steps, {first["skipped"]} of them skipped, '
            f'{len(first["gathers"])} gathers, at most {first["resident"] / first["whole"]:.2f} of '
            "the weights' bytes between steps"
        )
        assert len(first['gathers']) > 100
        for other in others:
            assert other['gathers'] == first['gathers']
            # Though they did different things.
            assert other['calls'] != first['calls']
            for name, shadow in first['teacher'].items():
                assert torch.equal(shadow, other['teacher'][name])
                assert shadow.isfinite().all()
        # The policy's weights and the teacher's.
        assert {version for _, version in first['gathers']} == {0, 1}
        # Every second step has a rank whose loss is not finite.
        assert first['skipped'] == steps // 2
        assert first['steps'] == steps - steps // 2
        # A third, and what is below the threshold.
        assert first['resident'] < 0.4 * first['whole']


def rollouts(rank: int, ranks: int) -> dict[str, Any]:
    """Rollouts of the same draws with whole weights, in parts, and gathered for the rollout."""
    prepare('pytorch', 'a.json')
    OBJECTIVES['grpo_initial'] = dict(OBJECTIVES['grpo'], ref='initial')
    mine = collate([samples([True, True])[rank]])

    def drawn(dual_loop: Any) -> list:
        torch.manual_seed(10 + rank)
        batch = dual_loop.encode(copy.deepcopy(mine)['data'], ['a'])
        with torch.no_grad():
            found = dual_loop.rollout(batch)
        first = found['mask_to_caption']
        second = found['caption_to_mask']
        compared = [
            first.rewards.rewards,
            first.ref_per_token_logps,
            second.actions,
            second.ref_action_mean,
        ]
        return [first.captions, first.completions.completion_ids, compared]

    kept: list = []
    dual_loop, wrapped, _, gathers = split('grpo_initial', lambda whole: kept.append(drawn(whole)))
    found = {'whole': kept[0], 'resident': resident_bytes(dual_loop) / whole_bytes(dual_loop)}
    for name, at_once in (('layers', False), ('at once', True)):
        gathers.clear()
        dual_loop.gather_for_rollout = at_once
        found[name] = [*drawn(dual_loop), list(gathers)]
        found[f'{name} left'] = resident_bytes(dual_loop) / whole_bytes(dual_loop)
    # A pass with a gradient keeps no gathered weights for its way back.
    gathered = []
    gather = wrapped.weights._gather

    def watched(wish: int, keep: bool) -> Any:
        tensors = gather(wish, keep)
        for tensor in tensors or ():
            gathered.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
        return tensors

    wrapped.weights._gather = watched
    batch = dual_loop.encode(mine['data'], ['a'])
    held = dual_loop.rollout(batch)
    gathered.clear()
    losses, _ = wrapped(batch, held, mode='objective')
    found['in graph'] = sum(size for ref, size in gathered if not ref.expired())
    found['gathered'] = sum(size for _, size in gathered)
    wrapped.weights.together()
    assert all(loss.value.requires_grad for loss in losses.values())
    return found


@pytest.mark.slow
def test_rollouts_are_those_of_whole_weights_however_they_are_gathered(tmp_path):
    for found in run_ranks(rollouts, 2, tmp_path, 2):
        whole = found['whole']
        for name in ('layers', 'at once'):
            captions, ids, compared, gathers = found[name]
            assert captions == whole[0]
            assert torch.equal(ids, whole[1])
            for own, expected in zip(compared, whole[2], strict=True):
                torch.testing.assert_close(own, expected, rtol=0, atol=1e-4)
            # The policy's weights, the teacher's and those that training started from.
            assert {version for _, version in gathers} == {0, 1, 2}
            assert found[f'{name} left'] < 0.6
        # Eight tokens take five units each; at once they are gathered a single time.
        assert len(found['at once'][-1]) < 0.7 * len(found['layers'][-1])
        assert found['resident'] < 0.6
        assert found['in graph'] < 0.25 * found['gathered']


class Tied(nn.Module):
    """A trained table that is the head too, and layers of which a rank runs as many as it likes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.layers[1].requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight
        self.objective = None
        self.weights = WholeWeights()

    def use_weights(self, weights: WholeWeights) -> None:
        self.weights = weights

    def forward(self, x: torch.Tensor, layers: int) -> torch.Tensor:
        hidden = self.table(x)
        for layer in self.layers[:layers]:
            hidden = hidden + torch.tanh(checkpoint(layer, hidden, use_reentrant=False))
        with self.weights.of(self.head):
            product = hidden @ self.head.weight.T
        return (self.head(hidden) - 0.3 * product.detach()).square().mean()


def saved(rank: int, ranks: int, count: int, path: Path) -> None:
    """Two steps of plain gradient descent on some samples, then what a checkpoint has of them."""
    prepare('pytorch' if ranks > 1 else 'none', 'a.json')
    dual_loop = model('sft')
    trained = [p for p in dual_loop.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.02)
    whole = samples([True] * count)
    take_randomness_away(dual_loop, collate(whole), rank if ranks > 1 else None)
    batch = collate(whole if ranks == 1 else [whole[rank]])
    wrapped: Any = dual_loop
    optim_wrapper: Any = OptimWrapper(optimizer)
    if ranks > 1:
        wrapped = engine(dual_loop, optimizer, PARTS)
        assert isinstance(wrapped.weights, SplitWeights)
        optim_wrapper = DeepSpeedOptimWrapper(optimizer)
        optim_wrapper.model = wrapped
    for _ in range(2):
        wrapped.train_step(copy.deepcopy(batch), optim_wrapper)
    state = full_weights(dual_loop, keep=rank == 0)
    if rank == 0:
        torch.save({'meta': {}, 'state_dict': state}, path)


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 3])
def test_an_export_is_that_of_one_rank_with_the_whole_batch(count, tmp_path):
    config = Config.fromfile(ROOT / 'configs/sa2va_tiny_dual_loop_sft.py')
    exported = {}
    for ranks in (1, count):
        path = tmp_path / f'{ranks}.pth'
        run_ranks(saved, ranks, tmp_path / f'logs{ranks}', ranks, count, path)
        export(config, path, tmp_path / f'out{ranks}')
        exported[ranks] = load_file(tmp_path / f'out{ranks}/model.safetensors')
    base = load_file(resolve(config.model.policy.pretrained) / 'model.safetensors')
    assert exported[1].keys() == exported[count].keys() == base.keys()
    for name, tensor in exported[count].items():
        torch.testing.assert_close(tensor, exported[1][name], rtol=0, atol=1e-4)
    moved = max(float((exported[1][name] - base[name]).abs().max()) for name in base)
    assert moved > 1e-3


X = torch.tensor([[1, 2, 3], [4, 5, 10]])


def tied(rank: int) -> dict[str, Any]:
    """The weights after two steps; the second time rank 1 alone has all layers."""
    prepare('pytorch', 'a.json')
    module = Tied()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    zero = {'stage': 3, 'stage3_param_persistence_threshold': 0}
    wrapped = engine(module, optimizer, 3, zero_optimization=zero)
    assert all(module.weights.is_split(p) for p in module.parameters())
    for layers in LAYERS:
        wrapped.backward(wrapped(X[rank], layers[rank]))
        wrapped.step()
    return {n: full_parameter(p) for n, p in module.named_parameters() if p.requires_grad}


LAYERS = [(1, 3), (0, 3)]


def test_tied_weights_and_ranks_that_run_other_layers(tmp_path):
    module = Tied()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    start = copy.deepcopy(module.state_dict())
    for layers in LAYERS:
        optimizer.zero_grad()
        (sum(module(X[rank], layers[rank]) for rank in range(2)) / 2).backward()
        optimizer.step()
    expected = dict(module.named_parameters())
    for found in run_ranks(tied, 2, tmp_path):
        assert len(found) == 5
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].detach(), rtol=0, atol=1e-6)
            assert not torch.allclose(value, start[name], atol=1e-3), name


def dying(rank: int) -> None:
    """Rank 1 is killed while rank 0 gathers a layer."""
    prepare('pytorch', 'a.json')
    module = Tied()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    zero = {'stage': 3, 'stage3_param_persistence_threshold': 0}
    wrapped = engine(module, optimizer, 3, zero_optimization=zero)
    if rank:
        module.layers[1].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    wrapped.backward(wrapped(X[rank], 3))


def test_a_rank_that_is_killed_ends_the_others(tmp_path):
    with pytest.raises(RuntimeError, match='exit codes'):
        run_ranks(dying, 2, tmp_path, timeout=120)
    assert 'Connection' in (tmp_path / 'rank0.log').read_text()


def test_ranks_with_other_numbers_of_validation_batches_are_refused():
    check_even_batches({'val_dataloader': {'sampler': {'shuffle': False}}, 'test_dataloader': None})
    with pytest.raises(ValueError, match='val_dataloader.sampler.round_up=False'):
        check_even_batches({'val_dataloader': {'sampler': {'round_up': False}}})


def too_low(rank: int) -> str:
    prepare('pytorch', 'a.json')
    dual_loop = model('sft')
    optimizer = torch.optim.SGD([p for p in dual_loop.parameters() if p.requires_grad], lr=0.1)
    zero = {'stage': 3, 'stage3_param_persistence_threshold': 10}
    with pytest.raises(ValueError, match='tables of SAM 2') as error:
        engine(dual_loop, optimizer, 3, zero_optimization=zero)
    return str(error.value)


@pytest.mark.slow
def test_tables_that_are_read_without_a_call_have_to_stay_whole(tmp_path: Path):
    (text,) = run_ranks(too_low, 1, tmp_path)
    assert 'stage3_param_persistence_threshold' in text
    assert 'tables of SAM 2 of 512 elements' in text
