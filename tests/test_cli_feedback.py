"""rlhf-gym label and rlhf-gym feedback from outside."""

from __future__ import annotations

import csv
import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from rlhf_gym.cli import main
from rlhf_gym.feedback import Comparison, Correction, FeedbackStore, Item, Judgement, Score

ROW = {"prompt": "The sky is", "responses": [" blue.", " green."]}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    Path("f.jsonl").write_text(json.dumps(ROW) + "\n")
    return tmp_path


def one_line(capsys):
    """The only line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("rlhf-gym: "), lines
    return lines[0]


@pytest.fixture
def label():
    """Starts the page; gives the process and the lines that it has printed."""
    processes = []

    def start(*arguments):
        pytest.importorskip("starlette"), pytest.importorskip("uvicorn")
        command = [sys.executable, "-m", "rlhf_gym", "label", "--port", "0", "--no-open", *arguments]
        # Python ignores Ctrl-C in what was started in the background; the test may have been.
        code = f"import signal, runpy, sys; signal.signal(2, signal.default_int_handler); sys.argv = {command[2:]!r}"
        code += "; runpy.run_module('rlhf_gym', run_name='__main__', alter_sys=True)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process, [process.stdout.readline().strip() for _ in range(2)]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def status(address, host=None):
    """Status and text of a page, asked for under a host's name."""
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(address).port, timeout=10)
    connection.request(
        "GET", f"{urlsplit(address).path}?{urlsplit(address).query}", headers={"host": host} if host else {}
    )
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders())


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for a child")
def test_label_serves_until_ctrl_c(label):
    process, (address, said) = label("--file", "f.jsonl")
    assert address.startswith("http://127.0.0.1:") and "token" not in address
    assert said == "1 questions; judgements go to f.feedback.sqlite; Ctrl-C stops"
    code, headers = status(address)
    assert code == 303 and headers["location"] == "/sign-in" and "server" not in headers
    assert status(address, "evil.example")[0] == 400
    busy = ["label", "--file", "f.jsonl", "--port", str(urlsplit(address).port), "--no-open"]
    assert main(busy) == 2
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(10) == 0 and "0 judgements are in f.feedback.sqlite; rlhf-gym feedback export" in rest
    assert [item.prompt for item in FeedbackStore("f.feedback.sqlite").items()] == ["The sky is"]


def test_label_off_loopback_needs_the_token_and_keeps_it(label):
    tokens = []
    for _ in range(2):
        process, (address, _) = label("--file", "f.jsonl", "--host", "0.0.0.0", "--allowed-hosts", "labels.example")
        assert address.startswith("http://labels.example:") and len(urlsplit(address).query) > 40
        port = urlsplit(address).port
        assert status(f"http://x:{port}/", "labels.example")[0] == 403
        assert status(f"http://x:{port}/")[0] == 403  # not on loopback either
        assert status(address, "labels.example")[0] == 303
        tokens.append(urlsplit(address).query)
        process.kill(), process.wait()
    assert tokens[0] == tokens[1]


def test_label_of_a_run_and_of_a_store(label):
    Path("run").mkdir()
    for when, response in (("before", "a"), ("after", "b")):
        Path(f"run/samples_{when}.jsonl").write_text(json.dumps({"prompt": "p", "response": response}) + "\n")
    process, (_, said) = label("--run", "run")
    assert said.startswith("1 questions; judgements go to run/feedback.sqlite;")
    process.kill(), process.wait()
    _, (_, said) = label("--db", "run/feedback.sqlite")
    assert said.startswith("1 questions; judgements go to run/feedback.sqlite;")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "nothing to judge: give --file, --run, or a --db that has items"),
        ("--file f.jsonl --run x", "--run and --file exclude each other"),
        ("--db none.sqlite", "there is no file 'none.sqlite'"),
        ("--db x --order-by gap", "--order-by is a column of --file or --run"),
        ("--file none.jsonl", "there is no file 'none.jsonl'"),
        ("--file f.jsonl --order-by gap", 'f.jsonl: line 1, column 1: "gap" must be a number'),
        ("--file f.jsonl --port 70000", "--port must be from 0 to 65535, got 70000"),
        ("--file f.jsonl --host 0.0.0.0", "--allowed-hosts"),
        ("--file f.jsonl --host 192.0.2.1", "cannot listen on --host 192.0.2.1 --port 8642"),
        ("--file f.jsonl --overlap 0", "overlap must be at least 1, got 0"),
        ("--file f.jsonl --guidelines none.txt", "none.txt"),
        ("--file f.jsonl --guidlines x", "did you mean '--guidelines'?"),
    ],
)
def test_label_refuses_in_one_line(arguments, message, capsys):
    pytest.importorskip("starlette")
    assert main(["label", "--no-open", *arguments.split()]) == 2
    assert message in one_line(capsys)
    assert not list(Path().glob("none*"))


def test_label_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["label", "--file", "f.jsonl", "--no-open"]) == 2
    assert "needs uvicorn: pip install 'rlhf-gym[feedback]'" in one_line(capsys)


@pytest.fixture
def store(place):
    with FeedbackStore("f.sqlite") as store:
        store.add_item(Item(ROW["prompt"], ROW["responses"], id="i"))
        for name, choice in (("ann", 0), ("\x1bbo", 1)):
            store.record(Judgement(f"{name}/1", name, "i", Comparison(choice), (0, 1), 2.0))
        store.record(Judgement("ann/2", "ann", "i", Score(0, "helpful", 4), (0, 1), 2.0))
        store.record(Judgement("ann/3", "ann", "i", Correction(1, " grey."), (0, 1), 2.0))
        yield store


def test_status(store, capsys):
    assert main(["feedback", "status", "f.sqlite"]) == 0
    text = capsys.readouterr().out
    assert "judgements that stand" in text and "everyone" in text and "\\x1bbo" in text and "\x1bbo" not in text
    assert main(["feedback", "status", "f.sqlite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_standing"] == 4 and found["everyone"]["left"]["mean"] == 0.5
    assert found["alphas"][0]["estimate"]["mean"] == 0.0  # one unit, two different answers: as by chance
    assert found["everyone"]["median_seconds"] == 2.0


def test_export_and_forget(store, capsys):
    assert main(["feedback", "export", "f.sqlite", "--out", "out"]) == 0
    assert "preferences.jsonl" in capsys.readouterr().out
    pairs = [json.loads(line) for line in Path("out/preferences.jsonl").read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        (" blue.", " green."), (" green.", " blue."), (" grey.", " green.")
    ]  # fmt: skip
    assert json.loads(Path("out/demonstrations.jsonl").read_text())["completion"] == " grey."
    assert main(["feedback", "forget", "f.sqlite", "--annotator", "Ann"]) == 2
    assert "there are no judgements of 'Ann'; did you mean 'ann'?" in one_line(capsys)
    assert main(["feedback", "forget", "f.sqlite", "--annotator", "ann"]) == 0
    assert "removed 3 judgements of ann" in capsys.readouterr().out
    assert {event.judgement.annotator for event in store.events()} == {"\x1bbo"}
    assert main(["feedback", "export", "f.sqlite", "--out", "out"]) == 0
    assert sorted(file.name for file in Path("out").iterdir()) == ["judgements.csv", "preferences.jsonl"]
    assert len(list(csv.DictReader(Path("out/judgements.csv").open()))) == 1


@pytest.mark.parametrize("verb", ["status", "export", "forget"])
def test_a_store_that_is_not_there_is_not_made(verb, capsys):
    more = {"status": [], "export": ["--out", "o"], "forget": ["--annotator", "ann"]}[verb]
    assert main(["feedback", verb, "none.sqlite", *more]) == 2
    assert "there is no file 'none.sqlite'; rlhf-gym label makes one" in one_line(capsys)
    assert not Path("none.sqlite").exists() and not Path("o").exists()
