"""From token ids to the score of a response: decode the texts, call the reward, add the missing-EOS penalty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_gym.envs.prompts import Prompt
from rlhf_gym.rewards import Reward, RewardInputs
from rlhf_gym.rewards.inputs import Scores, check_column_names

MISSING_EOS = "missing_eos_penalty"


@dataclass(frozen=True)
class ScoredResponses:
    """What the reward said of B responses.

    Attributes:
        totals: Score of each response. Shape (B,), float64. The terms sum to it.
        terms: One entry of the ledger per reward term. Each of shape (B,), float64, NaN where a term did not apply.
        completions: The response texts.
        metrics: What the metrics said; no part of the score. Each of shape (B,), float64, NaN where a metric did not apply.
    """

    totals: np.ndarray
    terms: dict[str, np.ndarray]
    completions: list[str]
    metrics: dict[str, np.ndarray] = field(default_factory=dict)


class Scorer:
    """Scores responses under one reward.

    Args:
        reward: The reward, see ``rlhf_gym.rewards.as_reward``.
        tokenizer: Decodes responses, special tokens left out.
        missing_eos_penalty: Subtracted once from the score of a response that ended by length, >= 0.
        metrics: Other rewards by name, reported and never paid.
    """

    def __init__(
        self,
        reward: Reward,
        tokenizer,
        missing_eos_penalty: float = 0.0,
        metrics: Mapping[str, Reward] | None = None,
    ):
        if not (np.isfinite(missing_eos_penalty) and missing_eos_penalty >= 0):
            raise ValueError(
                f"missing_eos_penalty must be a finite number >= 0 (it is subtracted), got {missing_eos_penalty}"
            )
        self.reward, self.tokenizer, self.missing_eos_penalty = reward, tokenizer, float(missing_eos_penalty)
        self.metrics = dict(metrics or {})
        self.term_names = (*reward.names, *((MISSING_EOS,) if missing_eos_penalty else ()))

    def check_columns(self, prompts: Sequence[Prompt], where: str) -> None:
        """Refuse prompts that lack a column which the reward or a metric asks for by name, or have one of a name that is
        taken."""
        names = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
        check_column_names(names)
        needed = [column for reward in (self.reward, *self.metrics.values()) for column in reward.columns_needed]
        for i, prompt in enumerate(prompts):
            for column in dict.fromkeys(needed):
                if column not in prompt.columns:
                    has = ", ".join(sorted(prompt.columns)) or "none"
                    raise ValueError(
                        f"the reward asks for the column {column!r}, which {where}[{i}] lacks (its columns: {has}); "
                        "add the column to every prompt or give the reward's parameter a default"
                    )
        for reward in (self.reward, *self.metrics.values()):
            reward.check_columns(names)

    def inputs(
        self, prompts: Sequence[Prompt], responses: Sequence[list[int]], texts: Sequence[str] | None = None
    ) -> RewardInputs:
        """What a reward is given: B prompts with their columns and B responses as ids and text (None: decoded now)."""
        names: dict[str, None] = {}  # a dict as an ordered set: columns keep the order of the data
        for prompt in prompts:
            names.update(dict.fromkeys(prompt.columns))
        columns: dict[str, list[Any]] = {name: [p.columns.get(name) for p in prompts] for name in names}
        return RewardInputs(
            prompts=[p.text for p in prompts],
            completions=[self.decode(r) for r in responses] if texts is None else texts,
            prompt_ids=[p.ids.tolist() for p in prompts],
            completion_ids=[list(r) for r in responses],
            columns=columns,
            continuations=_Texts(lambda row: self.continuation(prompts[row], responses[row]), range(len(prompts))),
        )

    def continuation(self, prompt: Prompt, response: Sequence[int]) -> str:
        """Text of a response as it goes on from its prompt, with the space between the two.

        The ids are the truth: what the response adds to the prompt when both are decoded together. Where the prompt's
        text is none of the whole's beginning (a character that is completed by the response), the response alone.
        """
        before, whole = (self.decode(ids) for ids in (prompt.ids.tolist(), [*prompt.ids.tolist(), *response]))
        if not whole.startswith(before):
            return self.decode(response)
        text = whole[len(before) :]
        # A space at the end of the prompt as it was written, which the tokenizer drops, is there already.
        twice = prompt.text[-1:].isspace() and not before[-1:].isspace()
        return text.removeprefix(" ") if twice else text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[list[int]], ended_by_eos: np.ndarray
    ) -> ScoredResponses:
        """Score finished responses; B prompts, B lists of token ids, and whether each ended by EOS (B,) bool."""
        inputs = self.inputs(prompts, responses)
        memory = self.memory()
        try:
            scores = self.reward.score(inputs)
            metrics = {name: _applied(reward.score(inputs)) for name, reward in self.metrics.items()}
        except BaseException:
            self.restore_memory(memory)
            raise
        totals, terms = np.asarray(scores.total, dtype=np.float64).copy(), dict(scores.terms)
        if self.missing_eos_penalty:
            terms[MISSING_EOS] = np.where(ended_by_eos, 0.0, -self.missing_eos_penalty)
            totals += terms[MISSING_EOS]
        return ScoredResponses(totals, terms, list(inputs.completions), metrics)

    def memory(self) -> list[dict[str, float]]:
        """A copy of what scoring changes in the rewards (running moments), for `restore_memory`."""
        return [dict(part) for part in self._memory()]

    def restore_memory(self, memory: Sequence[Mapping[str, float]]) -> None:
        """Put back what `memory` returned."""
        for part, kept in zip(self._memory(), memory, strict=True):
            part.update(kept)

    def _memory(self) -> list[dict[str, float]]:
        return [part for reward in (self.reward, *self.metrics.values()) for part in reward.memory]

    def token_rewards(self, prompts: Sequence[Prompt], responses: Sequence[list[int]]) -> list[np.ndarray]:
        """What the dense terms pay for each token of each (perhaps unfinished) response."""
        return self.reward.token_rewards(self.inputs(prompts, responses, _Texts(self.decode, responses)))


class _Texts(Sequence[str]):
    """The texts of B responses, each decoded when it is read.

    Dense rewards are asked at every step, those that go by tokens alone need no text, and few need continuations.
    """

    def __init__(self, decode: Callable[[Any], str], responses: Sequence[Any]):
        self._decode, self._responses = decode, responses

    def __len__(self) -> int:
        return len(self._responses)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self._decode(ids) for ids in self._responses[row]]
        return self._decode(self._responses[row])


def _applied(scores: Scores) -> np.ndarray:
    """The totals, NaN where no term applied: a mean over metrics must not count these responses as 0."""
    return np.where(np.isnan(list(scores.terms.values())).all(0), np.nan, scores.total)
