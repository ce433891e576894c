"""The labelling page under many annotators at once, and under ``kill -9``.

    python -m rlhf_gym.benchmarks.labelling --out benchmarks/results/labelling.json

Simulated annotators compare as fast as the page lets them, each over a connection of its own to a server in another process,
and every tenth answer is sent twice. Then the server is killed while they write, and started again: whoever got no answer
sends the same form once more. What was acknowledged must be in the store, and nothing may be there twice.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import numpy as np

from rlhf_gym.feedback import FeedbackStore

from .cells import write_figures

VERDICTS = ("A3", "A2", "A1", "tie", "B1", "B2", "B3", "both bad", "skip")
WORDS = "the a sky sea is was blue green wide deep and or not very".split()
TIMEOUT_S = 30.0
OVERLAP = 3
NUM_ITEMS = 4000


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write where asked to; returns 1 when anything was lost or doubled."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_gym.benchmarks.labelling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--annotators", type=int, default=32, help="at once")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long they work")
    parser.add_argument("--kills", type=int, default=3, help="kill -9 of the server, so many times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file, for instance benchmarks/results/labelling.json")
    options = parser.parse_args(argv)
    if min(options.annotators, options.kills + 1) < 1 or options.seconds <= 0:
        parser.error("--annotators must be >= 1, --kills >= 0 and --seconds above 0")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.annotators, options.seconds, options.kills, options.seed)
    print(json.dumps(found, indent=1))
    if options.out:
        write_figures(options.out, "labelling", argv, found)
    wrong = [each[name] for each in (found["work"], *found["kills"]) for name in ("lost", "doubled", "refused")]
    return 1 if any(wrong) else 0


def measure(folder: Path, num_annotators: int, seconds: float, kills: int, seed: int) -> dict[str, Any]:
    """Work for a while, then be killed.

    Returns:
        ``work``: counts; ``lost`` and ``doubled`` answers, and comparisons ``beyond_overlap`` (more people than a question
        was to go to; after a kill a few are possible, since nobody knows any more what is on whose screen); and milliseconds from sending an answer to its acknowledgement
        (``answer_ms``) and from asking for the next question to its page (``page_ms``). ``kills``: the same counts for
        each kill; ``repeated`` answers had no acknowledgement before it.
    """
    file, db = folder / "items.jsonl", folder / "feedback.sqlite"
    rng = random.Random(seed)
    rows = [{"prompt": f"Question {n}?", "responses": [_text(rng), _text(rng)]} for n in range(NUM_ITEMS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    server = Server(file, db, port=0)
    annotators = [Annotator(f"annotator {n}", server.port, seed + n) for n in range(num_annotators)]
    try:
        start = time.perf_counter()
        _together(annotators, lambda: time.sleep(seconds))
        took = time.perf_counter() - start
        work: dict[str, Any] = {"annotators": num_annotators, "seconds": took, **_check(annotators, db)}
        work["answers_per_second"] = work["acknowledged"] / took
        work["answer_ms"] = _percentiles([ms for each in annotators for ms in each.answer_ms])
        work["page_ms"] = _percentiles([ms for each in annotators for ms in each.page_ms])
        found = []
        for _ in range(kills):
            before = _check(annotators, db)["acknowledged"]
            killer = threading.Timer(rng.uniform(1.0, 2.0), server.kill)
            killer.start()
            _together(annotators, killer.join)
            server = Server(file, db, server.port)
            waiting = [each for each in annotators if each.unanswered is not None]
            _together(waiting, lambda: None, Annotator.repeat)
            counts = _check(annotators, db)
            found.append({**counts, "since_the_last": counts["acknowledged"] - before, "repeated": len(waiting)})
    finally:
        server.kill()
    return {"work": work, "kills": found}


class Server:
    """``rlhf-gym label`` in a process of its own."""

    def __init__(self, file: Path, db: Path, port: int) -> None:
        arguments = ["--file", str(file), "--db", str(db), "--port", str(port), "--overlap", str(OVERLAP), "--no-open"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_gym", "label", *arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        address = self.process.stdout.readline().strip()
        if not address:
            raise RuntimeError("the server did not start; its message is above")
        self.port = int(urlsplit(address).port or 0)

    def kill(self) -> None:
        """At once, without a chance to write anything more."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@dataclass
class Annotator:
    """Somebody who answers without thinking, over HTTP as a browser would."""

    name: str
    port: int
    seed: int
    acknowledged: list[str] = field(default_factory=list)
    """Keys of the answers that the server has confirmed."""
    answer_ms: list[float] = field(default_factory=list)
    page_ms: list[float] = field(default_factory=list)
    refused: int = 0
    unanswered: dict[str, str] | None = None
    """A form that was sent, and may or may not have arrived."""

    def __post_init__(self) -> None:
        self._rng, self._cookie = random.Random(self.seed), ""
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        form = _fields(self._request("GET", "/sign-in")[1])
        self._request("POST", "/sign-in", form | {"name": self.name})

    def work(self, stop: threading.Event) -> None:
        """Answer until it is time to stop, or the server is gone."""
        try:
            page = self._request("GET", "/")[1]
            while not stop.is_set() and "/answer" in page:
                form = _fields(page) | {"verdict": self._rng.choice(VERDICTS)}
                self._send(form)
                if self._rng.random() < 0.1:
                    self._send(form)  # a double click
                start = time.perf_counter()
                page = self._request("GET", "/")[1]
                self.page_ms.append(1000 * (time.perf_counter() - start))
        except (OSError, http.client.HTTPException):
            self._connection.close()

    def repeat(self, stop: threading.Event) -> None:
        """Send again what got no answer."""
        if self.unanswered is not None:
            self._send(self.unanswered)

    def _send(self, form: dict[str, str]) -> None:
        self.unanswered = form
        start = time.perf_counter()
        status, _ = self._request("POST", "/answer", form)
        if status != 303:
            self.refused += 1
            return
        self.answer_ms.append(1000 * (time.perf_counter() - start))
        self.unanswered = None
        self.acknowledged.append(key_of(form["ticket"]))

    def _request(self, method: str, path: str, form: dict[str, str] | None = None) -> tuple[int, str]:
        headers = {"Cookie": self._cookie, "Content-Type": "application/x-www-form-urlencoded"}
        self._connection.request(method, path, urlencode(form) if form else None, headers)
        response = self._connection.getresponse()
        text = response.read().decode()
        self._cookie = (response.getheader("set-cookie") or self._cookie).partition(";")[0]
        return response.status, text


def key_of(ticket: str) -> str:
    """The key that the judgement of a form is stored under."""
    payload = ticket.partition(".")[0]
    return f"{json.loads(base64.urlsafe_b64decode(payload + '=' * (-len(payload) % 4)))[3]}"


def _fields(page: str) -> dict[str, str]:
    """The hidden fields of the last form of a page, the one to fill in."""
    form = page[page.rindex("<form") :]
    return {name: unescape(value) for name, value in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form)}


def _together(annotators: list[Annotator], meanwhile: Any, task: Any = Annotator.work) -> None:
    """Let all of them work at once until ``meanwhile`` has returned."""
    stop = threading.Event()
    threads = [threading.Thread(target=task, args=(each, stop)) for each in annotators]
    for thread in threads:
        thread.start()
    meanwhile()
    stop.set()
    for thread in threads:
        thread.join()


def _check(annotators: list[Annotator], db: Path) -> dict[str, int]:
    """What was acknowledged against what is in the store."""
    with FeedbackStore(db) as store:
        judgements = [event.judgement for event in store.events()]
    stored = {judgement.key.partition("/")[0] for judgement in judgements}
    acknowledged = {key for each in annotators for key in each.acknowledged}
    asked = Counter((judgement.annotator, judgement.item) for judgement in judgements)
    compared = Counter(judgement.item for judgement in judgements if judgement.kind == "comparison")
    return {
        "acknowledged": len(acknowledged),
        "stored": len(stored),
        "lost": len(acknowledged - stored),
        "doubled": sum(count - 1 for count in asked.values()),
        "beyond_overlap": sum(max(count - OVERLAP, 0) for count in compared.values()),
        "sent_twice": sum(len(each.acknowledged) for each in annotators) - len(acknowledged),
        "refused": sum(each.refused for each in annotators),
    }


def _percentiles(ms: list[float]) -> dict[str, float]:
    return {name: float(np.percentile(ms, q)) for name, q in (("p50", 50), ("p99", 99), ("max", 100))}


def _text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(20, 120)))


if __name__ == "__main__":
    sys.exit(main())
