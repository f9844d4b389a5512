"""OpenAIWriter against a server on this machine that speaks the chat completions protocol."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import sa_med2d
from typer.testing import CliRunner

from medplib.apps.cli import app
from medplib.data.builder import OpenAIWriter, SAMed2DFolder, build_mecovqa
from medplib.errors import InputError, MedPLIBError

KEY = "sk-test-0123456789"
FACTS = {"modality": "CT", "structures": []}


class Server:
    """Answers with `script`'s entries in turn, then always as `answer` says. Keeps every request."""

    def __init__(self):
        self.script, self.seen, self.busy, self.most_busy = [], [], 0, 0
        self.answer = lambda user: "Indeed. " + user["draft"]
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.handle(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def handle(self, request):
        with self.lock:
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
            step = self.script.pop(0) if self.script else None
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        self.seen.append((request.path, dict(request.headers), body))
        status, headers, data = step or (200, {}, None)
        if data is None and status == 200:
            text = self.answer(json.loads(body["messages"][-1]["content"]))
            data = json.dumps(
                {
                    "id": "chatcmpl-1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": text},
                            "finish_reason": "stop",
                        }
                    ],
                    "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18},
                }
            )
        payload = (data or "").encode()
        with self.lock:
            self.busy -= 1
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(payload)))
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(payload)


def refusal(status, message, **headers):
    body = {"error": {"message": message, "type": "error", "param": None, "code": None}}
    return status, headers, json.dumps(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    yield server
    server.close()


def writer_for(server, tmp_path, **more):
    waits = []
    writer = OpenAIWriter(
        server.url, "small-model", cache=tmp_path / "answers", sleep=waits.append, timeout=5, **more
    )
    return writer, waits


def test_the_request_is_the_protocols(server, tmp_path):
    writer, waits = writer_for(server, tmp_path, extra={"max_completion_tokens": 50}, temperature=0.2)
    assert writer.write(FACTS, "Where is <region>?", "It is here.") == "Indeed. It is here."
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("small-model", 0.2, 50)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    user = json.loads(body["messages"][1]["content"])
    assert user == {"facts": FACTS, "question": "Where is <region>?", "draft": "It is here."}
    assert waits == []


def test_without_a_key_none_is_sent(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    writer_for(server, tmp_path)[0].write(FACTS, "q", "d")
    assert "Authorization" not in server.seen[0][1]


def test_answers_are_kept_and_asked_for_once(server, tmp_path):
    writer, _ = writer_for(server, tmp_path)
    assert writer.write(FACTS, "q", "d") == writer.write(FACTS, "q", "d") == "Indeed. d"
    assert (writer.requests, writer.cached, len(server.seen)) == (1, 1, 1)
    later, _ = writer_for(server, tmp_path)  # another run
    later.write(FACTS, "q", "d")
    assert (later.requests, later.cached) == (0, 1)
    later.write(FACTS, "q", "another draft")
    writer_for(server, tmp_path, temperature=0.0)[0].write(FACTS, "q", "d")
    assert len(server.seen) == 3  # another draft and another temperature are other requests
    kept = [path.read_text() for path in (tmp_path / "answers").rglob("*") if path.is_file()]
    assert len(kept) == 3
    assert not any(KEY in text for text in kept)
    for path in (tmp_path / "answers").rglob("*.json"):
        path.write_text("{")  # damaged: asked for again, and mended
    mended, _ = writer_for(server, tmp_path)
    assert mended.write(FACTS, "q", "d") == mended.write(FACTS, "q", "d") == "Indeed. d"
    assert (mended.requests, mended.cached) == (1, 1)


def test_busy_servers_are_waited_for(server, tmp_path):
    server.script = [
        refusal(429, "slow down", **{"Retry-After": "7"}),
        refusal(503, "later"),
        refusal(500, "?"),
    ]
    writer, waits = writer_for(server, tmp_path)
    assert writer.write(FACTS, "q", "d") == "Indeed. d"
    assert waits[0] == 7
    assert 1.5 <= waits[1] <= 2.5
    assert 3 <= waits[2] <= 5
    assert writer.requests == 4


@pytest.mark.parametrize(
    "data", ["<html>", '{"choices": []}', '{"choices": [{"message": {"content": null}}]}', "[]", '"x"', ""]
)
def test_answers_that_cannot_be_read_are_asked_for_again(server, tmp_path, data):
    server.script = [(200, {}, data)]
    writer, waits = writer_for(server, tmp_path)
    assert writer.write(FACTS, "q", "d") == "Indeed. d"
    assert len(waits) == 1


def test_a_server_that_stays_away_is_named_with_the_remedy(server, tmp_path):
    server.script = [refusal(503, "overloaded")] * 9
    writer, waits = writer_for(server, tmp_path, retries=3, longest_wait=3)
    with pytest.raises(MedPLIBError, match=r"4 tries \(503 .*overloaded\).*run it again"):
        writer.write(FACTS, "q", "d")
    assert len(waits) == 3
    assert max(waits) <= 3.75
    server.script = []
    gone = OpenAIWriter("http://127.0.0.1:9/v1", "m", retries=1, sleep=lambda s: None, timeout=1)
    with pytest.raises(MedPLIBError, match="gave no usable answer in 2 tries"):
        gone.write(FACTS, "q", "d")


def test_refusals_are_not_repeated_and_never_show_the_key(server, tmp_path):
    server.script = [refusal(401, f"Incorrect API key provided: {KEY}")]
    writer, waits = writer_for(server, tmp_path)
    with pytest.raises(MedPLIBError, match="401") as error:
        writer.write(FACTS, "q", "d")
    assert "$OPENAI_API_KEY" in str(error.value)
    assert KEY not in str(error.value)
    assert waits == []
    server.script = [refusal(404, "The model `small-model` does not exist")]
    with pytest.raises(MedPLIBError, match="does not exist"):
        writer.write(FACTS, "q", "d")
    server.script = [(302, {"Location": f"{server.url}/elsewhere"}, "")]
    with pytest.raises(MedPLIBError, match="302"):  # the key follows no redirect
        writer.write(FACTS, "q", "d")
    assert all(path == "/v1/chat/completions" for path, _, _ in server.seen)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"base_url": "api.openai.com"}, "base_url must be like"),
        ({"base_url": "file:///etc/passwd"}, "base_url must be like"),
        ({"base_url": "http://example.org/v1"}, "unencrypted; use https"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
    ],
)
def test_unusable_addresses_are_refused(arguments, words, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(InputError, match=words):
        OpenAIWriter(**{"base_url": "https://example.org/v1", "model": "m", **arguments})


def test_a_build_with_it_checks_answers_and_goes_on_where_it_stopped(server, tmp_path):
    folder = sa_med2d.write(tmp_path / "sa", cases=4)

    def answer(user):
        if "liver" in user["draft"]:
            return "The liver <SEG> <SEG> <SEG>."  # breaks the rules
        return user["draft"].replace("This is", "Here we see")

    server.answer = answer
    server.script = [(200, {}, None)] * 20 + [refusal(400, "stop here")] + [refusal(400, "stop here")] * 8
    first, _ = writer_for(server, tmp_path, concurrency=3)
    with pytest.raises(MedPLIBError, match="stop here"):
        build_mecovqa(SAMed2DFolder(folder), tmp_path / "out", writer=first, sheet=False)
    assert not (tmp_path / "out").exists()
    server.script = []
    kept = len(list((tmp_path / "answers").rglob("*.json")))
    assert kept >= 20
    second, _ = writer_for(server, tmp_path, concurrency=3)
    report = build_mecovqa(SAMed2DFolder(folder), tmp_path / "out", writer=second, sheet=False)
    assert second.requests > 0
    assert second.cached >= kept
    text = "".join(p.read_text() for p in (report.out / "train").glob("*.json"))
    assert "Here we see" in text
    assert "<SEG> <SEG>" not in text
    assert sum(report.fallbacks.values()) > 0
    third, _ = writer_for(server, tmp_path, concurrency=3)
    build_mecovqa(SAMed2DFolder(folder), tmp_path / "again", writer=third, sheet=False)
    assert third.requests == 0
    for name in ("train/MeCoVQA-Complex.json", "statistics.json", "build.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert 1 <= server.most_busy <= 3
    sent = json.dumps([body for _, _, body in server.seen])
    assert "Abdomen" not in sent
    assert "p-1" not in sent


def test_the_command_builds_with_a_server(server, tmp_path):
    folder = sa_med2d.write(tmp_path / "sa", cases=2)
    words = ["data", "build", str(folder), "--out", str(tmp_path / "out"), "--types", "region", "--writer"]
    more = ["openai", "--base-url", server.url, "--model", "small-model", "--test-share", "0"]
    done = CliRunner().invoke(app, [*words, *more])
    assert done.exit_code == 0, done.output
    assert "Indeed. " in (tmp_path / "out" / "train" / "MeCoVQA-Region.json").read_text()
    assert list((tmp_path / "out.answers").rglob("*.json"))
    assert json.loads((tmp_path / "out" / "build.json").read_text())["model"] == "small-model"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--writer", "openai"], "needs --base-url and --model"),
        (["--writer", "gpt"], "must be template or openai"),
        (["--base-url", "https://x.org/v1"], "are for --writer openai"),
        (["--types", "vqa"], "types must be some of"),
        (["--spacing", "no.json"], "cannot be read as JSON"),
        (["--case-pattern", "("], "no regular expression"),
    ],
)
def test_the_command_names_what_cannot_be_used(tmp_path, more, words):
    folder = sa_med2d.write(tmp_path / "sa", cases=1)
    done = CliRunner().invoke(app, ["data", "build", str(folder), "--out", str(tmp_path / "out"), *more])
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "out").exists()
