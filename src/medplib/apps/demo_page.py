"""The web page of `medplib demo`: gradio's components around `Sessions`. Importing this imports gradio."""

from __future__ import annotations

import html
import ipaddress
import os
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import gradio as gr
import typer
from starlette.middleware import Middleware

from medplib.apps.demo_guard import MAX_UPLOAD, Guard, is_text, is_upload
from medplib.apps.demo_session import KINDS, Session, Sessions
from medplib.apps.terminal import NOTICE, printable
from medplib.errors import InputError, MedPLIBError, is_number

_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_SETTINGS = {  # of gradio; not every version takes them as arguments
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_NUM_WORKERS": "0",  # others than this process would serve files past the guard
    "GRADIO_ALLOWED_PATHS": "",
    "GRADIO_ROOT_PATH": "",
    "GRADIO_VIBE_MODE": "",
    "GRADIO_DEBUG": "0",
}


def is_local(host: str) -> bool:
    """Whether this address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def serving(model: Any, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """A running server; gives its address. At the end it is stopped and every file it had is deleted.

    port: None takes a free one. Raises InputError for a host and port that cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="medplib-demo-", ignore_cleanup_errors=True) as folder:
        root = Path(folder).resolve()
        direct = ",".join([*filter(None, [getproxies().get("no")]), host, "127.0.0.1", "localhost"])
        places = {"GRADIO_TEMP_DIR": str(root), "GRADIO_EXAMPLES_CACHE": str(root), "no_proxy": direct}
        with _environment(_SETTINGS | places):  # gradio asks the server whether it is there, but no proxy
            page = Page(Sessions(model, root), root)
            guard = Middleware(
                Guard, root=root, hosts=_LOCAL | {host} if is_local(host) else None, events=page.checks
            )
            try:
                _, address, _ = page.blocks.launch(
                    server_name=f"[{host}]" if ":" in host else host, server_port=port,
                    prevent_thread_lock=True, quiet=True, inline=False, inbrowser=False, share=False,
                    show_error=False, allowed_paths=[], ssr_mode=False, max_file_size=MAX_UPLOAD,
                    state_session_capacity=8, pwa=False, footer_links=[], enable_monitoring=False,
                    app_kwargs={"middleware": [guard]}, theme=_theme(),
                )  # fmt: skip
            except OSError as error:
                raise InputError(
                    f"--host {host} --port {port} cannot be used: another program has the port, or this "
                    "machine has no such address. Choose another --port."
                ) from error
            try:
                yield address
            finally:
                page.blocks.close(verbose=False)


class Page:
    """The page of `Sessions`: what stands on it, and what each event does.

    blocks  gradio's
    checks  by the number of each event, the checks of what may be sent to it
    """

    def __init__(self, sessions: Sessions, root: Path) -> None:
        self.sessions = sessions
        with gr.Blocks(title="medplib", analytics_enabled=False) as self.blocks:
            gr.Markdown(f"## medplib\n**{NOTICE}** What you open is deleted when you close the page.")
            with gr.Row():
                with gr.Column():
                    self._lay_out_image()
                with gr.Column():
                    self._lay_out_conversation()
            self._connect()
        self.blocks.queue(max_size=32, default_concurrency_limit=1)
        kinds = {"open": (is_upload(root),), "slice": (is_number,), "click": (is_text,), "ask": (is_text,)}
        self.checks = {n: kinds.get(str(event.api_name), ()) for n, event in self.blocks.fns.items()}

    def _lay_out_image(self) -> None:
        self.upload = gr.File(label="Image: PNG, JPEG, TIFF, DICOM, or a NIfTI volume", height=150)
        self.picture = gr.Image(
            label="Picture: click to point", interactive=False, format="png", buttons=["fullscreen"]
        )
        self.index = gr.Slider(0, 1, step=1, label="Slice", visible=False)
        self.kind = gr.Radio(list(KINDS), value=KINDS[0], label="A click sets a")
        self.places = gr.Markdown()
        self.forget = gr.Button("Remove the places")

    def _lay_out_conversation(self) -> None:
        self.turns = gr.Chatbot(
            label="Conversation", height=240, render_markdown=False, feedback_options=None, buttons=[]
        )
        self.question = gr.Textbox(
            label="Question", lines=1, info="<region> stands for the next place; goes on from above."
        )
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary")
            self.new = gr.Button("New conversation")
        self.overlay = gr.Image(label="Answer", interactive=False, format="png", buttons=["fullscreen"])
        self.findings = gr.Dataframe(
            headers=["label", "score", "area (pixels)"], label="Findings", interactive=False
        )
        self.files = gr.DownloadButton("Download overlay, masks and answer.json", interactive=False)

    def _connect(self) -> None:
        shown = [self.picture, self.places]
        said = [self.turns, self.overlay, self.findings, self.files, self.question]
        both = [*shown, *said]
        one = {"preprocess": False, "concurrency_id": "one", "concurrency_limit": 1}  # checked by the guard
        self.upload.upload(
            self.on_open, self.upload, [self.upload, self.index, *both], api_name="open",
            show_progress="minimal", **one,
        )  # fmt: skip
        self.index.input(self.on_slice, self.index, both, api_name="slice", trigger_mode="always_last", **one)
        self.picture.select(self.on_click, self.kind, shown, api_name="click", show_progress="hidden", **one)
        self.forget.click(self.on_forget, None, shown, api_name="forget", **one)
        asked = [self.ask.click, self.question.submit]
        gr.on(asked, self.on_ask, self.question, both, api_name="ask", **one)
        gr.on([self.new.click, self.turns.clear], self.on_new, None, both, api_name="new", **one)
        self.blocks.unload(self.on_leave)

    def on_open(self, file: Any, request: gr.Request) -> list[Any]:
        path = Path(file["path"])
        with _told(self.sessions, request) as session:
            try:
                session.open(path)
            finally:
                with suppress(OSError):
                    path.parent.rmdir()  # named by the content
            slices = gr.update(
                visible=session.slices > 1, maximum=max(1, session.slices - 1), value=session.slice
            )
            return [None, slices, *_shown(session), *_said(session)]

    def on_slice(self, number: Any, request: gr.Request) -> list[Any]:
        with _told(self.sessions, request) as session:
            session.turn_to(number)
            return [*_shown(session), *_said(session)]

    def on_click(self, kind: str, event: gr.EventData, request: gr.Request) -> list[Any]:
        with _told(self.sessions, request) as session:
            session.click(*_place_of(event), kind)
            return _shown(session)

    def on_forget(self, request: gr.Request) -> list[Any]:
        with _told(self.sessions, request) as session:
            session.forget_places()
            return _shown(session)

    def on_ask(self, question: str, request: gr.Request) -> list[Any]:
        with _told(self.sessions, request) as session:
            session.ask(question)
            return [*_shown(session), *_said(session)]

    def on_new(self, request: gr.Request) -> list[Any]:
        with _told(self.sessions, request) as session:
            session.begin_again()
            return [*_shown(session), *_said(session)]

    def on_leave(self, request: gr.Request) -> None:
        self.sessions.close(str(request.session_hash))
        held = self.blocks.app.state_holder.session_data  # gradio's own, which it would keep for an hour
        held.pop(request.session_hash, None)


def _shown(session: Session) -> list[Any]:
    """What the picture and the line about it show."""
    return [str(session.save_picture()), _places_of(session)]


def _said(session: Session) -> list[Any]:
    """What the conversation, the overlay, the table, the download and the field of the question show."""
    talk = [
        {"role": role, "content": html.escape(text, quote=False)}  # the chat shows tags as what they do
        for turn in session.turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    if session.answer is None:
        return [talk, None, [], gr.update(value=None, interactive=False), ""]
    zipped = gr.update(value=str(session.save_files()), interactive=True)
    return [talk, str(session.save_overlay()), session.findings(), zipped, ""]


@contextmanager
def _told(sessions: Sessions, request: gr.Request) -> Iterator[Session]:
    """The session of a request. What goes wrong inside becomes one line on the page, without paths."""
    folder = sessions.root
    try:
        with (
            sessions.using(str(request.session_hash)) as session,
            warnings.catch_warnings(record=True) as notes,
        ):
            warnings.simplefilter("always", UserWarning)
            folder = session.folder
            yield session
    except (MedPLIBError, ImportError) as error:
        raise _error(_line(error, folder)) from None
    except Exception as error:  # a mistake of ours: its text may quote the image or the question
        place = traceback.extract_tb(error.__traceback__)[-1]
        name = type(error).__name__
        typer.echo(printable(f"error: {name} in {place.filename}, line {place.lineno}"), err=True)
        raise _error(f"This could not be done ({name}).") from None
    for note in notes:
        if issubclass(note.category, UserWarning):
            gr.Warning(html.escape(_line(note.message, folder), quote=False))


def _error(text: str) -> gr.Error:
    return gr.Error(html.escape(text, quote=False), print_exception=False)


def _line(error: object, folder: Path) -> str:
    text = str(error)
    for prefix in (f"{folder}{os.sep}", repr(f"{folder}{os.sep}")[1:-1], str(folder)):
        text = text.replace(prefix, "")
    return printable(" ".join(text.split()))


def _place_of(event: gr.EventData) -> tuple[Any, Any]:
    """(x, y) of a click. Raises InputError for what is none."""
    place = event._data.get("index") if isinstance(event._data, dict) else None
    if not isinstance(place, list) or len(place) != 2 or not all(map(is_number, place)):
        raise InputError("A click needs two numbers, x and y in pixels of the picture.")
    return place[0], place[1]


def _places_of(session: Session) -> str:
    height, width = session.picture.shape[:2]
    words = [f"{width} x {height} pixels."]
    if session.slices > 1:
        words.append(f"Slice {session.slice} of {session.slices}, counted from 0.")
    if session.places:
        words.append("For the next question: " + "; ".join(map(_place, session.places)) + ".")
    if session.corner is not None:
        words.append("Click the other corner of the box.")
    return " ".join(words)


def _place(place: Any) -> str:
    values = [getattr(place, name) for name in ("x0", "y0", "x1", "y1") if hasattr(place, name)]
    numbers = " ".join(f"{value:g}" for value in values or (place.x, place.y))
    return f"{type(place).__name__.lower()} {numbers}"


def _theme() -> gr.themes.Base:
    """Without fonts that the browser would fetch from elsewhere."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
