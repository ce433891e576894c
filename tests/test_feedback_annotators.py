"""Simulated annotators do what they say, and the fit finds what was planted in them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit, logit
from scipy.stats import norm

from rlhf_gym.feedback import Choice, FeedbackStore, Item, SimulatedAnnotator, choices, fit_annotators
from rlhf_gym.feedback.annotators import _Likelihood

PEOPLE = (
    SimulatedAnnotator("expert", temperature=0.4),
    SimulatedAnnotator("sloppy", temperature=1.5),
    SimulatedAnnotator("left", temperature=0.7, left_bias=1.0),
    SimulatedAnnotator("longer", temperature=0.7, length_bias=0.8),
    SimulatedAnnotator("clicker", random_rate=1.0),
)
PLANTED = np.array([[2.5, 1 / 1.5, 1 / 0.7, 1 / 0.7, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.8, 0]])


def simulate(seed, num_pairs=250, people=PEOPLE):
    """Everybody judges every pair, each in an order of their own; gaps are standard normal."""
    rng = np.random.default_rng(seed)
    gaps, lengths = rng.standard_normal(num_pairs), rng.standard_normal(num_pairs)
    found = []
    for person in people:
        side = rng.choice([-1, 1], num_pairs)
        won = rng.random(num_pairs) < person.probability_left(side * gaps, side * lengths)
        found += [
            Choice(person.name, n, bool(side[n] > 0), bool(won[n]), side[n] * lengths[n]) for n in range(num_pairs)
        ]
    return found, dict(enumerate(gaps))


def z_scores(fits):
    rows = [[getattr(fits[p.name], name) for p in PEOPLE] for name in ("skill", "left_bias", "length_bias")]
    mean, error = (np.array([[getattr(e, field) for e in row] for row in rows]) for field in ("mean", "standard_error"))
    return (mean - PLANTED) / error


@pytest.mark.parametrize("known", [False, True])
def test_the_fit_finds_what_was_planted_within_its_standard_errors(known):
    scores = []
    for seed in range(6):
        data, gaps = simulate(seed)
        fits = fit_annotators(data, gaps if known else None)
        scores.append(z_scores(fits))
    assert np.abs(scores).max() < 3.6  # of 90 scores
    assert 0.8 < np.sqrt(np.mean(np.square(scores))) < 1.2
    # Faults are told from their absence.
    assert fits["left"].left_bias.low > 0.3 and fits["longer"].length_bias.low > 0.3
    assert fits["clicker"].skill.low < 0 and fits["clicker"].skill.high < 0.5
    assert fits["expert"].skill.mean > fits["sloppy"].skill.mean > fits["clicker"].skill.mean
    assert fits["left"].num_comparisons == 250 and list(fits) == sorted(p.name for p in PEOPLE)


def test_two_proportions_by_hand():
    """All gaps are 1, so the model has as many parameters as there are proportions."""
    table = [(True, True, 70), (True, False, 30), (False, True, 40), (False, False, 60)]
    data = [Choice("a", "p", first, won) for first, won, count in table for _ in range(count)]
    fit = fit_annotators(data, {"p": 1.0})["a"]
    error = math.sqrt(1 / (100 * 0.7 * 0.3) + 1 / (100 * 0.4 * 0.6)) / 2
    assert fit.skill.mean == pytest.approx((logit(0.7) - logit(0.4)) / 2, abs=2e-3)
    assert fit.left_bias.mean == pytest.approx((logit(0.7) + logit(0.4)) / 2, abs=2e-3)
    assert fit.skill.standard_error == pytest.approx(error, rel=2e-3)
    assert fit.left_bias.high - fit.left_bias.mean == pytest.approx(1.959964 * error, rel=2e-3)
    # In another unit of quality only the skill changes.
    other = fit_annotators(data, {"p": 1000.0})["a"]
    assert other.skill.mean * 1000 == pytest.approx(fit.skill.mean, abs=1e-4)
    assert other.left_bias.mean == pytest.approx(fit.left_bias.mean, abs=1e-4)


def test_the_integral_is_right():
    data = [
        Choice("a", "p", True, True, 0.5),
        Choice("b", "p", False, False, -0.5),
        Choice("a", "q", False, True, 0.5),
    ]
    likelihood = _Likelihood(data, ["a", "b"], None)
    at = np.array([6.0, 0.3, 0.7, -0.2, 0.4, 0.1])

    def p(gap):
        return expit(6 * gap + 0.7 + 0.4) * expit(-(0.3 * -gap - 0.2 - 0.1)) * norm.pdf(gap)

    def q(gap):
        return expit(6 * -gap + 0.7 + 0.4) * norm.pdf(gap)

    exact = (
        -sum(math.log(quad(f, -9, 9, points=[0])[0]) for f in (p, q))
        + (at[:2] ** 2).sum() / 200
        + (at[2:] ** 2).sum() / 18
    )
    value, gradient = likelihood(at)
    assert value == pytest.approx(exact, abs=1e-6)
    for i, move in enumerate(np.eye(6) * 1e-5):
        slope = (likelihood(at + move)[0] - likelihood(at - move)[0]) / 2e-5
        assert gradient[i] == pytest.approx(slope, abs=1e-6)


def test_who_always_clicks_left_stays_finite():
    data, _gaps = simulate(0, 60, PEOPLE[:2])
    data += [Choice("stuck", n, n % 2 == 0, True) for n in range(60)]
    stuck = fit_annotators(data)["stuck"]
    assert 3 < stuck.left_bias.mean < 20 and stuck.left_bias.low > 0


def test_one_who_prefers_the_worse_has_a_skill_below_zero():
    data, _gaps = simulate(0, 200, PEOPLE[:3])
    data += [Choice("contrary", c.pair, c.first_left, not c.left_won) for c in simulate(0, 200, PEOPLE[:1])[0]]
    fits = fit_annotators(data)
    assert fits["contrary"].skill.high < 0 < fits["expert"].skill.low


def test_simulated_probabilities_by_hand():
    someone = SimulatedAnnotator("s", temperature=2.0, left_bias=0.5, length_bias=-1.0, random_rate=0.2)
    assert someone.probability_left(3.0, 0.4) == pytest.approx(0.1 + 0.8 / (1 + math.exp(-(1.5 + 0.5 - 0.4))))
    assert SimulatedAnnotator("s", math.inf).probability_left(100.0) == 0.5
    for wrong in ({"temperature": 0}, {"temperature": math.nan}, {"random_rate": 1.5}, {"left_bias": math.inf}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            SimulatedAnnotator("s", **wrong)


def test_from_the_store(tmp_path):
    """Simulated people fill a store, and the fit reads it."""
    rng = np.random.default_rng(0)
    people = (SimulatedAnnotator("good", 0.3), SimulatedAnnotator("lefty", 0.3, left_bias=2.0))
    with FeedbackStore(tmp_path / "f") as store:
        gaps = {}
        for n in range(60):
            item = store.add_item(Item(f"prompt {n}", ("a" * (n % 7), "b" * 150)))
            rewards = rng.standard_normal(2)
            gaps[item.id, 0, 1] = rewards[0] - rewards[1]
            for person in people:
                store.record(person.compare(item, rewards, f"{person.name}-{n}", rng))
        data = choices(store)
        shown = [event.judgement.shown for event in store.events()]
    assert len(data) == 120 and {*shown} == {(0, 1), (1, 0)}
    assert data[0].length_gap == (-1.5 if data[0].first_left else 1.5)
    fits = fit_annotators(data, gaps)
    for person in people:
        fit = fits[person.name]
        assert abs(fit.skill.mean - 1 / 0.3) < 3 * fit.skill.standard_error
        assert abs(fit.left_bias.mean - person.left_bias) < 3 * fit.left_bias.standard_error
    with pytest.raises(ValueError, match="at least two responses and one reward for each, got 1 and 2"):
        people[0].compare(Item("p", ("a",)), [0, 1], "k", rng)


def test_errors():
    with pytest.raises(ValueError, match="at least one choice"):
        fit_annotators([])
    with pytest.raises(ValueError, match="quality_gap must have a finite number for each pair compared, not for 'q'"):
        fit_annotators([Choice("a", "p", True, True), Choice("a", "q", True, True)], {"p": 1.0})
