"""`medplib demo`: the command, and its server end to end and under hostile requests, which needs gradio."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_demo_session import bomb
from typer.testing import CliRunner

from medplib.apps import demo
from medplib.apps.cli import app

CHEST = Path(__file__).parents[1] / "examples/images/chest_ct.png"
CANARY = "Canary^Zephyrine"
SECRET = "what no browser may read"

# Audited: the server's own record of every address that it looks up or connects to.
START = """
import sys

record = open(sys.argv.pop(1), "w", buffering=1)

def audit(event, values):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        print(values[0], file=record)
    elif event == "socket.connect" and isinstance(values[1], tuple):
        print(*values[1][:2], file=record)

sys.addaudithook(audit)
from medplib.apps.cli import main
sys.argv[0] = "medplib"
main()
"""


def free_port():
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running `medplib demo`: client, port, folder (with its temporary files), log, record, process."""
    pytest.importorskip("gradio", reason="the page needs gradio (extra `demo`)")
    httpx = pytest.importorskip("httpx", reason="it comes with gradio")
    folder = tmp_path_factory.mktemp("demo")
    (folder / "tmp").mkdir()
    (folder / "secret.txt").write_text(SECRET)
    port, log, record = free_port(), folder / "log", folder / "record"
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HTTP_PROXY": "http://proxy.invalid:3128", "NO_PROXY": ""}
    environment |= {"GRADIO_ALLOWED_PATHS": str(folder), "GRADIO_SHARE": "True", "GRADIO_NUM_WORKERS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", START, record, "demo", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            if process.poll() is not None or "Ctrl-C" in log.read_text():
                break
            time.sleep(0.1)
        assert process.poll() is None, log.read_text()
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield SimpleNamespace(**locals())
    finally:
        process.kill()
        process.wait()


class Browser:
    """What the page sends, without the page."""

    def __init__(self, server, session):
        self.client, self.session, self.folder = server.client, session, server.folder / "tmp"
        events = self.client.get("/config").json()["dependencies"]
        self.numbers = {event["api_name"]: event["id"] for event in events}

    def upload(self, content, name):
        sent = self.client.post("/gradio_api/upload", files={"files": (name, content)})
        assert sent.status_code == 200, sent.text
        return {"path": sent.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def event(self, name, *data, event_data=None):
        """The output of an event: {"data": ...} or {"error": ...}."""
        body = {"fn_index": self.numbers[name], "data": data, "session_hash": self.session}
        body |= {"event_data": event_data}
        kind = {"content-type": "application/json"}  # json of Python also writes what is no number
        joined = self.client.post("/gradio_api/queue/join", content=json.dumps(body), headers=kind)
        assert joined.status_code < 500, joined.text
        if joined.status_code >= 400:
            return {"error": joined.text}
        self.raw = []
        with self.client.stream("GET", f"/gradio_api/queue/data?session_hash={self.session}") as lines:
            for line in lines.iter_lines():
                self.raw.append(line)
                message = json.loads(line.removeprefix("data:")) if line else {}
                if message.get("msg") == "process_completed":
                    assert ("error" in message["output"]) is not message["success"]
                    return message["output"]
        raise AssertionError(self.raw)

    def leave(self):
        """Open the connection whose end is the end of the session, and end it."""
        with self.client.stream("GET", f"/gradio_api/heartbeat/{self.session}") as beats:
            next(beats.iter_lines())
        for _ in range(100):
            if not files_below(self.folder):
                break
            time.sleep(0.1)
        assert files_below(self.folder) == []


def files_below(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def test_a_conversation_end_to_end(server):
    browser = Browser(server, "first")
    _, slices, picture, places, *_ = browser.event("open", browser.upload(CHEST.read_bytes(), CHEST.name))[
        "data"
    ]
    assert slices["visible"] is False
    assert places == "256 x 256 pixels."
    assert len(files_below(server.folder / "tmp")) == 1  # the upload has gone
    shown = server.client.get(f"/gradio_api/file={picture['path']}")
    assert shown.headers["cache-control"] == "no-store"
    assert (
        np.asarray(Image.open(io.BytesIO(shown.content))) == np.asarray(Image.open(CHEST).convert("RGB"))
    ).all()
    _, _, turns, overlay, findings, files, _ = browser.event("ask", "Segment the right lung.")["data"]
    assert [turn["content"][0]["text"] for turn in turns] == [
        "Segment the right lung.",
        "Here is the right lung.",
    ]
    (label, score, area), *others = findings["data"]
    assert (label, others) == ("right lung", [])
    assert 0.5 < score <= 1
    assert area > 5000
    assert server.client.get(f"/gradio_api/file={overlay['path']}").status_code == 200
    with zipfile.ZipFile(
        io.BytesIO(server.client.get(f"/gradio_api/file={files['value']['path']}").content)
    ) as packed:
        assert {"overlay.png", "mask_0_right_lung.png", "answer.json"} == set(packed.namelist())
    _, places = browser.event("click", "point", event_data={"index": [70, 110], "value": None})["data"]
    assert places.endswith("For the next question: point 70 110.")
    _, _, turns, _, findings, *_ = browser.event("ask", "What is in <region>?")["data"]
    assert turns[-2]["content"][0]["text"] == "What is in &lt;region&gt;?"
    assert turns[-1]["content"][0]["text"] == "This is the right lung."
    assert len(turns) == 4
    _, _, turns, overlay, findings, *_ = browser.event("new")["data"]
    assert (turns, overlay, findings["data"]) == ([], None, [])
    browser.leave()


def test_a_canary_is_nowhere(server):
    pytest.importorskip("pydicom", reason="reading DICOM needs pydicom")
    from test_dicom import made

    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    data = made(deep, PatientName=CANARY, PatientID=CANARY, StudyDescription=CANARY)
    browser = Browser(server, "canary")
    seen = []
    for content, name in ((data, f"{CANARY}.dcm"), (data[:-9], "cut.dcm"), (data[:400], f"{CANARY}.png")):
        output = browser.event("open", {**browser.upload(content, name), "orig_name": "scan"})
        seen.append("data" in output)
        assert CANARY not in json.dumps(output)
    assert seen == [True, False, False]
    output = browser.event("ask", f"Is {CANARY} well? \x1b[31m")
    assert "data" in output
    packed = server.client.get(f"/gradio_api/file={output['data'][5]['value']['path']}").content
    assert CANARY.encode() not in zipfile.ZipFile(io.BytesIO(packed)).read("overlay.png")
    browser.event("new")
    for path in server.folder.rglob("*"):
        assert "Canary" not in path.name
        assert not path.is_file() or b"Zephyrine" not in path.read_bytes()
    browser.leave()


def hostile_requests(folder, address):
    """(method, path, keyword arguments) that a well-meaning page never sends."""
    places = [
        *("/etc/passwd", "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd"),
        *(f"{folder}/secret.txt", f"{folder}/tmp/../secret.txt", "file:///etc/passwd", "//etc/passwd"),
        *(f"http://{address}/x", f"https://{address}/x", f"ftp://{address}/x", "/proc/self/environ"),
        *("~/.ssh/id_rsa", "C:\\Windows\\win.ini", "%00"),
    ]  # fmt: skip
    routes = ["file=", "file/", "proxy=", "stream/", "custom_component/", "component_server/", "run-history/"]
    for place in places:
        for route in routes:
            yield "GET", f"/gradio_api/{route}{place}", {}
        for route in ("assets/", "static/", "svelte/", "", "../"):
            yield "GET", f"/{route}{place}", {}
        for route in (
            "upload",
            "queue/join",
            "run/ask",
            "call/ask",
            "component_server",
            "vibe-edit",
            "cancel",
        ):
            yield "POST", f"/gradio_api/{route}", {"json": {"data": [place], "path": place, "url": place}}
        meta = {"_type": "gradio.FileData"}
        for file in ({"path": place}, {"path": place, "url": place}, {"path": place, "is_stream": True}):
            body = {"fn_index": 0, "session_hash": "evil", "data": [{**file, "meta": meta}]}
            yield "POST", "/gradio_api/queue/join", {"json": body}
    for body in (
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 90_000,
        b'{"a":' * 9_000,
        b"9" * 200_000,
    ):
        for kind in (
            "application/json",
            "text/plain",
            "multipart/form-data",
            "multipart/form-data; boundary=x",
            "",
        ):
            for route in ("queue/join", "upload"):
                if not (
                    route == "upload" and kind.endswith("=x")
                ):  # multipart without a part: nothing uploaded
                    yield "POST", f"/gradio_api/{route}", {"content": body, "headers": {"content-type": kind}}
    for data in (
        None,
        {},
        [],
        [1],
        [None],
        [[]],
        [{}],
        ["x"] * 9,
        [1e400],
        [{"path": ["x"]}],
        [{"a": {"b": "c"}}],
    ):
        for number in (0, 2, 4, "0", -1, 1e9, None, [0]):
            content = json.dumps({"fn_index": number, "session_hash": "evil", "data": data})
            kind = {"content-type": "application/json"}
            yield "POST", "/gradio_api/queue/join", {"content": content, "headers": kind}
    good = json.dumps({"fn_index": 4, "session_hash": "evil", "data": ["What?"]})
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "",
    ):  # what a form of another page can send
        yield "POST", "/gradio_api/queue/join", {"content": good, "headers": {"content-type": kind}}
    for name in ("Host", "Origin"):
        for value in ("evil.example", "http://evil.example", "null", "127.0.0.1.evil.example"):
            yield "GET", "/", {"headers": {name: value}}
    for route in ("upload", "queue/join"):
        yield (
            "POST",
            f"/gradio_api/{route}",
            {"content": (b"x" * 1000 for _ in range(9))},
        )  # of unknown length
    yield "POST", "/gradio_api/queue/join", {"content": b'"' + b"x" * 5_000_000 + b'"'}
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "NONSENSE"):
        yield method, "/", {}


def test_hostile_requests_get_nothing_and_break_nothing(server):
    import httpx

    asked = []
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def listen():
            while True:
                try:
                    asked.append(listener.accept())
                except OSError:
                    return

        threading.Thread(target=listen, daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        requests = list(hostile_requests(server.folder, address))
        assert len(requests) > 300
        cut_off = 0
        for method, path, given in requests:
            try:
                reply = server.client.request(method, path, **given)
            except httpx.TransportError:  # refused before all was sent
                cut_off += 1
                continue
            assert 400 <= reply.status_code < 500, (method, path, given, reply.status_code, reply.text[:200])
            assert SECRET not in reply.text
            assert "root:" not in reply.text
        assert cut_off < 5
        with closing(socket.create_connection(("127.0.0.1", server.port))) as raw:
            length = b"Content-Length: 1000000000000"
            raw.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\n" + length + b"\r\n\r\n")
            assert b" 413 " in raw.recv(4096)
        with closing(socket.create_connection(("127.0.0.1", server.port))) as raw:
            raw.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
            assert b" 400 " in raw.recv(4096)
    assert asked == []
    assert Browser(server, "after").event("ask", "What?") == {
        "error": "Open an image first.", "visible": True, "duration": 10, "title": "Error",
    }  # fmt: skip


def test_hostile_uploads_are_errors_in_one_line(server):
    png = CHEST.read_bytes()
    tiff = io.BytesIO()
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(tiff, "TIFF")
    contents = {
        "bomb.png": bomb(), "empty.png": b"", "cut.png": png[:2000], "text.png": b"text",
        "page.html": b"<script>alert(1)</script>", "scan.svg": b"<svg/>", "x.mha": b"x",
        "scan.nii": bytes(400), "scan.nii.gz": b"\x1f\x8bx", "a.dcm": bytes(999),
        "b": bytes(128) + b"DICM" + os.urandom(300), "cut.tiff": tiff.getvalue()[:100],
        "x.pkl": b"cos\nsystem\n(S'x'\ntR.", "x.zip": b"PK\x03\x04" + bytes(99),
        "x.npy": b"\x93NUMPY" + bytes(99), "../../x.png": b"x", "C:\\x.png": b"x",
        "<img src=x onerror=alert(1)>.png": b"x", "y" * 300: b"x", "a\x00b.png": b"x",
    }  # fmt: skip
    browser = Browser(server, "uploads")
    for name, content in contents.items():
        output = browser.event("open", browser.upload(content, name))
        assert output.get("error"), name
        assert "\n" not in output["error"]
        assert "Traceback" not in output["error"]
        assert str(server.folder) not in output["error"]
        assert "onerror" not in output["error"]
    for index in ([1e400, 1], [1], "x", None, [None, None], {"x": 1}, [10**400, 1]):
        assert browser.event("click", "point", event_data={"index": index})["error"]
    for data in (None, "x", [], {}):
        assert browser.event("click", "point", event_data=data)["error"]
    assert files_below(server.folder / "tmp") == []


def test_the_server_answers_as_before_and_leaves_nothing(server):
    browser = Browser(server, "last")
    assert "data" in browser.event("open", browser.upload(CHEST.read_bytes(), "x.png"))
    assert browser.event("ask", "Segment the right lung.")["data"][4]["data"][0][0] == "right lung"
    log = server.log.read_text()
    assert "Traceback" not in log, log
    assert "lung" not in log
    assert "POST" not in log
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 0
    assert list((server.folder / "tmp").glob("*medplib*")) == files_below(server.folder / "tmp") == []
    looked_up = {line.split()[0] for line in server.record.read_text().splitlines()}
    assert looked_up <= {"127.0.0.1", "localhost", "None", "::1"}


def test_only_this_machine_unless_it_is_said(monkeypatch):
    page = pytest.importorskip("medplib.apps.demo_page", reason="the page needs gradio", exc_type=ImportError)
    assert all(map(page.is_local, ("127.0.0.1", "localhost", "::1", "127.0.0.2")))
    assert not any(map(page.is_local, ("0.0.0.0", "192.168.1.2", "ward-7", "::", "")))
    given = []

    def serving(model, host, port):
        given.append((host, port))
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "serving", serving)
    monkeypatch.setattr(demo, "load_model", lambda *options: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    CliRunner().invoke(app, ["demo"])
    assert given == [("127.0.0.1", 7860)]


def test_a_taken_port_is_one_line():
    page = pytest.importorskip("medplib.apps.demo_page", reason="the page needs gradio", exc_type=ImportError)
    from medplib import InputError

    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port} cannot be used"), page.serving(None, port=port):
            pass


@pytest.mark.parametrize(("found", "said"), [(None, "needs gradio"), ("5.49.1", "6.16 or newer, not 5.49.1")])
def test_without_the_extra_it_is_named_in_one_line(monkeypatch, found, said):
    def version(package):
        if found is None:
            raise demo.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(demo, "version", version)
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 2
    assert said in done.stderr
    assert "pip install 'medplib[demo]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
