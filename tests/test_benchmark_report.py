"""What a benchmark's directory is read as, and the tables and the page that are made of it."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from benchmark_runs import cell, curve_of, failed, full_directory, sampled, suite_of, write

from rlhf_gym.benchmarks import figures, tables
from rlhf_gym.benchmarks.outcomes import Task, label_cells, read_suites
from rlhf_gym.benchmarks.report import sections_of, write_report
from rlhf_gym.cli import main

# ---- what is read


def test_a_failed_run_counts_and_never_gains(tmp_path):
    rising, falling = curve_of([0, 10, 20], [0, 0.3, 0.7]), curve_of([0, 10, 20], [0, -0.1, -0.4])
    nowhere = {"tokens": 30, "normalised": math.nan}
    suite = suite_of(tmp_path, [
        cell(seed=0, normalised=0.9),
        failed(seed=1, curve=[*rising, nowhere]), failed(seed=2, curve=[*falling, nowhere]),
        failed(seed=3, curve=rising, metrics={"normalised": -3.0, "kl": 99.0}, failure="kl"),
        failed(seed=4, failure="exception: ValueError: x"), failed(seed=5, curve=rising, metrics={"normalised": 0.8}),
        cell(seed=6, normalised=math.nan),
    ])  # fmt: skip
    assert [run.score for run in suite.runs] == [0.9, 0.0, -0.4, -3.0, 0.0, 0.0, 0.0]
    assert [run.failure for run in suite.runs] == [None, "nan", "nan", "kl", "exception: ValueError: x", "nan", "nan"]
    assert len(suite.scores("ppo")[Task("WoAiNi", 0.1)]) == 7
    # Until it fails a run is worth what it scores, from then on what it counts.
    at = figures.score_at(suite.runs[1], np.array([0.0, 5.0, 20.0, 20.1, 99.0]), "tokens")
    np.testing.assert_allclose(at, [0, 0.15, 0.7, 0, 0])


def test_scores_without_an_optimum(tmp_path):
    """0 is the reference's objective, here 0.2, and 1 the best agent's mean, here (0.7 + 0.9) / 2 - 0.5 * 0.4 = 0.6."""
    cells = [sampled("a", 0, 0.7, 0.4), sampled("a", 1, 0.9, 0.4), sampled("b", 0, 0.4, 0.0), sampled("b", 1, 0.2, 0.4)]
    suite = suite_of(tmp_path, [*cells, cells[0] | {"seed": 2, "status": "failed", "failure": "kl"}])
    assert suite.relative and suite.agents == ["a", "b"]
    np.testing.assert_allclose(suite.scores("a")[Task("Reviews", 0.5)], [0.75, 1.25, 0.0], atol=1e-12)
    np.testing.assert_allclose(suite.scores("b")[Task("Reviews", 0.5)], [0.5, -0.5], atol=1e-12)
    np.testing.assert_allclose(suite.runs[0].scores, [0, 0.75], atol=1e-12)


def test_an_agent_without_a_kl_is_not_rated(tmp_path):
    blind = cell("blind", metrics={"reward": 0.93, "exact": False}, curve=[])
    suite = suite_of(tmp_path, [cell(normalised=0.5), blind, failed("blind", seed=1)])
    assert suite.agents == ["ppo"] and suite.unrated == ["blind"]
    assert [run.failure for run in suite.of("blind")] == [None, "nan"]
    assert tables.by_task(suite, suite.tasks).rows[1] == ["blind", "raw 0.9300\n(1 failed)"]


def test_torn_and_equal_lines(tmp_path):
    cells = [cell(seed=0, normalised=0.5), cell(seed=1, normalised=0.7)]
    suite = suite_of(tmp_path, [*cells, cells[0]], torn='{"suite": "exact", "ag')
    assert [run.score for run in suite.runs] == [0.5, 0.7]
    np.testing.assert_array_equal(suite.runs[0].seconds, [0, 1, 2])
    assert suite.runs[0].total_seconds == 3


def test_without_timings(tmp_path):
    suite = suite_of(tmp_path, [cell(seed=seed, normalised=0.5) for seed in range(2)], seconds=False)
    assert figures.efficiency(suite, "seconds") is None and figures.efficiency(suite, "tokens") is not None
    assert tables.overview(suite).rows[0][-3:] == ["-", "-", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no .*results.jsonl; give what rlhf-gym benchmark --out has written"),
        ("", "holds no finished cells; measure some with rlhf-gym benchmark --out"),
        ('{"suite": "exact"', "holds no finished cells"),
        ('{"suite": "exact", "task": "x"}\n', "holds a line without 'agent', so it is no benchmark's"),
        ("7\n{}\n", "line 1 is not a JSON object"),
    ],
)
def test_what_is_no_benchmark(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_suites(tmp_path)


def test_labels_say_only_what_is_needed():
    named = [cell("ppo"), cell("my.agents:Ppo"), cell("a:Same"), cell("b:Same")]
    assert label_cells(named) == ["ppo", "Ppo", "a:Same", "b:Same"]
    assert label_cells([cell(), cell(policy="lstm")]) == ["ppo, tabular", "ppo, lstm"]
    # Tuned for each task it is one agent; twice on one task and seed it is two.
    assert label_cells([cell(config={"x": 1}), cell(task="Recall", config={"x": 2})]) == ["ppo", "ppo"]
    twice = [cell(config={"x": 1, "y": 3}), cell(config={"x": 2, "y": 3}), cell(seed=1, config={"x": 2, "y": 3})]
    assert label_cells(twice) == ["ppo, x=1", "ppo, x=2", "ppo, x=2"]
    assert label_cells([cell(), cell(budget_tokens=7)]) == ["ppo, budget_tokens=1000", "ppo, budget_tokens=7"]


def test_tasks_stand_in_groups_of_one_coefficient_each(tmp_path):
    pairs = [("Lexicon", 1.0), ("Lexicon", 2.0), ("Mine", 0.1), ("WoAiNi", 0.3), ("WoAiNi", 0.1)]
    suite = suite_of(tmp_path, [cell(task=name, kl_coef=kl_coef, normalised=0.5) for name, kl_coef in pairs])
    assert suite.groups() == [[("WoAiNi", 0.1), ("Lexicon", 2.0)], [("WoAiNi", 0.3), ("Lexicon", 1.0), ("Mine", 0.1)]]


# ---- tables


def test_tables_by_hand(tmp_path):
    scores = {"good": (0.90, 0.92, 0.94, 0.96), "bad": (0.1, 0.3)}
    cells = [cell(agent, seed=i, normalised=x) for agent, values in scores.items() for i, x in enumerate(values)]
    suite = suite_of(tmp_path, [*cells, failed("bad", seed=2), failed("bad", seed=3, failure="kl")])
    good, bad = tables.overview(suite).rows
    # The IQM was measured to be 0.465 at 500 tokens, after a second, and 0.93 at 1000, after two.
    assert good[0] == "good" and good[1].startswith("0.9300 [") and good[2:] == [
        "0.9300", "0.9000", "0 (0 to 60 %)", "1,000", "2.0", "3.0", "4",
    ]  # fmt: skip
    assert bad[:1] + bad[2:5] == ["bad", "0.1000", "0.0000", "2 (7 to 93 %)"]
    rows = tables.by_task(suite, suite.tasks)
    half = 3.182446 * math.sqrt(0.002 / 3) / 2  # Student's t with three degrees of freedom
    assert rows == (
        ["agent", "WoAiNi, β = 0.1"],
        [["good", f"0.9300 ± {half:.4f}"], ["bad", "0.1000 ± 0.2250\n(2 failed)"]],
    )
    assert tables.regrets(suite, suite.tasks).rows == [["good", "0.1 ± 0"], ["bad", "0.1 ± 0\n(2 failed)"]]
    assert tables.failures(suite).rows == [
        ["bad", "nan", "WoAiNi, β = 0.1: seed 2", "0"], ["bad", "kl", "WoAiNi, β = 0.1: seed 3", "0"],
    ]  # fmt: skip
    assert tables.as_markdown(["a|b", "c"], [["1\n2", "3"]]) == "| a\\|b | c |\n| --- | --- |\n| 1 2 | 3 |"


def test_what_was_measured_and_with_what_settings(tmp_path):
    cells = [sampled("a", seed, 0.5, 0.25, gold=0.125) for seed in range(2)]
    cells[1]["config"] = {"learning_rate": 0.1}
    suite = suite_of(tmp_path, cells)
    found = tables.measures(suite, suite.tasks[0])
    assert found == (["agent", "score", "KL (nats)", "gold"], [["a", "0.5 ± 0", "0.25 ± 0", "0.125 ± 0"]])
    assert tables.settings_of(suite).rows[0][3] == "num_envs=64, budget_tokens=1000, learning_rate by task"


def reaching_by_hand(tmp_path, *others):
    """Runs of two lengths: on average 0.71 at 15 tokens, 0.935 at 20, and 0.975 at 30."""
    pairs = (([0, 10, 20], [0.0, 0.5, 0.95]), ([0, 15, 30], [0.0, 0.92, 1.0]))
    cells = [cell(seed=i, normalised=y[-1], curve=curve_of(x, y)) for i, (x, y) in enumerate(pairs)]
    runs = suite_of(tmp_path, [*cells, *others]).runs
    return {score: figures.first_reaching(runs, "tokens", score) for score in (0.0, 0.7, 0.9, 0.97, 0.98)}


def test_first_reaching_by_hand(tmp_path):
    """Only points that were measured: no straight line between them, along which 0.9 would be at 19.4 tokens."""
    assert reaching_by_hand(tmp_path) == pytest.approx({0: 0, 0.7: 15, 0.9: 20, 0.97: 30, 0.98: math.nan}, nan_ok=True)
    assert math.isnan(figures.first_reaching([], "seconds", 0.0))


def test_first_reaching_counts_what_failed(tmp_path):
    """A third run, which scores 0 from the start: the means are two thirds of those of the other two."""
    found = reaching_by_hand(tmp_path, failed(seed=2, failure="exception: ValueError: x"))
    assert found == pytest.approx({0.0: 0, **dict.fromkeys((0.7, 0.9, 0.97, 0.98), math.nan)}, nan_ok=True)


def overview_of(suite):
    """The table of all tasks as it stands in the report: rows as dicts by the head of their column."""
    _, section = next(sections_of(suite))
    return [dict(zip(section.header, row, strict=True)) for row in section.rows]


def test_a_suspended_process_decides_nothing(tmp_path):
    """Of four runs three reach 0.9 at their first measurement, after a second, and one was suspended meanwhile."""
    cells = [cell(seed=i, normalised=1.0, curve=curve_of([0, 500, 1000], [0.0, 0.95, 1.0])) for i in range(4)]
    (row,) = overview_of(suite_of(tmp_path, cells, slow={3: 1000.0}))
    assert row["seconds to 0.9"] == "1.0" and row["median seconds a run"] == "3.0"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (33_410.4, "33,000"), (996.0, "1,000"), (43.8, "44"), (1.0, "1.0"), (0.00108, "0.0011"), (0.0, "0"),
        (math.nan, "-"),
    ],
)  # fmt: skip
def test_amounts_have_two_digits(number, text):
    assert tables._amount(number) == text


# ---- the page


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = full_directory(tmp_path_factory.mktemp("benchmark") / "runs")
    files = write_report(directory, directory.parent / "report")
    return directory, files


class Page(HTMLParser):
    """Elements with their attributes, and whether each was closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else(report):
    _, (page, *_) = report
    text = page.read_text()
    found = Page(text)
    assert not found.open
    tags = [tag for tag, _ in found.found]
    assert "script" not in tags and "link" not in tags and "iframe" not in tags
    sources = [value for _, attributes in found.found for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 14 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    for _, attributes in (element for element in found.found if element[0] == "img"):
        assert len(attributes["alt"]) > 50 and re.match(r"min-width: \d+px$", attributes["style"])
    assert "<script>alert(1)</script>" in found.text  # an agent's name, as text
    for said in (
        "14 runs, of which 1 failed",
        "exact: Runs that failed",
        "small: Gold against proxy",
        "commit abc1234",
    ):
        assert said in found.text
    svgs = [base64.b64decode(source.partition(",")[2]) for source in sources]
    assert all(
        b"http" not in re.sub(rb"xmlns\S*|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>", b"", svg, flags=re.S)
        for svg in svgs
    )


def test_files(report):
    directory, files = report
    names = ["iqm", "tokens", "seconds", "profiles", "improvement", "kl", "gold"]
    pictures = [f"{suite}-{name}.png" for suite in ("exact", "small") for name in names]
    assert [path.name for path in files] == ["report.html", "table.md", *pictures]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files[2:])
    assert sorted(path.name for path in directory.iterdir()) == ["results.jsonl", "timings.jsonl"]
    text = files[1].read_text()
    assert "### All tasks together" in text and "| ppo | 0.99" in text and "(1 failed)" in text
    assert "fewer than 5 seeds" in text and "raw 0.9300" in text


def test_estimates_are_called_so(tmp_path):
    """Of the normalised score; on a task without a known optimum all is sampled, and nothing is normalised."""
    metrics = {"normalised": 0.5, "reward": 0.5, "kl": 1.0, "regret": 0.1}
    cells = [
        cell("nlpo", normalised=0.5) | {"metrics": metrics | {"exact": False}},
        cell("ppo", normalised=0.5) | {"metrics": metrics | {"exact": True}},
        sampled("a", 0, 0.5, 0.25) | {"metrics": {"score": 0.5, "kl": 0.25, "exact": False}},
    ]
    text = write_report(write(tmp_path / "runs", cells))[1].read_text()
    assert "Normalised scores of nlpo are partly estimates" in text and text.count("partly estimates") == 1


# ---- the command


def test_command(tmp_path, capsys):
    cells = [sampled("a", seed, 0.5, 0.25) for seed in range(2)]
    directory = write(tmp_path / "runs", cells)
    assert main(["plot", str(directory)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [str(directory / "report.html"), str(directory / "table.md")]
    assert sorted(map(str, directory.glob("*.png"))) == sorted(printed[2:])  # one agent: no pairs, and no gold
    assert [line.rpartition("-")[2] for line in printed[2:]] == [
        "iqm.png",
        "tokens.png",
        "seconds.png",
        "profiles.png",
        "kl.png",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "rlhf-gym plot needs a directory; see rlhf-gym plot --help"),
        (["nowhere"], "there is no nowhere/results.jsonl"),
        (["x", "--oout", "y"], "did you mean '--out'?"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]
    assert list(tmp_path.iterdir()) == []
