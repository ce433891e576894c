"""The tables and pictures of the known answers: cells that survive a kill, intervals, and curves that are what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlhf_gym.benchmarks import frontier as pictures
from rlhf_gym.benchmarks import known_answers, learning_curve
from rlhf_gym.benchmarks.cells import append_cell, mean_and_half_width, read_cells
from rlhf_gym.benchmarks.processes import run_cells

COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "known_answers.jsonl"


def cell(task="WoAiNi", kl_coef=0.1, seed=0, normalised=1.0, **others):
    """A cell as `known_answers` writes it."""
    values = {
        "agent": "ppo", "policy": "tabular", "task": task, "kl_coef": kl_coef, "seed": seed, "episodes": 51_200,
        "config": {}, "normalised": normalised, "reward": 0.9, "kl": 1.0, "seconds": 10.0,
    }  # fmt: skip
    return values | others


# ---- cells


def test_a_torn_line_is_no_cell_and_is_repaired(tmp_path):
    path = tmp_path / "folder" / "cells.jsonl"
    assert read_cells(path) == []
    append_cell(path, {"a": 1})
    whole = path.read_bytes()
    for torn in (b'{"a": 2, "b', b"{", b'{"a": 2}'):  # the last might be cut behind a 2 of 23
        path.write_bytes(whole + torn)
        assert read_cells(path) == [{"a": 1}]
    append_cell(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


@pytest.mark.parametrize("line", ["{", "[1]", "", "7"])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, line):
    path = tmp_path / "cells.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(ValueError, match="cells.jsonl, line 2 is not a JSON object"):
        read_cells(path)


def test_another_process_gives_the_same_cell():
    key = {"agent": "ppo", "policy": "tabular", "task": "WoAiNi", "kl_coef": 0.3, "seed": 1, "episodes": 128,
           "num_envs": 128, "config": {}}  # fmt: skip
    (_, here), (_, there) = (next(run_cells(known_answers.run_cell, [key], jobs)) for jobs in (1, 2))
    assert there | {"seconds": 0} == here | {"seconds": 0}


def test_interval_by_hand():
    mean, half = mean_and_half_width([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)  # t of 2 degrees of freedom
    assert math.isnan(mean_and_half_width([1.0])[1])


# ---- the table


def test_table_by_hand():
    cells = [cell(seed=seed, normalised=value) for seed, value in enumerate((0.8, 0.9, 1.0, 0.9, 0.9))]
    cells += [cell(kl_coef=0.3, normalised=0.5, seconds=20.0)]
    cells += [cell(task="Lexicon", kl_coef=2.0, normalised=0.25, config={"learning_rate": 0.1})]
    cells += [cell(task="Difficulty", normalised_by_prompt={"easy": 0.1, "rare": 0.7}, agent="trpo")]
    text = known_answers.as_markdown(cells)
    # t of 4 degrees of freedom is 2.776445, the standard deviation sqrt(.02 / 4).
    half = 2.776445 * math.sqrt(0.02 / 4) / math.sqrt(5)
    for row in (
        "| agent | KL coefficient | WoAiNi | Lexicon | Difficulty | seconds |",
        f"| PPO, tabular, 51,200 episodes | .1 (Lexicon 2) | 0.9000 ± {half:.4f} (0.8000) | - | - | 10 |",
        "| PPO, tabular, 51,200 episodes | .3 (Lexicon 1) | 0.5000 (1 seed) | - | - | 20 |",
        "| PPO, tabular, learning_rate=0.1, 51,200 episodes | .1 (Lexicon 2) | - | 0.2500 (1 seed) | - | 10 |",
        "| agent | KL coefficient | easy | rare |",
        "| TRPO, tabular, 51,200 episodes | .1 (Lexicon 2) | 0.1000 (1 seed) | 0.7000 (1 seed) |",
    ):
        assert row in text.splitlines()


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch, capsys):
    path, runs = tmp_path / "cells.jsonl", []

    def run(**key):
        runs.append((key["task"], key["kl_coef"], key["seed"]))
        if len(runs) == 3:
            raise KeyboardInterrupt
        return {"normalised": 0.5, "seconds": 1.0}

    monkeypatch.setattr(known_answers, "run_cell", run)
    arguments = ["--tasks", "WoAiNi", "--num-seeds", "2", "--config", "learning_rate=0.02", "--out", str(path)]
    with pytest.raises(KeyboardInterrupt):
        known_answers.main(arguments)
    path.write_bytes(path.read_bytes() + b'{"agent": "ppo", "pol')  # and killed while it wrote
    assert known_answers.main(arguments) == 0
    assert runs == [("WoAiNi", *rest) for rest in ((0.1, 0), (0.1, 1), (0.3, 0), (0.3, 0), (0.3, 1))]
    assert "[1/2, 0 min left] ppo tabular WoAiNi 0.3 seed 0: 0.5000 in 1 s" in capsys.readouterr().err
    assert known_answers.main(arguments) == 0 and len(runs) == 5
    printed = capsys.readouterr().out
    assert known_answers.main(["--table", str(path)]) == 0 and capsys.readouterr().out == printed
    known_answers.main([*arguments, "--episodes", "7"])  # another budget is another cell
    assert len(runs) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "nowhere.jsonl"], "nowhere.jsonl holds no cells"),
        (["--out", "x", "--config", "critic=separate"], "a value in JSON"),
        (["--out", "x", "--jobs", "0"], "--jobs must be >= 1"),
        (["--out", "x", "--table", "y"], "not allowed with"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        known_answers.main(arguments)
    assert message in capsys.readouterr().err


def test_a_cell_by_its_identities():
    """J = E[r] - beta KL, regret, F8, and the closed form of a binary task for each prompt."""
    found = known_answers.run_cell("ppo", "tabular", "Difficulty", 0.3, 0, 256, 128, {"learning_rate": 0.02})
    rates = np.array([0.9, 0.5, 0.1, 0.01])
    optima = 0.3 * np.log1p(rates * np.expm1(1 / 0.3))
    assert found["optimum"] == pytest.approx(optima.mean(), abs=1e-6)
    assert found["objective"] == pytest.approx(found["reward"] - 0.3 * found["kl"], abs=1e-9)
    assert found["regret"] == pytest.approx(found["optimum"] - found["objective"], abs=1e-9)
    room = optima - rates
    by_prompt = np.array([found["normalised_by_prompt"][name] for name in ("easy", "fair", "hard", "rare")])
    assert found["normalised"] == pytest.approx((by_prompt * room).sum() / room.sum(), abs=1e-6)
    assert 0 < found["normalised"] < 1 and found["exact"]


def test_committed_cells():
    """Every one belongs to the table, and none beats the optimum."""
    cells = read_cells(COMMITTED)
    assert len(cells) >= 60 and known_answers.as_markdown(cells)
    for each in cells:
        assert each["kl_coef"] in known_answers.TASKS[each["task"]]
        assert each["regret"] > -1e-6 and each["normalised"] <= 1 + 1e-6
        if (each["task"], each["kl_coef"]) == ("WoAiNi", 0.1):
            assert each["optimum"] == pytest.approx(0.1 * math.log(0.76 + 0.24 * math.exp(10)), abs=1e-6)


@pytest.mark.parametrize(
    ("agent", "policy", "at_least"), [("ppo", "tabular", 0.99), ("trpo", "tabular", 0.97), ("ppo", "transformer", 0.95)]
)
def test_committed_agents_reach_the_optimum(agent, policy, at_least):
    """Means of five seeds on all six tasks, Difficulty prompt by prompt; the longest run where there are several."""
    cells = pictures.longest_runs(read_cells(COMMITTED))[f"{agent.upper()}, {policy}"]
    for task, coefficients in known_answers.TASKS.items():
        for kl_coef in coefficients:
            found = [c for c in cells if (c["task"], c["kl_coef"]) == (task, kl_coef)]
            assert sorted(c["seed"] for c in found) == [0, 1, 2, 3, 4]
            assert sum(c["normalised"] for c in found) / 5 >= at_least
            for prompt in found[0]["normalised_by_prompt"] or ():
                assert sum(c["normalised_by_prompt"][prompt] for c in found) / 5 >= at_least


# ---- the pictures


@pytest.mark.parametrize(("task", "rate"), [("WoAiNi", 0.24), ("Recall", None)])
def test_best_of_n_of_a_binary_task_is_on_the_frontier(task, rate):
    """Both are KL(q || p) of a coin: all that matters is how often the text is right."""
    curves = pictures.curves_of(task)
    p = curves.reference
    assert rate is None or p == pytest.approx(rate, abs=1e-6)

    def coin(q):
        return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))

    some = curves.frontier.reward < 1 - 1e-9
    np.testing.assert_allclose(curves.frontier.kl[some], coin(curves.frontier.reward[some]), atol=1e-6)
    q = 1 - (1 - p) ** pictures.NS
    some = q < 1 - 1e-9
    np.testing.assert_allclose(curves.best_of_n.reward, q, atol=1e-6)
    np.testing.assert_allclose(curves.best_of_n.kl[some], coin(q[some]), atol=1e-6)
    assert pictures.popular_bound(np.array([64]))[0] == pytest.approx(3.174508, abs=1e-6)  # log 64 - 63/64


def test_best_of_n_of_graded_scores_is_below_the_frontier():
    curves = pictures.curves_of("Lexicon")
    best, known = curves.best_of_n, curves.frontier
    above = np.interp(best.kl[16:], known.kl[::-1], known.reward[::-1])  # from N = 2 on
    assert (above - best.reward[16:] > 0.05).all()


def test_gold_rises_to_its_peak_and_falls():
    known = pictures.curves_of("Goodhart").frontier
    gold, peak = known.metrics["gold"], known.metrics["gold"].argmax()
    assert known.kl[peak] == pytest.approx(0.25, abs=0.02)
    assert (np.diff(gold[: peak + 1]) > -1e-9).all() and (np.diff(gold[peak:]) < 0).all()  # KL falls along the arrays
    assert gold[0] < gold[-1] < gold[peak]


def test_only_the_longest_runs_are_drawn():
    cells = [cell(episodes=10), cell(episodes=20, seed=1), cell(task="Recall", episodes=10), cell(agent="trpo")]
    cells.append(cell(episodes=10, kl_coef=0.3))  # no other is longer at this coefficient
    runs = pictures.longest_runs(cells)
    assert [(c["task"], c["episodes"]) for c in runs["PPO, tabular"]] == [
        ("WoAiNi", 20),
        ("Recall", 10),
        ("WoAiNi", 10),
    ]
    assert len(runs["TRPO, tabular"]) == 1


def test_picture_shows_what_it_is_given(tmp_path):
    cells = [cell(reward=0.7, kl=2.5), cell(reward=0.5, kl=0.8, kl_coef=0.3), cell(task="Recall", agent="trpo")]
    figure = pictures.picture(cells, ["WoAiNi", "Goodhart"])
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["WoAiNi", "Goodhart"]
    lines = {line.get_label(): line for line in panels[0].get_lines()}
    np.testing.assert_allclose(lines["PPO, tabular"].get_xydata(), [[2.5, 0.7], [0.8, 0.5]])
    assert panels[0].get_xlim()[1] > 2.5
    optimum = lines["optimum at a KL coefficient β"].get_xydata()
    np.testing.assert_allclose(optimum, [[1.42554, 0.99986], [0.98175, 0.89850]], atol=1e-5)
    assert lines["reference"].get_xydata().tolist() == [[0.0, pytest.approx(0.24, abs=1e-6)]]
    assert lines["frontier (exact)"].get_xydata()[0].tolist() == [0.0, pytest.approx(0.24, abs=1e-6)]
    assert "gold score on the frontier" in [line.get_label() for line in panels[1].get_lines()]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == len(set(legend)) and legend[-2:] == ["PPO, tabular", "TRPO, tabular"]
    results = tmp_path / "cells.jsonl"
    results.write_text("")
    with pytest.raises(SystemExit):
        pictures.main(["--results", str(results), "--out", str(tmp_path / "x.png")])
    assert pictures.main(["--goodhart", str(tmp_path / "goodhart.png")]) == 0
    assert (tmp_path / "goodhart.png").read_bytes().startswith(b"\x89PNG")


def test_learning_curve(tmp_path):
    columns = learning_curve.measure(
        "WoAiNi", kl_coef=0.3, total_timesteps=4_000, learning_rate=0.02, every=2, num_samples=64
    )
    optimum = 0.3 * math.log(0.76 + 0.24 * math.exp(1 / 0.3))
    np.testing.assert_allclose(columns["objective"] + columns["regret"], optimum, atol=1e-6)
    assert columns["objective"][0] == pytest.approx(0.24, abs=1e-6) and columns["timesteps"][0] == 0
    assert columns["regret"][-1] < 0.5 * columns["regret"][0]
    assert (np.diff(columns["timesteps"]) > 0).all()
    figure = learning_curve.picture(columns, optimum, "title")
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log"]


def test_cells_are_json_without_surprises(tmp_path):
    append_cell(tmp_path / "x.jsonl", {"text": "我\n爱", "number": 0.1})
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"text": "我\n爱", "number": 0.1}
    assert read_cells(tmp_path / "x.jsonl")[0]["text"] == "我\n爱"
