"""The arithmetic and the turns of the throughput benchmark; its speeds are no test's business."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf_gym.benchmarks import throughput, throughput_floors, throughput_peers, throughput_tables
from rlhf_gym.benchmarks.throughput_cases import CASES, Side

ANSWER = """
import json, sys
print("ready", flush=True)
for number, _ in enumerate(sys.stdin):
    found = {"seconds": float(10 - number), "lengths": [10, 20], "memory_mib": number, "phases": {"update": number}}
    print(json.dumps(found), flush=True)
"""
CASE = {
    "case": "trl-ppo", "shape": {"layers": 2, "width": 2, "vocab_size": 5}, "prompt_tokens": 3, "rows": 2, "epochs": 1,
}  # fmt: skip
PYTHONS = {"1": Path(sys.executable)}
RATES = {"float32 GFLOP/s": 1e-9, "bfloat16 GFLOP/s": 2e-9, "copy GB/s": 1e-9}  # one a second, or two


def test_medians_over_rounds_without_the_first(tmp_path, monkeypatch):
    (tmp_path / "answer.py").write_text(ANSWER)
    monkeypatch.setattr(throughput, "PEERS", tmp_path / "answer.py")
    for alone in (False, True):
        sides = [Side("a", CASE, "1", alone), Side("b", CASE, "1")]
        answers = throughput.measure(sides, PYTHONS, rounds=3, threads=1)
        assert answers["a"] == answers["b"]
        found = throughput.summary(sides[0], answers["a"], RATES)
        # Of 10, 9, 8, 7 seconds the first is the warm-up.
        assert found["all_seconds"] == [9.0, 8.0, 7.0]
        assert found["seconds"] == 8.0 and found["tokens_per_second"] == 30 / 8
        assert found["memory_mib"] == 3 and found["phases"] == {"update": 2}


def test_a_side_that_dies_says_why_and_not_another(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text(
        "import sys\nprint('ready', flush=True)\nfor _ in sys.stdin:\n"
        "    if 'dies' in sys.argv[1]: raise SystemExit('no such library')\n"
        "    print('{}', flush=True)"
    )
    monkeypatch.setattr(throughput, "PEERS", tmp_path / "dies.py")
    sides = [Side("a", {}, "1"), Side("b", {"dies": 1}, "1"), Side("c", {}, "1")]
    with pytest.raises(RuntimeError, match="b has ended: no such library"):
        throughput.measure(sides, PYTHONS, rounds=1, threads=1)


def test_operations_are_those_that_torch_counts():
    shape = {"layers": 2, "width": 16, "heads": 2, "vocab_size": 40, "max_tokens": 16}
    model = throughput_peers.gpt2(shape).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # The last token of the response is not read, and logits are wanted from the last of the prompt on.
        model(torch.zeros(3, 6 + 4 - 1, dtype=torch.long), logits_to_keep=4)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    attention = counts.pop("aten.bmm")
    # Torch computes all 9 x 9 scores of a row; seen are 1 + 2 + ... + 9 = 45 of them.
    expected = sum(counts.values()) + attention * 45 / 81
    assert throughput_floors.forward_flops(shape, 6, [4, 4, 4]) == pytest.approx(expected)
    # By hand, a row of two prompt tokens and one of the response: 2 layers * (24 * 16^2 * 2 + 4 * 16 * (1 + 2)) + 2 * 16 * 40.
    assert throughput_floors.forward_flops(shape, 2, [1]) == 2 * (12288 + 192) + 1280
    assert throughput_floors.forward_flops(shape, 2, [1], num_trunks=2) == 4 * (12288 + 192) + 1280


def test_bytes_of_decoding():
    shape = {"layers": 2, "width": 4, "vocab_size": 10}
    weights = 2 * 12 * 16 + 4 * 10
    # Two steps. The second reads keys and values of 3 prompt tokens in each of two rows, in two layers of width 4.
    assert throughput_floors.decode_bytes(shape, 3, [2, 2], 2, 4) == 4 * (2 * weights + 2 * 2 * 4 * 6)
    # One row after the other takes four; a longer response reads its own tokens too: 3 + (3 + 1).
    assert throughput_floors.decode_bytes(shape, 3, [2, 2], 1, 2) == 2 * (4 * weights + 2 * 2 * 4 * 6)
    assert throughput_floors.decode_bytes(shape, 3, [3], 1, 2) == 2 * (3 * weights + 2 * 2 * 4 * 7)


def test_against_the_hardware():
    shape = CASE["shape"]
    forward = throughput_floors.forward_flops(shape, 3, [1, 1])
    answers = [{"seconds": 9.0, "lengths": [1, 1], "phases": {"update": 100.0, "decode": 7 * forward}}]
    case = CASE | {"case": "ppo"}
    found = throughput_floors.against_hardware(case, answers, RATES)
    # One epoch, forward and a backward of two forwards, at one FLOP/s and byte/s.
    assert found["update_utilisation"] == pytest.approx(3 * forward / 100)
    assert found["decode_floor_flops"] == pytest.approx(forward)
    assert found["decode_floor_bytes"] == 4 * (2 * 12 * 4 + 2 * 5)  # less than the operations
    assert found["decode_over_floor"] == pytest.approx(7)
    faster = throughput_floors.against_hardware(case | {"weights": "bfloat16", "epochs": 4}, answers, RATES)
    assert faster["update_utilisation"] == pytest.approx(3 * 4 * forward / 100 / 2)
    assert faster["decode_floor_bytes"] == found["decode_floor_bytes"] / 2
    # A rollout is decoding altogether, a TRPO update neither.
    answers = [{"seconds": 2 * forward, "lengths": [1, 1]}]
    found = throughput_floors.against_hardware(CASE | {"case": "rollout"}, answers, RATES)
    assert found["decode_over_floor"] == pytest.approx(2) and "update_utilisation" not in found
    assert throughput_floors.against_hardware(CASE | {"case": "trpo"}, answers, RATES) == {}


def test_phases_are_told_apart():
    phases = throughput_peers.Phases()
    owner = SimpleNamespace(score=lambda x: time.sleep(0.02) or x, step=lambda x: x)
    phases.time(owner, "score", "reward", when=lambda x: x == "reward")
    phases.time_from(owner, "step", "update", when=lambda x: x == "trained")
    assert owner.score("reward") == owner.score("reward") == "reward" and owner.score("value") == "value"
    owner.step("reference")
    found = phases.take()
    assert list(found) == ["reward"] and found["reward"] >= 0.04
    assert owner.step("trained") == "trained"
    time.sleep(0.02)
    owner.step("trained")  # the first one counts
    found = phases.take()
    assert list(found) == ["update"] and found["update"] >= 0.02 and phases.take() == {}


def test_ratios_are_of_tokens_per_second():
    sides = [Side("ours", {}), Side("theirs", {})]
    each = {"seconds": 2.0, "memory_mib": 100.0, "phases": {"update": 1.5}}
    ours = each | {"tokens_per_second": 1000.0, "update_utilisation": 0.5}
    floor = {"decode_over_floor": 3.0, "decode_floor_flops": 0.5, "decode_floor_bytes": 0.25}
    lines = throughput_tables.table(sides, {"ours": ours, "theirs": each | floor | {"tokens_per_second": 250.0}})
    assert lines[2] == "| ours | 2 | 1,000 |  | 100 | update 1.50 | update 50 % of a matrix product's FLOP/s |"
    assert lines[3] == (
        "| theirs | 2 | 250 | 4.00x | 100 | update 1.50 | decode 3.0 times its floor (FLOP 0.5 s, bytes 0.25 s) |"
    )


def test_table_of_the_readme():
    rates = {"float32 GFLOP/s": 400.0, "bfloat16 GFLOP/s": 800.0, "copy GB/s": 60.0}

    def measured(case, sides):
        return {case: {"sides": {CASES[case][place].name: each for place, each in sides.items()}, "rates": rates}}

    results = {"unknown": {}} | (
        measured("trpo", {0: {"seconds": 0.5, "tokens_per_second": 64}, 1: {"seconds": 8.0, "tokens_per_second": 4}})
        | measured("steps", {0: {"tokens_per_second": 3000}, 1: {"tokens_per_second": 1500}})
        | measured("memory-small", {0: {"memory_mib": 500}, 1: {"memory_mib": 250}, 3: {"memory_mib": 2000}})
        | measured("rows", {0: {"phases": {"update": 1.0}}, 2: {"phases": {"update": 8.0}}})
    )
    lines = [line.split(" | ")[1:4] for line in throughput_tables.readme_table(results)[2:]]
    assert lines == [
        ["3,000 tokens/s", "1,500 tokens/s", "2.0"],
        ["0.5 s", "8 s", "16.0"],
        ["500 MiB", "2,000 MiB", "4.0"],
        ["250 MiB", "2,000 MiB", "8.0"],
        ["8.0 times the seconds", "16.0 times the tokens", "2.0"],  # 16 times the rows in 8 times the time
    ]
    assert throughput_tables.readme_table(results)[2].endswith("|  | 400, 800; 60 |")
    for line in throughput_tables._LINES:
        ours, theirs = CASES[line.case][line.ours], CASES[line.case][line.theirs]
        assert ours.peer is None and ours is not theirs


def test_peak_memory_is_this_process_own():
    before = throughput_peers.peak_memory_mib()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert throughput_peers.peak_memory_mib() >= max(before, 64)


def test_python_without_trl_is_refused(monkeypatch):
    monkeypatch.setattr(throughput, "_VERSIONS", "raise SystemExit('no trl')")
    with pytest.raises(ValueError, match=r"--peer-python must have trl.*no trl"):
        throughput.installed(Path(sys.executable))


def test_cases_are_sound():
    for name, sides in CASES.items():
        assert sides[0].peer is None and len({side.name for side in sides}) == len(sides), name
        for side in sides:
            json.dumps(side.case)
            shape = side.case["shape"]
            assert side.case["prompt_tokens"] + side.case["response_tokens"] <= shape["max_tokens"]
