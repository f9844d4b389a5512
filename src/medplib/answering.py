"""Asking a MedPLIB model: requests in, answers with masks out, from a single pass of generation.

B rows, T new tokens, D language width, S `<SEG>` tokens.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from medplib.conversation import REGION
from medplib.decoders.postprocess import mask_score
from medplib.errors import InputError, check_whole
from medplib.official.compat import THRESHOLD, Quirks, published_states, quirks
from medplib.processing import as_list
from medplib.prompts.types import Box, Mask, Point
from medplib.results import Answer, Finding
from medplib.sample import Batch, Sample
from medplib.targets import named, request, target_of

if TYPE_CHECKING:
    from medplib.volumetric import VolumeAnswer

_PROMPT_TENSORS = (
    *("input_ids", "attention_mask", "pixel_values", "image_index", "region_masks", "region_images"),
)
# Inputs of the model that are not one per row: pictures, and what lists those of one row after another, with
# the control token that each entry belongs to.
_PICTURES = ("pixel_values", "mask_pixel_values", "features", "mask_features", "masks")
_LISTS = {"image_index": "image", "region_masks": "region", "region_images": "region", "seg_images": "seg"}
# Set here already, other ways of decoding, and two that count the ids of the prompt, where placeholders are
# no tokens of the vocabulary.
_OTHER_DECODING = {
    *("eos_token_id", "pad_token_id", "return_dict_in_generate", "output_hidden_states", "stop_strings"),
    *("assistant_model", "prompt_lookup_num_tokens", "custom_generate", "generation_config"),
    *("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "prefill_chunk_size"),
    *("repetition_penalty", "no_repeat_ngram_size"),
}
_WITHOUT_EFFECT = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@dataclass
class Generation:
    """New token ids (B, T) and, for every generated `<SEG>` in row-major order, its row and the state (S, D)
    that predicted it."""

    ids: Tensor
    rows: Tensor
    states: Tensor


class AnsweringMixin:
    """`ask`, `segment`, `segment_volume`, `answer` and `generate_with_states` of MedPLIB."""

    @torch.no_grad()
    def generate_with_states(
        self, batch: Batch, *, max_new_tokens: int = 64, compat: Any = None, **kwargs
    ) -> Generation:
        """Cached generation that keeps the hidden state each `<SEG>` was predicted from: no second forward.

        compat: see `answer`. Raises InputError for a prompt that leaves no room for `max_new_tokens`, and for
        ways of decoding whose states would not line up with the tokens (beam search, several returned
        sequences, drafts).
        """
        processor, chosen = self._need_processor(), quirks(compat)
        _check_options(kwargs)
        for name in ("num_beams", "num_return_sequences"):
            if kwargs.setdefault(name, 1) != 1:
                raise InputError(
                    f"Masks need {name}=1, got {kwargs[name]}; decode greedily, or sample with "
                    "do_sample=True."
                )
        wrong = sorted(
            name for name in kwargs.keys() & _OTHER_DECODING if kwargs[name] != _WITHOUT_EFFECT.get(name, ...)
        )
        if wrong:
            raise InputError(
                f"Masks cannot follow {', '.join(wrong)}; decode greedily, or with do_sample=True."
            )
        inputs = {k: batch.tensors[k] for k in _PROMPT_TENSORS if k in batch.tensors}
        length = inputs["input_ids"].shape[1]
        self._check_length(length, max_new_tokens)
        kwargs.setdefault("do_sample", False)
        out = self.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, output_hidden_states=True,
            last_hidden_only=not chosen.choose_states, eos_token_id=processor.eos_id,
            pad_token_id=processor.pad_id, **kwargs,
        )  # fmt: skip
        ids = out.sequences[:, length:]  # (B, T)
        if chosen.choose_states:
            states = torch.cat([h[-1] for h in out.hidden_states], dim=1)  # (B, L + T - 1, D)
            written = ids.masked_fill(_after_end(ids, processor.eos_id), -1)
            rows, states = published_states(
                inputs["input_ids"], written, states, self.config.tokens.seg, chosen
            )
            return Generation(ids, rows, states)
        states = torch.cat([h[-1] for h in out.hidden_states], dim=1)  # (B, T, D): state t predicts token t
        at = ids == self.config.tokens.seg  # (B, T); after the end of a row there is only padding
        return Generation(ids, at.nonzero()[:, 0], states[at])

    @torch.no_grad()
    def answer(
        self,
        samples: Sequence[Sample],
        *,
        max_new_tokens: int = 64,
        seed: int | None = 0,
        compat: Any = None,
        **kwargs,
    ) -> list[Answer]:
        """Answer a batch of samples (the last answer of each is None). A `<SEG>` gives a mask, and only that.

        seed: of the random numbers when `do_sample=True`; None draws from torch's generator as it stands,
        which is otherwise left as it was. compat: "official" draws as the published evaluation does, or name
        some of its quirks, see medplib.official.compat.Quirks; None draws correctly. Raises InputError (see
        MedPLIBProcessor and `generate_with_states`), UnknownNameError for an unknown quirk.
        """
        processor, chosen = self._need_processor(), quirks(compat)
        if self.training:
            raise InputError("The model is in training mode; call model.eval() before asking.")
        if seed is not None and not (isinstance(seed, Integral) and -(2**63) <= seed < 2**64):
            raise InputError(f"seed must be a whole number of 64 bits or None, got {seed!r}.")
        seed = None if seed is None else int(seed)
        batch = processor(samples)
        if any(sample.turns[-1][1] is not None for sample in samples):
            raise InputError(
                "The last question has an answer already; give None as the answer to be written."
            )
        batch.to(self.device, self.dtype)
        with _seeded(seed if kwargs.get("do_sample") else None, self.device):
            generated = self.generate_with_states(
                batch, max_new_tokens=max_new_tokens, compat=chosen, **kwargs
            )
        drawn = self._draw_generated(batch, generated)
        return [self._to_answer(i, s, batch, generated, drawn, seed, chosen) for i, s in enumerate(samples)]

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

        images: a path, PIL image, array or tensor, or a list of them; or the Answer to go on from, with its
        images, prompts and turns. prompts: regions in pixels of the first image, in the order of "<region>"
        in the question. history: earlier (question, answer) turns. Keyword arguments go to `generate`. Raises
        InputError (see MedPLIBProcessor).

            answer = model.ask("scan.png", "What is in <region>?", prompts=[Box(40, 60, 120, 150)])
            model.ask(answer, "Is it on the left?").text
        """
        prompts = [prompts] if isinstance(prompts, Point | Box | Mask) else as_list("prompts", prompts)
        history, on = as_list("history", history), [0] * len(prompts)
        if isinstance(images, Answer):
            if history:
                raise InputError("An Answer brings its own turns; give either it or history.")
            prompts, on = [*images.prompts, *prompts], [*images.prompt_images, *on]
            images, history = images.images, images.history
        images = list(images) if isinstance(images, list | tuple) else [images]
        sample = Sample(images, [*history, (question, None)], prompts, on if images else None)
        return self.answer([sample], max_new_tokens=max_new_tokens, seed=seed, **kwargs)[0]

    def segment(self, images: Any, target: str | Sequence[str], **kwargs) -> Answer:
        """Draw what is named: `model.segment("scan.png", "the right lung")`, or a list of names.

        No mask comes back for what the model says is absent.
        """
        return self.ask(images, request(named(target)), **kwargs)

    def segment_volume(self, volume: Any, target: str | Sequence[str], **kwargs) -> VolumeAnswer:
        """Draw what is named in every slice of a volume; see `medplib.volumetric.segment_volume`.

        model.segment_volume("ct.nii.gz", ["the right lung", "the left lung"]).save("out/")
        """
        from medplib.volumetric import segment_volume

        return segment_volume(self, volume, target, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat each row for its beams or samples (called by `generate`).

        What lists the images and regions of one row after another is repeated row by row; the pictures that
        it points at stay.
        """
        held = {name: kwargs.pop(name) for name in (*_PICTURES, *_LISTS) if kwargs.get(name) is not None}
        if expand_size > 1 and held:
            pictures = held.get("pixel_values", getattr(held.get("features"), "grid", ()))
            held.setdefault("image_index", torch.arange(len(pictures), device=input_ids.device))
            if "region_masks" in held and len(pictures) > 1:
                held.setdefault("region_images", torch.arange(len(pictures), device=input_ids.device))
            for name in held.keys() & _LISTS.keys():
                kind, width = _LISTS[name], self.num_image_tokens if _LISTS[name] == "image" else 1
                first = 1 if kind == "seg" else 0  # nothing predicts the first token
                at = input_ids[:, first:] == getattr(self.config.tokens, kind)
                counts = (at.sum(1) // width).tolist()  # (B,)
                if sum(counts) != len(held[name]):
                    raise InputError(f"{name} has {len(held[name])} entries, the prompts need {sum(counts)}.")
                blocks = held[name].split(counts)
                held[name] = torch.cat([block for block in blocks for _ in range(expand_size)])
        ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return ids, kwargs | held

    def _need_processor(self):
        if self.processor is None:
            raise InputError(
                "This model has no processor; load it with from_pretrained or set model.processor."
            )
        return self.processor

    def _check_length(self, prompt: int, new: int) -> None:
        check_whole(max_new_tokens=new)
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is not None and prompt + new > limit:
            raise InputError(
                f"The prompt takes {prompt} tokens and max_new_tokens is {new}, but the language model "
                f"reads at most {limit} together. Shorten the question, give fewer images, or begin a new "
                "conversation."
            )

    def _draw_generated(self, batch: Batch, generated: Generation) -> list[tuple[int, int, Tensor]]:
        """(row, image within the row, logits) of every generated `<SEG>`, on the last image of its row; the
        mask side runs once on each image that is drawn on, and not at all without `<SEG>`."""
        rows = generated.rows.tolist()
        kept = [i for i, row in enumerate(rows) if batch.row_images[row]]
        if not kept:
            return []
        images = [batch.row_images[rows[i]][-1] for i in kept]
        used = sorted(set(images))
        features = self.mask_encoder(batch.tensors["mask_pixel_values"][used])
        place = {image: i for i, image in enumerate(used)}
        index = torch.tensor([place[image] for image in images], device=features.grid.device)
        logits, _ = self.decode_masks(generated.states[kept], features, index)
        places = [len(batch.row_images[rows[i]]) - 1 for i in kept]
        return [(rows[i], at, logit) for i, at, logit in zip(kept, places, logits.float(), strict=True)]

    def _to_answer(self, row, sample, batch, generated, drawn, seed, chosen: Quirks) -> Answer:
        text, written, labels = self.processor.decode(generated.ids[row])
        config = self.config.mask
        cut = torch.tensor(THRESHOLD if chosen.threshold else config.threshold).logit().item()
        geometry = "official" if chosen.crop else config.geometry
        question, pictures = sample.turns[-1][0], batch.row_images[row]
        findings = []
        for i, (_, at, logits) in enumerate(d for d in drawn if d[0] == row):
            logits = batch.letterboxes[pictures[at]].unletterbox(logits, geometry)  # (H, W)
            label = "".join(labels[i : i + 1]) or target_of(question) or f"finding {i + 1}"
            findings.append(Finding(label, (logits > cut).cpu().numpy(), mask_score(logits, cut), at))
        images = [batch.images[i] for i in pictures]
        on = tuple(sample.prompt_images or [0] * len(sample.prompts or ()))
        prompts = tuple(_kept(p, images[i]) for p, i in zip(sample.prompts or (), on, strict=True))
        history = _turns_to_go_on_from(sample, written)
        return Answer(text, findings, images, question, prompts, self.identity(), seed, history, on)


def _check_options(options: Iterable[str]) -> None:
    """Raise InputError for an option that neither we nor transformers' `generate` know."""
    theirs = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters, "tokenizer"}
    ours = ("prompts", "history", "max_new_tokens", "seed", "compat")
    for name in options:
        if name not in theirs:
            close = difflib.get_close_matches(name, [*ours, *theirs], n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise InputError(
                f"There is no option {name!r}.{hint} Known: {', '.join(ours)}, and those of transformers' "
                "GenerationConfig."
            )


def answer_each(
    model: Any, samples: Sequence[Sample], errors: type[Exception] = Exception, **options: Any
) -> list[Answer | Exception]:
    """The answer to each sample, or what of `errors` went wrong with it; options are those of `answer`.

    A batch that fails is taken apart, so that only the sample that fails alone has no answer.
    """
    if not samples:
        return []
    try:
        return model.answer(samples, **options)
    except errors as error:
        if len(samples) == 1:
            return [error]
    return [answer_each(model, [sample], errors, **options)[0] for sample in samples]


def _kept(prompt: Point | Box | Mask, image: np.ndarray) -> Point | Box | Mask:
    """A prompt that stays what it is when the file or array of its mask is changed or deleted."""
    return Mask(prompt.to_mask(image.shape[:2])) if isinstance(prompt, Mask) else prompt


def _turns_to_go_on_from(sample: Sample, written: str) -> tuple[tuple[str, str], ...]:
    """The turns with the new answer; each prompt has its <region>, and a <region> without one is a word."""
    turns = [*sample.turns[:-1], (sample.turns[-1][0], written)]
    if not sample.prompts:
        return tuple((question.replace(REGION, "region"), answer) for question, answer in turns)
    missing = len(sample.prompts) - sum(question.count(REGION) for question, _ in turns)
    question, answer = turns[-1]
    return (*map(tuple, turns[:-1]), (question.rstrip() + f" {REGION}" * missing, answer))


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` inside, the generators as before outside; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _after_end(ids: Tensor, end: int | None) -> Tensor:
    """(B, T) -> True behind the first `end` of each row."""
    over = torch.zeros_like(ids) if end is None else (ids == end).long()
    return over.cumsum(1) - over > 0
