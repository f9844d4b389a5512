"""Many questions from a file: one JSON line in, one JSON line out, taken up again where it stopped.

A job: {"id"?, "image" or "images", "question", "prompts"?, "history"?, "slice"?, "axis"?, "window"?,
"series"?}; a prompt is {"box": [x0, y0, x1, y1]}, {"point": [x, y], "label"?: 1 or 0} or {"mask": file}. The
last four are those of the command, for volumes and DICOM: slice or frame from 0, "axial", "coronal" or
"sagittal", [lowest, highest] value shown, which series of a folder. Paths are relative to the file of jobs. A
result: {"id"} and either what `Answer.to_dict` gives or {"error"}. Without an id a job has its line's number.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medplib.apps.volumes import is_volume, picture_of
from medplib.errors import InputError, is_number
from medplib.io.json_lines import append_line, read_lines
from medplib.io.volume import AXES

if TYPE_CHECKING:
    from medplib.io.volume import Volume
    from medplib.results import Answer
    from medplib.sample import Sample

RESULTS = "results.jsonl"
_ID = re.compile(r"\w[\w.+-]{0,99}")  # it names a folder
_KEYS = {"id", "image", "images", "question", "prompts", "history", "slice", "axis", "window", "series"}


@dataclass(frozen=True)
class Job:
    """One line of a file of jobs; `error` says what is wrong with a line that is none."""

    id: str
    content: dict[str, Any]
    error: str | None = None


def read_jobs(path: Path) -> list[Job]:
    """The jobs of a file; empty lines count, but are none. Raises InputError for a file that cannot be read,
    for an id that cannot name a folder, and for one that is given twice."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The jobs {str(path)!r} cannot be read: {error}.") from error
    jobs = [_read_job(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    seen: set[str] = set()
    for job in jobs:
        if not _ID.fullmatch(job.id) or job.id == RESULTS:
            raise InputError(
                f"{str(path)!r} has the id {job.id[:120]!r}; an id names a folder: up to 100 letters, "
                "digits, '.', '_', '+' and '-'."
            )
        if job.id in seen:
            raise InputError(f"{str(path)!r} has two jobs with the id {job.id!r}; every job needs its own.")
        seen.add(job.id)
    return jobs


def _read_job(line: str, number: int) -> Job:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Job(str(number), {}, f"line {number} is not JSON: {error}")
    if not isinstance(content, dict):
        return Job(str(number), {}, f"line {number} must be a JSON object")
    name = content.get("id")
    return Job(str(number if name is None else name), content, _misfit(content))


def _misfit(job: dict[str, Any]) -> str | None:
    """What is wrong with the form of a job, or None."""
    if unknown := sorted(job.keys() - _KEYS):
        return f"unknown {', '.join(map(repr, unknown))}; a job has {', '.join(sorted(_KEYS))}"
    if ("image" in job) == ("images" in job):
        return "a job needs either 'image' or 'images'"
    images = job["images"] if "images" in job else [job["image"]]
    if not isinstance(images, list) or not images or not all(isinstance(i, str) for i in images):
        return "'image' must be a path, and 'images' a list of paths"
    if not isinstance(job.get("question"), str) or not job["question"].strip():
        return "a job needs a 'question'"
    turns = job.get("history", [])
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(words, str) for words in turn)
        for turn in turns
    ):
        return "'history' must be a list of [question, answer]"
    return _misfit_of_volumes(job)


def _misfit_of_volumes(job: dict[str, Any]) -> str | None:
    """What is wrong with the form of slice, axis, window and series, or None."""
    number, window, series = job.get("slice"), job.get("window"), job.get("series")
    if number is not None and not (_is_whole(number) and number >= 0):
        return f"'slice' must be a whole number from 0, got {json.dumps(number)[:120]}"
    if job.get("axis") not in (None, *AXES):
        return f"'axis' must be one of {', '.join(AXES)}, got {json.dumps(job['axis'])[:120]}"
    pair = isinstance(window, list) and len(window) == 2 and all(map(is_number, window))
    if window is not None and not (pair and window[0] < window[1]):
        return f"'window' must be [lowest, highest] value shown, got {json.dumps(window)[:120]}"
    if series is not None and not (_is_whole(series) or isinstance(series, str)):
        return f"'series' must be a number from 1 or the digits of a UID, got {json.dumps(series)[:120]}"
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def to_sample(job: Job, folder: Path, load: Callable[..., Volume] | None = None) -> Sample:
    """A job with its images read; load: see `picture_of`. Raises InputError for what cannot be used."""
    from medplib.sample import Sample

    if job.error:
        raise InputError(job.error)
    content = job.content
    files = [str(folder / path) for path in content.get("images") or [content["image"]]]
    if content.get("axis") and not any(map(is_volume, files)):
        raise InputError(f"'axis' is for volumes, not for {files[0]!r}. Leave it out.")
    axis, number, series = content.get("axis") or "axial", content.get("slice"), content.get("series")
    window = content.get("window") and tuple(content["window"])
    images = [picture_of(file, axis, number, window, series, load) for file in files]
    prompts = content.get("prompts", [])
    if not isinstance(prompts, list):
        raise InputError("'prompts' must be a list")
    made = [_to_prompt(prompt, folder) for prompt in prompts]
    for prompt in made:
        prompt.check(images[0].shape[:2])
    turns = [*map(tuple, content.get("history", [])), (content["question"], None)]
    return Sample(images, turns, made)


def _to_prompt(given: Any, folder: Path) -> Any:
    from medplib.prompts.types import Box, Mask, Point

    match given:
        case {"box": [*sides], **rest} if len(sides) == 4 and not rest:
            return Box(*sides)
        case {"point": [x, y], **rest} if rest.keys() <= {"label"}:
            return Point(x, y, **rest)
        case {"mask": str(path), **rest} if not rest:
            return Mask(folder / path)
    raise InputError(
        'a prompt is {"box": [x0, y0, x1, y1]}, {"point": [x, y], "label"?} or {"mask": file}, got '
        f"{json.dumps(given)[:120]}"
    )


def answer_jobs(
    model: Any, jobs: Iterable[Job], folder: Path, batch_size: int, **options: Any
) -> Iterator[tuple[Job, Answer | Exception]]:
    """Answer jobs in batches, in their order; what goes wrong with a job is its own result.

    folder: what its paths are relative to. options: those of `MedPLIB.answer`. A batch that fails is taken
    apart, so that only the job that fails alone has no answer. The last volume is kept for the jobs after it.
    """
    from medplib.io.volume import load_volume

    load = functools.lru_cache(maxsize=1)(load_volume)
    waiting: list[tuple[Job, Sample | Exception]] = []
    for job in jobs:
        try:
            waiting.append((job, to_sample(job, folder, load)))
        except Exception as error:  # reported in the result
            waiting.append((job, error))
        if len(waiting) == batch_size:
            yield from _answered(model, waiting, options)
            waiting = []
    yield from _answered(model, waiting, options)


def _answered(
    model: Any, jobs: list[tuple[Job, Sample | Exception]], options: dict[str, Any]
) -> Iterator[tuple[Job, Answer | Exception]]:
    from medplib.answering import answer_each

    answers = iter(answer_each(model, [s for _, s in jobs if not isinstance(s, Exception)], **options))
    for job, made in jobs:
        yield job, made if isinstance(made, Exception) else next(answers)


def run_batch(
    load: Callable[[], Any],
    path: Path,
    out: Path | None,
    *,
    batch_size: int = 4,
    show: Callable[[str], None] = print,
    **options: Any,
) -> tuple[int, int, int]:
    """Answer the jobs in `path`; returns how many were answered now, failed now or before, and were there.

    load: gives the model, if there is anything left to do. out: each answer is saved in out/<id>/ and its
    result added to out/results.jsonl, whose jobs are not done again; without it the results go to `show`.
    A progress bar runs on standard error. Raises InputError before anything is done; see `read_jobs` and
    `read_lines`.
    """
    from tqdm import tqdm

    jobs = read_jobs(path)
    results = {} if out is None else read_lines(out / RESULTS)
    for job in jobs:
        asked = results.get(job.id, {}).get("question")
        if asked is not None and asked != job.content.get("question"):
            raise InputError(
                f"{str(out / RESULTS)!r} answers another question under the id {job.id!r}; give another "
                "--out."
            )
    there = [job for job in jobs if job.id in results]
    left = [job for job in jobs if job.id not in results]
    answered, failed = 0, sum("error" in results[job.id] for job in there)
    if not left:
        return answered, failed, len(there)
    model = load()
    with tqdm(total=len(jobs), initial=len(there), desc="jobs", unit="job") as bar:
        for job, result in answer_jobs(model, left, path.parent, batch_size, **options):
            try:
                if out is not None and not isinstance(result, Exception):
                    result.save(out / job.id)
            except InputError as error:  # a foreign file is in the way; any other error would stop all jobs
                result = error
            given = job.content.get("id")
            record = {"id": job.id if given is None else given}  # a number stays a number
            if isinstance(result, Exception):
                record["error"] = " ".join(str(result).split()) or type(result).__name__
                failed += 1
            else:
                record |= result.to_dict()
                answered += 1
            line = json.dumps(record)
            show(line) if out is None else append_line(out / RESULTS, line)
            bar.update()
    return answered, failed, len(there)
