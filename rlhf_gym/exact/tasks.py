"""The tasks with known answers: reference, prompts, reward and horizon of each.

Each function returns the arguments of a text-generation environment; `make_env` and `make_vector_env` are the entry
points of the registered ids, where any of these arguments can be overridden: ``gym.make_vec("rlhf_gym/Brackets-v0",
num_envs=64, max_response_tokens=8, kl_coef=0.3)``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from rlhf_gym.envs.scalar import TextGenerationEnv
from rlhf_gym.envs.vector import TextGenerationVectorEnv

from .automaton import Automaton
from .languages import repetitions, word_scores
from .ngram import ngram_from_table

EOS = "<eos>"


def woaini() -> dict[str, Any]:
    """Write "我爱你。": the seed example of the field, small enough to check by hand.

    A response ends at the full stop. 1 for exactly this text, else 0; the reference writes it with probability
    .5 * .8 * .6 * 1 = .24. After 你 it never continues otherwise, so other words are forbidden there.
    """
    table = {"。": {"我": 0.5}, "我": {"爱": 0.8}, "爱": {"你": 0.6}, "你": {"。": 1.0}}
    # The state is the text so far: 40 of them, as many as there are unfinished texts.
    reward = Automaton(
        "", lambda text, word: text + word, final=lambda text, ended: float(ended and text == "我爱你"), name="woaini"
    )
    model = ngram_from_table(table, eos="。", spread_rest=True, separator="", show_eos=True)
    return {"model": model, "reward": reward, "max_response_tokens": 4}


def brackets() -> dict[str, Any]:
    """Write balanced brackets, at least four, and stop: sparse, with dead ends, and stopping has to be learnt."""

    def step(state: Any, word: str) -> Any:
        if state == "dead" or (word == ")" and state[0] == 0):
            return "dead"
        return state[0] + (1 if word == "(" else -1), min(state[1] + 1, 4)

    reward = Automaton((0, 0), step, final=lambda state, ended: float(ended and state == (0, 4)), name="balanced")
    model = ngram_from_table({"": {"(": 0.45, ")": 0.35, EOS: 0.2}}, eos=EOS)
    return {"model": model, "reward": reward, "max_response_tokens": 12}


LEXICON = {
    "superb": 1.0, "great": 0.8, "good": 0.6, "nice": 0.4, "fair": 0.2, "the": 0.0, "film": 0.0, "plot": 0.0, "was": 0.0,
    "and": 0.0, "a": 0.0, "with": 0.0, "some": 0.0, "flat": -0.2, "weak": -0.4, "poor": -0.6, "bad": -0.8, "awful": -1.0,
}  # fmt: skip


def lexicon(seed: int = 0) -> dict[str, Any]:
    """Collect good words: each word has a score, paid as it is written. Dense, and longer is better."""
    words = [*LEXICON, EOS]
    rng = random.Random(seed)  # its random() gives the same numbers in every Python
    table = {}
    for context in words:
        weights = [-math.log(1 - rng.random()) for _ in words]  # normalised: a uniform draw from all distributions
        table[context] = {word: weight / sum(weights) for word, weight in zip(words, weights, strict=True)}
    reward = word_scores(LEXICON, name="lexicon")
    return {"model": ngram_from_table(table, eos=EOS), "reward": reward, "max_response_tokens": 16}


def recall(num_states: int = 4) -> dict[str, Any]:
    """End with the word you began with: 1 if the last word is the first, else 0. Needs memory over the whole response.

    The reference goes round in a circle, a -> b -> c -> ..., with probability .8 at each step. There is no EOS: every
    response has all its tokens.
    """
    if not 2 <= num_states <= 26:
        raise ValueError(f"num_states must be from 2 to 26, got {num_states}")
    words = "abcdefghijklmnopqrstuvwxyz"[:num_states]
    table = {word: {words[(i + 1) % num_states]: 0.8} for i, word in enumerate(words)}
    reward = Automaton(
        None,
        lambda state, word: (word, word) if state is None else (state[0], word),
        final=lambda state, ended: float(state is not None and state[0] == state[1]),
        name="recall",
    )
    model = ngram_from_table(table, eos=None, spread_rest=True)
    return {"model": model, "reward": reward, "prompts": [words[-1]], "max_response_tokens": 12}


def goodhart() -> dict[str, Any]:
    """Say "great": a proxy reward that can be hacked. The gold reward is a metric, seen and never paid.

    The proxy counts every "great"; gold counts two of them at most and takes one off for every word that repeats the
    one before it. Along the frontier gold rises up to a KL of .25 nats and falls afterwards.
    """
    words = ["great", *"film plot cast story the a was is with and so very".split()]
    table: dict[Any, dict[str, float]] = {word: {"great": 0.12, EOS: 0.1, word: 0.1} for word in (*words, EOS)}
    table["great"] = {"great": 0.3, EOS: 0.1}
    return {
        "model": ngram_from_table(table, eos=EOS, spread_rest=True),
        "reward": word_scores({"great": 1.0}, name="proxy"),
        "metrics": {"gold": {word_scores({"great": 1.0}, cap=2, name="great"): 1.0, repetitions(): -1.0}},
        "max_response_tokens": 6,
    }


def difficulty() -> dict[str, Any]:
    """Four prompts on which the reference succeeds with probability .9, .5, .1 and .01.

    1 if the first word is "right"; what follows it does not matter.
    """
    rates = {"easy": 0.9, "fair": 0.5, "hard": 0.1, "rare": 0.01}
    words = [*rates, "right", EOS]
    table: dict[Any, dict[str, float]] = {prompt: {"right": rate} for prompt, rate in rates.items()}
    # Contexts of two words, so that the prompts share no state and each is learnt by itself.
    table |= {(prompt, word): {EOS: 0.5} for prompt in rates for word in words}
    table[""] = {EOS: 0.5}
    reward = Automaton(
        None,
        lambda is_right, word: word == "right" if is_right is None else is_right,
        final=lambda is_right, ended: float(is_right is True),
        name="right",
    )
    model = ngram_from_table(table, eos=EOS, spread_rest=True)
    return {"model": model, "reward": reward, "prompts": list(rates), "max_response_tokens": 2}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "woaini": woaini,
    "brackets": brackets,
    "lexicon": lexicon,
    "recall": recall,
    "goodhart": goodhart,
    "difficulty": difficulty,
}
_SETTINGS = {"lexicon": ("seed",), "recall": ("num_states",)}


def make_env(task: str, **arguments: Any) -> TextGenerationEnv:
    """One row of a task; ``arguments`` are those of the task's function and of the environment."""
    return TextGenerationEnv(**_arguments(task, arguments))


def make_vector_env(task: str, num_envs: int = 1, **arguments: Any) -> TextGenerationVectorEnv:
    """``num_envs`` rows of a task; ``arguments`` are those of the task's function and of the environment."""
    return TextGenerationVectorEnv(num_envs, **_arguments(task, arguments))


def _arguments(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    settings = {name: arguments.pop(name) for name in _SETTINGS.get(task, ()) if name in arguments}
    return TASKS[task](**settings) | arguments
