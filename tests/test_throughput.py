"""The arithmetic and the turns of the throughput benchmark; its speeds are no test's business."""

from __future__ import annotations

import json
import sys

import pytest

from rlhf_gym.benchmarks import throughput, throughput_peers
from rlhf_gym.benchmarks.throughput_cases import CASES, Side

ANSWER = """
import json, sys
print("ready", flush=True)
for number, _ in enumerate(sys.stdin):
    print(json.dumps({"seconds": float(10 - number), "tokens": 30, "memory_mib": number, "phases": {"update": number}}), flush=True)
"""


def test_medians_over_rounds_without_the_first(tmp_path, monkeypatch):
    (tmp_path / "answer.py").write_text(ANSWER)
    monkeypatch.setattr(throughput, "PEERS", tmp_path / "answer.py")
    for alone in (False, True):
        sides = [Side("a", {}, peer=True, alone=alone), Side("b", {}, peer=True)]
        found = throughput.measure(sides, sys.executable, rounds=3, threads=1)
        # Of 10, 9, 8, 7 seconds the first is the warm-up.
        assert found["a"]["all_seconds"] == [9.0, 8.0, 7.0] and found["a"] == found["b"]
        assert found["a"]["seconds"] == 8.0 and found["a"]["tokens_per_second"] == 30 / 8
        assert found["a"]["memory_mib"] == 3 and found["a"]["phases"] == {"update": 2}


def test_ratios_are_of_tokens_per_second():
    sides = [Side("ours", {}), Side("theirs", {})]
    each = {"seconds": 2.0, "memory_mib": 100.0, "phases": {"update": 1.5}}
    lines = throughput.table(
        sides, {"ours": each | {"tokens_per_second": 1000.0}, "theirs": each | {"tokens_per_second": 250.0}}
    )
    assert lines[2] == "| ours | 2 | 1,000 |  | 100 | update 1.50 |"
    assert lines[3] == "| theirs | 2 | 250 | 4.00x | 100 | update 1.50 |"


def test_a_side_that_dies_says_why(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("raise SystemExit('no such library')")
    monkeypatch.setattr(throughput, "PEERS", tmp_path / "dies.py")
    with pytest.raises(RuntimeError, match="a did not start: no such library"):
        throughput.measure([Side("a", {}, peer=True)], sys.executable, rounds=1, threads=1)


def test_peak_memory_is_this_process_own():
    before = throughput_peers.peak_memory_mib()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert throughput_peers.peak_memory_mib() >= max(before, 64)


def test_cases_are_sound():
    for name, sides in CASES.items():
        assert sides[0].peer is False and len({side.name for side in sides}) == len(sides), name
        for side in sides:
            json.dumps(side.case)
            shape = side.case["shape"]
            assert side.case["prompt_tokens"] + side.case["response_tokens"] <= shape["max_tokens"]
