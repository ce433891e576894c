"""How a reward function wants to be called, read from the names of its parameters.

The rule, in order:

1. **Batch** (TRL's form), when it has ``**kwargs`` or a parameter named ``prompts``, ``completions``, ``prompt_ids``
   or ``completion_ids`` (or ``continuations``: the responses with the space that goes before them, which is not TRL's).
   It is called once with keyword arguments: those as lists, and every other parameter from the column of that name. A
   parameter with a default is left out when there is no such column. ``**kwargs`` receives everything but
   continuations.
2. **Per sample** otherwise, one call per response. What counts are the parameters without default, and ``prompt``,
   ``text``, ``response``, ``completion`` even with one. One parameter receives the response. Of two, the one named
   ``prompt`` receives the prompt and the other the response; if neither is, and neither is named ``text``,
   ``response`` or ``completion``, they are (prompt, response).
3. Anything else is ambiguous and refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .inputs import BATCH_NAMES, RewardError

ALIASES = {"completions_ids": "completion_ids"}  # TRL's documentation spells it both ways
RESPONSE_NAMES = ("text", "response", "completion")
# Names for lists of responses that are not TRL's. Taken for one text they would score its characters without an error.
PLURALS = ("texts", "responses", "outputs", "samples", "generations", "answers", "sequences", "batch")

_ADVICE = (
    "name its parameters f(prompts, completions, <columns>) to score a batch and return a list, "
    "or f(text) or f(prompt, response) to score one response and return a number"
)


@dataclass(frozen=True)
class CallForm:
    """How to call a reward function.

    Attributes:
        batch: Called once per batch, else once per response.
        parameters: Parameter name -> what it receives, in the order of the signature: one of ``BATCH_NAMES`` or a
            column (batch); "prompt" or "response" (per sample).
        optional: Parameters with a default: left out when there is no such column.
        positional: Parameters that cannot be passed by name.
        takes_everything: It has ``**kwargs``.
    """

    batch: bool
    parameters: dict[str, str]
    optional: frozenset[str] = frozenset()
    positional: tuple[str, ...] = ()
    takes_everything: bool = False

    @property
    def columns_needed(self) -> tuple[str, ...]:
        """Columns that it cannot do without."""
        if not self.batch:
            return ()
        return tuple(s for name, s in self.parameters.items() if s not in BATCH_NAMES and name not in self.optional)

    @property
    def guessed(self) -> tuple[str, ...]:
        """Per-sample parameters whose name says nothing: a column of that name would make the guess doubtful."""
        return () if self.batch else tuple(p for p in self.parameters if p not in (*RESPONSE_NAMES, "prompt"))


def read_call_form(function: Callable[..., Any], name: str) -> CallForm:
    """Read how ``function`` wants to be called.

    Raises:
        RewardError: If its signature cannot be read or is ambiguous.
    """

    def refuse(why: str) -> RewardError:
        return RewardError(f"reward function {name!r} {why}; {_ADVICE}", function=name)

    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise refuse("has no signature that Python can read, wrap it in one that has (lambda text: ...)") from None
    kinds = inspect.Parameter
    named = {
        p.name: p for p in signature.parameters.values() if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
    }
    everything = any(p.kind == kinds.VAR_KEYWORD for p in signature.parameters.values())
    optional = frozenset(p.name for p in named.values() if p.default is not kinds.empty)
    positional = tuple(p.name for p in named.values() if p.kind == kinds.POSITIONAL_ONLY)
    of_batch = [p for p in named if ALIASES.get(p, p) in BATCH_NAMES]

    if of_batch or everything:
        if "prompt" in named:
            raise refuse(f"mixes `prompt` (one text) with {of_batch[0] if of_batch else '**kwargs'} (a batch)")
        if not of_batch and any(p in RESPONSE_NAMES and p not in optional for p in named):
            raise refuse(
                f"has **kwargs, as batch functions do, but its parameters {', '.join(named)} sound like one text"
            )
        return CallForm(True, {p: ALIASES.get(p, p) for p in named}, optional, positional, everything)

    wanted = [p for p in named if p not in optional or p in (*RESPONSE_NAMES, "prompt")]
    shown = f"({', '.join(wanted)})"
    if any(p in PLURALS for p in wanted):
        raise refuse(f"has parameters {shown} that sound like a batch, under a name that is not known")
    if len(wanted) == 1 and wanted != ["prompt"]:
        return CallForm(False, {wanted[0]: "response"}, optional, positional)
    if len(wanted) == 2 and "prompt" in wanted:
        return CallForm(False, {p: "prompt" if p == "prompt" else "response" for p in wanted}, optional, positional)
    if len(wanted) == 2 and not any(p in RESPONSE_NAMES for p in wanted):
        return CallForm(False, dict(zip(wanted, ("prompt", "response"), strict=True)), optional, positional)
    raise refuse(f"has parameters {shown}, from which it is not clear what it scores")
