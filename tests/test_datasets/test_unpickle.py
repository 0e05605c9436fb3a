import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import load_plain_pickle

PLAIN = [
    {'ref_id': 1, 'sentences': [{'sent': 'ä 猫', 'tokens': ['a']}], 'area': 2.5, 'ok': True},
    (None, b'\x00\xff', 1 << 80, {1, 2}, frozenset({3}), bytearray(b'x'), 1 + 2j),
]


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_containers_strings_and_numbers_are_read(tmp_path, protocol):
    path = tmp_path / 'plain.p'
    path.write_bytes(pickle.dumps(PLAIN, protocol=protocol))
    assert load_plain_pickle(path) == load_plain_pickle(str(path)) == PLAIN


def test_a_pickle_of_python_2_is_read():
    # {'raw': 'caf\xc3\xa9', u'sent': u'caf\xe9', 'n': 3L} of Python 2, protocol 2 without memos.
    old = (
        b'\x80\x02}(U\x03rawU\x05caf\xc3\xa9'
        b'X\x04\x00\x00\x00sentX\x05\x00\x00\x00caf\xc3\xa9U\x01n\x8a\x01\x03u.'
    )
    assert load_plain_pickle(io.BytesIO(old)) == {'raw': 'café', 'sent': 'café', 'n': 3}


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_refused_by_name_and_not_run(tmp_path, protocol):
    target = tmp_path / 'made'
    (tmp_path / 'bad.p').write_bytes(pickle.dumps([1, Runs(str(target))], protocol=protocol))
    with pytest.raises(pickle.UnpicklingError, match=r'bad\.p: .*(posix|nt)\.mkdir'):
        load_plain_pickle(tmp_path / 'bad.p')
    assert not target.exists()
    # The same bytes do run where nothing stands in the way.
    pickle.loads((tmp_path / 'bad.p').read_bytes())
    assert target.exists()


@pytest.mark.parametrize(
    ('code', 'named'),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", r'builtins\.eval'),
        (b"c__builtin__\ngetattr\n(S'1'\nS'x'\ntR.", r'__builtin__\.getattr'),
        (b'cbuiltins\nset.__init__\n.', r'builtins\.set\.__init__'),
        (b'\x80\x04\x8c\x08builtins\x8c\x0cset.__init__\x93.', r'builtins\.set\.__init__'),
        (b'c_codecs\ndecode\n.', r'_codecs\.decode'),
        (b"c_codecs\nencode\n(S'1'\nS'rot13'\ntR.", 'rot13'),
        (b'cbuiltins\nbytearray\n(L40000000000L\ntR.', 'not made of bytes'),
    ],
)
def test_globals_beside_the_few_are_refused(code, named):
    with pytest.raises(pickle.UnpicklingError, match=named):
        load_plain_pickle(io.BytesIO(code))


@pytest.mark.parametrize('value', [np.float64(1), np.zeros(2), OrderedDict(a=1), range(3)])
def test_other_classes_are_refused(value):
    with pytest.raises(pickle.UnpicklingError, match='refuses to load'):
        load_plain_pickle(io.BytesIO(pickle.dumps(value)))


@pytest.mark.parametrize('code', [b'', b'no pickle', pickle.dumps(PLAIN)[:-20]])
def test_broken_files_are_named(tmp_path, code):
    (tmp_path / 'cut.p').write_bytes(code)
    with pytest.raises(pickle.UnpicklingError, match=r'cut\.p'):
        load_plain_pickle(tmp_path / 'cut.p')
