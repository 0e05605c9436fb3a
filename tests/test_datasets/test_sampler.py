import itertools

import pytest
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader

from projects.llava_sam2_rl.datasets import GeneratedScenes, ResumableSampler, sampler
from projects.llava_sam2_rl.registry import DATA_SAMPLERS


def ranks(monkeypatch, world_size, **options):
    made = []
    for rank in range(world_size):
        monkeypatch.setattr(sampler, 'get_dist_info', lambda rank=rank: (rank, world_size))
        made.append(ResumableSampler(**options))
    return made


def test_each_record_comes_once_an_epoch_in_an_order_of_its_own():
    made = ResumableSampler(range(50), seed=3)
    orders = []
    for epoch in range(3):
        made.set_epoch(epoch)
        indices = list(made)
        assert sorted(indices) == list(range(epoch * 50, epoch * 50 + 50))
        orders.append([index - epoch * 50 for index in indices])
        assert indices == list(made)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != list(range(50))
    assert list(ResumableSampler(range(50), seed=4)) != orders[0]
    assert list(ResumableSampler(range(5), seed=3, shuffle=False)) == [0, 1, 2, 3, 4]


def test_ranks_share_an_epoch_and_yield_equally_many(monkeypatch):
    made = ranks(monkeypatch, 3, dataset=range(10), seed=0)
    indices = [list(one) for one in made]
    assert [len(v) for v in indices] == [len(one) for one in made] == [4, 4, 4]
    together = list(itertools.chain.from_iterable(zip(*indices)))
    assert sorted(together[:10]) == list(range(10))
    assert together[10:] == together[:2]  # filled up from the epoch's start


@pytest.mark.parametrize(('world_size', 'size'), [(1, 4), (3, 10), (4, 3), (2, 8)])
def test_endless_ranks_cover_each_epoch_exactly(monkeypatch, world_size, size):
    made = ranks(monkeypatch, world_size, dataset=range(size), seed=1, infinite=True)
    columns = [list(itertools.islice(one, 5 * size)) for one in made]
    together = list(itertools.chain.from_iterable(zip(*columns)))
    for epoch in range(4):
        part = together[epoch * size : (epoch + 1) * size]
        assert sorted(part) == list(range(epoch * size, (epoch + 1) * size))


def loader(infinite, num_workers=0):
    data = GeneratedScenes(7, image_size=48)
    return DataLoader(
        data,
        batch_size=2,
        sampler=ResumableSampler(data, seed=5, infinite=infinite),
        collate_fn=lambda items: [item['sample'].caption for item in items],
        num_workers=num_workers,
    )


@pytest.mark.parametrize('infinite', [False, True])
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(monkeypatch, infinite):
    # The way IterBasedTrainLoop resumes: a fresh iterator, pulled as often as was trained.
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    whole = _InfiniteDataloaderIterator(loader(infinite))
    seen = [next(whole) for _ in range(14)]
    resumed = _InfiniteDataloaderIterator(loader(infinite))
    for _ in range(9):
        next(resumed)
    assert [next(resumed) for _ in range(5)] == seen[9:]
    # Epochs differ, or resuming would be no feat.
    assert seen[:4] != seen[4:8]


def test_workers_see_the_same_items():
    alone = list(itertools.islice(loader(True), 6))
    assert list(itertools.islice(loader(True, num_workers=2), 6)) == alone


def test_it_is_built_as_the_runner_does():
    made = DATA_SAMPLERS.build(
        {'type': 'ResumableSampler', 'shuffle': False},
        default_args={'dataset': range(3), 'seed': 1},
    )
    assert isinstance(made, ResumableSampler)
    assert list(made) == [0, 1, 2]
    with pytest.raises(ValueError, match='empty'):
        ResumableSampler([])
