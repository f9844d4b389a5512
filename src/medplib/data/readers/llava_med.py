"""LLaVA-Med: alignment and instruction conversations (`conversations`, also as released: `conversatons`)."""

from __future__ import annotations

import os
import re
from typing import Any

from medplib.conversation import IMAGE
from medplib.data.readers.common import Unusable, find_files, of_split, pair_up, plain, with_suffix
from medplib.data.readers.vqa import Vqa, read_vqa
from medplib.data.recordset import RecordSet

_DOMAINS = {"chest_xray": "X-ray", "ct_scan": "CT", "mri": "MR", "histology": "histopathology"}


def read_llava_med(
    path: str | os.PathLike, split: str | None = None, *, images: str | os.PathLike | None = None
) -> RecordSet:
    """LLaVA-Med's JSON lists, from one file or a folder with alignment/ and instruct/.

    images  the folder or zip with the pictures; by default images/ beside the file or above it
    """
    patterns = ["*.json*", "alignment/*.json*", "instruct/*.json*", "data/*/*.json*"]
    files = of_split(find_files(path, patterns, "LLaVA-Med"), split, "LLaVA-Med")
    return read_vqa("llava_med", files, parse_conversation, images, ("images", "image"))


def parse_conversation(row: Any) -> Vqa:
    """A LLaVA row: id, image (absent: text alone), conversations. Raises Unusable."""
    if not isinstance(row, dict):
        raise Unusable("no conversation")
    turns = []
    for question, answer in pair_up(row.get("conversations", row.get("conversatons"))):
        question, answer = re.sub(rf"\s*{IMAGE}\s*", " ", question).strip(), answer.strip()
        if not question or not answer:
            raise Unusable("empty question or answer")
        plain(question, answer)
        turns.append((question, answer))
    image = row.get("image")
    if image is not None and not isinstance(image, str):
        raise Unusable("no image named", repr(image)[:80])
    domains = row.get("domain") if isinstance(row.get("domain"), dict) else {}
    found = [name for name, true in domains.items() if true]
    modality = _DOMAINS.get(found[0]) if len(found) == 1 else None
    extra = {"id": str(row["id"])} if "id" in row else {}
    return Vqa(tuple(turns), with_suffix(image) if image else None, modality, extra=extra)
