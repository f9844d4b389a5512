"""The published tokenizer: LLaMA's sentencepiece model in plain Python, with the old rules for added tokens.

It needs neither sentencepiece nor protobuf. The rules are those of the "slow, legacy" tokenizer that the
weights were trained with: white space around an added token vanishes, and the text after one begins as if
with a space.
"""

from __future__ import annotations

import heapq
import json
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medplib.conversation import CONTROL_TOKENS, Run
from medplib.errors import CheckpointError

MODEL_FILE, ADDED_FILE, CONFIG_FILE = "tokenizer.model", "added_tokens.json", "tokenizer_config.json"
SPACE = "\u2581"
GENERATED = 256  # the tokens <gen_1> to <gen_256>, which nothing uses
_UNKNOWN, _CONTROL, _BYTE = 2, 3, 6  # types of pieces in a sentencepiece model; 1 is normal


class LegacyLlamaTokenizer:
    """Text <-> ids, with the methods of a Hugging Face tokenizer that MedPLIBProcessor uses.

        tokenizer = LegacyLlamaTokenizer.from_pretrained(folder)
        tokenizer.encode("Sure, <SEG>.")   # without <s>

    added: the control tokens by text. Raises CheckpointError for a model of another kind than LLaMA's.
    """

    def __init__(self, model: bytes, added: dict[str, int], settings: dict[str, Any] | None = None) -> None:
        self.model, self.settings = model, dict(settings or {})
        self.pieces = _read_model(model)
        self.ids = {text: i for i, (text, _, kind) in enumerate(self.pieces) if kind not in (_CONTROL, _BYTE)}
        self.scores = {
            text: score for text, score, kind in self.pieces if kind not in (_CONTROL, _BYTE, _UNKNOWN)
        }
        self.byte_ids = [i for i, piece in enumerate(self.pieces) if piece[2] == _BYTE]
        specials = [text for text, _, kind in self.pieces if kind in (_CONTROL, _UNKNOWN)]
        self.special_ids = {text: i for i, (text, *_) in enumerate(self.pieces) if text in specials}
        self.added = dict(added)
        self.unk_token_id = self.special_ids.get("<unk>", 0)
        self.bos_token_id = self.special_ids.get("<s>")
        self.eos_token_id = self.special_ids.get("</s>")
        self.pad_token_id = self.unk_token_id  # as published
        self._prepare()

    def _prepare(self) -> None:
        names = sorted([*self.added, *self.special_ids], key=len, reverse=True)
        self._find = re.compile("|".join(map(re.escape, names)))
        self._texts = {i: text for text, i in self.added.items()}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LegacyLlamaTokenizer:
        """Read tokenizer.model and added_tokens.json of a folder. Raises CheckpointError."""
        folder = Path(folder)
        try:
            model = (folder / MODEL_FILE).read_bytes()
            added, settings = (
                json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                for path in (folder / ADDED_FILE, folder / CONFIG_FILE)
            )
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"The tokenizer of {str(folder)!r} cannot be read ({error}); copy it again."
            ) from error
        if not isinstance(added, dict) or not all(type(number) is int for number in added.values()):
            raise CheckpointError(f"{ADDED_FILE} of {str(folder)!r} must give a number for each token.")
        tokenizer = cls(model, added, settings if isinstance(settings, dict) else {})
        count, known = len(tokenizer.pieces), {text: i for i, (text, *_) in enumerate(tokenizer.pieces)}
        own = sorted(number for token, number in added.items() if known.get(token) != number)
        if own != list(range(count, count + len(own))):
            raise CheckpointError(
                f"{MODEL_FILE} of {str(folder)!r} has {count} tokens, but {ADDED_FILE} does not go on from "
                "there; they do not belong together."
            )
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> list[str]:
        """Write the three files that `from_pretrained` reads; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model)
        for name, content in ((ADDED_FILE, self.added), (CONFIG_FILE, self.settings)):
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return [str(folder / name) for name in (MODEL_FILE, ADDED_FILE, CONFIG_FILE)]

    def add_control_tokens(self) -> None:
        """Give the control tokens the next free ids, in the published order; `<SEG>` is the first."""
        *words, start, end = CONTROL_TOKENS
        for token in (*words, *(f"<gen_{i}>" for i in range(1, GENERATED + 1)), start, end):
            self.added.setdefault(token, len(self))
        self._prepare()

    def __len__(self) -> int:
        return max([len(self.pieces) - 1, *self.added.values()]) + 1

    def get_added_vocab(self) -> dict[str, int]:
        """The control tokens and their ids."""
        return dict(self.added)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of <unk>, <s> and </s>."""
        return list(self.special_ids.values())

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of one token, that of <unk> for an unknown one."""
        for table in (self.added, self.special_ids, self.ids):
            if token in table:
                return table[token]
        return self.unk_token_id

    def encode(
        self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = False
    ) -> list[int]:
        """Text -> ids. `split_special_tokens` reads control tokens in it as plain text."""
        ids = self.encode_runs([Run(text, control=not split_special_tokens)])[0]
        return [self.bos_token_id, *ids] if add_special_tokens and self.bos_token_id is not None else ids

    def encode_runs(self, runs: Sequence[Run]) -> tuple[list[int], list[bool]]:
        """The ids of a whole prompt, and for each whether its run is learned.

        Neighbouring texts are read as one, so that a word is cut where the published tokenizer cuts it.
        """
        ids: list[int] = []
        learned: list[bool] = []
        for part, flags in self._segments(runs):
            if isinstance(part, int):
                ids.append(part)
                learned.append(flags[0])
                continue
            for number, start in self._words(part):
                ids.append(number)
                learned.append(flags[start])
        return ids, learned

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Ids -> text, as the sentencepiece model joins its pieces; control tokens stand between spaces."""
        parts: list[str] = []
        run: list[int] = []
        for number in [*(int(i) for i in ids), None]:
            text = self._texts.get(number) if number is not None else None
            if number is not None and text is None and number not in self.special_ids.values():
                run.append(number)
                continue
            if run:
                parts.append(self._join(run))
                run = []
            if number is not None and not skip_special_tokens:
                parts.append(text or self.pieces[number][0])
        return " ".join(parts)

    def _segments(self, runs: Sequence[Run]) -> Iterator[tuple[str | int, list[bool]]]:
        """Runs -> texts and single ids in order, each with a flag per character (or for the id)."""
        items: list[tuple[str | int, list[bool], bool]] = []  # the last: does it take the spaces around it
        for content, control, flag in runs:
            if not isinstance(content, str):
                items += [(number, [flag], False) for number in content]
                continue
            at = 0
            for found in self._find.finditer(content) if control else ():
                items.append((content[at : found.start()], [flag] * (found.start() - at), False))
                token = found[0]
                items.append((self.convert_tokens_to_ids(token), [flag], token in self.added))
                at = found.end()
            items.append((content[at:], [flag] * (len(content) - at), False))
        merged: list[tuple[str | int, list[bool], bool]] = []
        for part, flags, strips in items:
            if isinstance(part, str) and merged and isinstance(merged[-1][0], str):
                merged[-1] = (merged[-1][0] + part, merged[-1][1] + flags, False)
            elif part != "":
                merged.append((part, flags, strips))
        for i, (part, flags, _) in enumerate(merged):
            if isinstance(part, str):
                if i + 1 < len(merged) and merged[i + 1][2]:
                    part = part.rstrip()
                    flags = flags[: len(part)]
                if i and merged[i - 1][2]:
                    cut = len(part) - len(part.lstrip())
                    part, flags = part[cut:], flags[cut:]
            if part != "":
                yield part, flags

    def _words(self, text: str) -> Iterator[tuple[int, int]]:
        """Text without control tokens -> (id, place of its first character) of each piece."""
        place = -1  # that of the space put in front, which counts as the first character
        for piece in _merge(SPACE + text.replace(" ", SPACE), self.scores):
            if piece in self.scores:
                yield self.ids[piece], max(place, 0)
            else:
                for byte in piece.encode():
                    yield self.byte_ids[byte] if self.byte_ids else self.unk_token_id, max(place, 0)
            place += len(piece)

    def _join(self, ids: Sequence[int]) -> str:
        raw = b""
        for number in ids:
            text, _, kind = self.pieces[number] if number < len(self.pieces) else ("", 0.0, 1)
            raw += bytes([int(text[1:-1], 16)]) if kind == _BYTE else text.replace(SPACE, " ").encode()
        # As sentencepiece does: a mark for every byte that belongs to no character, not one for several.
        return re.sub("[\udc80-\udcff]", "\ufffd", raw.decode("utf-8", "surrogateescape")).removeprefix(" ")


def _merge(text: str, scores: dict[str, float]) -> list[str]:
    """Byte-pair encoding: of all neighbours that join to a known piece, the best scored first, then the
    leftmost."""
    pieces: list[str] = list(text)
    before, after = list(range(-1, len(text) - 1)), list(range(1, len(text) + 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(pieces) and (joined := pieces[left] + pieces[right]) in scores:
            heapq.heappush(queue, (-scores[joined], left, right, joined))

    for i in range(len(pieces) - 1):
        offer(i, i + 1)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if (
            not pieces[left]
            or not pieces[right]
            or pieces[left] + pieces[right] != joined
            or after[left] != right
        ):
            continue  # one of the two was joined to something else meanwhile
        pieces[left], pieces[right] = joined, ""
        after[left] = after[right]
        if after[right] < len(pieces):
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [piece for piece in pieces if piece]


def _read_model(data: bytes) -> list[tuple[str, float, int]]:
    """A sentencepiece model file -> (text, score, type) of every piece, in the order of their ids.

    Only what LLaMA's needs: byte-pair encoding, no normalization, a space in front. Else CheckpointError.
    """
    pieces: list[tuple[str, float, int]] = []
    kind, rules, prefix, squeeze = 1, b"", 1, 1  # the format's defaults
    try:
        for number, value in _fields(data):
            if number == 1:
                fields = dict(_fields(value))
                score = struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0
                pieces.append((fields[1].decode(), score, fields.get(3, 1)))
            elif number == 2:
                kind = dict(_fields(value)).get(3, 1)
            elif number == 3:
                fields = dict(_fields(value))
                rules, prefix, squeeze = fields.get(2, b""), fields.get(3, 1), fields.get(4, 1)
    except (IndexError, KeyError, ValueError, struct.error, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MODEL_FILE} is damaged ({error!r}); copy it again.") from error
    if not pieces or kind != 2 or rules or not prefix or squeeze:
        raise CheckpointError(
            f"{MODEL_FILE} is not of LLaMA's kind (byte-pair encoding, no normalization, a space in front); "
            "use a folder with tokenizer.json."
        )
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of one protocol buffer message: numbers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _number(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire)
            if size is None:
                if wire != 2:
                    raise ValueError(f"wire type {wire}")
                size, at = _number(data, at)
            value = data[at : at + size]
            if len(value) < size:
                raise IndexError("the file ends early")
            at += size
        yield tag >> 3, value


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length number at a place, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
