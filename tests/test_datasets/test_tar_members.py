import io
import tarfile

import pytest

from projects.llava_sam2_rl.datasets import tar_members as module
from projects.llava_sam2_rl.datasets.tar_members import read_member, tar_members


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """An archive of ``name: bytes``, or ``name: type`` for what is no plain file."""
    with tarfile.open(path, 'w', format=format) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize('format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_where_they_lie(tmp_path, format):
    long = f'{"d" * 90}/{"n" * 90}.jpg'
    content = {'a.jpg': b'one', 'b.jpg': b'', long: b'x' * 5000, './c.pickle': b'three'}
    path = write_tar(tmp_path / 'x.tar', {**content, 'd': (tarfile.DIRTYPE, '')}, format)
    members = tar_members(path)
    assert [member.name for member in members] == list(content)
    assert all(member.safe for member in members)
    for member in members:
        assert read_member(path, member.offset, member.size) == content[member.name]


def test_links_and_names_that_leave_the_folder_are_marked(tmp_path):
    unsafe = {
        '../up.jpg': b'x',
        'a/../../up.jpg': b'x',
        '/etc/up.jpg': b'x',
        'c:\\up.jpg': b'x',
        '..\\up.jpg': b'x',
        'soft.jpg': (tarfile.SYMTYPE, '/etc/passwd'),
        'hard.jpg': (tarfile.LNKTYPE, '../../x'),
        'device.jpg': (tarfile.CHRTYPE, ''),
    }
    path = write_tar(tmp_path / 'x.tar', {**unsafe, 'good..name.jpg': b'x'})
    members = tar_members(path)
    assert [member.name for member in members if member.safe] == ['good..name.jpg']
    assert len(members) == len(unsafe) + 1
    assert [p.name for p in tmp_path.iterdir()] == ['x.tar']


def test_a_truncated_archive_gives_what_is_whole(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(module, 'print_log', lambda text, **_: said.append(text))
    path = write_tar(tmp_path / 'x.tar', {f'{i}.jpg': bytes([i]) * 2000 for i in range(4)})
    whole = path.read_bytes()
    for keep, names in ((512 + 2048 + 100, ['0.jpg']), (2 * 2560 + 900, ['0.jpg', '1.jpg'])):
        path.write_bytes(whole[:keep])
        assert [member.name for member in tar_members(path)] == names
        assert f'x.tar is damaged or cut short after {len(names)} members' in said.pop()
    path.write_bytes(whole)
    assert len(tar_members(path)) == 4
    assert said == []


@pytest.mark.parametrize(
    'content', [b'', b'\0' * 100, b'nonsense' * 1000, b'\x1f\x8b' + b'x' * 999]
)
def test_what_is_no_archive_has_no_members(tmp_path, content):
    path = tmp_path / 'x.tar'
    path.write_bytes(content)
    assert tar_members(path) == []


def test_a_negative_size_ends_the_reading(tmp_path):
    # Base-256 number: the member after it would be the one before it, for ever.
    path = write_tar(tmp_path / 'x.tar', {'a.jpg': b'one', 'b.jpg': b'two'})
    data = bytearray(path.read_bytes())
    header = 1024
    data[header + 124 : header + 136] = (-1024).to_bytes(12, 'big', signed=True)
    data[header + 148 : header + 156] = b' ' * 8
    data[header + 148 : header + 155] = b'%06o\0' % sum(data[header : header + 512])
    path.write_bytes(data)
    assert [member.name for member in tar_members(path)] == ['a.jpg']


def test_a_member_that_is_too_large_or_gone_is_an_error(tmp_path, monkeypatch):
    path = write_tar(tmp_path / 'x.tar', {'a.jpg': b'one'})
    with pytest.raises(OSError, match='of the 20000 bytes'):
        read_member(path, 512, 20000)
    monkeypatch.setattr(module, 'MAX_MEMBER_BYTES', 2)
    with pytest.raises(ValueError, match='3 bytes'):
        read_member(path, 512, 3)
