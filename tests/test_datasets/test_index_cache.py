import multiprocessing
import os
import pickle

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import index_cache
from projects.llava_sam2_rl.datasets.index_cache import FOLDER, CachedIndex, cached_index


class Builder:
    def __init__(self, value=1):
        self.calls = 0
        self.value = value

    def __call__(self):
        self.calls += 1
        return {
            'numbers': np.arange(5, dtype=np.int32) * self.value,
            'names': np.array([b'a', b'bcd'], dtype='S3'),
            'nothing': np.zeros((0, 2), np.float32),
        }


@pytest.fixture
def source(tmp_path):
    path = tmp_path / 'data' / 'rows.csv'
    path.parent.mkdir()
    path.write_text('one')
    return path


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(index_cache, 'print_log', lambda text, **kwargs: lines.append(text))
    return lines


def backing(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_the_second_start_maps_what_the_first_built(source):
    build = Builder()
    for _ in range(3):
        index = cached_index([source], build, 'rows')
        assert index['numbers'].tolist() == [0, 1, 2, 3, 4]
        assert index['names'].tolist() == [b'a', b'bcd']
        assert index['nothing'].shape == (0, 2)
        assert isinstance(backing(index['numbers']), np.memmap)
        with pytest.raises(ValueError, match='read-only'):
            index['numbers'][0] = 1
    assert build.calls == 1
    assert index.folder.parent == source.parent / FOLDER
    assert [p.suffix for p in index.folder.parent.iterdir() if p.is_file()] in ([], ['.lock'])


@pytest.mark.parametrize('change', ['size', 'time', 'name', 'version', 'sources'])
def test_anything_that_may_change_the_rows_builds_anew(source, change):
    build = Builder()
    cached_index([source], build, 'rows')
    sources, name, version = [source], 'rows', 1
    if change == 'size':
        stat = source.stat()
        source.write_text('four')
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == 'time':
        os.utime(source, ns=(0, source.stat().st_mtime_ns + 1))
    elif change == 'name':
        name = 'other'
    elif change == 'version':
        version = 2
    else:
        sources = [source, source]
    build.value = 7
    assert cached_index(sources, build, name, version=version)['numbers'][1] == 7
    assert build.calls == 2


def test_a_folder_that_was_moved_keeps_its_index(source, tmp_path):
    build = Builder()
    cached_index([source], build, 'rows')
    source.parent.rename(tmp_path / 'moved')
    cached_index([tmp_path / 'moved' / 'rows.csv'], build, 'rows')
    assert build.calls == 1


@pytest.mark.parametrize('damage', ['cut', 'gone', 'text', 'shapes'])
def test_a_damaged_entry_is_built_anew(source, damage, logged):
    build = Builder()
    folder = cached_index([source], build, 'rows').folder
    array = folder / 'numbers.npy'
    if damage == 'cut':
        array.write_bytes(array.read_bytes()[:-4])
    elif damage == 'gone':
        array.unlink()
    elif damage == 'text':
        array.write_text('no array')
    else:
        (folder / 'shapes.json').write_text('')
    logged.clear()
    assert cached_index([source], build, 'rows')['numbers'].tolist() == [0, 1, 2, 3, 4]
    assert build.calls == 2
    assert 'damaged' in logged[0]
    cached_index([source], build, 'rows')
    assert build.calls == 2
    assert {p.name for p in folder.parent.iterdir()} <= {folder.name, f'{folder.name}.lock'}


def test_a_build_that_fails_leaves_nothing(source):
    def fail():
        raise ValueError('broken row')

    with pytest.raises(ValueError, match='broken row'):
        cached_index([source], fail, 'rows')
    with pytest.raises(ValueError, match='[Oo]bject'):
        cached_index([source], lambda: {'rows': np.array([{}, None])}, 'rows')
    left = [p for p in (source.parent / FOLDER).iterdir() if p.suffix != '.lock']
    assert left == []


def test_a_source_that_changes_meanwhile_stops(source):
    def build():
        source.write_text('longer than before')
        return Builder()()

    with pytest.raises(RuntimeError, match='changed while'):
        cached_index([source], build, 'rows')


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'gone\.csv'):
        cached_index([tmp_path / 'gone.csv'], Builder(), 'rows')
    with pytest.raises(ValueError, match='rows: .*source'):
        cached_index([], Builder(), 'rows')


def test_a_folder_that_cannot_be_written_falls_back_to_the_users_cache(
    source, tmp_path, monkeypatch, logged
):
    monkeypatch.setattr(index_cache.Path, 'home', lambda: tmp_path / 'home')
    monkeypatch.setattr(index_cache, '_fallbacks_told', set())
    # A file where the folder would be: holds for root too, whom permissions do not stop.
    (source.parent / FOLDER).write_text('')
    build = Builder()
    index = cached_index([source], build, 'rows')
    assert index.folder.parent == tmp_path / 'home' / '.cache' / 'llava_sam2_rl'
    cached_index([source], build, 'rows')
    cached_index([source], build, 'more')
    assert build.calls == 2
    assert sum('cannot be written' in line for line in logged) == 1
    with pytest.raises(OSError, match='cache_dir'):
        cached_index([source], build, 'third', cache_dir=source / 'below a file')


def test_an_index_travels_as_its_path(source):
    index = cached_index([source], Builder(), 'rows')
    packed = pickle.dumps(index)
    assert len(packed) < 500
    again = pickle.loads(packed)
    assert isinstance(again, CachedIndex)
    assert again['numbers'].tolist() == index['numbers'].tolist()


def _start(source, calls, arrived, barrier, values):
    class CountedLock(index_cache.FileLock):
        def acquire(self, *args, **kwargs):
            arrived.release()
            return super().acquire(*args, **kwargs)

    index_cache.FileLock = CountedLock

    def build():
        with calls.get_lock():
            calls.value += 1
        # Built only when all four stand at the lock, or would have got past it.
        for _ in range(4):
            assert arrived.acquire(timeout=60)
        return {'numbers': np.arange(1000)}

    barrier.wait(60)
    values.put(int(cached_index([source], build, 'rows')['numbers'].sum()))


def test_processes_that_start_at_once_build_once(source):
    context = multiprocessing.get_context('fork')
    calls, values = context.Value('i', 0), context.Queue()
    arrived, barrier = context.Semaphore(0), context.Barrier(4)
    arguments = (source, calls, arrived, barrier, values)
    workers = [context.Process(target=_start, args=arguments) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [values.get(timeout=90) for _ in workers] == [499500] * 4
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert calls.value == 1


def _crash(source):
    cached_index([source], lambda: os._exit(3), 'rows')


def test_a_crash_while_building_holds_nobody_up(source, monkeypatch, logged):
    worker = multiprocessing.get_context('fork').Process(target=_crash, args=(source,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 3
    # A lock that is still held would be waited for, and then a warning be given.
    monkeypatch.setattr(index_cache, 'LOCK_TIMEOUT', 60.0)
    assert cached_index([source], Builder(), 'rows')['numbers'].sum() == 10
    assert not any('waiting for another process' in line for line in logged)


@pytest.mark.parametrize('error', [NotImplementedError('flock'), None])
def test_without_a_lock_it_builds_all_the_same(source, monkeypatch, error):
    class Lock:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            raise error or index_cache.Timeout('rows.lock')

        def __exit__(self, *args):
            pass

    monkeypatch.setattr(index_cache, 'FileLock', Lock)
    assert cached_index([source], Builder(), 'rows')['numbers'].sum() == 10
