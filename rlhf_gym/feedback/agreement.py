"""How far annotators agree beyond chance: Krippendorff's alpha for any number of them, Cohen's kappa for two.

Both are 1 when all agree, 0 when values go with units no more than by chance, and below 0 when people disagree more often
than that. Intervals are over *units* (what was judged): they are what is drawn, with all their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from rlhf_gym.intervals import CONFIDENCE, Estimate

Level = Literal["nominal", "ordinal", "interval"]
LEVELS = ("nominal", "ordinal", "interval")
MAX_VALUES = 64


def krippendorff_alpha(
    values: Sequence[Sequence[Any]] | np.ndarray, level: Level = "nominal", *, seed: int = 0, num_resamples: int = 1000
) -> Estimate:
    """Krippendorff's alpha, with the bootstrap's percentiles over units as its 95 % interval.

    alpha = 1 - D_o / D_e: the disagreement within units over that between any two values. A unit with m values counts for
    m of them, each pair in it with the weight 1 / (m - 1); one with a single value has no pair and does not count.

    Args:
        values: What each annotator said of each unit, None or NaN where nothing. Shape (annotators, units): texts or
            numbers for "nominal", numbers for the others.
        level: How values differ. "nominal": the same or not. "ordinal": squared number of values that lie between in rank,
            so only their order matters. "interval": squared difference.
        seed: Seed of the resampling.
        num_resamples: Resamples, >= 1.

    Returns:
        alpha as ``mean``. NaN when no unit has two values or all values are the same: chance alone would then agree, and
        nothing shows that people can tell things apart. Resamples of which that is true are left out of the interval.

    Raises:
        ValueError: If the rows differ in length, the level is another, a value is no finite number where one is needed, or
            there are more than 64 different values.

    Source:
        Krippendorff 2011, "Computing Krippendorff's alpha-reliability". Differs in the interval: Hayes and Krippendorff
        2007 draw pairs against a fixed D_e, which takes the pairs of a unit for independent.

    Example:
        >>> krippendorff_alpha([["a", "a", "b", None], ["a", "a", "b", "b"]]).mean
        1.0
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    known, codes = _coded(values, numbers=level != "nominal")
    scale = np.array(known, dtype=np.float64) if level == "interval" else None
    counts = np.stack([(codes == value).sum(0) for value in range(len(known))], axis=1) if known else np.zeros((0, 0))
    counts = counts[counts.sum(1) > 1].astype(np.float64)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(known))
    coincidences = pairs / (counts.sum(1) - 1)[:, None, None]
    return _over_units(lambda sums: _alpha(sums, level, scale), coincidences, seed, num_resamples)


def cohen_kappa(
    first: Sequence[Any] | np.ndarray, second: Sequence[Any] | np.ndarray, *, seed: int = 0, num_resamples: int = 1000
) -> Estimate:
    """Cohen's kappa of two annotators, unweighted, with the bootstrap's percentiles over units as its 95 % interval.

    kappa = (p_o - p_e) / (1 - p_e). Unlike alpha, chance here is what comes of each one's own habits: if one of them says
    "left" more often than the other, that is not held against them.

    Args:
        first: What one said of each unit, None or NaN where nothing. Shape (units,).
        second: What the other said of the same units.
        seed: Seed of the resampling.
        num_resamples: Resamples, >= 1.

    Returns:
        kappa as ``mean``, over the units that both judged. NaN when there are none, or both always say one same thing.

    Raises:
        ValueError: If the two differ in length, or there are more than 64 different values.

    Source:
        Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    known, codes = _coded([first, second], numbers=False)
    codes = codes[:, (codes >= 0).all(0)]
    one_hot = np.eye(len(known))[codes]  # (2, units, values)
    return _over_units(_kappa, one_hot[0][:, :, None] * one_hot[1][:, None, :], seed, num_resamples)


def reliability_table(
    judgements: Iterable[tuple[str, Hashable, Any]],
) -> tuple[list[list[Any]], list[str], list[Hashable]]:
    """The table that `krippendorff_alpha` takes.

    Args:
        judgements: (annotator, unit, value); of two by one annotator on one unit the later one counts.

    Returns:
        The values, shape (annotators, units), None where nothing was said; the annotators, sorted; the units, in the order
        in which they first appear.
    """
    said = {(annotator, unit): value for annotator, unit, value in judgements}
    annotators = sorted({annotator for annotator, _ in said})
    units = list(dict.fromkeys(unit for _, unit in said))
    return [[said.get((annotator, unit)) for unit in units] for annotator in annotators], annotators, units


def _coded(values: Any, *, numbers: bool) -> tuple[list[Any], np.ndarray]:
    """The different values, sorted, and each one's place among them, -1 where missing. Shape (annotators, units)."""
    rows = [list(row) for row in values]
    if len({len(row) for row in rows}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows[:8])
        raise ValueError(f"values must have one entry per unit from each annotator, None where missing; got {lengths}")
    rows = [[None if _is_missing(value) else value for value in row] for row in rows]
    if numbers:
        for value in (value for row in rows for value in row):
            right = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if value is not None and not (right and math.isfinite(value)):
                raise ValueError(f"values must be finite numbers unless level is 'nominal', got {value!r}")
    different = {value for row in rows for value in row if value is not None}
    # By type first: texts and numbers have no common order, and "nominal" needs none.
    known = sorted(different) if numbers else sorted(different, key=lambda value: (type(value).__name__, value))
    if len(known) > MAX_VALUES:
        raise ValueError(f"values must be at most {MAX_VALUES} different ones, got {len(known)}; round or group them")
    place = {value: index for index, value in enumerate(known)}
    codes = np.array([[-1 if value is None else place[value] for value in row] for row in rows], dtype=np.int64)
    return known, codes.reshape(len(rows), len(rows[0]) if rows else 0)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and math.isnan(value))


def _over_units(
    statistic: Callable[[np.ndarray], float], tables: np.ndarray, seed: int, num_resamples: int
) -> Estimate:
    """A statistic of the sum of the units' tables. ``tables`` has the shape (units, values, values).

    Units with the same table are drawn together: the sum depends only on how many of each kind are drawn, and there are
    few kinds, however many units.
    """
    num_units, size = len(tables), tables.shape[1]
    kinds, counts = np.unique(tables.reshape(num_units, size * size), axis=0, return_counts=True)
    whole = statistic((counts @ kinds).reshape(size, size)) if num_units else math.nan
    if num_units < 2 or math.isnan(whole):
        return Estimate(whole, None, None, None)
    drawn = np.random.default_rng(seed).multinomial(num_units, counts / num_units, size=num_resamples)
    found = np.array([statistic(each.reshape(size, size)) for each in drawn @ kinds])
    found = found[~np.isnan(found)]
    if not len(found):
        return Estimate(whole, None, None, None)
    low, high = np.quantile(found, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Estimate(whole, float(low), float(high), float(found.std()))


def _alpha(coincidences: np.ndarray, level: Level, scale: np.ndarray | None) -> float:
    totals = coincidences.sum(1)
    difference = 1.0 - np.eye(len(totals))
    if level == "ordinal":
        # Sum of n_g from one value to the other, each end by half: the distance of their mid-ranks.
        rank = totals.cumsum() - totals / 2
        difference = (rank[:, None] - rank) ** 2
    elif scale is not None:
        difference = (scale[:, None] - scale) ** 2
    expected = float(totals @ difference @ totals)
    if expected <= 0 or np.count_nonzero(totals > 1e-9) < 2:
        return math.nan
    return 1.0 - float(totals.sum() - 1) * float((coincidences * difference).sum()) / expected


def _kappa(table: np.ndarray) -> float:
    if not table.any():
        return math.nan
    table = table / table.sum()
    by_chance = float(table.sum(1) @ table.sum(0))
    return (float(np.trace(table)) - by_chance) / (1 - by_chance) if by_chance < 1 - 1e-12 else math.nan
