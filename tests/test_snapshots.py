"""Snapshots: complete or not there, whatever happens to the process or the disk."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from medplib.errors import CheckpointError, MedPLIBError
from medplib.training import snapshots
from medplib.training.snapshots import begin, clean, newest, prune, read_manifest, seal, step_folder

WRITER = """
import sys
from pathlib import Path
from medplib.training.snapshots import begin, clean, newest, prune, seal, step_folder
run = Path(sys.argv[1])
clean(run)
last = newest(run)
step = int(last.name[5:]) if last else 0
while True:
    step += 1
    target = step_folder(run, step)
    staging = begin(target)
    (staging / "shards").mkdir()
    for i in range(4):
        (staging / "shards" / f"{i}.bin").write_bytes(step.to_bytes(4, "big") * 50_000)
    seal(staging, target, {"step": step})
    prune(run, 2)
"""


def write(run, step, content=b"weights"):
    target = step_folder(run, step)
    staging = begin(target)
    (staging / "a.bin").write_bytes(content)
    seal(staging, target, {"step": step})
    return target


def test_a_snapshot_appears_with_all_its_files_and_their_hashes(tmp_path):
    target = write(tmp_path, 3)
    assert read_manifest(target)["step"] == 3
    assert set(read_manifest(target)["files"]) == {"a.bin"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "no manifest", "cut manifest"])
def test_a_damaged_snapshot_is_passed_over_and_the_error_names_what_is_wrong(tmp_path, damage):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    manifest = bad / snapshots.MANIFEST
    if damage == "changed":
        (bad / "a.bin").write_bytes(b"weightz")
    elif damage == "missing":
        (bad / "a.bin").unlink()
    elif damage == "added":
        (bad / "b.bin").write_bytes(b"")
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:30])
    assert newest(tmp_path) == good
    with pytest.raises(CheckpointError, match="manifest" if "manifest" in damage else r"[ab]\.bin"):
        read_manifest(bad)


def test_an_unfinished_folder_is_no_snapshot_and_is_cleaned_away(tmp_path):
    write(tmp_path, 1)
    staging = begin(step_folder(tmp_path, 2))
    (staging / "a.bin").write_bytes(b"half")
    assert newest(tmp_path).name == "step-00000001"
    clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_prune_keeps_the_newest(tmp_path):
    for step in range(1, 5):
        write(tmp_path, step)
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_what_stood_in_the_place_is_replaced(tmp_path):
    write(tmp_path, 1, b"old")
    target = write(tmp_path, 1, b"new")
    assert (target / "a.bin").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_other_errors_than_the_disks_are_passed_on_and_the_staging_goes(tmp_path):
    target = step_folder(tmp_path, 1)
    staging = begin(target)
    with pytest.raises(KeyError), snapshots.writing(target, staging):
        raise KeyError("x")
    with (
        pytest.raises(MedPLIBError, match=r"Quota.*Nothing that was there is lost\."),
        snapshots.writing(target),
    ):
        raise OSError(122, "Quota exceeded")
    assert list(tmp_path.iterdir()) == []


def test_kill_9_at_any_moment_leaves_the_newest_complete_one(tmp_path):
    rng, before = random.Random(0), 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
        deadline = time.monotonic() + 60
        while not any(p.name > step_folder(tmp_path, before).name for p in snapshots.steps(tmp_path)):
            assert time.monotonic() < deadline, "the writer wrote nothing"
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for folder in snapshots.steps(tmp_path):  # complete, and all its files of one step
            step = read_manifest(folder)["step"]
            for i in range(4):
                assert (folder / "shards" / f"{i}.bin").read_bytes() == step.to_bytes(4, "big") * 50_000
        step = int(newest(tmp_path).name[5:])
        assert step > before
        before = step
