"""Folders that are complete or not there: written beside their place, hashed, moved in by one rename.

    staging = begin(Path("run/vqa/step-00000500"))
    ...                                              # write files into `staging`
    seal(staging, target, {"step": 500})             # manifest.json last, then the rename
    newest(Path("run/vqa"))                          # the newest folder whose manifest and files agree

A process killed at any moment leaves at most a folder with another name, which `clean` removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medplib.errors import CheckpointError, MedPLIBError

MANIFEST = "manifest.json"
FORMAT = 1
_STAGING, _OLD = ".incoming-", ".outgoing-"
_STEP = re.compile(r"step-(\d{8})")


def step_folder(run: Path, step: int) -> Path:
    """Where the snapshot of a step is kept."""
    return run / f"step-{step:08d}"


def begin(target: Path) -> Path:
    """An empty folder beside `target` to write into. Raises MedPLIBError where that cannot be."""
    staging = target.with_name(_STAGING + target.name)
    with writing(target):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    return staging


def seal(staging: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest (`facts` and the sha256 of every file) and move the folder to `target`.

    All files reach the disk before the manifest, and the manifest before the rename. What stood at `target`
    is replaced. Raises MedPLIBError, and `target` is as before.
    """
    with writing(target, staging):
        files = {path.relative_to(staging).as_posix(): _hash(path, sync=True) for path in _files(staging)}
        content = {"format": FORMAT, **facts, "files": files}
        manifest = staging / MANIFEST
        manifest.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        for path in (manifest, *(p for p in staging.rglob("*") if p.is_dir()), staging):
            _sync(path)
        old = target.with_name(_OLD + target.name)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        staging.rename(target)
        _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all there and unchanged. Raises CheckpointError otherwise."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{str(folder)!r} has no readable {MANIFEST} ({error!r}); it is not complete."
        ) from error
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{str(folder)!r} has format {content.get('format')!r}, this version reads {FORMAT}."
        )
    present = {p.relative_to(folder).as_posix() for p in _files(folder)} - {MANIFEST}
    for name in sorted(present ^ set(files)):
        raise CheckpointError(
            f"{str(folder)!r}: {name} is {'missing' if name in files else 'not in the manifest'}."
        )
    for name, digest in files.items():
        if _hash(folder / name) != digest:
            raise CheckpointError(
                f"{str(folder / name)!r} is not the file that was written: its SHA-256 differs."
            )
    return content


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What `read_manifest` gives, None where it would raise."""
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None


def is_complete(folder: Path) -> bool:
    """Whether `read_manifest` would succeed."""
    return manifest_of(folder) is not None


def newest(run: Path) -> Path | None:
    """The complete snapshot with the highest step, None where there is none."""
    return next((folder for folder in reversed(steps(run)) if is_complete(folder)), None)


def steps(run: Path) -> list[Path]:
    """The snapshot folders of a run, complete or not, by step."""
    return (
        sorted(p for p in run.glob("step-*") if _STEP.fullmatch(p.name) and p.is_dir())
        if run.is_dir()
        else []
    )


def prune(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest complete snapshots. A failure to remove is no failure."""
    complete = [folder for folder in steps(run) if (folder / MANIFEST).is_file()]
    for folder in complete[: max(0, len(complete) - keep)]:
        gone = folder.with_name(_OLD + folder.name)
        with contextlib.suppress(OSError):
            folder.rename(gone)  # first out of sight: a half-removed folder must not look like a snapshot
        shutil.rmtree(gone, ignore_errors=True)


def clean(run: Path) -> None:
    """Remove what killed processes left behind."""
    for prefix in (_STAGING, _OLD):
        for path in run.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raise MedPLIBError now, not after an hour, if the folder cannot be made or written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{_STAGING}probe"
        probe.write_bytes(b"medplib")
        probe.unlink()


@contextlib.contextmanager
def writing(target: Path, staging: Path | None = None) -> Iterator[None]:
    """Turn what a disk can do into one clear error; whatever was being written is taken away again."""
    try:
        yield
    except Exception as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        if not _is_disk_error(error):
            raise
        kept = newest(target.parent)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        left = f": the newest complete snapshot is {str(kept)!r}" if kept else ""
        raise MedPLIBError(
            f"{str(target)!r} could not be written ({reason}). Nothing that was there is lost{left}. "
            "Make room or choose another folder, then run the same command again."
        ) from error


def _is_disk_error(error: Exception) -> bool:
    """An OSError, or what torch and safetensors make of one."""
    text = str(error)
    return isinstance(error, OSError) or bool(
        re.search(
            r"No space left|Read-only file system|PytorchStreamWriter|os error|I/O error|iostream", text
        )
    )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)


def _hash(path: Path, sync: bool = False) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if sync:
                os.fsync(file.fileno())
            return digest
    except FileNotFoundError:
        return "absent"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
