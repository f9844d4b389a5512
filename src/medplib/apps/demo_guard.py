"""What a request to the demo may ask for: a layer before gradio, which offers far more than the page uses.

It lets the page's own routes pass, files of the sessions, and events whose data is what the event takes;
nothing in a request makes the server fetch an address or read another file. The browser is told to load
nothing from elsewhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medplib.apps.demo_session import SESSIONS, sweep

MAX_UPLOAD = 1 << 30  # bytes
MAX_UPLOADS = 1 << 32  # of all that are not opened yet
MAX_EVENT = 1 << 18
_UPLOAD_AGE = 600  # seconds after which an upload that nobody opened is deleted
_API = "/gradio_api"
_FILE = f"{_API}/file="
_PAGES = re.compile(
    rf"/(config/?|theme\.css|favicon\.ico|robots\.txt|(assets|static)/.+)?"
    rf"|{_API}/(info/?|startup-events|theme\.css|queue/data|upload_progress|heartbeat/[\w-]+)"
)
_EVENT, _UPLOAD = f"{_API}/queue/join", f"{_API}/upload"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_FILE_WORDS = ("url", "orig_name", "mime_type", "alt_text", "b64")  # what may be said of a file, all optional
Check = Callable[[Any], bool]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware that answers with a 4xx what the page never asks.

    root: the folder of uploads, and in `sessions` of the files that the sessions make. hosts: the names under
    which the server may be addressed (against pages of others whose names are pointed here), None for any.
    events: of each event's number the checks of its data, one a value.
    """

    def __init__(
        self,
        app: Any,
        *,
        root: Path,
        hosts: frozenset[str] | None,
        events: Mapping[int, Sequence[Check]],
    ) -> None:
        self.app, self.root, self.hosts, self.events = app, root, hosts, events

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no web sockets here; the connection is closed
        path = scope["path"]
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refused = self._refused(scope["method"], path, headers)
        if refused is None and path == _EVENT:
            body = await _read(receive)
            refused = self._refused_event(body)
            receive = _replay(body, receive)
        if refused is not None:
            await _answer(send, *refused)
            return
        if not path.startswith(_API):
            scope = {**scope, "query_string": b""}  # of the page it would name states and themes to be loaded
        if path.startswith(_FILE):
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0].lower() != b"range"]}
        await self.app(scope, receive, _with_headers(send, private=path.startswith(_FILE)))

    def _refused(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """(status, reason) for what is not let in by its address and headers alone."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(f"//{host}") not in self.hosts:
            return 421, "This page is for the machine it runs on."
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "Other pages may not use this one."
        if method in ("GET", "HEAD"):
            if path.startswith(_FILE):
                return None if self._is_shown(path.removeprefix(_FILE)) else (403, "No such file.")
            return None if _PAGES.fullmatch(path) else (404, "Not found.")
        if method != "POST" or path not in (_EVENT, _UPLOAD):
            return (404, "Not found.") if method == "POST" else (405, "Not allowed.")
        length = headers.get("content-length", "")
        if not re.fullmatch(r"\d{1,18}", length) or "transfer-encoding" in headers:
            return 411, "Say the length."
        if int(length) > (MAX_EVENT if path == _EVENT else MAX_UPLOAD):
            return 413, "Too large."
        if path == _UPLOAD and sweep(self.root, _UPLOAD_AGE) + int(length) > MAX_UPLOADS:
            return 413, "Too many uploads at once."
        return None

    def _is_shown(self, path: str) -> bool:
        """Whether this is the path of a file that a session made for the browser."""
        return _lies_in(self.root / SESSIONS, path)

    def _refused_event(self, body: bytes) -> tuple[int, str] | None:
        try:
            event = json.loads(body)
        except (ValueError, RecursionError):
            return 400, "No JSON."
        if not isinstance(event, dict):
            return 422, "No event."
        number, data, key = (event.get(name) for name in ("fn_index", "data", "session_hash"))
        if not isinstance(number, int) or isinstance(number, bool) or number not in self.events:
            return 422, "No such event."
        if not isinstance(key, str) or not re.fullmatch(r"[\w-]{1,64}", key):
            return 422, "No session."
        checks = self.events[number]
        if not isinstance(data, list) or len(data) != len(checks):
            return 422, "Wrong number of values."
        if not all(check(value) for check, value in zip(checks, data, strict=True)):
            return 422, "Wrong values."
        return None


def is_text(value: Any) -> bool:
    """The check of a text."""
    return isinstance(value, str)


def is_upload(root: Path) -> Check:
    """The check of a file that was uploaded: what gradio says of it, and that it is one of this folder's."""

    def check(value: Any) -> bool:
        if not isinstance(value, dict) or value.get("meta") != {"_type": "gradio.FileData"}:
            return False
        words = [value.get(key) for key in _FILE_WORDS]
        return (
            value.keys() <= {"path", "size", "is_stream", "meta", *_FILE_WORDS}
            and all(word is None or isinstance(word, str) for word in words)
            and (value.get("size") is None or type(value["size"]) is int)
            and value.get("is_stream") in (None, False)
            and isinstance(value.get("path"), str)
            and _lies_in(root, value["path"])
            and not _lies_in(root / SESSIONS, value["path"])
        )

    return check


def _lies_in(folder: Path, path: str) -> bool:
    """Whether this is the plain path of a file below the folder, without links and steps upwards."""
    try:
        real = Path(os.path.realpath(path))
        return real.is_relative_to(folder) and real.is_file() and real == Path(path)
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


async def _read(receive: Receive) -> bytes:
    """The body, whose length was checked."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False) and message["type"] == "http.request"
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay() -> dict[str, Any]:
        return next(messages, None) or await receive()

    return replay


def _with_headers(send: Send, private: bool) -> Send:
    added = {**_HEADERS, **({"Cache-Control": "no-store"} if private else {})}
    names = {name.lower().encode() for name in added}

    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [(key, value) for key, value in message.get("headers", []) if key.lower() not in names]
            own = [(name.lower().encode(), value.encode()) for name, value in added.items()]
            message = {**message, "headers": kept + own}
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str) -> None:
    send = _with_headers(send, private=True)
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
