"""MedPLIBProcessor: images, prompts and words -> every tensor the model takes, labels included; and ids -> words.

B rows, L tokens, N images, R regions, S `<SEG>` tokens, g side of the vision grid.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from medplib.conversation import REGION, SEG, Piece, get_template, render
from medplib.errors import CheckpointError, InputError
from medplib.geometry import Letterbox
from medplib.io.images import load_image
from medplib.preprocess import prepare_clip, prepare_sam
from medplib.prompts.region import region_mask_to_grid
from medplib.prompts.types import Box, Mask, Point

PROCESSOR_FILE = "medplib_processor.json"
MAX_QUESTION = 4000  # characters
CONTROL = re.compile(r"(<SEG>|</?ref>|</?region>|</?sr>|</?mask>|<im_start>|<im_end>|</s>)")


@dataclass
class Sample:
    """One row: images, question and answer turns, regions asked about, and target masks.

    images: path, PIL, array or tensor each. turns: (question, answer or None). prompts: the regions, in the order
    of "<region>" in the questions (one that is not written is added at the end of the last question).
    masks: one bool (H, W) array per `<SEG>` in the answers, in pixels of the image it draws on.
    seg_images: index within `images` for each `<SEG>` (default: the last image).
    """

    images: Sequence[Any]
    turns: Sequence[tuple[str, str | None]]
    prompts: Sequence[Point | Box | Mask] = ()
    prompt_images: Sequence[int] | None = None
    masks: Sequence[np.ndarray] = ()
    seg_images: Sequence[int] | None = None


@dataclass
class Batch:
    """Tensors for `MedPLIB.forward` and what is needed to bring masks back to the images."""

    tensors: dict[str, Tensor]
    images: list[np.ndarray]
    letterboxes: list[Letterbox]
    row_images: list[list[int]]
    seg_images: list[int] = field(default_factory=list)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The tensors on a device, pixels in `dtype`."""
        for name, value in self.tensors.items():
            pixels = dtype is not None and name in ("pixel_values", "mask_pixel_values")
            self.tensors[name] = value.to(device, dtype) if pixels else value.to(device)
        return self


class MedPLIBProcessor:
    """Writes the prompt (template, image and region placeholders), prepares images and masks, reads answers.

    A control token that a user types stays text. `config` is the model's MedPLIBConfig; `num_image_tokens` and
    `grid` (side of the vision grid) come from the built model: see `for_model`.
    """

    def __init__(self, tokenizer, config, num_image_tokens: int, grid: int) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.num_image_tokens = num_image_tokens
        self.grid = grid
        self.template = get_template(config.template)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.eos_id = tokenizer.eos_token_id

    @classmethod
    def for_model(cls, source: Path | str, model) -> MedPLIBProcessor:
        """The processor of a loaded model. Raises CheckpointError when the tokenizer cannot be read."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except Exception as error:
            raise CheckpointError(f"The tokenizer of {str(source)!r} cannot be read: {error}") from error
        grid = model.config.vision.image_size // model.vision_tower.stride
        return cls(tokenizer, model.config, model.num_image_tokens, grid)

    @classmethod
    def from_pretrained(cls, source: Path | str, **kwargs) -> MedPLIBProcessor:
        """Load the tokenizer, configuration and sizes written by `save_pretrained`."""
        from medplib.configuration import MedPLIBConfig
        from medplib.loading import resolve_model

        source = resolve_model(source)
        sizes_file = Path(source) / PROCESSOR_FILE
        if not sizes_file.is_file():
            raise CheckpointError(f"{str(source)!r} holds no {PROCESSOR_FILE}; load the model and use model.processor.")
        sizes = json.loads(sizes_file.read_text(encoding="utf-8"))
        config = MedPLIBConfig.from_pretrained(source)
        return cls(AutoTokenizer.from_pretrained(source), config, sizes["num_image_tokens"], sizes["grid"])

    def save_pretrained(self, folder: Path | str, **kwargs) -> list[str]:
        """Write the tokenizer and the sizes beside a saved model."""
        files = list(self.tokenizer.save_pretrained(folder))
        path = Path(folder) / PROCESSOR_FILE
        sizes = {"processor_class": type(self).__name__, "num_image_tokens": self.num_image_tokens, "grid": self.grid}
        path.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
        return [*files, str(path)]

    def __call__(
        self, samples: Sequence[Sample], *, training: bool = False, check_length: bool = True
    ) -> Batch:
        """Samples -> a Batch: right padding with labels when `training`, left padding for generation otherwise.

        Identical image objects are prepared once. Raises InputError for unusable images, prompts outside their
        image, counts that do not match, and questions over MAX_QUESTION characters.
        """
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
        for piece in render(self.template, sample.turns, len(sample.images), regions):
            new = self._piece_ids(piece)
            ids += new
            labels += new if piece.learned and training else [-100] * len(new)
        return ids, labels

    def decode(self, ids: Sequence[int]) -> tuple[str, str, list[str]]:
        """Generated ids -> clean text, raw text with control tokens, and a label per `<SEG>` (may be empty).

        A label is what stands between <ref> and </ref> before its `<SEG>`.
        """
        ids = [int(i) for i in ids]
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        raw = self.tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=False)
        raw = raw.replace(self.tokenizer.pad_token or "</s>", "").replace("</s>", "").strip()
        labels, label, inside = [], "", False
        for part in CONTROL.split(raw):
            if part == "<ref>":
                label, inside = "", True
            elif part == "</ref>":
                inside = False
            elif part == SEG:
                labels.append(label.strip())
                label = ""
            elif inside:
                label += part
        clean = re.sub(r"\s+([.,;:!?])", r"\1", re.sub(r"\s+", " ", CONTROL.sub(" ", raw))).strip()
        return clean, raw, labels

    # -- one step each -------------------------------------------------------------------------------------

    def _complete(self, sample: Sample, check_length: bool) -> Sample:
        """Check a sample and write its missing <region> places. Raises InputError."""
        if not sample.turns:
            raise InputError("A sample needs at least one question.")
        turns = [tuple(t) for t in sample.turns]
        for question, _ in turns:
            if not isinstance(question, str) or not question.strip():
                raise InputError(f"The question is {question!r}; write at least one word.")
            if check_length and len(question) > MAX_QUESTION:
                raise InputError(
                    f"The question has {len(question)} characters; the limit is {MAX_QUESTION}. Shorten it, "
                    "or ask several questions."
                )
        written = sum(question.count(REGION) for question, _ in turns)
        if sample.prompts and written > len(sample.prompts):
            raise InputError(
                f"The question has {written} <region> but {len(sample.prompts)} prompts were given; give a Point, "
                "Box or Mask for each."
            )
        if not sample.prompts and written:
            warnings.warn("The question says <region> but no prompt was given: it is read as text.", stacklevel=4)
        missing = len(sample.prompts) - written
        if missing:
            question, answer = turns[-1]
            turns[-1] = (question.rstrip() + f" {REGION}" * missing, answer)
        if sample.prompts and not sample.images:
            raise InputError(f"{len(sample.prompts)} region prompts were given, but no image to look at.")
        return Sample(
            list(sample.images), turns, list(sample.prompts), sample.prompt_images, sample.masks, sample.seg_images
        )

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
        within = sample.prompt_images[index] if sample.prompt_images is not None else 0
        if not 0 <= within < len(row):
            raise InputError(f"Prompt {index} names image {within}, but the sample has {len(row)}.")
        return row[within]

    def _check_prompts(self, samples, arrays, row_images) -> None:
        for sample, row in zip(samples, row_images, strict=True):
            for i, prompt in enumerate(sample.prompts):
                if not isinstance(prompt, Point | Box | Mask):
                    raise InputError(f"A prompt must be a Point, Box or Mask, got {type(prompt).__name__}.")
                prompt.check(arrays[self._prompt_image(sample, i, row)].shape[:2])

    def _piece_ids(self, piece: Piece) -> list[int]:
        tokens = self.config.tokens
        if piece.kind == "image" and piece.text == "<image>":
            return [tokens.image] * self.num_image_tokens
        if piece.kind == "region":
            return [tokens.region]
        encode = self.tokenizer.encode
        if piece.control:
            return encode(piece.text, add_special_tokens=False)
        return encode(piece.text, add_special_tokens=False, split_special_tokens=True)

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
        """A bool (H, W) region -> what the pooler takes: (g, g) on the vision grid ("official"), or the region on
        the vision tower's square ("area")."""
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
            if training and sample.masks is not None and len(sample.masks) not in (0, count):
                raise InputError(f"The answers hold {count} <SEG>, but {len(sample.masks)} masks were given.")
            within = sample.seg_images if sample.seg_images is not None else [len(row) - 1] * count
            segs += [row[i] for i in within]
            for i, mask in zip(within, sample.masks, strict=False):
                box = letterboxes[row[i]]
                if mask.shape != tuple(box.original_size):
                    raise InputError(f"A mask has size {mask.shape}, its image {tuple(box.original_size)}; make them equal.")
                squares.append(torch.as_tensor(box.mask(np.asarray(mask, dtype=bool))).float())
        if segs:
            tensors["seg_images"] = torch.tensor(segs)
        if squares:
            tensors["masks"] = torch.stack(squares)
        return segs
