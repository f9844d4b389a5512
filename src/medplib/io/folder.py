"""Writing several files into a folder all or nothing: they are made in a hidden folder and then moved."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from medplib.errors import InputError, MedPLIBError


def write_together(
    folder: str | os.PathLike, files: dict[str, bytes], is_ours: Callable[[Path], bool]
) -> list[Path]:
    """Write `files` (name -> content) into `folder`, which is made if need be; returns their paths.

    Files already there that `is_ours` calls ours are taken away, also those that get no successor; other
    files stay. If anything fails the folder is as it was before. The last of `files` appears last. Raises
    InputError if a foreign file or something that is no folder is in the way, MedPLIBError if the folder
    cannot be written (no right, disk full).
    """
    if not isinstance(folder, str | os.PathLike):
        raise InputError(f"Give the path of a folder to save in, got {folder!r}.")
    target = Path(folder).expanduser()
    try:
        target = target.resolve()
        if target.exists() and not target.is_dir():
            raise InputError(
                f"The answer cannot be saved in {os.fspath(folder)!r}: it is a file, not a folder."
            )
        old = [path for path in sorted(target.iterdir()) if is_ours(path)] if target.exists() else []
        for name in files:
            if (target / name).exists() and target / name not in old:
                raise InputError(
                    f"{os.fspath(folder)!r} already holds a {name} that medplib did not write. "
                    "Move it away or choose another folder."
                )
        if target.exists():
            _replace(target, files, old)
        else:
            _create(target, files)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, MedPLIBError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise MedPLIBError(
            f"The answer could not be saved in {os.fspath(folder)!r} ({reason}); nothing was changed there. "
            "Choose a folder that can be written and has free space."
        ) from error
    return [target / name for name in files]


def _create(target: Path, files: dict[str, bytes]) -> None:
    """A folder that does not exist: filled beside its place, then renamed in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _hidden_folder(target.parent) as staging:
        new = staging / "new"
        new.mkdir()  # with the rights of an ordinary folder
        _fill(new, files)
        new.rename(target)


def _replace(target: Path, files: dict[str, bytes], old: list[Path]) -> None:
    """A folder that exists: all is written inside it first (same disk), then old and new change places."""
    with _hidden_folder(target) as staging:
        new, aside = staging / "new", staging / "old"
        new.mkdir()
        aside.mkdir()
        _fill(new, files)
        moved: list[tuple[Path, Path]] = []  # (from, to), undone in reverse
        try:
            for path in old:
                path.rename(aside / path.name)
                moved.append((path, aside / path.name))
            for name in files:
                (new / name).rename(target / name)
                moved.append((new / name, target / name))
        except BaseException:
            for source, destination in reversed(moved):
                destination.rename(source)
            raise


def _fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        with (folder / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk is noticed here, before anything changes


@contextlib.contextmanager
def _hidden_folder(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".medplib-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
