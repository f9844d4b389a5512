"""OpenAIWriter: answers worded by any server that speaks the OpenAI chat completions protocol.

Only words leave the machine: question, draft and the facts of the masks; no image, no file or case name.
Every answer is kept on disk under the hash of its request: a second run is free and a stopped one goes on.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medplib.errors import InputError, MedPLIBError

SYSTEM = (
    "You word answers about medical images for a training set. You get facts measured from expert masks, a "
    "question and a correct draft answer. Write the answer in one to three natural sentences. Say nothing "
    "that the facts and the draft do not say: no diagnosis, no cause, no advice. Keep every number of the "
    "draft and add none. Keep names and words of place (left, upper, inside) as the draft has them and in "
    "its order, and name no other structure. Keep <ref>...</ref> and <SEG> exactly as they are and in their "
    'order; use no other tags. If the draft begins with "Yes" or "No", begin with it. Reply with the answer '
    "alone."
)
# No connection, a time-out, an answer cut short, or not the protocol's JSON: worth another try.
_PASSING = (OSError, ValueError, http.client.HTTPException)
_LOCAL = ("localhost", "127.0.0.1", "::1")


class OpenAIWriter:
    """POSTs to `{base_url}/chat/completions`, for example base_url="https://api.openai.com/v1".

    api_key_env  name of the environment variable with the key; without the variable no key is sent. The key
                 is kept in no file and no message, and goes over plain http to this machine only
    cache        folder of the answers; None keeps none
    concurrency  requests at a time
    timeout      seconds for one request
    retries      further tries after 429, 5xx, a broken connection or an answer that cannot be read; the wait
                 is what `Retry-After` says, else 1, 2, 4, ... seconds with jitter, at most `longest_wait`
    extra        further fields of the request, such as {"max_completion_tokens": 200}

    `requests` and `cached` count what was sent and what was found on disk. Raises InputError for an address
    or number that cannot be used; `write` raises MedPLIBError when the server refuses or stays unreachable.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        cache: str | os.PathLike | None = None,
        temperature: float | None = 0.7,
        system: str = SYSTEM,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 5,
        longest_wait: float = 60.0,
        extra: Mapping[str, Any] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"base_url must be like https://api.openai.com/v1, got {base_url!r}.")
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise InputError(
                "concurrency must be at least 1, retries at least 0 and timeout above 0, got "
                f"{concurrency}, {retries} and {timeout}."
            )
        self._key = os.environ.get(api_key_env) or None
        if self._key and parts.scheme == "http" and parts.hostname not in _LOCAL:
            raise InputError(
                f"The key in ${api_key_env} would go to {parts.hostname} unencrypted; use https, or unset it."
            )
        self.base_url, self.model, self.api_key_env = base_url.rstrip("/"), model, api_key_env
        self.cache = None if cache is None else Path(cache)
        self.system, self.temperature, self.extra = system, temperature, dict(extra or {})
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.longest_wait, self._sleep = longest_wait, sleep
        self.requests = self.cached = 0
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def write(self, facts: Mapping[str, Any], question: str, draft: str) -> str:
        """The server's answer, or the one on disk. Raises MedPLIBError; what came before stays on disk."""
        body = self.request(facts, question, draft)
        path = self._path(body)
        if path is not None and (kept := _read_kept(path)) is not None:
            with self._lock:
                self.cached += 1
            return kept
        answer = self._ask(body)
        if path is not None:
            _keep(path, answer)
        return answer

    def request(self, facts: Mapping[str, Any], question: str, draft: str) -> dict[str, Any]:
        """The JSON body that is sent."""
        user = json.dumps(
            {"facts": facts, "question": question, "draft": draft}, ensure_ascii=False, sort_keys=True
        )
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": user}],
            **self.extra,
        }
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body

    def _path(self, body: dict[str, Any]) -> Path | None:
        if self.cache is None:
            return None
        text = json.dumps([self.base_url, body], ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.cache / digest[:2] / f"{digest}.json"

    def _ask(self, body: dict[str, Any]) -> str:
        reason = ""
        for attempt in range(self.retries + 1):
            wait = min(self.longest_wait, 2.0**attempt) * random.Random().uniform(0.75, 1.25)
            try:
                return _content(self._post(body))
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"{error.code} {error.reason}: {self._redacted(_message(error))}"
                    after = _seconds(error.headers.get("Retry-After"))
                if error.code not in (408, 409, 429) and error.code < 500:
                    hint = f" Is ${self.api_key_env} set and right?" if error.code in (401, 403) else ""
                    raise MedPLIBError(f"{self.base_url} refused the request: {reason}.{hint}") from None
                wait = wait if after is None else min(after, self.longest_wait)
            except _PASSING as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                self._sleep(wait)
        kept = (
            ""
            if self.cache is None
            else f" Answers so far are in {str(self.cache)!r}: run it again to go on."
        )
        raise MedPLIBError(
            f"{self.base_url} gave no usable answer in {self.retries + 1} tries ({reason}).{kept}"
        )

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            f"{self.base_url}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        with self._lock:
            self.requests += 1
        with self._opener.open(request, timeout=self.timeout) as response:
            return response.read()

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host: it is an error instead."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _content(data: bytes) -> str:
    """choices[0].message.content. Raises ValueError when that is not what came."""
    try:
        text = json.loads(data)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"an answer without choices[0].message.content ({error!r})") from error
    if not isinstance(text, str) or not text.strip():
        raise ValueError("an empty answer")
    return text.strip()


def _message(error: urllib.error.HTTPError) -> str:
    """error.message of the body, as the protocol has it; else the start of the body."""
    data = error.read(4000)
    try:
        return str(json.loads(data)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return " ".join(data.decode("utf-8", "replace").split())[:200] or "no message"


def _seconds(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:  # a date: the usual wait will do
        return None


def _read_kept(path: Path) -> str | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if isinstance(kept, str) else None


def _keep(path: Path, answer: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.{random.Random().getrandbits(32):08x}")
    part.write_text(json.dumps({"answer": answer}, ensure_ascii=False), encoding="utf-8")
    os.replace(part, path)
