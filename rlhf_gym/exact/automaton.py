"""Rewards that read a response word by word and remember little: finite automata.

Their optimum can be computed, since two responses in the same state have the same future. For an environment they are
rewards like any other: ``reward=Automaton(...)``, or terms of a weighted dict.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_gym.rewards import Reward, RewardError, RewardInputs, Scores

if TYPE_CHECKING:
    from rlhf_gym.lm import LanguageModel

# More states than this are no small memory: most likely the state holds the whole response.
MAX_STATES = 1_000_000


class Automaton(Reward):
    """A reward that is a function of a small state.

    Words are the texts of the tokens without white space around them. The EOS token is no word: it only ends the
    response. (A response that ends at the length limit has no EOS.)

    Args:
        initial: The state before the first word; states are hashable.
        step: ``step(state, word)`` is the state after the word.
        final: ``final(state, ended_by_eos)`` is paid with the last token. None pays nothing.
        token_reward: ``token_reward(state, word)`` is paid for the word, `state` being the one before it. None pays
            nothing; otherwise the reward is dense.
        name: Its term in the ledger.

    Example: an even number of words, ended by EOS.
        >>> even = Automaton(0, lambda n, word: 1 - n, final=lambda n, ended: float(n == 0 and ended), name="even")
    """

    def __init__(
        self,
        initial: Hashable,
        step: Callable[[Any, str], Hashable],
        *,
        final: Callable[[Any, bool], float] | None = None,
        token_reward: Callable[[Any, str], float] | None = None,
        name: str = "automaton",
    ):
        if final is None and token_reward is None:
            raise ValueError(f"the automaton {name!r} pays nothing: give final, token_reward or both")
        self.initial, self.step, self.final, self.token_reward, self.name = initial, step, final, token_reward, name
        self.names, self.dense, self.needs_language_model = (name,), token_reward is not None, True
        self.table: TransitionTable | None = None

    def with_language_model(self, language_model: LanguageModel) -> Automaton:
        bound = copy.copy(self)
        bound.table, bound.needs_language_model = TransitionTable(self, language_model), False
        return bound

    def score(self, inputs: RewardInputs) -> Scores:
        paid, states, ended = self._read(inputs)
        total = paid.sum(1) + self._bound().finals(states)[np.arange(len(states)), ended.astype(int)]
        return Scores(total, {self.name: total})

    def token_rewards(self, inputs: RewardInputs) -> list[np.ndarray]:
        paid, _, _ = self._read(inputs)
        return [row[: len(ids)] for row, ids in zip(paid, inputs.completion_ids, strict=True)]

    def _read(self, inputs: RewardInputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token rewards (B, L), last states (B,) and whether EOS ended the responses (B,)."""
        table = self._bound()
        lengths = np.array([len(ids) for ids in inputs.completion_ids], dtype=int)
        real = np.arange(lengths.max(initial=0)) < lengths[:, None]
        tokens = np.zeros(real.shape, dtype=int)
        tokens[real] = list(itertools.chain.from_iterable(inputs.completion_ids))
        paid, states = np.zeros(real.shape), np.zeros(len(lengths), dtype=int)
        for t in range(real.shape[1]):
            going = np.flatnonzero(real[:, t])
            paid[going, t], states[going] = table.look_up(states[going], tokens[going, t])
        return paid, states, np.any(table.is_eos[tokens] & real, axis=1)

    def _bound(self) -> TransitionTable:
        if self.table is None:
            raise RewardError(
                f"the automaton {self.name!r} does not know the words yet; make an environment with it, or pass the "
                "model: as_reward(automaton, language_model=lm)",
                function=self.name,
            )
        return self.table


class TransitionTable:
    """An automaton over token ids, as arrays that grow as its states are met.

    Attributes:
        states: The states met so far; a state's number is its place here, 0 the initial one.
        next: The state after a token, -1 where it was not asked for yet. Shape (capacity, V), int32.
        rewards: What is paid for the token there. Shape (capacity, V), float64.
        is_eos: Which tokens end a response; they leave the state as it is. Shape (V,), bool.
    """

    def __init__(self, automaton: Automaton, language_model: LanguageModel):
        self.automaton = automaton
        decode = language_model.tokenizer.decode
        self.words = [decode([i], skip_special_tokens=False).strip() for i in range(language_model.vocab_size)]
        self.is_eos = np.isin(np.arange(len(self.words)), language_model.eos_token_ids)
        self.states: list[Hashable] = []
        self._number: dict[Hashable, int] = {}
        self.next = np.full((0, len(self.words)), -1, dtype=np.int32)
        self.rewards = np.zeros((0, len(self.words)))
        self._finals = np.full((0, 2), np.nan)
        self._state_number(automaton.initial)

    def look_up(self, states: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token rewards and next states of n (state, token) pairs, both (n,)."""
        self._fill(states, tokens)
        return self.rewards[states, tokens], self.next[states, tokens]

    def expand(self, states: np.ndarray) -> None:
        """Fills the rows of these states, all tokens."""
        tokens = np.tile(np.arange(len(self.words)), len(states))
        self._fill(np.repeat(states, len(self.words)), tokens)

    def finals(self, states: np.ndarray) -> np.ndarray:
        """What is paid at the end in these states: (n, 2) float64, without EOS and with it."""
        for state in np.unique(states[np.isnan(self._finals[states, 0])]):
            for ended in (False, True):
                value = 0.0
                if self.automaton.final is not None:
                    value = self._number_from("final", self.automaton.final, self.states[state], ended)
                self._finals[state, int(ended)] = value
        return self._finals[states]

    def _fill(self, states: np.ndarray, tokens: np.ndarray) -> None:
        missing = self.next[states, tokens] < 0
        if not missing.any():
            return
        for state, token in sorted(set(zip(states[missing].tolist(), tokens[missing].tolist(), strict=True))):
            if self.is_eos[token]:
                self.next[state, token] = state
                continue
            before, word = self.states[state], self.words[token]
            if self.automaton.token_reward is not None:
                reward = self._number_from("token_reward", self.automaton.token_reward, before, word)
                self.rewards[state, token] = reward
            try:
                number = self._state_number(self.automaton.step(before, word))
            except RewardError:
                raise
            except Exception as error:
                raise self._failure("step", before, word, f"{type(error).__name__}: {error}") from error
            self.next[state, token] = number

    def _state_number(self, state: Hashable) -> int:
        number = self._number.setdefault(state, len(self.states))
        if number == len(self.states):
            if number == MAX_STATES:
                raise RewardError(
                    f"the automaton {self.automaton.name!r} has come to more than {MAX_STATES:,} states, the last "
                    f"{state!r}; remember less of the response",
                    function=self.automaton.name,
                )
            self.states.append(state)
            if number == len(self.next):
                grow = max(8, number)
                self.next = np.pad(self.next, ((0, grow), (0, 0)), constant_values=-1)
                self.rewards = np.pad(self.rewards, ((0, grow), (0, 0)))
                self._finals = np.pad(self._finals, ((0, grow), (0, 0)), constant_values=np.nan)
        return number

    def _number_from(self, what: str, function: Callable[[Any, Any], float], state: Hashable, argument: Any) -> float:
        try:
            value = float(function(state, argument))
        except Exception as error:
            raise self._failure(what, state, argument, f"{type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise self._failure(what, state, argument, f"it must be finite, got {value}")
        return value

    def _failure(self, what: str, state: Hashable, argument: Any, why: str) -> RewardError:
        name = self.automaton.name
        return RewardError(f"automaton {name!r}: {what}({state!r}, {argument!r}) failed: {why}", function=name)
