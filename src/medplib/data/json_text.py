"""JSON files of any size, item by item, each with the byte where it begins."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from medplib.errors import InputError

CHUNK = 1 << 22  # bytes read at a time
MAX_ROW = 1 << 26  # bytes of one row; a longer one is a damaged file
_SPACE = " \t\r\n,"
_DECODER = json.JSONDecoder()
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes) -> Any:
    """The first JSON value in `data`, or the first pair (key, value), whatever follows it.

    Half a surrogate pair, as a text cut at a number of UTF-16 units ends in, becomes U+FFFD.
    """
    text = data.decode("utf-8", "replace")
    first, end = _DECODER.raw_decode(text)
    rest = text[end:].lstrip()
    value = (first, _DECODER.raw_decode(rest[1:].lstrip())[0]) if rest.startswith(":") else first
    return _whole_characters(value) if _SURROGATE.search(text) else value


def scan_json(path: str | os.PathLike, inside: Sequence[str] = ()) -> Iterator[tuple[str | None, int, Any]]:
    """(key, byte position, value) of every item of a JSON file, one at a time.

    A list gives its items with key None, and so do the lines of a .jsonl file; an object gives its members,
    with the key's position, but a list under a key of `inside` gives its items, each with that key. Raises
    InputError, with the position, for text that is no JSON.
    """
    with _Text(path) as text:
        if text.path.lower().endswith((".jsonl", ".ndjson")):
            yield from ((None, *item) for item in text.items(""))
        elif text.peek() == "[":
            yield from ((None, *item) for item in text.items("]"))
        elif text.peek() == "{":
            text.take("{")
            while text.peek() not in ("}", ""):
                at, key = text.value()
                text.take(":")
                if key in inside and text.peek() == "[":
                    yield from ((key, *item) for item in text.items("]"))
                else:
                    yield key, at, text.value()[1]
            text.take("}")
        else:
            raise text.wrong("a list or an object")
        if text.peek():
            raise text.wrong("the end")


def _whole_characters(value: Any) -> Any:
    """A JSON value whose texts UTF-8 can hold."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_whole_characters, value))
    return value


class _Text:
    """A UTF-8 file as a window of text that moves forward; `position` is in bytes of the file."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._window, self._at, self.position = "", 0, 0
        self._ended = False

    def __enter__(self) -> _Text:
        try:
            self._file = open(self.path, "rb")
        except OSError as error:
            raise InputError(f"{self.path!r} cannot be opened: {error.strerror}. Check the path.") from error
        if self._file.read(3) == codecs.BOM_UTF8:
            self.position = 3
        self._file.seek(self.position)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def peek(self) -> str:
        """The next character that is neither white space nor a comma; "" at the end."""
        while True:
            start = self._at
            while self._at < len(self._window) and self._window[self._at] in _SPACE:
                self._at += 1
            self.position += self._at - start
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Step over this character."""
        if self.peek() != character:
            raise self.wrong(repr(character))
        self._at += 1
        self.position += 1

    def items(self, end: str) -> Iterator[tuple[int, Any]]:
        """(position, value) of the values between "[" and its `end`, or up to the file's end for ""."""
        if end:
            self.take("[")
        while self.peek() not in (end, ""):
            yield self.value()
        if end:
            self.take(end)

    def value(self) -> tuple[int, Any]:
        """(its position, value) of the next JSON value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._window, self._at)
            except (json.JSONDecodeError, RecursionError):
                if len(self._window) - self._at > MAX_ROW or not self._more():
                    raise self.wrong("a whole JSON value") from None
                continue
            if len(self._window) - end < 4 and self._more():
                continue  # a number may go on, as "1" in "1e-5"
            start, taken = self.position, self._window[self._at : end]
            self.position += len(taken) if taken.isascii() else len(taken.encode())
            self._at = end
            return start, value

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        rest = self._window[self._at :]
        data = self._file.read(max(CHUNK, len(rest)))  # doubling: a long value is not parsed often
        self._ended = not data
        try:
            self._window, self._at = rest + self._decode.decode(data, self._ended), 0
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path!r} is not UTF-8 text: {error}. Save it as UTF-8.") from error
        return True

    def wrong(self, wanted: str) -> InputError:
        found = self._window[self._at : self._at + 20] or "the end of the file"
        return InputError(
            f"{self.path!r} is not valid JSON: at byte {self.position} {wanted} should stand, but there is "
            f"{found!r}. The file may be cut short; fetch it again."
        )
