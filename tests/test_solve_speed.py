"""The measurement of exact.solve: its task against enumeration, its memory against what the system says."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from rlhf_gym.benchmarks import solve_speed


def test_states_are_counted_by_hand():
    """Last two words, capped sum of scores, keywords seen: the distinct ones after 0, 1 and 2 words."""
    states = 0
    for t in range(3):
        seen = set()
        for words in itertools.product(solve_speed.WORDS, repeat=t):
            total = 0.0
            for word in words:
                total = min(1.0, round(total + solve_speed.SCORES.get(word, 0.0), 9))
            seen.add((words[-2:], total, frozenset(words) & set(solve_speed.WORDS[:3])))
        states += len(seen)
    found = solve_speed.measure(3, 0.2)
    assert found["states"] == states and found["prefixes"] == sum(20**t for t in range(3)) * 21 + 1


def test_optimum_by_enumeration():
    env = solve_speed.make_task(2).unwrapped
    eos, others = env.eos_token_ids[0], [i for i in range(21) if i not in env.eos_token_ids]
    responses = [[eos, 0], *([a, b] for a in others for b in range(21))]
    mask = np.array([[True, first != eos] for first, _ in responses])
    result = env.evaluate_responses([env.prompts[0].ids] * len(responses), np.array(responses), mask)
    z = np.exp(result.ref_logprobs.sum(1) + result.scores / 0.2).sum()
    assert solve_speed.measure(2, 0.2)["objective"] == pytest.approx(0.2 * np.log(z), abs=1e-6)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="another measure of memory is Linux's")
def test_peak_memory_is_in_mib():
    """No less than what is resident now, and not a thousand times as much."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    now = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert 0.99 * now < solve_speed.peak_mib() < 500 * now


def test_the_command_prints_and_writes(tmp_path, monkeypatch, capsys):
    seconds = iter([3.0, 1.0, 2.0])
    row = {"max_response_tokens": 4, "states": 1234567, "prefixes": 9.87e10, "objective": 0.5, "peak_mib": 1500.4}

    def measured(length, kl_coef):
        return row | {"seconds": next(seconds), "before_mib": 100.0 * length, "kl_coef": kl_coef}

    monkeypatch.setattr(solve_speed, "in_own_process", measured)
    out = tmp_path / "x.json"
    assert solve_speed.main(["--lengths", "4", "--out", str(out)]) == 0
    assert "| 4 | 1,234,567 | 9.9e+10 | 0.50000 | 2.00 | 1,500 | 400 |" in capsys.readouterr().out.splitlines()
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["rows"][0]["all_seconds"] == [3.0, 1.0, 2.0] and written["versions"]["numpy"]
    assert written["command"].startswith("python -m rlhf_gym.benchmarks.solve_speed --lengths 4")
    with pytest.raises(SystemExit):
        solve_speed.main(["--repeats", "0"])
