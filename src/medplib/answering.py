"""Asking a MedPLIB model: requests in, answers with masks out, from a single pass of generation.

B rows, T new tokens, D language width, S `<SEG>` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medplib.decoders.postprocess import mask_score, masks_from_logits
from medplib.errors import InputError
from medplib.processing import Batch, Sample
from medplib.prompts.types import Box, Mask, Point
from medplib.results import Answer, Finding


@dataclass
class Generation:
    """New token ids (B, T) and, for every generated `<SEG>` in row-major order, its row and the state (S, D)
    that predicted it."""

    ids: Tensor
    rows: Tensor
    states: Tensor


class AnsweringMixin:
    """`ask`, `segment`, `answer` and `generate_with_states` of MedPLIB."""

    @torch.no_grad()
    def generate_with_states(self, batch: Batch, *, max_new_tokens: int = 64, **kwargs) -> Generation:
        """Cached generation that keeps the hidden state each `<SEG>` was predicted from: no second forward.

        Raises InputError for beam search or several returned sequences, whose states would not line up.
        """
        if kwargs.get("num_beams", 1) != 1 or kwargs.get("num_return_sequences", 1) != 1:
            raise InputError("Masks need num_beams=1 and num_return_sequences=1; sample or decode greedily.")
        names = ("input_ids", "attention_mask", "pixel_values", "image_index", "region_masks", "region_images")
        inputs = {k: batch.tensors[k] for k in names if k in batch.tensors}
        kwargs.setdefault("do_sample", False)
        out = self.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, output_hidden_states=True,
            last_hidden_only=True, eos_token_id=self.processor.eos_id, pad_token_id=self.processor.pad_id, **kwargs,
        )  # fmt: skip
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]  # (B, T)
        states = torch.cat([h[-1] for h in out.hidden_states], dim=1)  # (B, T, D): state t predicts token t
        ended = (ids == self.processor.eos_id).cumsum(1) > 0
        at = (ids == self.config.tokens.seg) & ~ended
        return Generation(ids, at.nonzero()[:, 0], states[:, : ids.shape[1]][at])

    @torch.no_grad()
    def answer(self, samples: Sequence[Sample], *, max_new_tokens: int = 64, seed: int | None = 0, **kwargs) -> list[Answer]:
        """Answer a batch of samples (the last answer of each is None). A `<SEG>` gives a mask, and only that."""
        processor = self._need_processor()
        if self.training:
            raise InputError("The model is in training mode; call model.eval() before asking.")
        if seed is not None and kwargs.get("do_sample"):
            torch.manual_seed(seed)
        batch = processor(samples).to(self.device, self.dtype)
        generated = self.generate_with_states(batch, max_new_tokens=max_new_tokens, **kwargs)
        drawn = self._draw_generated(batch, generated)
        return [self._to_answer(i, s, batch, generated, drawn, seed) for i, s in enumerate(samples)]

    def ask(
        self,
        images: Any,
        question: str,
        prompts: Sequence[Point | Box | Mask] = (),
        *,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 64,
        seed: int | None = 0,
        **kwargs,
    ) -> Answer:
        """Ask one question about one image or several.

        images: a path, PIL image, array or tensor, or a list of them. prompts: regions in pixels of the first
        image, in the order of "<region>" in the question. history: earlier (question, answer) turns.
        Keyword arguments go to `generate`. Raises InputError (see MedPLIBProcessor).

            model.ask("scan.png", "What is in <region>?", prompts=[Box(40, 60, 120, 150)]).text
        """
        images = list(images) if isinstance(images, list | tuple) else [images]
        prompts = [prompts] if isinstance(prompts, Point | Box | Mask) else list(prompts)
        sample = Sample(images, [*history, (question, None)], prompts)
        return self.answer([sample], max_new_tokens=max_new_tokens, seed=seed, **kwargs)[0]

    def segment(self, images: Any, target: str | Sequence[str], **kwargs) -> Answer:
        """Draw what is named: `model.segment("scan.png", "the right lung")`, or a list of names.

        No mask comes back for what the model says is absent.
        """
        names = [target] if isinstance(target, str) else list(target)
        if not names or not all(isinstance(n, str) and n.strip() for n in names):
            raise InputError(f"Name what to segment, for example 'the right lung'; got {target!r}.")
        names = [n.strip().rstrip(".") for n in names]
        names = [n if n.lower().startswith(("the ", "a ", "an ", "all ")) else f"the {n}" for n in names]
        listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        return self.ask(images, f"Segment {listed}.", **kwargs)

    def _need_processor(self):
        if self.processor is None:
            raise InputError("This model has no processor; load it with from_pretrained or set model.processor.")
        return self.processor

    def _draw_generated(self, batch: Batch, generated: Generation) -> list[tuple[int, int, Tensor]]:
        """(row, image, logits) of every generated `<SEG>`, on the last image of its row; the mask side runs only
        on images that are drawn on."""
        rows = generated.rows.tolist()
        kept = [i for i, r in enumerate(rows) if batch.row_images[r]]
        if not kept:
            return []
        images = [batch.row_images[rows[i]][-1] for i in kept]
        used = sorted(set(images))
        features = self.mask_encoder(batch.tensors["mask_pixel_values"][used])
        index = torch.tensor([used.index(i) for i in images], device=self.device)
        logits, _ = self.decode_masks(generated.states[kept], features, index)
        return [(rows[i], image, logit) for i, image, logit in zip(kept, images, logits.float(), strict=True)]

    def _to_answer(self, row, sample, batch, generated, drawn, seed) -> Answer:
        text, _, labels = self.processor.decode(generated.ids[row])
        config = self.config.mask
        cut = torch.tensor(config.threshold).logit().item()
        findings = []
        for i, (_, image, logits) in enumerate(d for d in drawn if d[0] == row):
            box = batch.letterboxes[image]
            mask = masks_from_logits(logits[None], box, threshold=cut, geometry=config.geometry)[0]
            label = (labels[i] if i < len(labels) else "") or _target_of(sample.turns[-1][0]) or f"finding {i + 1}"
            score = mask_score(logits, cut)
            findings.append(Finding(label, mask.cpu().numpy(), score, batch.row_images[row].index(image)))
        pictures = [batch.images[i] for i in batch.row_images[row]]
        return Answer(
            text, findings, pictures, sample.turns[-1][0], tuple(sample.prompts), self.identity(), seed
        )


def _target_of(question: str) -> str:
    """What a plain request asks for: "Please segment the right lung." -> "right lung"; "" when it is none."""
    words = question.strip().rstrip(".?!")
    for verb in ("segment", "outline", "delineate", "draw", "mark"):
        head, found, rest = words.partition(f"{verb} ") if verb in words else words.partition(f"{verb.capitalize()} ")
        if found and len(rest) <= 60:
            return rest.removeprefix("the ").strip()
    return ""
