"""From the fields of a form to judgements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_gym.feedback.judgements import Comparison, Correction, Flag, Item, Judgement, Score, Skip, Verdict

from .text import editable

SIDES = "AB"
VERDICTS = {
    "A3": "A is much better",
    "A2": "A is better",
    "A1": "A is slightly better",
    "tie": "Equally good",
    "B1": "B is slightly better",
    "B2": "B is better",
    "B3": "B is much better",
    "both bad": "Both are bad",
    "save": "Saved",
    "skip": "Skipped",
}
MAX_REASON = 1000


class Incomplete(ValueError):
    """Something is missing or wrong in a form.

    Attributes:
        problems: What, by the field to go to.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(problems.values()))
        self.problems = dict(problems)


def side_name(side: int, shown: Sequence[int]) -> str:
    """What the page calls a response: nothing in it says where the response comes from."""
    return f"Response {SIDES[side]}" if len(shown) == 2 else "Response"


def read_answer(
    form: Mapping[str, str],
    item: Item,
    shown: tuple[int, ...],
    criteria: Sequence[str],
    *,
    key: str,
    annotator: str,
    seconds: float,
) -> list[Judgement]:
    """All that a form says.

    The fields: ``verdict`` (a key of `VERDICTS`), and for each side 0 (and 1) ``rating-SIDE-CRITERION`` (1 to 5, by the
    criterion's place), ``unsafe-SIDE`` and ``reason-SIDE``, ``text-SIDE`` (the text as it should be).

    Args:
        form: The fields.
        item: What was judged.
        shown: The responses from left to right.
        criteria: What must be rated.
        key: Begins the keys of the judgements.
        annotator: Who judged.
        seconds: Time taken.

    Raises:
        Incomplete: If there is no verdict, a rating is missing, or a correction is empty.
    """
    verdict = form.get("verdict", "")
    allowed = [name for name in VERDICTS if name != "save"] if len(shown) == 2 else ["save", "skip"]
    problems = {} if verdict in allowed else {"verdict": "Choose one of the answers."}
    found: dict[str, Verdict] = {}
    for side, response in enumerate(shown):
        reason = form.get(f"reason-{side}", "").strip()
        if len(reason) > MAX_REASON:
            problems[f"reason-{side}"] = f"A reason can have at most {MAX_REASON} characters."
        if f"unsafe-{side}" in form or reason:
            found[f"flag-{side}"] = Flag(response, reason)
        before = editable(item.responses[response])
        text = editable(form.get(f"text-{side}", before))
        if text != before and not text.strip():
            problems[f"text-{side}"] = f"{side_name(side, shown)}: the corrected text is empty."
        elif text != before:
            found[f"correction-{side}"] = Correction(response, text)
        for number, criterion in enumerate(criteria):
            field = f"rating-{side}-{number}"
            rating = form.get(field, "")
            if rating in ("1", "2", "3", "4", "5"):
                found[field] = Score(response, criterion, int(rating))
            elif verdict != "skip" or rating:
                problems[field] = f"{side_name(side, shown)}: rate “{criterion}” from 1 to 5."
    if problems:
        raise Incomplete(problems)
    if verdict == "skip":
        found["skip"] = Skip()
    elif verdict != "save":
        found["comparison"] = as_comparison(verdict, shown)
    return [Judgement(f"{key}/{ending}", annotator, item.id, said, shown, seconds) for ending, said in found.items()]


def as_comparison(verdict: str, shown: Sequence[int]) -> Comparison:
    """The comparison that a button stands for."""
    if verdict in ("tie", "both bad"):
        return Comparison(verdict)  # type: ignore[arg-type]
    return Comparison(shown[SIDES.index(verdict[0])], int(verdict[1]))


def describe(judgements: Sequence[Judgement]) -> str:
    """What was sent at once, in a few words: the verdict, then what came with it."""
    words: list[str] = []
    for judgement in judgements:
        said = judgement.verdict
        if isinstance(said, Skip):
            words.insert(0, VERDICTS["skip"])
        elif isinstance(said, Comparison):
            words += [text for name, text in VERDICTS.items() if _is(name, said, judgement.shown)]
    extras = {Score: "ratings", Correction: "a corrected text", Flag: "an unsafe response"}
    kinds = dict.fromkeys(extras[type(j.verdict)] for j in judgements if type(j.verdict) in extras)
    return ", with ".join(filter(None, [" ".join(words) or VERDICTS["save"], " and ".join(kinds)]))


def _is(name: str, said: Comparison, shown: Sequence[int]) -> bool:
    return name not in ("save", "skip") and len(shown) == 2 and as_comparison(name, shown) == said
