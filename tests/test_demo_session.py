"""The demo without its page: what a session reads, keeps and forgets, and what the guard lets in."""

import asyncio
import json
import os
import struct
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from medplib import Box, InputError, Point
from medplib.apps import demo_session
from medplib.apps.demo_guard import MAX_EVENT, MAX_UPLOAD, Guard, is_text, is_upload
from medplib.apps.demo_session import KINDS, SESSIONS, Sessions, sweep

POINT, BOX = KINDS


@pytest.fixture
def sessions(tiny_model, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    return Sessions(tiny_model, root)


@pytest.fixture
def upload(sessions, pictures):
    """`upload(array_or_bytes, "name.png")` -> the path of a file as the page would receive it."""

    def make(content=None, name="scan.png"):
        path = sessions.root / "hash" / name
        path.parent.mkdir(exist_ok=True)
        content = pictures[0] if content is None else content
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.fromarray(content).save(path)
        return path

    return make


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def test_a_conversation_with_places(sessions, upload, pictures):
    with sessions.using("a") as session:
        path = upload()
        session.open(path)
        assert not path.exists()
        assert list(session.folder.iterdir()) == []
        assert (session.picture == pictures[0]).all()
        session.click(3, 4, POINT)
        session.click(40, 30, BOX)
        session.click(10, 20, BOX)
        assert session.places == [Point(3, 4), Box(10, 20, 41, 31)]
        first = session.ask("What is in <region> and in <region>?")
        assert first.prompts == (Point(3, 4), Box(10, 20, 41, 31))
        assert session.places == []
        session.click(59, 47, BOX)  # the last pixel
        session.click(59, 47, BOX)
        second = session.ask("And here?")
        assert second.prompts[2:] == (Box(59, 47, 60, 48),)
        assert [question for question, _ in session.turns] == [
            "What is in <region> and in <region>?",
            "And here?",
        ]
        assert len(second.history) == 2
        with zipfile.ZipFile(session.save_files()) as packed:
            record = json.loads(packed.read("answer.json"))
            assert {"overlay.png", "answer.json"} <= set(packed.namelist())
        assert record["question"] == "And here?"
        assert Image.open(session.save_picture()).size == (60, 48)
        assert Image.open(session.save_overlay()).size >= (60, 48)
        session.begin_again()
        assert (session.answer, session.turns, list(session.folder.iterdir())) == (None, [], [])
        assert session.ask("What is this?").prompts == ()


def test_only_the_last_files_are_kept(sessions, upload):
    with sessions.using("a") as session:
        session.open(upload())
        written = [session.save_picture() for _ in range(9)]
        assert sorted(session.folder.iterdir()) == written[-demo_session._KEPT :]


def test_sixteen_bits_are_stretched(sessions, upload):
    deep = np.linspace(1000, 1400, 20 * 30).reshape(20, 30).astype(np.uint16)
    with sessions.using("a") as session:
        session.open(upload(deep, "deep.png"))
        assert session.picture.min() == 0
        assert session.picture.max() == 255


def test_what_cannot_be_done_leaves_the_session_as_it_was(sessions, upload):
    with sessions.using("a") as session:
        for early in (lambda: session.ask("What?"), lambda: session.click(1, 1, POINT), session.save_files):
            with pytest.raises(InputError, match="first"):
                early()
        session.open(upload())
        session.click(1, 1, BOX)
        before = session.picture
        wrong = [
            *[(session.click, (x, y, POINT)) for x, y in ((60, 1), (1, 48), (-1, 0), (float("nan"), 1))],
            *[(session.click, ("1", [2], POINT)), (session.click, (1, 1, "mask"))],
            *[(session.ask, (question,)) for question in ("", "  ", None, 3, "x" * 10_001, "x " * 4_000)],
            *[(session.turn_to, (index,)) for index in (1, -1, 0.5, "0", None)],
        ]
        for call, values in wrong:
            with pytest.raises(InputError):
                call(*values)
        path = upload(b"no picture", "../x.png".replace("../", ""))
        with pytest.raises(InputError):
            session.open(path)
        assert not path.exists()
        assert session.picture is before
        assert (session.corner, session.places, session.turns) == ((1, 1), [], [])
        assert list(session.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (bomb(), "bomb.png", "at most 64 million"),
        (b"", "empty.png", "empty"),
        (b"<svg/>", "Doe^Jane.svg", "upload.svg"),
        (b"<svg/>", "x" * 200 + ".svg", "upload.svg"),
        (b"\x1f\x8b garbage", "scan.nii.gz", "upload.nii.gz"),
        (b"garbage", "scan.mha", "MetaImage"),
        (bytes(128) + b"DICM garbage", "scan", "upload"),
    ],
)
def test_what_is_no_picture_is_named_by_no_name_of_its_own(sessions, upload, content, name, said):
    if "nii" in name:
        pytest.importorskip("nibabel", reason="reading volumes needs nibabel")
    with sessions.using("a") as session, pytest.raises(InputError) as caught:
        session.open(upload(content, name))
    assert said in str(caught.value)
    assert "Doe" not in str(caught.value)


def test_a_volume_is_turned_slice_by_slice(sessions, upload, monkeypatch):
    nibabel = pytest.importorskip("nibabel", reason="reading volumes needs nibabel")
    from medplib.io import volume

    values = np.arange(20 * 30 * 5, dtype=np.int16).reshape(20, 30, 5)
    data = nibabel.Nifti1Image(values, np.eye(4)).to_bytes()
    with sessions.using("a") as session:
        session.open(upload(data, "scan.nii"))
        assert (session.slices, session.slice) == (5, 2)
        session.click(1, 1, POINT)
        session.ask("What is this?")
        middle = session.picture
        session.turn_to(4)
        assert session.turns == session.places == []
        assert (session.picture != middle).any()
        assert list(session.folder.iterdir()) == []
        assert volume._read.cache_info().currsize == 0  # nothing of it is kept elsewhere
        monkeypatch.setattr(demo_session, "MAX_VOXELS", 2999)
        with pytest.raises(InputError, match="20 x 30 x 5 voxels"):
            session.open(upload(data, "scan.nii"))


def test_frames_of_a_dicom_file(sessions, upload):
    pytest.importorskip("pydicom", reason="reading DICOM needs pydicom")
    from pydicom.data import get_testdata_file

    source = get_testdata_file("examples_ybr_color.dcm", download=False) or get_testdata_file(
        "rtdose.dcm", download=False
    )
    with open(source, "rb") as file:
        data = file.read()
    with sessions.using("a") as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        session.open(upload(data, "any"))
        assert session.slices > 1
        first = session.picture
        session.turn_to(session.slices - 1)
        assert session.picture.shape == first.shape
        assert list(session.folder.iterdir()) == []


def test_sessions_end_with_their_files(sessions, upload):
    sessions.most = 2
    for key in ("a", "b", "../../c"):
        with sessions.using(key) as session:
            session.open(upload())
            session.save_picture()
    folders = list((sessions.root / SESSIONS).iterdir())
    assert len(sessions) == len(folders) == 2
    assert all(len(folder.name) > 20 for folder in folders)
    with sessions.using("a") as session:
        assert session.picture is None  # it was closed, this is a new one
    for key in ("a", "b", "../../c", "d"):
        sessions.close(key)
    assert len(sessions) == 0
    assert list((sessions.root / SESSIONS).iterdir()) == []


def test_uploads_that_nobody_opens_are_swept(sessions, upload):
    with sessions.using("a") as session:
        session.open(upload())
        shown = session.save_picture()
        os.utime(shown, (1, 1))
    old, new = upload(b"old", "old"), upload(b"new", "new")
    os.utime(old, (1, 1))
    assert sweep(sessions.root, 60) == 3
    assert (old.exists(), new.exists(), shown.exists()) == (False, True, True)
    for path in (new, new.parent):
        os.utime(path, (time.time() - 100,) * 2)
        assert sweep(sessions.root, 60) == 0
    assert not new.parent.exists()


# ---------------------------------------------------------------------------------- the guard


class Asked:
    """A guard in front of an application that says 200 to everything; `asked(...)` is the status."""

    def __init__(self, root, hosts=frozenset({"127.0.0.1"})):
        self.root = root
        self.guard = Guard(
            self.app, root=root, hosts=hosts, events={0: (is_upload(root),), 1: (is_text,), 2: ()}
        )
        self.seen = None

    async def app(self, scope, receive, send):
        self.seen = scope, (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"let in"})

    def __call__(self, method, path, body=b"", query=b"", **headers):
        given = {"host": "127.0.0.1:7860", "content_length": str(len(body))} | headers
        raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items() if v is not None]
        half = len(body) // 2
        parts = iter([(body[:half], True), (body[half:], False)])
        sent = []

        async def receive():
            part, more = next(parts)
            return {"type": "http.request", "body": part, "more_body": more}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": query}
        asyncio.run(self.guard(scope, receive, send))
        self.headers = dict(sent[0]["headers"])
        return sent[0]["status"]

    def event(self, **event):
        body = json.dumps({"fn_index": 1, "data": ["What?"], "session_hash": "abc"} | event).encode()
        return self("POST", "/gradio_api/queue/join", body)


@pytest.fixture
def asked(tmp_path):
    (tmp_path / "root" / SESSIONS / "token").mkdir(parents=True)
    (tmp_path / "root" / SESSIONS / "token" / "overlay.png").write_bytes(b"a picture")
    (tmp_path / "root" / "hash").mkdir()
    (tmp_path / "root" / "hash" / "upload.png").write_bytes(b"an upload")
    (tmp_path / "secret").write_bytes(b"a secret")
    (tmp_path / "root" / "hash" / "link").symlink_to(tmp_path / "secret")
    return Asked((tmp_path / "root").resolve())


def test_the_pages_own_requests_are_let_in(asked):
    for path in ("/", "/config", "/assets/index-x.js", "/static/img/logo.svg", "/theme.css", "/favicon.ico"):
        assert asked("GET", path, query=b"deep_link=x") == 200
        assert asked.seen[0]["query_string"] == b""
    assert b"default-src 'self'" in asked.headers[b"content-security-policy"]
    assert asked("GET", "/gradio_api/queue/data", query=b"session_hash=x") == 200
    assert asked.seen[0]["query_string"] == b"session_hash=x"
    assert asked("GET", "/gradio_api/heartbeat/0ab-c_d") == 200
    assert asked("POST", "/gradio_api/upload", b"files", origin="http://127.0.0.1:7860") == 200
    assert asked.event() == 200
    assert json.loads(asked.seen[1])["data"] == ["What?"]


def test_files_of_the_sessions_are_shown_and_no_others(asked):
    shown = asked.root / SESSIONS / "token" / "overlay.png"
    assert asked("GET", f"/gradio_api/file={shown}", range="bytes=0-1-2") == 200
    assert asked.headers[b"cache-control"] == b"no-store"
    assert not any(name == b"range" for name, _ in asked.seen[0]["headers"])
    others = [
        *("/etc/passwd", "", "/", "http://127.0.0.1/", "https://example.org/x.png", "x" * 5000, "\0", "file:///etc/passwd"),
        *(asked.root / "hash" / "upload.png", asked.root / "hash" / "link", shown.parent, f"{shown}\0"),
        f"{asked.root}/{SESSIONS}/../../secret",
        f"{asked.root}/{SESSIONS}/token/../token/overlay.png",
    ]  # fmt: skip
    assert [path for path in others if asked("GET", f"/gradio_api/file={path}") != 403] == []


def test_what_gradio_offers_beyond_the_page_is_not_there(asked):
    rest = "proxy=http://x file/etc/passwd call/ask run/ask api/ask component_server vibe-edit vibe-code runs"
    for path in (
        *rest.split(),
        "process_recording",
        "deep_link",
        "login",
        "openapi.json",
        "stream/a/b/c/d.ts",
    ):
        for method in ("GET", "POST"):
            assert asked(method, f"/gradio_api/{path}") == 404
    assert asked("GET", "/monitoring") == 404
    assert {asked(method, "/") for method in ("PUT", "DELETE", "PATCH", "TRACE")} == {405}


def test_other_hosts_and_other_pages_are_refused(asked):
    hosts = ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[", None)
    assert {asked("GET", "/", host=host) for host in hosts} == {421}
    assert {asked("GET", "/", origin=origin) for origin in ("null", "http://evil.example", "x")} == {403}
    anywhere = Asked(asked.root, hosts=None)
    assert anywhere("GET", "/", host="ward-7:7860", origin="http://ward-7:7860") == 200


def test_sizes_are_limited_before_anything_is_read(asked):
    for path, most in (("/gradio_api/upload", MAX_UPLOAD), ("/gradio_api/queue/join", MAX_EVENT)):
        assert asked("POST", path, content_length=str(most + 1)) == 413
        for length in (None, "-1", "x", "9" * 30):
            assert asked("POST", path, content_length=length) == 411
        assert asked("POST", path, b"{}", transfer_encoding="chunked") == 411


def test_events_take_their_own_values_alone(asked):
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        assert asked("POST", "/gradio_api/queue/join", body) == 400
    wrong = [{"fn_index": i} for i in (9, -1, "1", None, True, 1.0, [])]
    wrong += [{"session_hash": key} for key in (None, "", "a/b", "../x", 3, "x" * 65)]
    wrong += [
        {"data": data} for data in (None, "x", {}, [], [1], [None], ["a", "b"], [["a"]], [{"path": "x"}])
    ]
    assert [event for event in wrong if asked.event(**event) != 422] == []
    own = {"path": str(asked.root / "hash" / "upload.png"), "meta": {"_type": "gradio.FileData"}}
    assert asked.event(fn_index=0, data=[own]) == 200
    assert asked.event(fn_index=0, data=[own | {"url": "http://127.0.0.1:7860/x", "size": 3}]) == 200
    shown = str(asked.root / SESSIONS / "token" / "overlay.png")
    link = str(asked.root / "hash" / "link")
    paths = ("/etc/passwd", "http://127.0.0.1:1/x.png", "file:///etc/passwd", "", None, 3, ["x"], shown, link)
    files = [own | {"path": path} for path in paths]
    files += [own | change for change in ({"meta": {}}, {"meta": own}, {"is_stream": True}, {"size": "x"})]
    files += [own | {"url": own}, own | {"more": own}, {"path": own["path"]}, [own], "x", None, 3]
    assert [file for file in files if asked.event(fn_index=0, data=[file]) != 422] == []


def test_anything_but_http_is_closed(asked):
    asyncio.run(asked.guard({"type": "websocket"}, None, None))
    assert asked.seen is None
