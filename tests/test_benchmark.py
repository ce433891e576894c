"""The benchmark's runner: nothing is lost by a kill, cells repeat, tuning is equal, anybody's agent takes part."""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import time
from pathlib import Path

import benchmark_agents
import benchmark_functions
import numpy as np
import pytest

import rlhf_gym  # noqa: F401 - registers the ids
from rlhf_gym.benchmarks import runner, tuning
from rlhf_gym.benchmarks.cells import append_cell, provenance, read_cells
from rlhf_gym.benchmarks.contestants import load_agent, settings_of
from rlhf_gym.benchmarks.processes import run_cells
from rlhf_gym.benchmarks.progress import Progress, as_duration
from rlhf_gym.cli import main

EXAMPLE = f"{Path(__file__).parents[1] / 'examples' / 'custom_agent.py'}:Reinforce"
HERE = {"commit": "abc1234", "python": "3", "versions": {"torch": "2"}, "machine": "x"}


@pytest.fixture(autouse=True)
def same_provenance(monkeypatch):
    """The checkout may change while the tests run."""
    monkeypatch.setattr(runner, "provenance", lambda: HERE)
    monkeypatch.chdir(Path(__file__).parent)  # where the modules of agents are


def plan(agents=("ppo",), settings=None, **changes):
    settings = {agent: {} for agent in agents} | (settings or {})
    small = {"tasks": ["WoAiNi", "Difficulty"], "num_seeds": 2, "num_envs": 32, "budget_tokens": 250}
    return runner.Plan(suite="exact", agents=agents, settings=settings, **(small | changes))


def run(where, the_plan=None, jobs=1, **options):
    return runner.run(the_plan or plan(), where, jobs=jobs, progress=Progress(False), **options)


# ---- interruptions


def test_killed_three_times_it_ends_as_if_it_had_not_been(tmp_path):
    unbroken, broken, rng = tmp_path / "a", tmp_path / "b", random.Random(5)
    cells = run(unbroken)
    assert len(cells) == 8 and [cell["seed"] for cell in cells] == [0, 1] * 4
    for num_cells in (0, 2, 4):
        child = multiprocessing.get_context("fork").Process(target=run, args=(broken,))
        child.start()
        deadline = time.monotonic() + 60
        while len(lines(broken / "results.jsonl")) < num_cells and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        child.join()
        assert child.exitcode == -9 and num_cells <= len(lines(broken / "results.jsonl")) < 8
    (broken / "results.jsonl").open("ab").write(b'{"suite": "exact", "agent": "p')  # and in the middle of a line
    run(broken)
    assert (broken / "results.jsonl").read_bytes() == (unbroken / "results.jsonl").read_bytes()
    timings = [read_cells(where / "timings.jsonl") for where in (broken, unbroken)]
    assert [[line[name] for name in runner.KEY] for line in timings[0]] == [
        [line[name] for name in runner.KEY] for line in timings[1]
    ]
    run(unbroken)  # nothing is missing: nothing changes
    assert (broken / "results.jsonl").read_bytes() == (unbroken / "results.jsonl").read_bytes()


def lines(path):
    return path.read_bytes().splitlines() if path.exists() else []


def test_a_process_that_dies_is_tried_again_and_then_a_result(tmp_path):
    keys = [{"x": x, "folder": str(tmp_path)} for x in (1, 2, 3)]
    found = run_cells(benchmark_functions.dies_at_two, keys, 2, died=lambda key, code: {"died": (key["x"], code)})
    assert sorted(json.dumps(result) for _, result in found) == ['{"died": [2, 3]}', '{"square": 1}', '{"square": 9}']
    assert len(list(tmp_path.glob("2-*"))) == 2


def test_processes_end_with_the_process_that_started_them(tmp_path):
    keys = [{"x": x, "folder": str(tmp_path)} for x in (1, 2)]
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: list(run_cells(benchmark_functions.sleeps, keys, 2)))
    child.start()
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    child.kill()
    child.join()
    wait_for(lambda: not any(is_running(int(path.name)) for path in tmp_path.iterdir()))


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_run_at_a_time_in_a_directory(tmp_path):
    with runner._locked(tmp_path), pytest.raises(ValueError, match="another benchmark is at work"):
        run(tmp_path)
    run(tmp_path, plan(tasks=["WoAiNi"], num_seeds=1))


# ---- the same numbers


def test_a_cell_gives_the_same_numbers_again(tmp_path, capsys):
    cells = run(tmp_path, plan(tasks=["WoAiNi"], num_seeds=1))
    assert main(["benchmark", "--out", str(tmp_path), "--rerun", "1", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"line {line}: ppo WoAiNi {kl_coef} seed 0: the same numbers again" for line, kl_coef in ((1, 0.1), (2, 0.3))
    ]
    cells[0]["metrics"]["kl"] += 1e-9
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    assert main(["benchmark", "--out", str(tmp_path), "--rerun", "1"]) == 1
    assert "not the same: kl" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has 2, got 5"):
        runner.rerun(tmp_path, 5)


def test_other_versions_are_not_mixed_unasked(tmp_path, monkeypatch):
    run(tmp_path, plan(tasks=["WoAiNi"], num_seeds=1))
    before = (tmp_path / "results.jsonl").read_bytes()
    monkeypatch.setattr(runner, "provenance", lambda: HERE | {"commit": "fff", "versions": {"torch": "3"}})
    run(tmp_path, plan(tasks=["WoAiNi"], num_seeds=1))  # it is all there: nothing is measured
    assert (tmp_path / "results.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"commit abc1234 \(now fff\), torch 2 \(now 3\).*--allow-mixed"):
        run(tmp_path, plan(tasks=["WoAiNi"], num_seeds=2))
    cells = run(tmp_path, plan(tasks=["WoAiNi"], num_seeds=2), allow_mixed=True)
    assert [cell["commit"] for cell in cells] == ["abc1234", "fff"] * 2


def test_provenance_is_the_packages_own(tmp_path, monkeypatch):
    commit = provenance()["commit"]
    monkeypatch.chdir(tmp_path)  # which is no checkout
    assert provenance()["commit"] == commit


# ---- tuning


def test_tuning_is_equal_and_on_seeds_of_its_own(tmp_path):
    agents = ("ppo", EXAMPLE)
    the_plan = plan(agents, {"ppo": {"num_epochs": 2}}, tasks=["WoAiNi"], num_seeds=1, tune=3)
    cells = run(tmp_path, the_plan)
    swept = read_cells(tmp_path / "tuning.jsonl")
    for agent in agents:
        mine = [cell for cell in swept if cell["agent"] == agent]
        assert len({json.dumps(cell["config"]) for cell in mine}) == 3 and len(mine) == 6  # two coefficients
        means = {}
        for cell in mine:
            means.setdefault(json.dumps(cell["config"]), []).append(cell["metrics"]["normalised"])
        best = max(means, key=lambda config: np.mean(means[config]))
        assert {json.dumps(cell["config"]) for cell in cells if cell["agent"] == agent} == {best}
    assert all(cell["config"]["num_epochs"] == 2 for cell in swept if cell["agent"] == "ppo")
    assert not {cell["seed"] for cell in swept} & {cell["seed"] for cell in cells}
    before = (tmp_path / "results.jsonl").read_bytes(), (tmp_path / "tuning.jsonl").read_bytes()
    run(tmp_path, the_plan)
    assert before == ((tmp_path / "results.jsonl").read_bytes(), (tmp_path / "tuning.jsonl").read_bytes())


def test_draws():
    drawn = [tuning.draw("a:B", "tabular", number, {}) for number in range(200)]
    rates = np.log([each["learning_rate"] for each in drawn])
    low, high = np.log(0.003), np.log(0.3)
    assert (low - 1e-2 < rates).all() and (rates < high + 1e-2).all()
    assert rates.mean() == pytest.approx((low + high) / 2, abs=3 * (high - low) / math.sqrt(12 * 200))
    assert all(list(each) == ["learning_rate"] for each in drawn)
    assert tuning.draw("ppo", "tabular", 7, {"gae_lambda": 0.5})["gae_lambda"] == 0.5
    assert tuning.draw("ppo", "tabular", 7, {}) != tuning.draw("trpo", "tabular", 7, {})


def test_presets():
    assert tuning.preset("ppo", "tabular") == tuning.preset("soft-q", "tabular") == {"learning_rate": 0.02}
    # A variant keeps its settings whatever the policy, and in a search.
    assert tuning.preset("online-dpo-soft", "reference") == {"labels": "soft", "learning_rate": 6e-4}
    assert tuning.preset("online-dpo-soft", "tabular") == {"labels": "soft", "learning_rate": 0.02, "num_epochs": 4}
    assert tuning.draw("expert-iteration-optimal", "tabular", 0, {})["weights"] == "optimal"
    assert tuning.preset("my:Agent", "tabular") == tuning.preset("q-learning", "tabular") == {}
    assert "target_kl" in tuning.preset("trpo", "tabular")
    assert "learning_rate" not in tuning.draw("best-of-n", "tabular", 0, {})


def test_the_best_configuration_by_hand():
    def cell(rate, **metrics):
        return {"config": {"learning_rate": rate}, "metrics": metrics}

    cells = [cell(1, normalised=0.9), cell(2, normalised=0.5), cell(1, normalised=-1.0), cell(2, normalised=0.4)]
    assert tuning.best(cells) == {"learning_rate": 2}
    assert tuning.best([cell(1, objective=0.1), cell(2)]) == {"learning_rate": 1}  # 2 has failed


def test_the_command_line_keeps_tuning_seeds_free(capsys):
    assert main(["benchmark", "--out", "x", "--seeds", str(tuning.SEED + 1)]) == 2
    assert "those above are for tuning" in capsys.readouterr().err


# ---- agents by name, and the command


def test_the_example_agent_takes_part(tmp_path, capsys):
    command = ["benchmark", "--agents", EXAMPLE, "--tasks", "WoAiNi", "--seeds", "1", "--num-envs", "64"]
    command += ["--budget-tokens", "6000", "--config", f"{EXAMPLE}.learning_rate=0.1", "--out", str(tmp_path / "x")]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "2 cells, 0 failed" in printed.out
    assert len(printed.err.splitlines()) == 2 and "results [2/2, 0 s left]" in printed.err
    found = {(cell["agent"], cell["kl_coef"]): cell for cell in read_cells(tmp_path / "x" / "results.jsonl")}
    for kl_coef in (0.1, 0.3):
        assert found[EXAMPLE, kl_coef]["metrics"]["normalised"] > 0.5
        assert found[EXAMPLE, kl_coef]["config"] == {"learning_rate": 0.1}
        assert 6000 <= found[EXAMPLE, kl_coef]["metrics"]["tokens"] < 6000 + 2 * 64 * 4


def test_agents_by_name():
    assert load_agent("ppo").__name__ == "PPO"
    assert load_agent("dr-grpo") is load_agent("grpo")
    assert load_agent("benchmark_agents:Idle") is benchmark_agents.Idle
    assert load_agent("sb3_contrib:TRPO").algorithm_class.__module__.startswith("sb3_contrib")
    for name, message in (
        ("pppo", "did you mean 'ppo'"),
        ("nowhere_at_all:X", "no module 'nowhere_at_all'"),
        ("benchmark_agents:X", "no class 'X'"),
        ("benchmark_agents:NoAgent", "lacks predict"),
        ("nowhere.py:X", "no file 'nowhere.py'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_agent(name)


def test_settings_by_agent():
    pairs = ["learning_rate=0.1", "ppo.learning_rate=0.2", "a.py:B.critic=separate"]
    assert settings_of(["ppo", "a.py:B", "c:D"], pairs) == {
        "ppo": {"learning_rate": 0.2},
        "a.py:B": {"learning_rate": 0.1, "critic": "separate"},
        "c:D": {"learning_rate": 0.1},
    }
    with pytest.raises(ValueError, match="one of the agents ppo"):
        settings_of(["ppo"], ["trpo.learning_rate=0.2"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--agents", "pppo"], "did you mean 'ppo'?"),
        (["--tasks", "Wo"], "--tasks of the suite exact must be of WoAiNi"),
        (["--tasks", "Stories", "--suite", "tiny"], "give --stories the directory of its model"),
        (["--policy", "reference"], "--policy of the suite exact must be of tabular"),
        (["--config", "clip_rnge=0.1"], "did you mean 'clip_range'?"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--budget-seconds", "0"], "--budget-seconds must be above 0"),
        (["--rerun", "1"], "which has 0, got 1"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, says):
    assert main(["benchmark", "--out", str(tmp_path / "x"), *arguments]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and told[0].startswith("rlhf-gym: ") and says in told[0]
    assert not (tmp_path / "x").exists()


def test_ctrl_c_says_what_is_there(tmp_path, capsys, monkeypatch):
    def interrupted(**key):
        if key["seed"] == 1:
            raise KeyboardInterrupt
        return {"status": "ok", "failure": None, "metrics": {}, "curve": [], "seconds": {}, "curve_seconds": []}

    monkeypatch.setattr(runner, "run_cell", interrupted)
    out = str(tmp_path / "x")
    assert main(["benchmark", "--tasks", "WoAiNi", "--seeds", "2", "--num-envs", "4", "--out", out]) == 130
    says = capsys.readouterr().err.strip().splitlines()[-1]
    assert says == f"rlhf-gym: interrupted; 2 of 4 cells of results are in {out}, and the same command goes on"


def test_time_left_by_hand(monkeypatch):
    """Two agents, two cells each. After one of 10 s and one of 30 s in 25 s of wall time: 40 s are ahead."""
    clock = iter([0.0, *[25.0] * 10])
    monkeypatch.setattr("rlhf_gym.benchmarks.progress.time.perf_counter", lambda: next(clock))
    keys = [{"agent": agent, "seed": seed} for seed in (0, 1) for agent in ("a", "b")]
    progress = Progress(False)
    with progress.of("results", keys, [], 2):
        for key, seconds in zip(keys, (10.0, 30.0), strict=False):
            cell = key | {"task": "X", "kl_coef": 1, "failure": None, "metrics": {"normalised": 0.5, "tokens": 100}}
            progress.finished(cell, {"total": seconds})
        assert progress.seconds_left() == pytest.approx(25.0)  # 40 s in the ratio 25 : 40
        columns = {column.header: list(column.cells) for column in progress.table().columns}
    assert columns["agent"] == ["a", "b"] and columns["cells"] == ["1/2", "1/2"] and columns["tokens/s"] == ["10", "3"]
    assert [as_duration(seconds) for seconds in (None, 42, 7 * 60, 7500)] == ["?", "42 s", "7 min", "2 h 05 min"]


def test_a_torn_timing_costs_nothing(tmp_path):
    run(tmp_path, plan(tasks=["WoAiNi"], num_seeds=1))
    append_cell(tmp_path / "timings.jsonl", read_cells(tmp_path / "timings.jsonl")[0])  # of a cell that was begun again
    run(tmp_path, plan(tasks=["WoAiNi"], num_seeds=1))
    assert len(read_cells(tmp_path / "timings.jsonl")) == 2
