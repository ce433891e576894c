"""A review queue: the samples that people should look at first, as a file that the labelling page reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

HIGH, UNCERTAIN = "high score", "uncertain"


def review_queue(
    samples: Sequence[Mapping[str, Any]],
    baseline: Sequence[Mapping[str, Any]] | None = None,
    *,
    size: int = 50,
    uncertainty: str | None = None,
) -> list[dict[str, Any]]:
    """Choose samples for people: half with the highest score, where a reward that is fooled shows, half the most
    uncertain.

    A sample comes with a response to the same prompt to compare it with: the baseline's, else another sample's, else
    none (it is then rated by itself). Uncertain are those where an ensemble disagrees; without one, those whose score
    is closest to the score of what they are compared with, for the reward can say least about which is better.

    Args:
        samples: With ``prompt``, ``response`` and ``score``, as in ``Evaluation.samples``.
        baseline: Samples of the reference, one for each of ``samples``, in their order.
        size: Rows at most, >= 1.
        uncertainty: A number of the samples that says how uncertain the score is, for instance "disagreement".

    Returns:
        Rows ``{"prompt", "responses", "why", "score", "priority"}``, with ``gap`` (of the scores of the two) and
        ``disagreement`` where known; the largest ``priority`` first. No two with the same texts.

    Raises:
        ValueError: If ``size`` is out of range, the baseline answers other prompts, or a sample lacks the uncertainty.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an integer >= 1, got {size!r}")
    if baseline is not None and [s["prompt"] for s in baseline] != [s["prompt"] for s in samples]:
        raise ValueError("baseline must answer the same prompts in the same order")
    if uncertainty is not None:
        for i, sample in enumerate(samples):
            if not isinstance(sample.get(uncertainty), (int, float)):
                raise ValueError(f"uncertainty: sample {i} has no number {uncertainty!r}; it has {', '.join(sample)}")
    rows = [_row(*pair, uncertainty) for pair in zip(samples, _partners(samples, baseline), strict=True)]
    by_score = _distinct(sorted(rows, key=lambda row: -row["score"]))
    if uncertainty is not None:
        by_doubt = sorted(by_score, key=lambda row: -row["disagreement"])
    else:
        by_doubt = sorted((row for row in by_score if "gap" in row), key=lambda row: abs(row["gap"]))
    chosen: dict[tuple[str, ...], dict[str, Any]] = {}
    for i in range(len(by_score)):  # in turn, so that the first of each come first, whatever the size
        for ranked, why in ((by_score, HIGH), (by_doubt, UNCERTAIN)):
            if i < len(ranked):
                chosen.setdefault(_texts(ranked[i]), {**ranked[i], "why": why})
    kept = list(chosen.values())[:size]
    return [{**row, "priority": len(kept) - i} for i, row in enumerate(kept)]


def _partners(
    samples: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]] | None
) -> list[Mapping[str, Any] | None]:
    """What each sample is compared with: another text to the same prompt, None where there is none."""
    of_prompt: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        of_prompt[sample["prompt"]].append(sample)
    found = []
    for i, sample in enumerate(samples):
        others = [*([] if baseline is None else [baseline[i]]), *of_prompt[sample["prompt"]]]
        found.append(next((other for other in others if other["response"] != sample["response"]), None))
    return found


def _row(sample: Mapping[str, Any], partner: Mapping[str, Any] | None, uncertainty: str | None) -> dict[str, Any]:
    responses = [sample["response"], *([] if partner is None else [partner["response"]])]
    row = {"prompt": sample["prompt"], "responses": responses, "score": sample["score"]}
    row |= {} if partner is None else {"gap": sample["score"] - partner["score"]}
    return row | ({} if uncertainty is None else {"disagreement": sample[uncertainty]})


def _distinct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of those with the same texts."""
    first: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        first.setdefault(_texts(row), row)
    return list(first.values())


def _texts(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["prompt"], *sorted(row["responses"]))
