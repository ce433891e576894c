"""Random small tasks with everything about them enumerated: the independent answer for the tests of rlhf_gym.exact."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_gym.envs.scalar import TextGenerationEnv
from rlhf_gym.exact import Automaton, ngram_from_table

EOS = "<eos>"


@dataclass
class World:
    """A task as an environment, and as the list of all its responses.

    Attributes:
        env: The environment.
        prob: P_ref of each response, (num_prompts, num_responses); score: the same shape.
        responses: Their words.
    """

    env: TextGenerationEnv
    responses: list[tuple[str, ...]]
    prob: np.ndarray
    score: np.ndarray

    def optimum(self, beta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """J*, E[r] and KL at the optimum, each (num_prompts,), and pi* of every response: F2, by enumeration."""
        weights = np.where(self.prob > 0, self.prob * np.exp(self.score / beta), 0.0)
        z = weights.sum(1, keepdims=True)
        policy = weights / z
        ratio = np.where(policy > 0, policy / np.where(self.prob > 0, self.prob, 1), 1)
        return beta * np.log(z[:, 0]), (policy * self.score).sum(1), (policy * np.log(ratio)).sum(1), policy


def random_world(seed: int, **arguments: Any) -> World:
    """A random n-gram model of order 1 to 3 (some probabilities are 0) with a random automaton of 3 states."""
    rng = random.Random(seed)
    words = ["a", "b", "c"][: rng.choice([2, 3])]
    everything = [*words, EOS]
    order, horizon, has_eos = rng.choice([1, 2, 3]), rng.choice([2, 3, 4]), rng.random() < 0.8
    if not has_eos:
        everything = words
    table: dict[tuple[str, ...], dict[str, float]] = {}
    contexts = [(), *[(w,) for w in everything], *[(v, w) for v in everything for w in everything]]
    for context in contexts:
        if context and (len(context) >= order or rng.random() < 0.3):
            continue  # such a context falls back on a shorter one
        weights = [rng.random() if rng.random() < 0.85 else 0.0 for _ in everything]
        weights[rng.randrange(len(words))] += 0.1
        table[context] = {w: x / sum(weights) for w, x in zip(everything, weights, strict=True)}

    step = {(state, word): rng.randrange(3) for state in range(3) for word in words}
    final = {(state, ended): rng.choice([0.0, 1.0, -0.5, 0.7]) for state in range(3) for ended in (False, True)}
    dense = rng.random() < 0.5
    paid = {(state, word): rng.choice([0.0, 0.3, -0.2]) for state in range(3) for word in words}
    reward = Automaton(
        0,
        lambda state, word: step[state, word],
        final=lambda state, ended: final[state, ended],
        token_reward=(lambda state, word: paid[state, word]) if dense else None,
    )
    penalty = rng.choice([0.0, 0.4])
    prompts = rng.choice([["a"], ["a", "b"], ["a a", "b"]])
    env = TextGenerationEnv(
        model=ngram_from_table(table, eos=EOS if has_eos else None),
        reward=reward,
        prompts=prompts,
        max_response_tokens=horizon,
        missing_eos_penalty=penalty,
        **arguments,
    )

    def next_probs(history: tuple[str, ...]) -> dict[str, float]:
        return next(table[history[i:]] for i in range(len(history) + 1) if history[i:] in table)

    def score(response: tuple[str, ...]) -> float:
        state, total, ended = 0, 0.0, response[-1] == EOS
        for word in response[: len(response) - ended]:
            total += paid[state, word] if dense else 0.0
            state = step[state, word]
        return total + final[state, ended] - (0.0 if ended else penalty)

    responses: list[tuple[str, ...]] = []
    open_ones: list[tuple[str, ...]] = [()]
    while open_ones:
        longer = [(*r, word) for r in open_ones for word in everything]
        responses += [r for r in longer if r[-1] == EOS or len(r) == horizon]
        open_ones = [r for r in longer if r[-1] != EOS and len(r) < horizon]
    prob = np.zeros((len(prompts), len(responses)))
    for p, prompt in enumerate(prompts):
        for i, response in enumerate(responses):
            history, prob[p, i] = tuple(prompt.split()), 1.0
            for word in response:
                prob[p, i] *= next_probs(history).get(word, 0.0)
                history = (*history, word)
    scores = np.tile([score(r) for r in responses], (len(prompts), 1))
    return World(env, responses, prob, scores)


def response_ids(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of all responses. (num_responses, R)."""
    vocabulary = world.env.tokenizer.get_vocab()
    shape = (len(world.responses), world.env.max_response_tokens)
    ids, mask = np.zeros(shape, dtype=int), np.zeros(shape, dtype=bool)
    for i, response in enumerate(world.responses):
        ids[i, : len(response)] = [vocabulary[word] for word in response]
        mask[i, : len(response)] = True
    return ids, mask
