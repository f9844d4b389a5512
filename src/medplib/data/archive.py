"""Archive: files read straight from a zip with millions of members, whose table of contents stays on disk.

Python's zipfile keeps an object of about 600 bytes per member, 10 GB for SA-Med2D-20M's twenty million files;
here a member costs 16 bytes: a hash of its name and where its entry stands. Format: PKWARE's APPNOTE.TXT 6.3.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medplib.data.rows import Descriptor
from medplib.errors import InputError

_END, _END64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s5H3I2H")
MAX_MEMBER = 1 << 30  # bytes of one member, packed or not
_READ = 1 << 22
_FULL = 0xFFFFFFFF


class Member(NamedTuple):
    """One entry of the table of contents. Sizes in bytes; `method` 0 is stored, 8 deflated."""

    name: str
    method: int
    crc: int
    packed: int
    size: int
    header: int
    encrypted: bool


class Archive:
    """A zip file, opened once; safe in threads, and after a fork. Raises InputError for what is no whole zip.

    Members are found by name, as in `"images/a.png" in archive` and `archive.read("images/a.png")`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        refuse_split(self.path)
        try:
            self._file = Descriptor(self.path)
        except OSError as error:
            raise InputError(
                f"The archive {self.path!r} cannot be opened: {error.strerror}. Check the path."
            ) from error
        count, self._size, self._start = self._find_contents()
        hashes, places = np.empty(count, np.uint64), np.empty(count, np.uint64)
        found = 0
        for place, member in self._entries():
            if found == count:
                break
            hashes[found], places[found] = _hash(member.name), place
            found += 1
        if found != count:
            raise self._damaged(f"its table of contents lists {found} of {count} files")
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._places = hashes[order], places[order]

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory."""
        return self._hashes.nbytes + self._places.nbytes

    def __contains__(self, name: str) -> bool:
        """By the 64-bit hash of the name alone, without a look at the file."""
        wanted = np.uint64(_hash(name))
        at = int(np.searchsorted(self._hashes, wanted))
        return at < len(self._hashes) and self._hashes[at] == wanted

    def names(self) -> Iterator[str]:
        """The names of all files, in the archive's order; folders are left out."""
        return (member.name for _, member in self._entries() if not member.name.endswith("/"))

    def find(self, name: str) -> Member | None:
        """What the table of contents says about a member; the last of that name."""
        wanted = np.uint64(_hash(name))
        last = None
        for at in range(int(np.searchsorted(self._hashes, wanted)), len(self._hashes)):
            if self._hashes[at] != wanted:
                break
            place = int(self._places[at])
            member, length = self._parse(self._file.read(1024, place), 0)
            if length > 1024:
                member, _ = self._parse(self._file.read(length, place), 0)
            if member.name == name:
                last = member
        return last

    def read(self, name: str) -> bytes:
        """The unpacked bytes of a member. Raises KeyError, or InputError when they are damaged."""
        member = self.find(name)
        if member is None:
            raise KeyError(f"there is no {name!r} in the archive")
        if max(member.packed, member.size) > MAX_MEMBER:
            raise InputError(
                f"{name!r} in {self.path!r} has {member.size} bytes; at most {MAX_MEMBER} are read at once. "
                "Unpack the archive and give the folder."
            )
        data = self._file.read(member.packed, self.data_start(member))
        if len(data) != member.packed:
            raise self._damaged(f"{name!r} is cut short")
        if member.method == 8:
            unpack = zlib.decompressobj(-15)
            try:
                data = unpack.decompress(data, member.size + 1)
            except zlib.error as error:
                raise self._damaged(f"{name!r} cannot be unpacked ({error})") from error
        if len(data) != member.size or zlib.crc32(data) != member.crc:
            raise self._damaged(f"{name!r} does not match its checksum")
        return data

    def unpack_to(self, name: str, target: Path) -> None:
        """Write a member of any size to a file, piece by piece. Raises KeyError, or InputError if damaged."""
        member = self.find(name)
        if member is None:
            raise KeyError(f"there is no {name!r} in the archive")
        place, unpack, crc, left = self.data_start(member), zlib.decompressobj(-15), 0, member.packed
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            try:
                while left:
                    piece = self._file.read(min(_READ, left), place)
                    if not piece:
                        raise self._damaged(f"{name!r} is cut short")
                    place, left = place + len(piece), left - len(piece)
                    piece = unpack.decompress(piece) if member.method == 8 else piece
                    crc = zlib.crc32(piece, crc)
                    file.write(piece)
                if crc != member.crc:
                    raise self._damaged(f"{name!r} does not match its checksum")
                os.replace(file.name, target)
            except BaseException as error:
                os.unlink(file.name)
                if isinstance(error, zlib.error):
                    raise self._damaged(f"{name!r} cannot be unpacked ({error})") from error
                raise

    def data_start(self, member: Member) -> int:
        """Where the member's packed bytes begin in the file. Raises InputError if they cannot be read."""
        if member.encrypted or member.method not in (0, 8):
            how = "encrypted" if member.encrypted else f"packed by method {member.method}"
            raise InputError(
                f"{member.name!r} in {self.path!r} is {how}; only stored and deflated members are read. "
                "Unpack the archive and give the folder."
            )
        header = self._file.read(_LOCAL.size, member.header)
        if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
            raise self._damaged(f"{member.name!r} is not where the table of contents says")
        *_, name_length, extra_length = _LOCAL.unpack(header)
        return member.header + _LOCAL.size + name_length + extra_length

    def _find_contents(self) -> tuple[int, int, int]:
        """(files, bytes, place) of the table of contents."""
        size = os.fstat(self._file.number).st_size
        tail_start = max(0, size - 22 - 0xFFFF)
        tail = self._file.read(size - tail_start, tail_start)
        at = tail.rfind(_END)
        if at < 0 or len(tail) - at < 22:
            raise self._damaged("it has no table of contents")
        disk, first, _, count, length, start, _ = struct.unpack_from("<4H2IH", tail, at + 4)
        if disk == 0xFFFF or count == 0xFFFF or _FULL in (length, start):
            place = tail_start + at - 20
            locator = self._file.read(20, place) if place >= 0 else b""
            if locator[:4] == _LOCATOR:
                disk, end64, disks = struct.unpack_from("<IQI", locator, 4)
                record = self._file.read(56, end64)
                if disks > 1:
                    raise _split(self.path)
                if len(record) < 56 or record[:4] != _END64:
                    raise self._damaged("its large table of contents is not where it should be")
                disk, first, _, count, length, start = struct.unpack_from("<2I4Q", record, 16)
        if disk or first:
            raise _split(self.path)
        if start + length > size or count * 46 > length:
            raise self._damaged("its table of contents is cut short")
        return count, length, start

    def _entries(self) -> Iterator[tuple[int, Member]]:
        """(place in the file, member) of the whole table, read piece by piece."""
        place, end, buffer, at = self._start, self._start + self._size, b"", 0
        while True:
            if len(buffer) - at < 46 + 3 * 0xFFFF and place + len(buffer) < end:
                place += at
                buffer, at = self._file.read(min(_READ, end - place), place), 0
            if at + 46 > len(buffer):
                return
            member, length = self._parse(buffer, at)
            yield place + at, member
            at += length

    def _parse(self, data: bytes, at: int) -> tuple[Member, int]:
        """The entry at `at`, and its length."""
        if len(data) < at + 46:
            raise self._damaged("its table of contents is cut short")
        (mark, _, _, flags, method, _, _, crc, packed, size, *lengths, _, _, _, header) = _ENTRY.unpack_from(
            data, at
        )
        if mark != b"PK\x01\x02":
            raise self._damaged("its table of contents is garbled")
        name_length, extra_length, comment_length = lengths
        body = at + 46
        name = data[body : body + name_length].decode("utf-8" if flags & 0x800 else "cp437", "replace")
        if _FULL in (packed, size, header) and len(data) >= body + name_length + extra_length:
            extra = data[body + name_length : body + name_length + extra_length]
            size, packed, header = self._large(extra, size, packed, header)
        member = Member(name, method, crc, packed, size, header, bool(flags & 1))
        return member, 46 + name_length + extra_length + comment_length

    def _large(self, extra: bytes, *values: int) -> list[int]:
        """Values of 64 bits from the extra field 1, in the place of those that are full."""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            if kind == 1:
                numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
                return [next(numbers, value) if value == _FULL else value for value in values]
            at += 4 + length
        raise self._damaged("an entry lacks its large sizes")

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"{self.path!r} is not a whole zip archive: {why}. It may be cut short, or one part of a split "
            f"archive; fetch it again, or join its parts ({_JOIN.format('ARCHIVE')})."
        )


@lru_cache(maxsize=16)
def _open_archive(path: str, modified: int, size: int) -> Archive:
    del modified, size  # a changed file is another archive
    return Archive(path)


def archive_at(path: str) -> Archive:
    """The archive at `path` as it is now, kept open. Raises InputError if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return Archive(path)  # says what is wrong
    return _open_archive(path, status.st_mtime_ns, status.st_size)


def refuse_split(path: str | os.PathLike) -> None:
    """Raise InputError, with the command that joins them, if `path` is or has parts of a split archive."""
    file = Path(path)
    suffix = file.suffix.lower()
    if suffix[1:2] == "z" and suffix[2:].isdigit():
        raise _split(os.fspath(file))
    if suffix[1:].isdigit() and file.stem.lower().endswith(".zip"):
        raise _split(os.fspath(file))
    if suffix == ".zip" and any(file.with_suffix(end).exists() for end in (".z01", ".Z01")):
        raise _split(os.fspath(file))


_JOIN = "zip -s 0 {0}.zip --out whole.zip"


def _split(path: str) -> InputError:
    file = Path(path)
    if file.suffix[1:].isdigit():  # name.zip.001, name.zip.002
        how, stem = "cat {0}.zip.* > whole.zip", file.name[: -len(file.suffix) - 4]
    else:
        how, stem = _JOIN, file.stem
    return InputError(
        f"{path!r} is one part of a split archive ({stem}.z01, ...). Put all parts into one folder and join "
        f"them there, `{how.format(stem)}`, then give whole.zip."
    )


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
