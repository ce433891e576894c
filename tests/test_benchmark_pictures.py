"""Pictures of a benchmark: what is drawn where, by hand; and that nothing lies on anything else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from benchmark_runs import cell, curve_of, failed, full_directory, sampled, suite_of
from matplotlib.text import Text

from rlhf_gym.benchmarks import figures, tradeoffs
from rlhf_gym.benchmarks.outcomes import read_suites
from rlhf_gym.plots import as_svg


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


def numbers_below(figure):
    """Texts and boxes of the numbers below each panel. Beyond its ends there are ticks too, which are not drawn."""
    figure.draw_without_rendering()
    return [
        [
            (tick.label1.get_text(), tick.label1.get_window_extent())
            for tick in axes.xaxis.get_major_ticks()
            if tick.label1.get_text() and min(axes.get_xlim()) <= tick.get_loc() <= max(axes.get_xlim())
        ]
        for axes in figure.axes
    ]


def test_numbers_of_neighbouring_panels_stand_apart(tmp_path):
    """Of the widest axis: from a score of -99 to the last ten-thousandth."""
    cells = [cell(f"agent-{i}", seed=seed, normalised=-99.0 * seed) for i in range(4) for seed in range(2)]
    found = numbers_below(figures.profiles(suite_of(tmp_path, cells)))
    assert len(found) == 4 and min(map(len, found)) >= 3
    pairs = [(a, b) for left, right in itertools.pairwise(found) for _, a in left for _, b in right]
    assert not any(a.padded(2).overlaps(b) for a, b in pairs)


def test_a_short_logarithmic_axis_has_numbers(tmp_path):
    """Seconds from 3 to 30 hold one power of ten, which says nothing about the others."""
    curve = curve_of(range(0, 1100, 100), np.linspace(0, 0.8, 11))
    suite = suite_of(tmp_path, [cell(seed=i, normalised=0.8, curve=curve) for i in range(2)], slow={0: 3.0, 1: 3.0})
    (found,) = numbers_below(figures.efficiency(suite, "seconds"))
    assert {"5", "10", "20"} <= {text for text, _ in found}


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


def test_one_that_got_lost_does_not_squash_the_others(tmp_path):
    """The reference has .2: 'dear' is worth less than that at KL 3, and 'lost' went to 900 nats."""
    ends = {"good": (0.9, 0.4), "fair": (0.6, 0.7), "dear": (0.9, 3.0), "lost": (0.1, 900.0)}
    figure = tradeoffs.reward_against_kl(suite_of(tmp_path, [sampled(a, 0, *end) for a, end in ends.items()]))
    (axes,) = figure.axes
    assert axes.get_xlim()[1] == pytest.approx(1.2 * 0.7)
    drawn = [line for line in axes.lines if "agent" in line.get_label()]
    points = sorted((line.get_marker(), x, y) for line in drawn for x, y in zip(*line.get_data(), strict=True))
    edge = axes.get_xlim()[1]
    assert points == [(">", edge, 0.1), (">", edge, 0.9), ("o", 0.4, 0.9), ("o", 0.7, 0.6)]
    assert {text.get_text() for text in axes.texts} == {"good", "fair", "dear: KL 3", "lost: KL 900"}


@pytest.mark.parametrize("name", ["ppo", "a-name-that-is-as-long-as-some-are"])
def test_a_single_panel_is_whole(tmp_path, name):
    """With its legend and the names beside it."""
    figure = tradeoffs.reward_against_kl(suite_of(tmp_path, [cell(name, normalised=0.5)]))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    boxes = [Text.get_window_extent(text) for text in (*legend.get_texts(), *figure.axes[0].texts)]
    assert len(boxes) >= 6
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 for box in boxes)
    assert legend.get_window_extent().y1 < figure.axes[0].xaxis.label.get_window_extent().y0


def test_where_all_runs_failed_the_frontier_is_there(tmp_path):
    figure = tradeoffs.reward_against_kl(suite_of(tmp_path, [failed()]))
    assert "frontier (exact)" in [line.get_label() for line in figure.axes[0].lines]


def test_an_interval_that_goes_on_outside_has_an_arrow(tmp_path):
    """Two runs of 'wide' are lost: drawn again they are often more than a quarter, and the IQM far below."""
    scores = {"narrow": [0.8] * 8, "wide": [0.6] * 4 + [-5.0] * 2 + [0.5] * 2}
    cells = [cell(agent, seed=i, normalised=x) for agent, some in scores.items() for i, x in enumerate(some)]
    axes = figures.iqm_intervals(suite_of(tmp_path, cells)).axes[0]
    arrows = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_marker() == "<"]
    assert arrows == [([figures.LOWEST], [1])]


def test_every_axis_has_a_name(tmp_path):
    """And all curves, rows and points of every agent are there, at two agents as at twenty."""
    exact, small = read_suites(full_directory(tmp_path))
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
