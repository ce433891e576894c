"""What a benchmark's directory is read as, and the tables, pictures and page that are made of it."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.text import Text

from rlhf_gym.benchmarks import figures, tables, tradeoffs
from rlhf_gym.benchmarks.outcomes import Task, label_cells, read_suites
from rlhf_gym.benchmarks.report import sections_of, write_report
from rlhf_gym.cli import main
from rlhf_gym.plots import as_svg

HOSTILE = "agents.py:<script>alert(1)</script>"


def cell(agent="ppo", task="WoAiNi", seed=0, normalised=None, *, suite="exact", kl_coef=0.1, **others):
    """A cell as the runner writes it."""
    key = {
        "suite": suite, "agent": agent, "policy": "tabular", "task": task, "kl_coef": kl_coef, "seed": seed,
        "num_envs": 64, "budget_tokens": 1000, "budget_seconds": None, "config": {},
    }  # fmt: skip
    metrics = {} if normalised is None else {"normalised": normalised, "reward": 0.5, "kl": 1.0, "regret": 0.1}
    curve = [] if normalised is None else curve_of([0, 500, 1000], [0.0, normalised / 2, normalised])
    values = {"status": "ok", "failure": None, "metrics": metrics, "curve": curve, "commit": "abc1234"}
    return key | values | others


def curve_of(tokens, normalised):
    return [{"tokens": x, "normalised": y, "kl": 0.1 * y} for x, y in zip(tokens, normalised, strict=True)]


def sampled(agent, seed, score, kl, *, gold=None, kl_coef=0.5):
    """A cell of a task whose optimum is unknown; the reference scores 0.2."""
    curve = [{"tokens": 0, "score": 0.2, "kl": 0.0}, {"tokens": 1000, "score": score, "kl": kl}]
    metrics = {"score": score, "kl": kl} | ({} if gold is None else {"gold": gold})
    return cell(agent, "Reviews", seed, suite="small", kl_coef=kl_coef, metrics=metrics, curve=curve)


def failed(agent="ppo", seed=0, curve=(), metrics=(), failure="nan", **others):
    others = {"metrics": dict(metrics), "curve": list(curve), "status": "failed", "failure": failure} | others
    return cell(agent, seed=seed, **others)


def write(directory, cells, seconds=True, torn="", slow=()):
    """Their files; a point of a curve a second, but for the seeds in ``slow``, where it takes so many."""
    directory.mkdir(exist_ok=True)
    (directory / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in cells) + torn)
    if seconds:
        each_takes = [dict(slow).get(each["seed"], 1.0) for each in cells]
        lines = [
            each | {"seconds": {"total": 3.0 * time}, "curve_seconds": [time * i for i in range(len(each["curve"]))]}
            for each, time in zip(cells, each_takes, strict=True)
        ]
        (directory / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return directory


def suite_of(directory, cells, **others):
    (suite,) = read_suites(write(directory, cells, **others))
    return suite


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
        (None, "holds no finished cells; measure some with rlhf-gym benchmark --out"),
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


# ---- pictures


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]), ([0.5, 0.5, 0.5], [0.5, 0.6, 0.7]), ([0.95, 0.97], [0.9, 1.0]),
        ([-3.0, 0.05], [0.0, 0.1]), ([], []),
    ],
)  # fmt: skip
def test_names_keep_their_distance(heights, expected):
    assert tradeoffs.spread(heights, 0.1) == pytest.approx(expected)


def test_pairs_by_hand(tmp_path):
    scores = {"a": (0.9, 0.8), "b": (0.85, 0.1), "elsewhere": (0.5, 0.5)}
    cells = [
        cell(agent, "Recall" if agent == "elsewhere" else "WoAiNi", i, x)
        for agent, values in scores.items() for i, x in enumerate(values)
    ]  # fmt: skip
    found = figures.improvements(suite_of(tmp_path, cells))
    assert found.keys() == {("a", "b"), ("b", "a")} and found["a", "b"].value == 0.75
    assert found["b", "a"] == pytest.approx([1 - end for end in (0.75, found["a", "b"].high, found["a", "b"].low)])


def blue_line(axes):
    """Places and values of the agent that a small panel is about."""
    (line,) = (line for line in axes.lines if line.get_color() == figures.BLUE)
    return line.get_data()


def test_curves_begin_at_the_first_measurement(tmp_path):
    """However long one of the runs was suspended; and with nothing between the points but lines."""
    cells = [cell(seed=i, normalised=0.8) for i in range(4)]  # 0.4 after a second, 0.8 after two
    suite = suite_of(tmp_path, cells, slow={3: 1000.0})
    places, values = blue_line(figures.efficiency(suite, "seconds").axes[0])
    np.testing.assert_array_equal(places, [1, 2, 1000, 2000])
    # The middle two of four: the suspended run is still near 0 when the others are measured, and is cut off.
    np.testing.assert_allclose(values, [0.4, 0.8, 0.8, 0.8])
    places, values = blue_line(figures.efficiency(suite, "tokens").axes[0])
    np.testing.assert_array_equal(places, [0, 500, 1000])
    np.testing.assert_allclose(values, [0, 0.4, 0.8])


@pytest.mark.parametrize("by", ["tokens", "seconds"])
def test_who_learns_nothing_is_a_flat_line(tmp_path, by):
    """Best-of-N has one point, where it begins, and scores as much there as at any other."""
    flat = [cell("best-of-n", seed=i, normalised=0.7, curve=curve_of([0], [0.7])) for i in range(2)]
    suite = suite_of(tmp_path, [cell(seed=i, normalised=0.8) for i in range(2)] + flat)
    learner, other = figures.efficiency(suite, by).axes
    places, values = blue_line(other)
    assert list(values) == [0.7, 0.7] and list(places) == [blue_line(learner)[0][0], blue_line(learner)[0][-1]]
    behind = next(line for line in learner.lines if line.get_color() != figures.BLUE)
    np.testing.assert_array_equal(behind.get_xdata()[:2], places)
    assert figures.efficiency(suite_of(tmp_path, flat), by) is None  # nobody learns: there is nothing to show


def test_numbers_of_neighbouring_panels_stand_apart(tmp_path):
    """Of the widest axis: from a score of -99 to the last ten-thousandth."""
    cells = [cell(f"agent-{i}", seed=seed, normalised=-99.0 * seed) for i in range(4) for seed in range(2)]
    figure = figures.profiles(suite_of(tmp_path, cells))
    figure.draw_without_rendering()
    boxes = [
        [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()] for axes in figure.axes
    ]
    assert len(boxes) == 4 and min(map(len, boxes)) >= 3
    assert not any(a.padded(2).overlaps(b) for left, right in itertools.pairwise(boxes) for a in left for b in right)


def test_an_agent_stays_in_its_panel(tmp_path):
    """Lexicon's frontier goes far beyond what matters at β = 2: who went there stands at the edge, and says where."""
    ends = {"near": (0.4, 1.4), "far": (39.4, 16.0), "expert-iteration": (38.2, 15.7), "low": (30.0, 2.0)}
    cells = [
        cell(agent, task, 0, 0.5, kl_coef=kl_coef) | {"metrics": {"normalised": 0.5, "reward": reward, "kl": kl}}
        for agent, (kl, reward) in ends.items() for task, kl_coef in (("Lexicon", 2.0), ("Recall", 0.1))
    ]  # fmt: skip
    figure = tradeoffs.reward_against_kl(suite_of(tmp_path, cells))
    figure.draw_without_rendering()
    axes, neighbour = figure.axes
    assert axes.get_title() == "Lexicon, β = 2"
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    drawn = [line for line in axes.lines if "agent" in line.get_label()]
    points = [(line.get_marker(), x, y) for line in drawn for x, y in zip(*line.get_data(), strict=True)]
    assert all(left <= x <= right and bottom <= y <= top for _, x, y in points)
    assert sorted(points) == [(">", right, 2.0), (">", right, top), (">", right, top), ("o", 0.4, 1.4)]
    names = [text for text in axes.texts if not text.get_text().startswith("β")]
    assert sorted(text.get_text() for text in names) == [
        "expert-iteration: KL 38, score 16", "far: KL 39, score 16", "low: KL 30", "near",
    ]  # fmt: skip
    edge = neighbour.yaxis.label.get_window_extent().x0
    # The text alone: an annotation's own extent has the line to its point as well.
    assert all(Text.get_window_extent(text).x1 < edge for text in names)


def full_directory(path):
    """Two agents and three tasks, a failure, gold, a second suite; the last lines half-written."""
    cells, rng = [], np.random.default_rng(0)
    for agent, level in (("ppo", 0.995), (HOSTILE, 0.5)):
        for task, others in (("WoAiNi", {}), ("Brackets", {}), ("Goodhart", {"gold": -1.0})):
            for seed in range(2):
                each = cell(agent, task, seed, level - 0.004 * rng.random())
                each["metrics"] |= others
                cells.append(each)
    cells += [failed(HOSTILE, seed=2, curve=curve_of([0, 400], [0, 0.3]), metrics={"kl": 50.0, "reward": 0.1})]
    cells += [cell("blind", metrics={"reward": 0.93, "exact": False}, curve=[])]
    cells += [sampled(agent, seed, 0.5 + seed / 10, 0.3, gold=0.4) for agent in ("ppo", "trpo") for seed in range(2)]
    return write(path, cells, torn='{"suite": "exact", "agent": "ppo", "po')


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


def test_every_axis_has_a_name(report):
    """And all curves, rows and points of every agent are there, at two agents as at twenty."""
    exact, small = read_suites(report[0])
    for suite in (exact, small):
        drawn = {
            "iqm": figures.iqm_intervals(suite), "tokens": figures.efficiency(suite, "tokens"),
            "seconds": figures.efficiency(suite, "seconds"), "profiles": figures.profiles(suite),
            "improvement": figures.improvement_map(suite), "kl": tradeoffs.reward_against_kl(suite),
            "gold": tradeoffs.gold_against_proxy(suite),
        }  # fmt: skip
        for name, figure in drawn.items():
            shared = figure.get_supxlabel() and figure.get_supylabel()
            for axes in figure.axes:
                assert shared or axes.get_xlabel(), name
                assert shared or axes.get_ylabel() or name == "iqm", name  # its rows are the agents
        assert [text.get_text() for text in drawn["iqm"].axes[0].get_yticklabels()] == list(suite.agents)
        for name in ("tokens", "seconds", "profiles"):
            assert [axes.get_title() for axes in drawn[name].axes] == [figures._wrapped(a, 28) for a in suite.agents]
        kl = {text.get_text() for axes in drawn["kl"].axes for text in axes.texts}
        # Those at the optimum in every run carry no name; those far out say how far.
        expected = {"ppo", "trpo"} if suite is small else {exact.agents[1], f"{exact.agents[1]} (1 failed): KL 17.3"}
        assert expected <= kl and ("ppo" in kl) is (suite is small)


def test_twenty_agents_fit(tmp_path):
    """Names do not lie on each other, and a panel stands for each."""
    cells = [cell(f"agent-{i:02}", seed=seed, normalised=0.5 + 0.001 * i) for i in range(20) for seed in range(2)]
    suite = suite_of(tmp_path, cells)
    figure = tradeoffs.reward_against_kl(suite)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().startswith("agent")]
    boxes = sorted((box for box in boxes), key=lambda box: box.y0)
    assert len(boxes) == 20
    panels = figures.efficiency(suite, "tokens").axes
    assert len(panels) == 20 and not any(
        a.get_position().overlaps(b.get_position()) for a in panels for b in panels if a is not b
    )
    heights = [text.xyann[1] for text in figure.axes[0].texts if text.get_text().startswith("agent")]
    assert min(np.diff(sorted(heights))) >= tradeoffs.LINE / 3 and min(heights) >= 0 and max(heights) <= 1


def test_pictures_repeat(tmp_path):
    cells = [cell(seed=seed, normalised=0.1 * seed) for seed in range(3)]
    one, two = (as_svg(figures.iqm_intervals(suite_of(tmp_path, cells))) for _ in range(2))
    assert one == two


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
        (["nowhere"], "holds no finished cells"),
        (["x", "--oout", "y"], "did you mean '--out'?"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]
    assert list(tmp_path.iterdir()) == []
