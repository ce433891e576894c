"""Adversarial prompts mixed into training: a list in which they have a given share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MAX_COPIES = 16


def mix_prompts(
    prompts: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], share: float
) -> list[dict[str, Any]]:
    """Prompts of which a share are others, by repeating rows: an environment visits every row of a list equally often.

    The others are gone through in turn, so all of them occur, and equally often but for one. Rows of theirs with a true
    ``held_out`` are left out: what was trained on can no longer show what training does elsewhere.

    Args:
        prompts: Rows ``{"prompt": text, ...}``; all occur, equally often.
        others: Further rows.
        share: Of the others in the list, above 0 and below 1.

    Returns:
        First the prompts, then the others. Their share is the one asked for, to half a row.

    Raises:
        ValueError: If the share is out of range or too small for so many others, all others are held out, or one that
            is held out is among the prompts.

    Example:
        >>> [row["prompt"] for row in mix_prompts([{"prompt": "a"}, {"prompt": "b"}], [{"prompt": "x"}], 0.5)]
        ['a', 'b', 'x', 'x']
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"the share of mixed prompts must be above 0 and below 1, got {share!r}")
    kept = [row for row in others if not row.get("held_out")]
    if not kept:
        raise ValueError(f"there is nothing to mix in: all of the {len(others)} rows are held out")
    trained_on = {row["prompt"] for row in [*prompts, *kept]}
    for row in others:
        if row.get("held_out") and row["prompt"] in trained_on:
            raise ValueError(
                f"{row['prompt'][:60]!r} is held out, and also among the prompts to train on; remove one of them"
            )
    odds = share / (1 - share)
    for copies in range(1, MAX_COPIES + 1):
        count = round(copies * len(prompts) * odds)
        if count >= len(kept):
            repeated = [kept[i % len(kept)] for i in range(count)]
            return [dict(row) for row in [*(list(prompts) * copies), *repeated]]
    least = len(kept) / (len(kept) + MAX_COPIES * len(prompts))
    raise ValueError(
        f"the share of mixed prompts must be at least {least:.2g} for each of the {len(kept)} to occur beside "
        f"{len(prompts)} prompts, got {share:g}; raise it or mix in fewer"
    )
