"""The recorded tiny model: loaded, and its recorded inputs turned into those of MedPLIB.forward."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from medplib import MedPLIB


@dataclasses.dataclass
class Case:
    """One recorded forward: what it was called with and what came out."""

    name: str
    facts: dict
    tensors: dict


class Recorded:
    """Everything in a folder `model_tiny`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.dims = self.json("tiny_dims")
        self.samples, self.inputs = self.json("samples"), load_file(folder / "samples.safetensors")
        names = [p.stem for p in sorted(folder.glob("*.safetensors")) if p.with_suffix(".json").is_file()]
        self.cases = {
            name: Case(name, self.json(name), load_file(folder / f"{name}.safetensors"))
            for name in names
            if name != "samples" and "losses" in self.json(name)
        }
        self.evaluations = self.json("evaluate")["cases"]

    def json(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    @property
    def overrides(self) -> dict:
        return {"sam": self.dims["sam"], "clip": self.dims["clip"]}

    def load(self, moe: dict | None = None, **kwargs) -> MedPLIB:
        overrides = self.overrides | ({"moe": moe} if moe else {})
        weights = self.dims["loss_weights"]
        return MedPLIB.from_pretrained(self.folder, overrides=overrides, losses=weights, **kwargs)

    def sample(self, name: str, part: str):
        """A sample's own tensor, or that of the sample it borrows its images from."""
        owner = name
        while f"{owner}.{part}" not in self.inputs:
            owner = self.samples[owner]["images_of_sample"]
        return self.inputs[f"{owner}.{part}"]

    def images(self, names) -> dict:
        """One image per row, as the published model takes them."""
        return {
            "pixel_values": torch.cat([self.sample(name, "images_clip") for name in names]).float(),
            "mask_pixel_values": torch.cat([self.sample(name, "images_sam") for name in names]).float(),
        }

    def regions(self, names) -> dict:
        rows = [(i, name) for i, name in enumerate(names) if self.samples[name]["n_regions"]]
        if not rows:
            return {}
        masks = [self.inputs[f"{name}.region_masks"] for _, name in rows]
        index = [i for (i, _), group in zip(rows, masks, strict=True) for _ in group]
        return {"region_masks": torch.cat(masks).float(), "region_images": torch.tensor(index)}

    def rows(self, model, case: Case) -> dict:
        """input_ids, attention_mask, labels and image_index of a case, image placeholders expanded."""
        given, tokens = case.tensors, model.config.tokens
        names = case.facts["samples"]
        if "in.input_ids" not in given:  # a case recorded without its inputs has those of its samples
            return self.rows(model, Case(case.name, case.facts, self.padded(names)))
        rows = [
            expand(*row, tokens.image, model.num_image_tokens)
            for row in zip(given["in.input_ids"], given["in.attention_mask"], given["in.labels"], strict=True)
        ]
        length = max(len(ids) for ids, _, _ in rows)
        fills = (0, 0, -100)
        stacked = [
            torch.stack([pad(row[i].long(), length, fill) for row in rows]) for i, fill in enumerate(fills)
        ]
        shown = [i for i, ids in enumerate(stacked[0]) if (ids == tokens.image).any()]
        return {
            "input_ids": stacked[0], "attention_mask": stacked[1], "labels": stacked[2],
            "image_index": torch.tensor(shown),
        }  # fmt: skip

    def length(self, case: Case) -> int:
        """How many tokens the rows of a case have before their images are put in."""
        given = case.tensors.get("in.input_ids")
        return max(
            map(len, given if given is not None else [self.inputs[f"{n}.ids"] for n in case.facts["samples"]])
        )

    def padded(self, names) -> dict:
        ids = [self.inputs[f"{name}.ids"] for name in names]
        labels = [self.inputs[f"{name}.labels"] for name in names]
        length = max(map(len, ids))
        return {
            "in.input_ids": torch.stack([pad(row, length, 0) for row in ids]),
            "in.attention_mask": torch.stack([pad(torch.ones_like(row), length, 0) for row in ids]),
            "in.labels": torch.stack([pad(row, length, -100) for row in labels]),
        }

    def targets(self, names) -> list[torch.Tensor]:
        return [
            self.inputs[f"{name}.gt_mask.{i}"] for name in names for i in range(self.samples[name]["n_masks"])
        ]


def expand(ids, mask, labels, image: int, count: int):
    """One row with every image placeholder repeated `count` times."""
    repeats = torch.where(ids == image, count, 1)
    seen = ids.repeat_interleave(repeats)
    wanted = labels.repeat_interleave(repeats)
    return seen, mask.repeat_interleave(repeats), wanted.masked_fill(seen == image, -100)


def pad(row: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    return torch.cat([row, row.new_full((length - len(row),), fill)])
