"""The formats of rows: TRL's, and two of our own for classes and scalar ratings. Which one a row has, and what is wrong in it.

A format is told by the columns; others may stand beside them. Texts are strings ("standard") or lists of messages
("conversational").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .chat import RESPONSES, extract_prompt, is_conversation, message_problems
from .locate import Path
from .records import Demonstration, Labelled, Preference, PromptOnly, Rating, Record

LANGUAGE_MODELING = "language modeling"
PROMPT_ONLY = "prompt-only"
PROMPT_COMPLETION = "prompt-completion"
PREFERENCE = "preference"
IMPLICIT_PREFERENCE = "preference with implicit prompt"
UNPAIRED_PREFERENCE = "unpaired preference"
CLASSIFICATION = "classification"
RATING = "rating"

COLUMNS = {
    LANGUAGE_MODELING: "text (or messages)",
    PROMPT_ONLY: "prompt",
    PROMPT_COMPLETION: "prompt, completion",
    PREFERENCE: "prompt, chosen, rejected",
    IMPLICIT_PREFERENCE: "chosen, rejected",
    UNPAIRED_PREFERENCE: "prompt, completion, label (true or false)",
    CLASSIFICATION: "prompt, completion, label (an integer or a name); or text, label",
    RATING: "prompt, completion, rating (a number); or text, rating",
}
RECORDS: dict[str, type[Record]] = {
    LANGUAGE_MODELING: Demonstration,
    PROMPT_ONLY: PromptOnly,
    PROMPT_COMPLETION: Demonstration,
    PREFERENCE: Preference,
    IMPLICIT_PREFERENCE: Preference,
    UNPAIRED_PREFERENCE: Labelled,
    CLASSIFICATION: Labelled,
    RATING: Rating,
}
# Columns that may be missing or null: their type, and what they must be.
_OPTIONAL: dict[str, tuple[tuple[type, ...], str]] = {
    "margin": ((int, float), "a number"),
    "tie": ((bool,), "true or false"),
    "position": ((str,), '"left" or "right"'),
    "annotator": ((str, int), "a text or an integer"),
    "criterion": ((str,), "a text"),
}


class Format(NamedTuple):
    """What a row is."""

    name: str
    """A key of `COLUMNS`."""
    conversational: bool

    def __str__(self) -> str:
        return f"{self.name} ({'conversational' if self.conversational else 'standard'})"


class NoFormat(ValueError):
    """The columns of a row are none of the formats."""


def recognise(row: Mapping[str, Any]) -> Format:
    """The format of a row, by its columns alone; its values may still be wrong.

    Raises:
        NoFormat: If it has none; says which columns are missing or too many.
    """
    has = {name for name in ("prompt", "chosen", "rejected", "completion", "messages") if name in row}
    conversational = any(is_conversation(row[name]) for name in has)
    if "completions" in row and "labels" in row:
        raise NoFormat("this is TRL's stepwise supervision (completions, labels), which is not read")
    if {"chosen", "rejected"} & has:
        _need(has, {"chosen", "rejected"}, {"prompt"})
        # As in TRL, a prompt in plain text beside conversations is a copy of what they begin with, and not used.
        copied = "prompt" in has and isinstance(row["prompt"], str) and is_conversation(row["chosen"])
        return Format(PREFERENCE if "prompt" in has and not copied else IMPLICIT_PREFERENCE, conversational)
    if "completion" in has:
        _need(has, {"prompt", "completion"})
        return Format(_judged(row) or PROMPT_COMPLETION, conversational)
    if "messages" in has:
        _need(has, {"messages"})
        return Format(LANGUAGE_MODELING, True)
    if "prompt" in has:
        return Format(PROMPT_ONLY, conversational)
    if "text" in row:
        return Format(_judged(row) or LANGUAGE_MODELING, False)
    found = ", ".join(map(repr, row)) or "none"
    raise NoFormat(f"its columns are no format: {found[:200]}; rename them, for instance to prompt and completion")


def _need(has: set[str], needed: set[str], allowed: frozenset[str] | set[str] = frozenset()) -> None:
    missing, extra = sorted(needed - has), sorted(has - needed - allowed)
    what = " and ".join(sorted(needed & has))
    if missing:
        raise NoFormat(f"{what} needs {' and '.join(missing)} beside it")
    if extra:
        raise NoFormat(f"{what} and {' and '.join(extra)} together are no format; remove or rename one")


def _judged(row: Mapping[str, Any]) -> str | None:
    if "label" in row and "rating" in row:
        raise NoFormat("label and rating together are no format; remove or rename one")
    if "rating" in row:
        return RATING
    if "label" in row:
        # What is neither a class nor a truth value is refused later, with its column.
        return UNPAIRED_PREFERENCE if isinstance(row["label"], bool) and "completion" in row else CLASSIFICATION
    return None


def value_problems(row: Mapping[str, Any], form: Format) -> list[tuple[Path, str]]:
    """What is wrong with the values of a row, and where.

    Args:
        row: A row that `recognise` gave ``form``.
        form: Its format.
    """
    names = [name for name in ("prompt", *RESPONSES, "text", "messages") if name in text_columns(row, form)]
    found: list[tuple[Path, str]] = []
    for name in names:
        value = row[name]
        if is_conversation(value) and name != "text":
            found += message_problems(value, (name,))
        elif not isinstance(value, str) or name == "messages":
            wanted = {"text": "a text", "messages": "a list of messages"}.get(name, "a text or a list of messages")
            found.append(((name,), f"{name!r} must be {wanted}, got {_shown(value)}"))
    if not found and form.conversational:
        found += _conversation_problems(row, names)
    if not found and form.name == IMPLICIT_PREFERENCE:
        found += _implicit_problems(row)
    if form.name == CLASSIFICATION and not isinstance(row["label"], (int, str)):
        wanted = "true or false (good or bad), an integer or a name (a class)"
        found.append((("label",), f"'label' must be {wanted}, got {_shown(row['label'])}; a score is a 'rating'"))
    if form.name == RATING and not _is_number(row["rating"]):
        found.append((("rating",), f"'rating' must be a number, got {_shown(row['rating'])}"))
    return found + _optional_problems(row, form)


def text_columns(row: Mapping[str, Any], form: Format) -> set[str]:
    """The columns of a row that hold texts of its format."""
    if form.name == IMPLICIT_PREFERENCE:
        return {"chosen", "rejected"}
    if form.name == PREFERENCE:
        return {"prompt", "chosen", "rejected"}
    if form.name == PROMPT_ONLY:
        return {"prompt"}
    if form.name == LANGUAGE_MODELING:
        return {"messages" if "messages" in row else "text"}
    return {"prompt", "completion"} if "completion" in row else {"text"}


def _conversation_problems(row: Mapping[str, Any], names: list[str]) -> list[tuple[Path, str]]:
    mixed = [name for name in names if isinstance(row[name], str)]
    if mixed:
        others = " and ".join(name for name in names if name not in mixed)
        return [((mixed[0],), f"{mixed[0]!r} is a text while {others} is a list of messages; write both alike")]
    if "prompt" in names and row["prompt"][-1]["role"] not in ("user", "tool", "assistant"):
        message = (
            f"a prompt must end with a message of user, tool or assistant, not {_shown(row['prompt'][-1]['role'])}"
        )
        return [(("prompt", len(row["prompt"]) - 1, "role"), message)]
    if not isinstance(row.get("tools"), (list, str, type(None))):
        return [(("tools",), f"'tools' must be a list, got {_shown(row['tools'])}")]
    if not isinstance(row.get("chat_template_kwargs"), (Mapping, type(None))):
        return [(("chat_template_kwargs",), "'chat_template_kwargs' must be an object")]
    return []


def _implicit_problems(row: Mapping[str, Any]) -> list[tuple[Path, str]]:
    if not row["chosen"] or not row["rejected"]:
        return [(("chosen" if not row["chosen"] else "rejected",), "must not be empty: it holds the prompt as well")]
    prompt = extract_prompt(row["chosen"], row["rejected"])[0]
    if not is_conversation(row["chosen"]):
        return []
    if not prompt:
        message = "chosen and rejected begin with different messages, so they have no prompt in common"
        hint = "; write the prompt as a list of messages" if "prompt" in row else ""
        return [(("chosen",), message + hint)]
    return _conversation_problems({**row, "prompt": prompt}, ["prompt"])


def _optional_problems(row: Mapping[str, Any], form: Format) -> list[tuple[Path, str]]:
    fields = RECORDS[form.name].__dataclass_fields__
    found: list[tuple[Path, str]] = []
    for name, (types, wanted) in _OPTIONAL.items():
        value = row.get(name)
        if value is None or name not in fields:
            continue
        right = isinstance(value, types) and (isinstance(value, bool) == (types == (bool,)))
        if not right or (name == "margin" and not _is_number(value)) or (name == "position" and value not in _SIDES):
            found.append(((name,), f"{name!r} must be {wanted}, got {_shown(value)}"))
    return found


_SIDES = ("left", "right")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
