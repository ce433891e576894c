"""The benchmark's runner: nothing is lost by a kill, cells repeat, tuning is equal, anybody's agent takes part."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import benchmark_agents
import benchmark_functions
import numpy as np
import pytest

import rlhf_gym  # noqa: F401 - registers the ids
from rlhf_gym.agents import AGENTS
from rlhf_gym.benchmarks import cells as table
from rlhf_gym.benchmarks import contestants, runner, tuning
from rlhf_gym.benchmarks.cells import append_cell, provenance, read_cells
from rlhf_gym.benchmarks.contestants import VARIANTS, known_name, load_agent, settings_of
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


@pytest.fixture
def nothing_is_run(monkeypatch):
    """Every cell is found to be good at once."""
    found = {"status": "ok", "failure": None, "metrics": {}, "curve": [], "seconds": {"total": 1}, "curve_seconds": []}
    monkeypatch.setattr(runner, "check_agents", lambda *arguments: None)
    monkeypatch.setattr(runner, "run_cell", lambda **key: dict(found))


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
    kl = cells[0]["metrics"]["kl"]
    assert re.search(rf"not the same: kl \S+ \(was {re.escape(str(kl))}\)$", capsys.readouterr().out.strip())
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


def test_rerun_measures_nothing_new(tmp_path, capsys):
    """Also where no line is given: that is not the same as leaving the option out."""
    assert main(["benchmark", "--out", str(tmp_path / "x"), "--rerun"]) == 2
    assert "--rerun needs at least one line" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_file_is_no_directory(tmp_path, capsys):
    (tmp_path / "x").write_text("mine")
    assert main(["benchmark", "--out", str(tmp_path / "x"), "--tasks", "WoAiNi"]) == 2
    assert "is a file; results need a directory" in capsys.readouterr().err
    assert (tmp_path / "x").read_text() == "mine"


def test_what_is_no_benchmark_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text('{"mine": 1}\n')
    assert main(["benchmark", "--out", str(tmp_path), "--tasks", "WoAiNi"]) == 2
    assert "holds a line without 'suite', so it is no benchmark's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    assert (tmp_path / "results.jsonl").read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize(("given", "meant"), [("woaini", "WoAiNi"), ("Bracket", "Brackets"), ("xyz", None)])
def test_a_misspelt_task(given, meant):
    with pytest.raises(ValueError, match="--tasks of the suite exact must be of .*WoAiNi") as caught:
        plan(tasks=[given])
    assert str(caught.value).endswith(f"; did you mean {meant!r}?" if meant else f"got {given!r}")


def test_an_edited_agent_is_another_one(tmp_path, nothing_is_run):
    file, out = tmp_path / "mine.py", tmp_path / "x"
    file.write_text("from benchmark_agents import Idle as Mine\n")
    name = f"{file}:Mine"
    first, others = plan((name,), tasks=["WoAiNi"], num_seeds=1), plan((name,), tasks=["Difficulty"], num_seeds=1)
    cells = run(out, first)
    assert [cell["sha256"] for cell in cells] == [{name: hashlib.sha256(file.read_bytes()).hexdigest()[:16]}] * 2
    before = (out / "results.jsonl").read_bytes()
    file.write_text("from benchmark_agents import GoesFar as Mine\n")
    run(out, first)  # this process has loaded the file, and goes on with what it has loaded
    contestants._first_hash.cache_clear()  # another would see
    for the_plan in (first, others):  # neither is it done, nor do its other cells belong to it
        for allow_mixed in (False, True):
            with pytest.raises(ValueError, match=r"holds cells of another .*mine\.py:Mine \(SHA-256 .* put back"):
                run(out, the_plan, allow_mixed=allow_mixed)
    with pytest.raises(ValueError, match="holds cells of another"):
        runner.rerun(out, 1)
    assert (out / "results.jsonl").read_bytes() == before
    assert [cell["sha256"] for cell in run(out, plan(tasks=["WoAiNi"], num_seeds=1))[-2:]] == [{}] * 2
    # Cells of old do not say what they used.
    (out / "results.jsonl").write_text("".join(json.dumps(cell | {"sha256": {}}) + "\n" for cell in cells))
    run(out, others)
    for cell in cells:
        del cell["sha256"]
    (out / "results.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    assert len(run(out, others)) == 4


def test_another_model_of_stories_is_another_task(tmp_path, nothing_is_run):
    def stories(folder, **changes):
        the_plan = {"suite": "tiny", "agents": ["ppo"], "settings": {"ppo": {}}, "num_seeds": 1, "stories": str(folder)}
        return runner.Plan(**(the_plan | changes))

    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(folder.name.encode())
    cells = run(tmp_path / "x", stories(one))
    told = {cell["task"]: cell["sha256"] for cell in cells}
    assert told.pop("Stories") == {"Stories": hashlib.sha256(b"one").hexdigest()[:16]} and not any(told.values())
    with pytest.raises(ValueError, match="holds cells of another Stories"):
        run(tmp_path / "x", stories(other))
    run(tmp_path / "x", stories(other, tasks=["Keyword"]))  # which has another model
    run(tmp_path / "x", stories(one))
    with pytest.raises(ValueError, match=r"--stories must be a directory with a model's \*.safetensors, got"):
        run(tmp_path / "x", stories(tmp_path))


def test_stories_is_rerun_with_its_model_only(tmp_path, capsys):
    key = dict.fromkeys(runner.KEY) | {"suite": "tiny", "task": "Stories", "agent": "ppo", "kl_coef": 0.05, "seed": 0}
    (tmp_path / "results.jsonl").write_text(json.dumps(key | {"metrics": {}}) + "\n")
    assert main(["benchmark", "--out", str(tmp_path), "--rerun", "1"]) == 2
    says = "rlhf-gym: --rerun 1 is a cell of the task Stories; give --stories the directory of its model"
    assert capsys.readouterr().err.splitlines() == [says]


def test_provenance_is_the_packages_own(tmp_path, monkeypatch):
    commit = provenance()["commit"]
    monkeypatch.chdir(tmp_path)  # which is no checkout
    assert provenance()["commit"] == commit


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_counts_that_touches_code(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def commits(name):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n")
        git("add", name)
        git("commit", "-q", "-m", name)
        return git("rev-parse", "--short", "HEAD")

    git("init", "-q")
    monkeypatch.setattr(table, "__file__", str(tmp_path / "benchmarks" / "cells.py"))
    last = commits("benchmarks/cells.py")
    for name in ("README.md", "docs/benchmark.md", "tests/test_x.py", "results.jsonl"):
        commits(name)
        assert provenance()["commit"] == last
    for name in ("agents/ppo.py", "setup.cfg", "rlhf_gym/words.txt", "examples/prompts.jsonl"):
        last = commits(name)
        assert provenance()["commit"] == last
    (tmp_path / "agents" / "ppo.py").write_text("x = 2\n")
    assert provenance()["commit"].endswith("-dirty")


# ---- tuning


def test_tuning_is_equal_and_on_seeds_of_its_own(tmp_path, capfd):
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
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tuned ")]
    config = next(cell["config"] for cell in cells if cell["agent"] == "ppo")
    settings = " ".join(f"{name}={value}" for name, value in config.items())
    assert len(told) == 2 and told[0] == f"tuned ppo, the best of 3: {settings}"
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


def test_draws_are_presets_with_something_drawn_anew():
    """What is not searched stays: without it an agent would be tuned around another one."""
    for agent, policy, kept in (
        ("dr-grpo", "tabular", {"divide_by_std": False, "loss_mode": "constant", "kl_placement": "reward"}),
        ("dqn", "tabular", {"batch_size": 1024}),
        ("dqn-reference", "reference", {"exploration": "reference"}),
        ("trpo", "reference", {"n_steps": 24}),
        ("maskable-ppo", "reference", {"top_k": 16}),
    ):
        assert tuning.draw(agent, policy, 3, {}).items() >= kept.items()
    tuning.draw("ppo", "tabular", 0, {})
    assert tuning.preset("ppo", "tabular") == {"learning_rate": 0.02}  # and is not drawn into


def test_similar_agents_are_searched_alike():
    def searched(agent):
        drawn = [tuning.draw(agent, "tabular", number, {}) for number in range(40)]
        return {name for name in drawn[0] if len({each[name] for each in drawn}) > 1}

    rate = {"learning_rate"}
    for agents, names in (
        (("ppo", "nlpo"), {"num_epochs", "gae_lambda"}),
        (("soft-q",), {"num_epochs", "td_lambda"}),
        (("sb3-ppo", "maskable-ppo", "recurrent-ppo", "mlp-ppo"), {"n_epochs", "gae_lambda"}),
        (("rloo", "grpo", "dr-grpo", "vargrad", "online-dpo", "expert-iteration"), {"num_epochs", "num_minibatches"}),
        (("reinforce", "remax"), {"num_minibatches"}),
        (("dqn", "qrdqn", "dqn-reference"), {"replay_ratio", "exploration_fraction"}),
    ):
        for agent in agents:
            assert searched(agent) == names | rate, agent


@pytest.mark.parametrize("agent", [name for name in (*AGENTS, *VARIANTS) if name != "mlp-ppo"])  # SB3's own settings
def test_what_is_drawn_are_settings_of_the_agent(agent):
    for number in range(20):
        drawn = tuning.draw(agent, "tabular", number, {})
        config = load_agent(agent).config_class(**drawn)
        assert dataclasses.asdict(config).items() >= drawn.items()


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
    def cell(rate, status="ok", curve=(), **metrics):
        settings = {"config": {"learning_rate": rate}, "kl_coef": 0.5}
        return settings | {"status": status, "curve": list(curve), "metrics": metrics}

    cells = [cell(1, normalised=0.9), cell(2, normalised=0.5), cell(1, normalised=-1.0), cell(2, normalised=0.4)]
    assert tuning.best(cells) == {"learning_rate": 2}
    assert tuning.best([cell(1, objective=0.1), cell(2, "failed")]) == {"learning_rate": 1}
    # A failed one leaves one with the reference, 0, or worse: not with what it scored on the way.
    assert tuning.best([cell(1, "failed", normalised=0.9), cell(2, normalised=0.8)]) == {"learning_rate": 2}
    assert tuning.best([cell(1, "failed", normalised=0.9), cell(2, normalised=-0.1)]) == {"learning_rate": 1}
    assert tuning.best([cell(1, "failed", normalised=-0.2), cell(2, normalised=-0.1)]) == {"learning_rate": 2}
    # Its weights are NaN, and all that is known is its curve.
    curve = [{"tokens": 0, "normalised": 0.0}, {"tokens": 9, "normalised": -0.3}]
    assert tuning.best([cell(1, "failed", curve), cell(2, normalised=-0.2)]) == {"learning_rate": 2}
    assert tuning.best([cell(1, "failed", curve), cell(2, normalised=-0.4)]) == {"learning_rate": 1}
    # Where no optimum is known, the reference scores .7 - .5 * .2 = .6.
    curve = [{"tokens": 0, "score": 0.7, "kl": 0.2}, {"tokens": 9, "score": 0.9, "kl": 0.0}]
    assert tuning.best([cell(1, "failed", curve, objective=0.9), cell(2, objective=0.65)]) == {"learning_rate": 2}
    assert tuning.best([cell(1, "failed", curve, objective=0.9), cell(2, objective=0.55)]) == {"learning_rate": 1}


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


def test_files_of_one_name_are_two_modules(tmp_path):
    """Their name is taken, too, by a module that is loaded."""
    names = [f"{tmp_path / folder / 'statistics.py'}:Mine" for folder in ("v1", "v2")]
    for name in names:
        file = Path(name.rpartition(":")[0])
        file.parent.mkdir()
        file.write_text(
            f"class Mine:\n    version = {file.parent.name!r}\n\n    def learn(self): ...\n\n    predict = learn\n"
        )
    found = [load_agent(name) for name in names]
    assert [each.version for each in found] == ["v1", "v2"]
    assert [load_agent(name) for name in names] == found and sys.modules["statistics"] is statistics
    assert all(sys.modules[each.__module__].Mine is each for each in found)
    (tmp_path / "broken.py").write_text("raise OSError('no such disk')\n")
    for _ in range(2):  # it is not half loaded
        with pytest.raises(OSError, match="no such disk"):
            load_agent(f"{tmp_path / 'broken.py'}:Mine")


def test_an_agent_of_ours_has_its_settings_under_any_name(tmp_path, monkeypatch, nothing_is_run):
    file = tmp_path / "mine.py"
    file.write_text("import stable_baselines3\n\n\nclass MyPPO(stable_baselines3.PPO):\n    pass\n")
    for name, known in (
        ("stable_baselines3:PPO", "sb3-ppo"), ("sb3_contrib:QRDQN", "qrdqn"), ("rlhf_gym.agents:PPO", "ppo"),
        ("ppo", "ppo"), ("dr-grpo", "dr-grpo"), ("sb3_contrib:TRPO", None), (f"{file}:MyPPO", None), (EXAMPLE, None),
    ):  # fmt: skip
        assert known_name(name) == (known or name)
    for tune in (0, 2):
        names = ("stable_baselines3:PPO", "sb3-ppo")
        run(tmp_path / "x", plan(names, tasks=["WoAiNi"], num_seeds=1, tune=tune))
        cells = read_cells(tmp_path / "x" / ("tuning.jsonl" if tune else "results.jsonl"))
        theirs, ours = ([cell["config"] for cell in cells if cell["agent"] == name] for name in names)
        assert theirs == ours and (tune or ours == [{"learning_rate": 0.03}] * 2)
    monkeypatch.delitem(sys.modules, "rlhf_gym.agents.sb3")
    assert known_name(EXAMPLE) == EXAMPLE and "rlhf_gym.agents.sb3" not in sys.modules


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
