"""One user's function as a reward: hands it what it names, checks what it answers, says which row went wrong."""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .background import run_coroutine
from .inputs import BATCH_NAMES, RewardError, RewardInputs, Scores, sum_terms
from .outputs import BadOutput, to_score, to_scores, to_token_scores
from .reward import Reward
from .signature import CallForm, read_call_form

if TYPE_CHECKING:
    from rlhf_gym.lm import LanguageModel


class FunctionReward(Reward):
    """One reward function as one term.

    Args:
        function: What scores. ``dense = True`` on it says that it returns one list of numbers per response, one per
            token.
        name: Its name in the ledger.

    Raises:
        RewardError: If it is not clear how to call it.
    """

    def __init__(self, function: Callable[..., Any], name: str):
        self.function, self.name, self.names = function, name, (name,)
        self.form: CallForm = read_call_form(function, name)
        self.dense = bool(getattr(function, "dense", False))
        self.columns_needed = self.form.columns_needed
        self.needs_language_model = bool(getattr(function, "needs_language_model", False))

    def with_language_model(self, language_model: LanguageModel) -> Reward:
        if not self.needs_language_model:
            return self
        bound = self.function.with_language_model(language_model)  # type: ignore[attr-defined]
        return FunctionReward(bound, self.name)

    def score(self, inputs: RewardInputs) -> Scores:
        if self.dense:
            # fsum: the sum of many small token rewards must not depend on how the environment adds them up
            values = np.array(
                [math.nan if r is None else math.fsum(r) for r in self._token_scores(inputs)], dtype=np.float64
            )
        else:
            values = self._scores(inputs)
        terms = {self.name: values}
        return Scores(sum_terms(terms), terms)

    def token_rewards(self, inputs: RewardInputs) -> list[np.ndarray]:
        if not self.dense:
            return super().token_rewards(inputs)
        rows = self._token_scores(inputs)
        return [np.zeros(len(ids)) if r is None else r for r, ids in zip(rows, inputs.completion_ids, strict=True)]

    def _scores(self, inputs: RewardInputs) -> np.ndarray:
        # None means "does not apply" in TRL's form; from a function of one text it is more often a forgotten return.
        output = self._call(inputs)
        try:
            if self.form.batch:
                return to_scores(output, len(inputs), allow_none=True)
            scores = np.empty(len(inputs))
            for row, value in enumerate(output):
                try:
                    scores[row] = to_score(value)
                except BadOutput as error:
                    raise BadOutput(error.what, row) from None
            return scores
        except BadOutput as error:
            raise self._refusal(error, inputs) from None

    def _token_scores(self, inputs: RewardInputs) -> list[np.ndarray | None]:
        try:
            return to_token_scores(self._call(inputs), [len(ids) for ids in inputs.completion_ids])
        except BadOutput as error:
            raise self._refusal(error, inputs) from None

    def _refusal(self, error: BadOutput, inputs: RewardInputs) -> RewardError:
        where = "" if error.row is None else f"; first in {inputs.describe(error.row)}"
        return RewardError(
            f"reward function {self.name!r} returned {error.what}{where}", function=self.name, row=error.row
        )

    def _call(self, inputs: RewardInputs) -> Any:
        """The function's raw answer: one value for the batch, or a list of one per response."""
        if len(inputs) == 0:
            return []
        self.check_columns(inputs.columns)
        if self.form.batch:
            return self._invoke([self._batch_arguments(inputs)], inputs)[0]
        texts = {"prompt": inputs.prompts, "response": inputs.completions}
        calls = [{p: texts[kind][row] for p, kind in self.form.parameters.items()} for row in range(len(inputs))]
        return self._invoke(calls, inputs)

    def check_columns(self, available: Iterable[str]) -> None:
        available = list(available)
        super().check_columns(available)
        for parameter in self.form.guessed:
            if parameter in available:
                kind = self.form.parameters[parameter]
                raise RewardError(
                    f"reward function {self.name!r}: its parameter {parameter!r} would receive the {kind}, but the "
                    f"prompts have a column of that name; rename it to {kind!r}, or take f(completions, {parameter}) "
                    "to score a batch with the column",
                    function=self.name,
                )

    def _batch_arguments(self, inputs: RewardInputs) -> dict[str, Any]:
        # Copies, and new ones for each function: one that sorts or pops its list must not change what the others score.
        sources: dict[str, list[Any]] = {name: getattr(inputs, name) for name in BATCH_NAMES} | inputs.columns
        if inputs.continuations is None:  # a parameter without a default must receive something
            optional = any(self.form.parameters.get(p) == "continuations" for p in self.form.optional)
            sources = {name: v for name, v in sources.items() if name != "continuations"}
            sources |= {} if optional else {"continuations": list(inputs.completions)}
        wanted = {p: s for p, s in self.form.parameters.items() if s in sources}
        if self.form.takes_everything:  # TRL's names; continuations, which cost a second decoding, when they are named
            wanted |= {name: name for name in sources if name not in (*wanted.values(), "continuations")}
        return {parameter: _copied(source, sources[source]) for parameter, source in wanted.items()}

    def _invoke(self, calls: Sequence[dict[str, Any]], inputs: RewardInputs) -> list[Any]:
        """Make the calls, awaiting those that are async (all at once), and name the one that raises."""
        results: list[Any] = []
        for row, arguments in enumerate(calls):
            positional = [arguments.pop(p) for p in self.form.positional if p in arguments]
            try:
                results.append(self.function(*positional, **arguments))
            except Exception as error:
                raise self._failure(error, row, inputs) from error
        if any(inspect.isawaitable(r) for r in results):
            results = run_coroutine(_gather(results))
        for row, result in enumerate(results):
            if isinstance(result, BaseException):
                raise self._failure(result, row, inputs) from result
        return results

    def _failure(self, error: BaseException, row: int, inputs: RewardInputs) -> RewardError:
        where = "" if self.form.batch else f" for {inputs.describe(row)}"
        message = f"reward function {self.name!r} raised {type(error).__name__}: {error}{_line_of(error)}{where}"
        return RewardError(message, function=self.name, row=None if self.form.batch else row)


def _line_of(error: BaseException) -> str:
    """Where in the user's file it was raised or led to: the last line there; nothing for rewards of this package."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the call here
    if not frames or Path(frames[0].filename).is_relative_to(Path(__file__).parents[1]):
        return ""
    line = [frame.lineno for frame in frames if frame.filename == frames[0].filename][-1]
    return f" ({Path(frames[0].filename).name}, line {line})"


def _copied(source: str, values: list[Any]) -> list[Any]:
    if source in ("prompts", "completions", "continuations"):
        return list(values)
    if source in BATCH_NAMES:  # lists of ints: deepcopy would look at every token
        return [list(ids) for ids in values]
    return copy.deepcopy(values)


async def _gather(results: Sequence[Any]) -> list[Any]:
    """Await what is awaitable, all of it concurrently; an exception takes the place of its result."""

    async def value(result: Any) -> Any:
        return await result if inspect.isawaitable(result) else result

    return await asyncio.gather(*map(value, results), return_exceptions=True)
