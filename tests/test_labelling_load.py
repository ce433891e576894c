"""Several annotators at a real server at once, and the server killed while they write: a small run of the benchmark."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from rlhf_gym.benchmarks import labelling  # noqa: E402
from rlhf_gym.feedback import FeedbackStore, Item, Judgement, Skip  # noqa: E402


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_nothing_is_lost_or_doubled(tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "NUM_ITEMS", 400)
    out = tmp_path / "out.json"
    assert labelling.main(["--annotators", "4", "--seconds", "1", "--kills", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    work, (kill,) = found["work"], found["kills"]
    assert work["acknowledged"] == work["stored"] > 4 and work["beyond_overlap"] == 0
    assert kill["lost"] == kill["doubled"] == 0 and kill["since_the_last"] > 0
    assert 0 < work["answer_ms"]["p50"] <= work["answer_ms"]["p99"] <= work["answer_ms"]["max"]


def test_the_check_sees_what_is_lost_and_doubled(tmp_path):
    path = tmp_path / "f.sqlite"
    with FeedbackStore(path) as store:
        store.add_item(Item("p", ("a", "b"), id="i"))
        for key in ("k1", "k2"):
            store.record(Judgement(f"{key}/skip", "ann", "i", Skip(), (0, 1)))

    class Somebody:
        acknowledged, refused = ["k1", "k1", "k3"], 0

    found = labelling._check([Somebody()], path)
    assert (found["lost"], found["doubled"], found["sent_twice"]) == (1, 1, 1)
