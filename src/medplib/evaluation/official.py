"""The metrics of the published evaluation, flaws included, for comparison with published numbers only.

What is wrong with them, and what this package's own metrics do instead: docs/official_quirks.md.
S images, (H, W) an image.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medplib.errors import InputError

OPEN, CLOSED = ("open", "other", "number"), ("yes/no", "closed")
NO_CANDIDATES = 1100  # what "open accuracy" shows when no candidate answers are given

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# One apostrophe forgotten -> with all of them; and one entry that the usual table has the wrong way round.
_APOSTROPHES = {
    word[: at.start()] + word[at.end() :]: word
    for word in re.split(r"\s+", _CONTRACTIONS.strip())
    for at in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_MOST_PERIODS = 32  # a flag of the regular expression is given in the place of a count


def normalize(text: str) -> str:
    """Answer text without punctuation and articles, number words as digits, apostrophes put back.

    A mark beside a space anywhere in the text is deleted wherever it stands, others become spaces; with a
    comma between digits all marks are deleted.
    """
    out = text
    for mark in _PUNCTUATION:
        deleted = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        out = out.replace(mark, "" if deleted else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=_MOST_PERIODS)
    words = [_WORDS.get(word, word) for word in out.lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES).replace(",", "")


def exact_match(answer: str, reference: str) -> float:
    """Called exact match; in fact the reference's distinct words found in the answer / the answer's words."""
    ours, theirs = _counted(answer), _counted(reference)
    return sum(word in ours for word in theirs) / ours.total() if ours else 0.0


def f1_precision_recall(answer: str, reference: str) -> tuple[float, float, float]:
    """Word overlap, where a word of both counts as often as the answer repeats it."""
    ours, theirs = _counted(answer), _counted(reference)
    hits = sum(count for word, count in ours.items() if word in theirs)
    if not hits:
        return 0.0, 0.0, 0.0
    precision = hits / ours.total()
    recall = hits / (hits + sum(count for word, count in theirs.items() if word not in ours))
    return 2 * precision * recall / (precision + recall), precision, recall


def bleu(answer: str, reference: str, weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25)) -> float:
    """Sentence BLEU without smoothing: an n-gram order without a match counts as the smallest positive float.

    Papineni et al., BLEU, 2002; as computed by NLTK 3.8.1.
    """
    ours, theirs = answer.lower().split(), reference.lower().split()
    logs = []
    for order in range(1, len(weights) + 1):
        found, wanted = (
            Counter(zip(*(words[i:] for i in range(order)), strict=False)) for words in (ours, theirs)
        )
        hits = (found & wanted).total()
        if order == 1 and not hits:
            return 0.0
        logs.append(math.log(hits / max(1, found.total()) if hits else sys.float_info.min))
    penalty = 1.0 if len(ours) > len(theirs) else math.exp(1 - len(theirs) / len(ours))
    return penalty * math.exp(math.fsum(weight * log for weight, log in zip(weights, logs, strict=True)))


def appears(answer: str, reference: str, candidates: Iterable[str]) -> float:
    """1.0 when the candidate most covered by the answer (or the answer itself) is the reference."""
    words = set(normalize(answer).split())
    best, highest = "", -1.0
    for candidate in map(normalize, candidates):
        parts = set(candidate.split())
        covered = len(parts & words) / len(parts) if parts else 0.0
        if covered > highest:
            best, highest = candidate, covered
    return float(normalize(reference) in (best, normalize(answer)))


def text_metrics(items: Sequence[Mapping[str, Any]], use_candidates: bool = False) -> dict[str, float]:
    """The published table, in percent. Items hold "gt", "text" and "answer_type"; other types are ignored.

    use_candidates: compare with all references for "open accuracy", in their order. The published code goes
    through a set, whose order, and so who wins a tie, depends on the run; only "" always comes first.
    """
    candidates = sorted(dict.fromkeys(str(item["gt"]) for item in items), key=bool)  # "" first
    rows: list[dict[str, float]] = []
    closed: list[float] = []
    for item in items:
        reference, answer = (normalize(str(item[key]).lower()) for key in ("gt", "text"))
        kind = str(item["answer_type"]).lower()
        if kind in CLOSED:
            closed.append(float(reference == answer))
        elif kind in OPEN:
            f1, precision, recall = f1_precision_recall(answer, reference)
            row = {
                "exact match acc score": exact_match(answer, reference), "f1 score": f1,
                "precision": precision, "recall": recall, "bleu_score": bleu(answer, reference),
            }  # fmt: skip
            for order in (1, 2, 3):
                row[f"bleu_score_{order}"] = bleu(answer, reference, [float(i == order) for i in range(1, 5)])
            if use_candidates:
                row["open accuracy"] = appears(answer, reference, candidates)
            rows.append(row)
    names = ("exact match acc score", "f1 score", "precision", "recall", "bleu_score")
    names = (*names, *(f"bleu_score_{order}" for order in (1, 2, 3)))
    table = {name: 100 * _mean([row[name] for row in rows]) for name in names}
    if use_candidates or not rows:
        table["open accuracy"] = 100 * _mean([row["open accuracy"] for row in rows])
    else:
        table["open accuracy"] = NO_CANDIDATES
    return table | {"yes/no accuracy": 100 * _mean(closed)}


def mask_iou(prediction: np.ndarray | None, target: np.ndarray) -> float:
    """|A and B| / |A or B| in float32; 0.0 for a missing mask, and for two empty ones (there the published
    code fails)."""
    if prediction is None:
        return 0.0
    union = int(np.logical_or(prediction, target).sum())
    if not union:
        return 0.0
    return float(np.float32(np.logical_and(prediction, target).sum()) / np.float32(union))


def mask_metrics(
    predictions: Sequence[np.ndarray | None], targets: Sequence[np.ndarray], groups: Sequence[str] = ()
) -> dict[str, Any]:
    """The published grounding table: S bool masks (H, W), or None where there is none, against S targets.

    "miou" and "mDice" are means over images, "by_group" the same within each of `groups` (one name per image,
    such as its modality).
    """
    if len(predictions) != len(targets) or (groups and len(groups) != len(targets)):
        raise InputError(f"{len(predictions)} predictions, {len(targets)} targets and {len(groups)} groups.")
    ious = [mask_iou(mask, target) for mask, target in zip(predictions, targets, strict=True)]
    dices = [2 * iou / (1 + iou) for iou in ious]
    by_group = {}
    for name in dict.fromkeys(groups):
        at = [i for i, group in enumerate(groups) if group == name]
        by_group[name] = {"iou": _mean([ious[i] for i in at]), "dice": _mean([dices[i] for i in at])}
    return {"miou": _mean(ious), "mDice": _mean(dices), "by_group": by_group}


def training_metrics(predictions: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> dict[str, float]:
    """gIoU and cIoU as the published training loop logs them, in float32; two empty masks count as 1."""
    small, each = np.float32(1e-5), np.float32(0)
    overlaps, unions = np.float32(0), np.float32(0)
    for mask, target in zip(predictions, targets, strict=True):
        overlap = np.float32(np.logical_and(mask, target).sum())
        union = np.float32(np.logical_or(mask, target).sum())
        each += overlap / (union + small) + np.float32(union == 0)
        overlaps, unions = overlaps + overlap, unions + union
    giou = each / np.float32(len(predictions) + 1e-5)
    return {"giou": float(giou), "ciou": float(overlaps / (unions + np.float32(1e-10)))}


def _counted(text: str) -> Counter[str]:
    return Counter(normalize(text).split())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
