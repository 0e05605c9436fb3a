"""Members of tar archives, read in place: nothing is ever extracted."""

from __future__ import annotations

import logging
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from mmengine.logging import print_log

#: Largest member that is read; a picture or a pickle of masks is far smaller.
MAX_MEMBER_BYTES = 256 << 20


@dataclass(frozen=True)
class Member:
    """A file inside an archive.

    Args:
        name: As the archive has it.
        offset: First byte of its contents in the archive.
        size: Bytes.
        safe: Whether it is a plain file whose name stays below the folder it would go to.
    """

    name: str
    offset: int
    size: int
    safe: bool


def tar_members(path: Path) -> list[Member]:
    """What an uncompressed archive holds, without folders.

    One that is cut short, as an unfinished download is, gives the members before the cut and a
    warning in the log, and so does one that is no archive at all.
    """
    members: list[Member] = []
    size = path.stat().st_size
    try:
        # 'r:' opens no compressed archive, which would have to be unpacked to be read.
        with tarfile.open(path, 'r:') as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # It would keep them all.
                if member.isdir():
                    continue
                # With a negative size the next member would be one before this.
                if member.size < 0 or member.offset_data + member.size > size:
                    raise tarfile.ReadError(f'{member.name} of {member.size} bytes')
                members.append(
                    Member(member.name, member.offset_data, member.size, _is_safe(member))
                )
            # tarfile takes a broken header for the end, which is marked by a block of zeros.
            if archive.offset < size and archive.fileobj is not None:
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f'no header at byte {archive.offset}')
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        print_log(
            f'{path} is damaged or cut short after {len(members)} members ({error}): '
            'download it again',
            logger='current',
            level=logging.WARNING,
        )
    return members


def _is_safe(member: tarfile.TarInfo) -> bool:
    # A sparse file's bytes do not lie in one piece; links lead anywhere.
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    windows = PureWindowsPath(member.name)
    climbs = '..' in windows.parts or windows.drive or windows.root
    return plain and not climbs and not PurePosixPath(member.name).is_absolute()


def read_member(path: Path, offset: int, size: int) -> bytes:
    """The contents of a member, by the place that :func:`tar_members` gave.

    Raises:
        ValueError: It is larger than ``MAX_MEMBER_BYTES``.
        OSError: The archive cannot be read, or has become shorter.
    """
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f'{path}: a member of {size} bytes, at most {MAX_MEMBER_BYTES} are read')
    with open(path, 'rb') as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise OSError(f'{path} has {len(data)} of the {size} bytes at {offset}')
    return data
