"""Results as JSON lines with an "id" each, added one by one, so that a run that was stopped can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from medplib.errors import InputError


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """{id: result} of an earlier run; a last line that was not written to its end is taken away.

    Raises InputError for a file that holds something else.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    results = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            results[str(record["id"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"Line {number} of {str(path)!r} is no result ({error!r}); give another --out."
            ) from error
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return results


def append_line(path: Path, line: str) -> None:
    """Add a line, on the disk before this returns. The folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
