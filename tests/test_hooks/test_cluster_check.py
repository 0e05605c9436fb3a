"""Ranks that run different software, and more ranks than data, are refused and named."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata

import numpy
import torch

from projects.llava_sam2_rl.hooks import ClusterCheckHook, cluster_check
from test_hooks import toy
from test_hooks.processes import ranks


def _train(rank, work_dir, change=None):
    if rank == 1 and change is not None:
        change()
    toy.build(work_dir, hooks=[{'type': ClusterCheckHook}], max_iters=2).train()


def test_the_same_software_trains(tmp_path):
    codes, printed = ranks(_train, 2, tmp_path, tmp_path / 'run')
    assert codes == [0, 0], printed
    assert (tmp_path / 'run/iter_2.pth').is_file()


def _another_version():
    version = metadata.version
    metadata.version = lambda name: '4.0.1' if name == 'transformers' else version(name)


def test_a_rank_with_another_version_is_refused_by_all_and_named(tmp_path):
    codes, printed = ranks(_train, 2, tmp_path, tmp_path / 'run', _another_version)
    assert codes == [1, 1]
    own = metadata.version('transformers')
    host = platform.node()
    for text in printed:
        assert 'RuntimeError: The ranks run different software' in text
        assert f'rank 1 on {host} has transformers 4.0.1, rank 0 on {host} has {own}' in text
        assert 'Install the same versions on every node' in text
        assert 'torch ' not in text.split('different software')[1]  # only what differs
    assert not list(tmp_path.glob('run/*.pth'))


def _not_installed():
    version = metadata.version

    def without_nltk(name):
        if name == 'nltk':
            raise metadata.PackageNotFoundError(name)
        return version(name)

    metadata.version = without_nltk


def test_a_rank_without_a_package_is_refused(tmp_path):
    codes, printed = ranks(_train, 2, tmp_path, tmp_path / 'run', _not_installed)
    assert codes == [1, 1]
    assert 'has nltk None, rank 0' in printed[0]


def _other_sources():
    cluster_check._digest = lambda folder: 'abc'


def test_a_rank_with_other_sources_is_refused(tmp_path):
    codes, printed = ranks(_train, 2, tmp_path, tmp_path / 'run', _other_sources)
    assert codes == [1, 1]
    assert 'has this project (digest of its sources) abc, rank 0' in printed[1]


def _train_on_one_sample(rank, work_dir):
    toy.RandomData.__len__ = lambda self: 1
    toy.build(work_dir, hooks=[{'type': ClusterCheckHook}], max_iters=2).train()


def test_more_ranks_than_data_are_refused_with_both_numbers(tmp_path):
    codes, printed = ranks(_train_on_one_sample, 2, tmp_path, tmp_path / 'run')
    assert codes == [1, 1]
    for text in printed:
        assert '2 ranks, but the training data has 1 samples' in text
        assert 'Start at most 1 ranks' in text


def test_versions_are_those_of_what_is_imported():
    found = cluster_check.versions(['torch', 'numpy', 'no-such-package'])
    assert found['Python'] == platform.python_version()
    assert found['torch'] == torch.__version__.split('+')[0] or found['torch'] == torch.__version__
    assert found['numpy'] == numpy.__version__
    assert found['no-such-package'] is None
    assert set(cluster_check.PACKAGES) >= {'torch', 'transformers', 'deepspeed', 'numpy'}


def test_the_digest_changes_with_a_source_and_its_name_only(tmp_path):
    folder = tmp_path / 'package'
    (folder / 'inner').mkdir(parents=True)
    (folder / 'a.py').write_text('x = 1\n')
    (folder / 'inner/b.py').write_text('y = 2\n')
    expected = hashlib.sha256(b'a.py\0x = 1\ninner/b.py\0y = 2\n').hexdigest()
    digest = cluster_check._digest(folder)
    assert expected.startswith(digest)
    assert len(digest) == 12
    (folder / 'notes.txt').write_text('no source')
    assert cluster_check._digest(folder) == digest
    (folder / 'a.py').write_text('x = 2\n')
    changed = cluster_check._digest(folder)
    assert changed != digest
    (folder / 'a.py').rename(folder / 'c.py')
    assert cluster_check._digest(folder) not in (digest, changed)
