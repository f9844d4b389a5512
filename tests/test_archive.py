"""Archive: the same bytes as Python's zipfile gives, in little memory; what is no whole zip is refused."""

import os
import pickle
import threading
import tracemalloc
import zipfile

import pytest

from medplib.data.archive import Archive, refuse_split
from medplib.data.files import File
from medplib.errors import InputError


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("a/stored.bin", b"stored" * 10)
        out.writestr("a/deflated.bin", b"deflated" * 1000, zipfile.ZIP_DEFLATED)
        out.writestr("a/ümlaut.bin", b"")
        out.writestr("twice.bin", b"first")
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("twice.bin", b"second")
        out.mkdir("a/empty")
    return path


def test_reads_what_zipfile_reads(archive):
    mine = Archive(archive)
    with zipfile.ZipFile(archive) as theirs:
        assert list(mine.names()) == [name for name in theirs.namelist() if not name.endswith("/")]
        for name in theirs.namelist():
            assert mine.read(name) == theirs.read(name)
    assert mine.read("twice.bin") == b"second"
    assert "a/ümlaut.bin" in mine
    assert "a/other.bin" not in mine
    with pytest.raises(KeyError, match=r"other\.bin"):
        mine.read("a/other.bin")


def test_reads_large_offsets_and_sizes(tmp_path):
    path = tmp_path / "large.zip"
    with zipfile.ZipFile(path, "w") as out:
        with out.open("a.bin", "w", force_zip64=True) as member:
            member.write(b"abc")
        out.writestr("b.bin", b"def")
        out.filelist[1].extract_version = 45
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x05\x06")  # the same table, as a zip64 end record says it
    count, size, start = 2, *(int.from_bytes(data[at + i : at + i + 4], "little") for i in (12, 16))
    end64 = (
        b"PK\x06\x06" + (44).to_bytes(8, "little") + b"\x2d\0\x2d\0" + bytes(8)
        + b"".join(number.to_bytes(8, "little") for number in (count, count, size, start))
    )  # fmt: skip
    locator = b"PK\x06\x07" + bytes(4) + at.to_bytes(8, "little") + (1).to_bytes(4, "little")
    path.write_bytes(data[:at] + end64 + locator + b"PK\x05\x06" + bytes(4) + b"\xff" * 12 + bytes(2))
    archive = Archive(path)
    assert [archive.read(name) for name in archive.names()] == [b"abc", b"def"]


def test_a_member_costs_16_bytes(tmp_path):
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as out:
        for i in range(5000):
            out.writestr(f"images/ct_00--Set--case{i}--x_0000.png", b"")
    tracemalloc.start()
    archive = Archive(path)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert archive.nbytes == 16 * 5000
    assert kept < 17 * 5000 + 20_000


def test_threads_and_forks_read_at_once(archive):
    file = File(str(archive), "a/deflated.bin")
    results = []
    threads = [threading.Thread(target=lambda: results.append(file.read())) for _ in range(8)]
    for thread in threads:
        thread.start()
    if (child := os.fork()) == 0:
        os._exit(0 if file.read() == b"deflated" * 1000 else 1)
    assert os.waitpid(child, 0)[1] == 0
    for thread in threads:
        thread.join()
    assert results == [b"deflated" * 1000] * 8
    assert pickle.loads(pickle.dumps(file)).read() == b"deflated" * 1000  # noqa: S301


def test_unpacks_a_member_to_a_file(archive, tmp_path):
    Archive(archive).unpack_to("a/deflated.bin", tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == b"deflated" * 1000
    with pytest.raises(KeyError):
        Archive(archive).unpack_to("gone", tmp_path / "gone.bin")
    assert not (tmp_path / "gone.bin").exists()


@pytest.mark.parametrize("name", ["set.z01", "set.Z12", "set.zip.001"])
def test_a_part_of_a_split_archive_is_named_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    remedy = (
        r"cat set\.zip\.\* > whole\.zip" if name.endswith("001") else r"zip -s 0 set\.zip --out whole\.zip"
    )
    with pytest.raises(InputError, match=remedy):
        Archive(tmp_path / name)


def test_the_last_part_beside_the_others_is_refused_too(archive, tmp_path):
    refuse_split(archive)
    (tmp_path / "all.z01").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"zip -s 0 all\.zip --out whole\.zip"):
        Archive(archive)


def test_the_last_part_alone_is_refused(archive):
    data = bytearray(archive.read_bytes())
    at = data.rfind(b"PK\x05\x06")
    data[at + 4] = 3  # this is the fourth disk
    archive.write_bytes(data)
    with pytest.raises(InputError, match="one part of a split archive"):
        Archive(archive)


def test_damage_is_an_input_error(archive):
    data = archive.read_bytes()
    for length in range(0, len(data), 37):
        archive.write_bytes(data[:length])
        with pytest.raises(InputError, match="not a whole zip"):
            Archive(archive)
    broken = bytearray(data)
    broken[data.index(b"storedstored")] ^= 1
    archive.write_bytes(broken)
    with pytest.raises(InputError, match="checksum"):
        Archive(archive).read("a/stored.bin")


def test_encrypted_and_other_methods_are_named(tmp_path):
    path = tmp_path / "lzma.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as out:
        out.writestr("a.bin", b"abc")
    with pytest.raises(InputError, match="packed by method 14"):
        Archive(path).read("a.bin")
