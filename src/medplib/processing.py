"""MedPLIBProcessor: images, prompts and words -> every tensor the model takes; and ids -> words.

B rows, L tokens, N images, R regions, S `<SEG>` tokens, g side of the vision grid.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

from medplib.configuration import MedPLIBConfig
from medplib.conversation import (
    CONTROL_TOKENS,
    IMAGE,
    MAX_QUESTION,
    REGION,
    SEG,
    Piece,
    Run,
    check_turns,
    encode_runs,
    get_template,
    render,
)
from medplib.errors import CheckpointError, InputError
from medplib.geometry import Letterbox
from medplib.io.images import load_image
from medplib.model_folder import HUB_ARGUMENTS, local_folder, read_config
from medplib.official.tokenizer import MODEL_FILE, LegacyLlamaTokenizer
from medplib.preprocess import prepare_clip, prepare_sam
from medplib.prompts.region import region_mask_to_grid
from medplib.prompts.types import Box, Mask, Point
from medplib.sample import Batch, Sample

PROCESSOR_FILE = "medplib_processor.json"
_WRITTEN = (REGION, "</region>", "<im_start>", "<im_end>")  # the control tokens that prompts are written with


class MedPLIBProcessor:
    """Writes the prompt (template, image and region placeholders), prepares images and masks, reads answers.

    A control token that a user types stays text. `config` is the model's MedPLIBConfig; `num_image_tokens`
    and `grid` (side of the vision grid) come from the built model: see `for_model`.
    """

    def __init__(self, tokenizer, config: MedPLIBConfig, num_image_tokens: int, grid: int) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.num_image_tokens = num_image_tokens
        self.grid = grid
        self.template = get_template(config.template)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.eos_id = tokenizer.eos_token_id
        self.control_ids = {t: i for t, i in tokenizer.get_added_vocab().items() if t in CONTROL_TOKENS}
        if self.control_ids.get(SEG) != config.tokens.seg:
            raise InputError(
                f"The tokenizer's id of {SEG} is {self.control_ids.get(SEG)}, the configuration's "
                f"tokens.seg is {config.tokens.seg}; use the tokenizer that the model was trained with."
            )
        lacking = [token for token in _WRITTEN if token not in self.control_ids]
        if lacking:
            raise InputError(
                f"The tokenizer lacks {', '.join(lacking)}, which prompts are written with; use the "
                "tokenizer that the model was trained with."
            )
        if len(tokenizer) > config.text_config.vocab_size:
            raise InputError(
                f"The tokenizer has {len(tokenizer)} tokens, but text_config.vocab_size is "
                f"{config.text_config.vocab_size}; use the tokenizer that the model was trained with."
            )

    @classmethod
    def for_model(cls, source: Path | str, model) -> MedPLIBProcessor:
        """The processor of a loaded model. Raises CheckpointError when the tokenizer cannot be read."""
        grid = model.config.vision.image_size // model.vision_tower.stride
        return cls(_load_tokenizer(source, model.config), model.config, model.num_image_tokens, grid)

    @classmethod
    def from_pretrained(cls, source: Path | str, **kwargs) -> MedPLIBProcessor:
        """Load the tokenizer, configuration and sizes written by `save_pretrained`: a folder, a Hub id or a
        known model. Keyword arguments are those of `model_folder.local_folder`; others are ignored. Raises
        CheckpointError or UnknownNameError.
        """

        hub = {k: kwargs[k] for k in (*HUB_ARGUMENTS, "subfolder") if kwargs.get(k) is not None}
        folder = local_folder(source, **hub)
        path = folder / PROCESSOR_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{str(source)!r} holds no {PROCESSOR_FILE}; load the model and use model.processor."
            )
        try:
            sizes = json.loads(path.read_text(encoding="utf-8"))
            tokens, grid = (int(sizes[name]) for name in ("num_image_tokens", "grid"))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{str(path)!r} is damaged ({error!r}); copy it again.") from error
        config = read_config(folder)
        return cls(_load_tokenizer(folder, config), config, tokens, grid)

    def save_pretrained(self, folder: Path | str, **kwargs) -> list[str]:
        """Write the tokenizer and the sizes beside a saved model."""
        files = list(self.tokenizer.save_pretrained(folder))
        path = Path(folder) / PROCESSOR_FILE
        sizes = {"num_image_tokens": self.num_image_tokens, "grid": self.grid}
        path.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
        return [*files, str(path)]

    def __call__(
        self, samples: Sequence[Sample], *, training: bool = False, check_length: bool = True
    ) -> Batch:
        """Samples -> a Batch: right padding with labels when `training`, else left padding for generation.

        Identical image objects are prepared once. Raises InputError for unusable images, prompts outside
        their image, counts that do not match, and (unless check_length is False) questions over MAX_QUESTION
        characters.
        """
        if isinstance(samples, Sample):
            raise InputError("Samples come in a list; write [sample] for a single one.")
        if samples is not None and not isinstance(samples, Sequence):
            raise InputError(f"Samples come in a list, got {type(samples).__name__}.")
        if not samples:
            raise InputError("Give at least one sample.")
        for sample in samples:
            if not isinstance(sample, Sample):
                raise InputError(f"A sample must be a Sample, got {type(sample).__name__}.")
            if isinstance(sample.images, str) or not isinstance(sample.images, Sequence):
                given = "a text" if isinstance(sample.images, str) else type(sample.images).__name__
                raise InputError(f"A sample's images come in a list, got {given}; write [image] for one.")
        samples = [self._complete(s, check_length) for s in samples]
        arrays, row_images = self._unique_images(samples)
        self._check_prompts(samples, arrays, row_images)
        rows = [self.encode(s, training) for s in samples]
        tensors = self._pad(rows, training)
        vision, mask = self.config.vision, self.config.mask
        letterboxes = [Letterbox(a.shape[:2], mask.image_size) for a in arrays]
        if arrays:
            tensors["pixel_values"] = torch.stack(
                [prepare_clip(a, vision.image_size, vision.mean, vision.std) for a in arrays]
            )
            tensors["mask_pixel_values"] = torch.stack(
                [prepare_sam(a, mask.image_size, mask.mean, mask.std) for a in arrays]
            )
            tensors["image_index"] = torch.tensor([i for row in row_images for i in row])
        self._add_regions(tensors, samples, arrays, row_images)
        seg_images = self._add_masks(tensors, samples, letterboxes, row_images, training)
        return Batch(tensors, arrays, letterboxes, row_images, seg_images)

    def encode(self, sample: Sample, training: bool = False) -> tuple[list[int], list[int]]:
        """Token ids and labels of one row (images and regions expanded to placeholders)."""
        regions = [question.count(REGION) for question, _ in sample.turns] if sample.prompts else []
        ids, labels = [], []
        if self.tokenizer.bos_token_id is not None:
            ids, labels = [self.tokenizer.bos_token_id], [-100]
        pieces = render(self.template, sample.turns, len(sample.images), regions)
        runs = [Run(self._fixed_ids(p) or p.text, p.control, p.learned and training) for p in pieces]
        new, learned = encode_runs(self.tokenizer, runs)
        ids += new
        labels += [i if flag else -100 for i, flag in zip(new, learned, strict=True)]
        return ids, labels

    def decode(self, ids: Sequence[int]) -> tuple[str, str, list[str]]:
        """Generated ids -> clean text, raw text with control tokens, and a label per `<SEG>` (may be empty).

        A label is what stands between <ref> and </ref> before its `<SEG>`.
        """
        ids = [i for i in (ids.tolist() if isinstance(ids, Tensor) else map(int, ids)) if i >= 0]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        names = {i: token for token, i in self.control_ids.items()}
        foreign = set(self.tokenizer.all_special_ids) - set(names)  # <s>, <pad>, ...
        ids = [i for i in ids if i not in foreign]
        runs: list[list[int]] = [[]]  # the words between control tokens
        labels, label, start = [], "", None  # start: the run in which an open <ref> began
        for i in ids:
            if i not in names:
                runs[-1].append(i)
                continue
            if names[i] in ("</ref>", SEG) and start is not None:
                label, start = self._words(runs[start:]), None
            if names[i] == SEG:
                labels.append(label)
                label = ""
            runs.append([])
            if names[i] == "<ref>":
                label, start = "", len(runs) - 1
        return self._words(runs), self.tokenizer.decode(ids, skip_special_tokens=False).strip(), labels

    def _words(self, runs: Sequence[list[int]]) -> str:
        """Runs of ids -> one clean text: no doubled spaces, none before punctuation; line breaks stay."""
        text = " ".join(self.tokenizer.decode(run, skip_special_tokens=False) for run in runs if run)
        text = re.sub(r"[^\S\n]+", " ", text)
        text = re.sub(r" ?\n ?", "\n", text)
        return re.sub(r" +([.,;:!?])(?=\s|$)", r"\1", text).strip()

    # -- one step each -------------------------------------------------------------------------------------

    def _complete(self, sample: Sample, check_length: bool) -> Sample:
        """Check a sample and write its missing <region> places. Raises InputError."""
        turns = check_turns(sample.turns, MAX_QUESTION if check_length else None)
        prompts, masks = as_list("prompts", sample.prompts), as_list("masks", sample.masks)
        written = sum(question.count(REGION) for question, _ in turns)
        if prompts and written > len(prompts):
            raise InputError(
                f"The question has {written} <region> but {len(prompts)} prompts were given; give a "
                "Point, Box or Mask for each."
            )
        if not prompts and written:
            warnings.warn(
                "The question says <region> but no prompt was given: it is read as text.", stacklevel=4
            )
        if len(prompts) > written:
            question, answer = turns[-1]
            turns[-1] = (question.rstrip() + f" {REGION}" * (len(prompts) - written), answer)
        if prompts and not sample.images:
            raise InputError(f"{len(prompts)} region prompts were given, but no image to look at.")
        _check_numbers("prompt_images", sample.prompt_images, len(prompts), len(sample.images))
        segs = sum((answer or "").count(SEG) for _, answer in turns)
        _check_numbers("seg_images", sample.seg_images, segs, len(sample.images))
        return Sample(list(sample.images), turns, prompts, sample.prompt_images, masks, sample.seg_images)

    @staticmethod
    def _unique_images(samples: Sequence[Sample]) -> tuple[list[np.ndarray], list[list[int]]]:
        arrays, seen, rows = [], {}, []
        for sample in samples:
            row = []
            for image in sample.images:
                key = str(image) if isinstance(image, str | Path) else id(image)
                if key not in seen:
                    array = load_image(image)
                    seen[key] = len(arrays)
                    arrays.append(array)
                row.append(seen[key])
            rows.append(row)
        return arrays, rows

    @staticmethod
    def _prompt_image(sample: Sample, index: int, row: Sequence[int]) -> int:
        return row[0 if sample.prompt_images is None else sample.prompt_images[index]]

    def _check_prompts(self, samples, arrays, row_images) -> None:
        for sample, row in zip(samples, row_images, strict=True):
            for i, prompt in enumerate(sample.prompts):
                if not isinstance(prompt, Point | Box | Mask):
                    raise InputError(f"A prompt must be a Point, Box or Mask, got {type(prompt).__name__}.")
                prompt.check(arrays[self._prompt_image(sample, i, row)].shape[:2])

    def _fixed_ids(self, piece: Piece) -> list[int] | None:
        """The ids of placeholders and of the end; None for text."""
        tokens = self.config.tokens
        if piece.kind == "image" and piece.text == IMAGE:
            return [tokens.image] * self.num_image_tokens
        if piece.kind == "region":
            return [tokens.region]
        if piece.kind == "end" and self.eos_id is not None:
            return [self.eos_id]
        return None

    def _pad(self, rows: list[tuple[list[int], list[int]]], training: bool) -> dict[str, Tensor]:
        length = max(len(ids) for ids, _ in rows)
        out = {
            "input_ids": torch.full((len(rows), length), self.pad_id),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        }
        if training:
            out["labels"] = torch.full((len(rows), length), -100)
        for i, (ids, labels) in enumerate(rows):
            at = slice(0, len(ids)) if training else slice(length - len(ids), length)
            out["input_ids"][i, at] = torch.tensor(ids)
            out["attention_mask"][i, at] = 1
            if training:
                out["labels"][i, at] = torch.tensor(labels)
        return out

    def region_mask(self, mask: np.ndarray) -> Tensor:
        """A bool (H, W) region -> what the pooler takes: (g, g) on the vision grid ("official"), or the
        region on the vision tower's square ("area")."""
        vision = self.config.vision
        if self.config.region.mask_mode == "official":
            patch = vision.image_size // self.grid
            return torch.as_tensor(region_mask_to_grid(mask, vision.image_size, patch)).float()
        return torch.as_tensor(Letterbox(mask.shape, vision.image_size).mask(mask)).float()

    def _add_regions(self, tensors, samples, arrays, row_images) -> None:
        masks, images = [], []
        for sample, row in zip(samples, row_images, strict=True):
            for i, prompt in enumerate(sample.prompts):
                at = self._prompt_image(sample, i, row)
                region = prompt.to_mask(arrays[at].shape[:2], point_size=self.config.region.point_size)
                masks.append(self.region_mask(region))
                images.append(at)
        if masks:
            tensors["region_masks"] = torch.stack(masks)
            tensors["region_images"] = torch.tensor(images)

    def _add_masks(self, tensors, samples, letterboxes, row_images, training) -> list[int]:
        """Targets on the mask side's square, and the image of each `<SEG>` of the known answers."""
        segs, squares = [], []
        for sample, row in zip(samples, row_images, strict=True):
            count = sum((answer or "").count(SEG) for _, answer in sample.turns)
            if not row and count:
                raise InputError(f"An answer holds {count} <SEG>, but the sample has no image to draw on.")
            if training and len(sample.masks) not in (0, count):
                raise InputError(f"The answers hold {count} <SEG>, but {len(sample.masks)} masks were given.")
            within = [len(row) - 1] * count if sample.seg_images is None else sample.seg_images
            segs += [row[i] for i in within]
            for i, mask in zip(within, sample.masks, strict=False):
                squares.append(
                    torch.as_tensor(letterboxes[row[i]].mask(_target(mask, letterboxes[row[i]]))).float()
                )
        if squares and len(squares) != len(segs):
            raise InputError(
                f"The batch's answers hold {len(segs)} <SEG>, but {len(squares)} masks were given; give one "
                "for each, or none at all."
            )
        if segs:
            tensors["seg_images"] = torch.tensor(segs)
        if squares:
            tensors["masks"] = torch.stack(squares)
        return segs


def _load_tokenizer(folder: Path | str, config: MedPLIBConfig):
    """The tokenizer in a folder, no code of its own run. Raises CheckpointError."""
    if (Path(folder) / MODEL_FILE).is_file():  # only the published layout has one
        tokenizer = LegacyLlamaTokenizer.from_pretrained(folder)
        if config.tokens.seg == len(tokenizer):  # a language model that has not learned them yet
            tokenizer.add_control_tokens()
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # tokenizer files fail in as many ways as there are formats
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"The tokenizer of {str(folder)!r} cannot be read: {reason}") from error


def as_list(name: str, given: Any) -> list:
    """`given` as a new list, empty for None. Raises InputError for what is no list of things."""
    if given is None:
        return []
    if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable):
        raise InputError(
            f"{name} must be a list, got {type(given).__name__}; write [...] around a single one."
        )
    return list(given)


def _check_numbers(name: str, given: Sequence[int] | None, count: int, images: int) -> None:
    """`given` names an image for each of `count` things, out of `images`. Raises InputError."""
    if given is None:
        return
    given = as_list(name, given)
    if len(given) != count:
        raise InputError(f"{name} has {len(given)} entries for {count}; give one for each, or None.")
    for i in given:
        if not isinstance(i, int | np.integer) or not 0 <= i < images:
            raise InputError(f"{name} names image {i!r}, but the sample has {images} (counted from 0).")


def _target(mask: Any, letterbox: Letterbox) -> np.ndarray:
    """A target mask as bool (H, W), all 0 allowed. Raises InputError for another size or other values."""
    array = np.asarray(mask)
    if array.shape != letterbox.original_size:
        raise InputError(
            f"A mask has size {array.shape}, its image {letterbox.original_size}; make them equal."
        )
    if array.dtype != np.bool_ and (array.dtype.kind not in "uif" or not np.isin(array, (0, 1, 255)).all()):
        raise InputError(
            f"A target mask holds 0 and 1 (or 255) only, got {array.dtype}; compare with a threshold."
        )
    return array.astype(bool, copy=False)


AutoProcessor.register(MedPLIBConfig, MedPLIBProcessor, exist_ok=True)
