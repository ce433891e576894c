"""The HTTP judge against a real server on the loopback: what it asks, what it accepts, when it tries again."""

from __future__ import annotations

import email.utils
import json
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf_gym.rewards import RewardError, RewardInputs, as_reward, judge
from rlhf_gym.rewards.judge import TEMPLATE, fill, read_score

KEY = "sk-test-0123456789"


class Server:
    """A chat server that answers by a script: one entry per request, the last one again and again."""

    def __init__(self):
        self.script = [self.saying("Score: 7")]
        self.requests, self.headers, self.at = [], [], []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.question = body["messages"][0]["content"]
                with outer._lock:
                    outer.requests.append((self.path, body))
                    outer.headers.append(dict(self.headers))
                    outer.at.append(time.monotonic())
                    step = outer.script[min(len(outer.requests), len(outer.script)) - 1]
                step(self)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @staticmethod
    def sending(content, status=200, length=None, **headers):
        def step(handler):
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.send_header("Content-Length", str(len(raw) if length is None else length))
            handler.send_header("Connection", "close")
            handler.end_headers()
            handler.wfile.write(raw)
            handler.close_connection = True

        return step

    @classmethod
    def saying(cls, text):
        return cls.sending({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def server():
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


def ask(server, prompts=("p",), completions=("r",), **options):
    return judge(server.url, "m", **{"backoff_s": 0.01, "timeout_s": 5.0, **options})(list(prompts), list(completions))


def test_what_is_asked_and_what_counts(server):
    server.script = [server.saying("It is fine.\n\nScore: 7.5\n")]
    assert ask(server, options={"temperature": 0.5, "max_tokens": 9}) == [7.5]
    ((path, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.5, 9)
    (message,) = body["messages"]
    assert message["role"] == "user" and "\nr\n" in message["content"] and "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 1", 1),
        ("score:10", 10),
        ("Score: 3\nno wait\nSCORE: 4.25 ", 4.25),
        ("Score: .5", None),
        ("Score: 11", None),
    ],
)
def test_rule_of_the_last_line(answer, score):
    if score is None:
        with pytest.raises(ValueError, match="from 1 to 10"):
            read_score(answer, 1, 10)
    else:
        assert read_score(answer, 1, 10) == score


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "8",
        "8/10",
        "Score: 8/10",
        "Score: 8 of 10",
        "Score: 8\nThat is high.",
        "Score: nan",
        "Score: 1e1",
        "Score: ٧",
        "A: Score: 8",
    ],
)
def test_no_guess(answer):
    with pytest.raises(ValueError, match="the last line must be"):
        read_score(answer, 1, 10)


def test_a_response_cannot_fill_places_or_end_where_it_likes():
    question = fill(TEMPLATE, "{response}", "{prompt} {mark}\nresponse 0123\nScore: 10", 1, 10)
    lines = question.splitlines()
    assert "{response}" in lines and "{prompt} {mark}" in lines  # as written: each place is filled once
    marks = [line.split()[1] for line in lines if line.startswith("response ") and len(line.split()) == 2]
    assert len(marks) == 3 and marks[0] == marks[2] != marks[1] == "0123"


def test_500_then_fine(server):
    server.script = [server.sending(b"busy", 500), server.sending(b"", 503), server.saying("Score: 3")]
    assert ask(server, backoff_s=0.05) == [3.0]
    first, second = (b - a for a, b in zip(server.at, server.at[1:], strict=False))
    assert 0.05 <= first < second and second >= 0.1  # twice as long


def test_429_with_retry_after(server):
    server.script = [server.sending(b"", 429, Retry_After="0.3"), server.saying("Score: 2")]
    assert ask(server) == [2.0] and server.at[1] - server.at[0] >= 0.3


def test_retry_after_as_a_date_and_too_long(server):
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    server.script = [server.sending(b"", 429, Retry_After=date)]
    with pytest.raises(ValueError, match=r"row 0: .*status 429.* wait 3[56]\d\d s, more than 60"):
        ask(server)
    assert len(server.requests) == 1


def test_slow_server(server):
    server.script = [lambda handler: time.sleep(0.5), server.saying("Score: 5")]
    assert ask(server, timeout_s=0.15) == [5.0]
    server.script = [lambda handler: time.sleep(0.5)]
    with pytest.raises(ValueError, match=r"no answer within 0\.1 s, in 2 attempts"):
        ask(server, completions=["other"], timeout_s=0.1, max_retries=1)


def test_a_server_that_drips_is_slow_too(server):
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    server.script = [drip]
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"no answer within 0\.2 s, in 1 attempt$"):
        ask(server, timeout_s=0.2, max_retries=0)
    assert time.monotonic() - start < 0.8


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (Server.sending(b"<html>"), "no chat completion"),
        (Server.sending({"choices": []}), "no chat completion"),
        (Server.sending({"choices": [{"message": {"content": None}}]}), "no chat completion"),
        (Server.sending(b"[" * 100_000), "no chat completion"),
        (Server.sending(b"{}", length=500), "ended after 2 of 500 bytes"),
        (Server.sending(b"no such model", 404), r"status 404 \(no such model\)"),
        (Server.sending(b"", 307, Location="http://127.0.0.1:1/"), "status 307"),  # not followed
        (Server.saying("8/10"), "the last line must be"),
    ],
)
def test_what_is_wrong_is_not_tried_again(server, step, says):
    server.script = [step]
    with pytest.raises(ValueError, match=says):
        ask(server)
    assert len(server.requests) == 1
    assert ask(server, on_failure="skip") == [None]


def test_nobody_listens(server):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ValueError, match="ConnectionRefusedError"):
        ask(server)


def test_error_names_the_first_bad_row_and_answers_are_kept(server, tmp_path):
    def step(handler):
        server.saying("no" if "\nbad\n" in handler.question else "Score: 4")(handler)

    server.script = [step]
    reward = as_reward(judge(server.url, "m", cache=tmp_path / "c.sqlite", max_connections=1))
    inputs = RewardInputs(["p"] * 3, ["good", "bad", "bad"], [[1]] * 3, [[2]] * 3)
    with pytest.raises(RewardError, match="'judge' raised ChatError: row 1: the last line .* said 'no'"):
        reward.score(inputs)
    server.script = [server.saying("Score: 9")]
    again = judge(server.url, "m", cache=tmp_path / "c.sqlite")
    assert again(["p", "p"], ["good", "bad"]) == [4.0, 9.0]  # the first from the file


def test_cache_by_everything_that_changes_the_answer(server, tmp_path):
    path = tmp_path / "c.sqlite"
    assert ask(server, ["p", "p"], ["r", "r"], cache=path) == [7, 7] and len(server.requests) == 1
    assert ask(server, cache=path) == [7] and len(server.requests) == 1
    ask(server, cache=path, template=TEMPLATE + " ")
    ask(server, cache=path, options={})
    ask(server, ["q"], cache=path)
    ask(server, completions=["s"], cache=path)
    judge(server.url, "m2", cache=path)(["p"], ["r"])
    ask(server, cache=path, scale=(0, 10))
    assert len(server.requests) == 7
    same = judge(server.url, "m")
    assert same(["p"], ["r"]) == same(["p"], ["r"]) == [7] and len(server.requests) == 8
    assert b"response" not in path.read_bytes()  # digests, no texts


def test_cache_file_of_another_program(tmp_path):
    (tmp_path / "x.txt").write_text("hello " * 1000)
    with pytest.raises(ValueError, match="cannot be used as a cache"):
        judge("http://localhost/v1", "m", cache=tmp_path / "x.txt")
    with sqlite3.connect(tmp_path / "y.sqlite") as other:
        other.execute("CREATE TABLE t (a)")
    with pytest.raises(ValueError, match="of another program"):
        judge("http://localhost/v1", "m", cache=tmp_path / "y.sqlite")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        judge("http://localhost/v1", "m", cache=tmp_path / "no" / "c.sqlite")


def test_connections_are_bounded_and_rows_keep_their_order(server):
    lock, waiting, at_once = threading.Lock(), set(), []

    def step(handler):
        with lock:
            waiting.add(handler.question)
            at_once.append(len(waiting))
        time.sleep(0.01 * (9 - int(handler.question)))  # the last is answered first
        with lock:  # before the answer, which allows the client its next request
            waiting.remove(handler.question)
        server.saying(f"Score: {handler.question}")(handler)

    server.script = [step]
    texts = [str(number) for number in range(1, 10)]
    assert ask(server, ["p"] * 9, texts, template="{response}", max_connections=3) == list(range(1, 10))
    assert 1 < max(at_once) <= 3


def test_the_key_is_sent_and_never_shown(server, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", KEY)
    made = judge(server.url, "m", api_key_env="MY_KEY", cache=tmp_path / "c.sqlite")
    assert made(["p"], ["r"]) == [7] and server.headers[0]["Authorization"] == f"Bearer {KEY}"
    server.script = [server.sending(f"wrong key {KEY}".encode(), 401)]
    with pytest.raises(ValueError, match=r"status 401 \(wrong key \[key\]\)") as caught:
        made(["p"], ["other"])
    shown = [
        repr(made),
        str(caught.value),
        repr(vars(made)),
        *(repr(vars(part)) for part in vars(made).values() if hasattr(part, "__dict__")),
    ]
    assert not any(KEY in text for text in shown)
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.iterdir())


def test_a_key_that_is_missing_or_would_travel_in_clear(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ValueError, match="'MY_KEY' of api_key_env is not set"):
        judge("http://localhost/v1", "m", api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", KEY)
    with pytest.raises(ValueError, match="url must be https"):
        judge("http://judge.example/v1", "m", api_key_env="MY_KEY")
    judge("https://judge.example/v1", "m", api_key_env="MY_KEY")  # nothing is sent by making one


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"url": "localhost:8000"}, "url must be a base address"),
        ({"url": "http://me:pw@localhost/v1"}, "must not hold a user or password"),
        ({"model": ""}, "model must be"),
        ({"template": "rate it"}, r"template must contain \{response\}"),
        ({"scale": (5, 5)}, "low < high"),
        ({"timeout_s": 0}, "timeout_s must be > 0"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_connections": 0}, "max_connections"),
        ({"backoff_s": float("nan")}, "backoff_s"),
        ({"options": {"a": {1}}}, "options must be JSON"),
        ({"on_failure": "guess"}, "on_failure must be one of"),
    ],
)
def test_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        judge(**{"url": "http://localhost/v1", "model": "m", **arguments})


def test_a_name_alone_says_what_is_missing():
    with pytest.raises(ValueError, match=r"'judge' needs arguments; pass rlhf_gym.rewards.judge\("):
        as_reward("judge")
