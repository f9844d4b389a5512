"""One question and its answer -> figures: questions of a record, masks paired, a row of plain values.

H, W height and width of the original image, M masks that are right, F findings of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medplib.conversation import REGION, SEG
from medplib.data.record import Record
from medplib.errors import InputError
from medplib.evaluation import official
from medplib.evaluation.metrics import dice, iou
from medplib.evaluation.text import agrees, chosen, normalize, overlap
from medplib.io import rle

if TYPE_CHECKING:
    from medplib.results import Answer, Finding
    from medplib.sample import Sample

PROTOCOLS = ("medplib", "official")


def check_protocol(protocol: str) -> None:
    """Raises InputError for a protocol that is none."""
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}.")


@dataclass(frozen=True)
class Question:
    """A turn of a record, asked after the turns before it with their right answers.

    names: of the M masks, "" where the record has none. task: "grounding" (masks to draw), "absent" (a
    grounding conversation's question without mask), "region" or "vqa".
    """

    record: Record
    turn: int
    names: tuple[str, ...]
    task: str

    @property
    def reference(self) -> str:
        """The right answer in words."""
        return self.record.turns[self.turn][1]

    def sample(self, images: Sequence[np.ndarray]) -> Sample:
        """What the model is asked; `images` are those of the record, (H, W, 3) each."""
        from medplib.sample import Sample

        turns = self.record.turns[: self.turn + 1]
        size = images[-1].shape[:2] if images else (0, 0)
        regions = self.record.load_regions(size, slice(sum(q.count(REGION) for q, _ in turns)))
        last = max(0, len(images) - 1)
        return Sample(images, [*turns[:-1], (turns[-1][0], None)], regions, [last] * len(regions))

    def load_masks(self, size: tuple[int, int]) -> list[np.ndarray]:
        """bool (H, W) for each of the M masks. Raises InputError, naming the file."""
        first = sum(answer.count(SEG) for _, answer in self.record.turns[: self.turn])
        return self.record.load_masks(size, slice(first, first + len(self.names)))


def questions_of(record: Record) -> list[Question]:
    """A question for each turn of a record."""
    grounding = bool(record.masks) or record.extra.get("kind") == "grounding"
    labels = record.labels if len(record.labels) >= len(record.masks) else ("",) * len(record.masks)
    first, questions = 0, []
    for turn, (question, answer) in enumerate(record.turns):
        count = answer.count(SEG)
        written = re.findall(r"(?:<ref>([^<]*)</ref>\s*)?<SEG>", answer)
        known = labels[first : first + count]
        names = tuple(w.strip() or name for w, name in zip(written, known, strict=True))
        asked = "absent" if grounding else "region" if REGION in question else "vqa"
        questions.append(Question(record, turn, names, "grounding" if count else asked))
        first += count
    return questions


def score(question: Question, answer: Answer, protocol: str = "medplib") -> dict[str, Any]:
    """What was asked, answered and drawn, and how well: plain values for JSON, masks as COCO RLE.

    "official" scores the first mask alone, by the published arithmetic; the published text metrics are sums
    over all answers and are made from these rows later. Raises InputError for a mask that cannot be read.
    """
    record = question.record
    row = {
        "task": question.task,
        "source": record.source,
        "modality": record.modality,
        "dataset": record.extra.get("dataset"),
        "split": record.split,
        "case": record.case,
        "type": record.answer_type,
        "question": record.turns[question.turn][0],
        "reference": question.reference,
        "answer": answer.text,
        "drawn": len(answer.findings),
    }
    if question.task == "grounding":
        targets = question.load_masks(answer.images[-1].shape[:2])
        judge = _official_masks if protocol == "official" else _masks
        row["masks"] = judge(question.names, targets, answer.findings)
    elif question.task != "absent":
        row |= _words(question, answer.text)
    row["findings"] = [finding.to_dict() for finding in answer.findings]
    return row


def _masks(
    names: Sequence[str], targets: Sequence[np.ndarray], findings: Sequence[Finding]
) -> list[dict[str, Any]]:
    pairs = pair(names, targets, findings)
    out = []
    for i, (name, target) in enumerate(zip(names, targets, strict=True)):
        mask = findings[pairs[i]].mask if i in pairs else np.zeros_like(target)
        figures = {"dice": dice(mask, target), "iou": iou(mask, target), "drawn": i in pairs}
        pixels = [int(m.sum()) for m in (mask & target, mask, target)]  # of both, drawn, right
        out.append({"name": name, **figures, "pixels": pixels})
    return out


def _official_masks(
    names: Sequence[str], targets: Sequence[np.ndarray], findings: Sequence[Finding]
) -> list[dict[str, Any]]:
    overlapped = official.mask_iou(findings[0].mask if findings else None, targets[0])
    figures = {"dice": 2 * overlapped / (1 + overlapped), "iou": overlapped, "drawn": bool(findings)}
    return [{"name": names[0], **figures}]


def pair(names: Sequence[str], targets: Sequence[np.ndarray], findings: Sequence[Finding]) -> dict[int, int]:
    """{number of a target: number of the finding that stands for it}; each finding stands for one.

    A finding goes to a target of its own name; among those, and then among what is left, pairs are taken from
    the greatest Dice down, so that a name in other words, or none, costs nothing.
    """
    called = [normalize(finding.label) for finding in findings]
    same = np.array([[normalize(name) == label != "" for label in called] for name in names], bool)
    overlaps = np.array([[dice(f.mask, target) for f in findings] for target in targets], float)
    pairs: dict[int, int] = {}
    free = np.ones((len(targets), len(findings)), bool)
    for allowed in (same, np.ones_like(free)):
        while findings and (left := free & allowed).any():
            i, j = np.unravel_index(np.where(left, overlaps, -1).argmax(), left.shape)
            pairs[int(i)] = int(j)
            free[i, :] = free[:, j] = False
    return pairs


def _words(question: Question, text: str) -> dict[str, Any]:
    record, reference = question.record, question.reference
    precision, recall, f1 = overlap(text, reference)
    row: dict[str, Any] = {"exact": float(normalize(text) == normalize(reference))}
    row |= {"precision": precision, "recall": recall, "f1": f1}
    if record.choices:
        wanted, said = chosen(reference, record.choices), chosen(text, record.choices)
        return row | {"type": "choice", "right": float(said is not None and said == wanted)}
    if record.answer_type == "closed" or normalize(reference) in ("yes", "no"):
        return row | {"type": "closed", "right": float(agrees(text, reference))}
    return row | {"type": "open"}


def decode_findings(row: dict[str, Any]) -> list[np.ndarray]:
    """The masks of a row's findings, bool (H, W) each, for figures of your own."""
    return [rle.decode(finding["rle"]) for finding in row["findings"]]
