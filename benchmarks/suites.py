"""Suites: named lists of tasks, and how a policy is measured on them.

``exact``: the tasks with known answers, two KL coefficients each; a policy is measured against the optimum.
``tiny``: small language models; a policy is measured by samples on held-out prompts. TinyReviews pays the true (gold)
sentiment, TinyReviewsProxy one that counts words, with the gold reported; Keyword wants a phrase that is rare; Stories
is there when the directory of its model is given.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import rlhf_gym
from rlhf_gym.evaluation import evaluate
from rlhf_gym.rewards import keyword

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "stories"
REFERENCE = "reference"


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        kl_coefs: The coefficients to train with.
        budget_tokens: Response tokens to learn from.
        arguments: Of the environment, beyond those of its id.
        env_id: The environment; None is ``rlhf_gym/NAME-v0``.
        held_out: Prompts to measure on; None: those trained on.
        gold: The true reward where the task pays another, or reports its own under that name too.
    """

    kl_coefs: tuple[float, ...]
    budget_tokens: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    env_id: str | None = None
    held_out: str | None = None
    gold: str | None = None


@dataclass(frozen=True)
class Suite:
    """Tasks, the policies that can be trained on them (the first is the default), and the rows of the environment."""

    tasks: Mapping[str, Task]
    policies: tuple[str, ...]
    num_envs: int
    is_exact: bool


# Two KL coefficients each: a sharp and a soft optimum (scores of Lexicon are ten times as large). The budgets are about
# 50,000 responses of the optimal policy, with which PPO comes to .99 and more.
EXACT = {
    "WoAiNi": Task((0.1, 0.3), 200_000),
    "Brackets": Task((0.1, 0.3), 300_000),
    "Lexicon": Task((2.0, 1.0), 700_000),
    "Recall": Task((0.1, 0.3), 600_000),
    "Goodhart": Task((0.1, 0.3), 300_000),
    "Difficulty": Task((0.1, 0.3), 100_000),
}
_REVIEWS: dict[str, Any] = {"env_id": "rlhf_gym/TinyReviews-v0", "held_out": "tiny-reviews/test"}
TINY = {
    "TinyReviews": Task((0.03,), 50_000, gold="tiny-reviews", **_REVIEWS),
    "TinyReviewsProxy": Task((0.03,), 50_000, {"reward": "sentiment"}, gold="tiny-reviews", **_REVIEWS),
    # Some five of a hundred reviews of the reference have it.
    "Keyword": Task((0.03,), 50_000, {"reward": keyword("five stars")}, **_REVIEWS),
}
STORIES = Task(
    (0.05,),
    80_000,
    {
        "prompts": str(EXAMPLES / "openings.jsonl"), "reward": f"{EXAMPLES / 'happy.py'}:happy_words",
        "max_prompt_tokens": 32, "max_response_tokens": 64,
    },
    env_id="rlhf_gym/TextGeneration-v0",
    held_out=str(EXAMPLES / "held_out.jsonl"),
)  # fmt: skip
SUITES = {
    "exact": Suite(EXACT, rlhf_gym.exact.POLICY_KINDS, 256, is_exact=True),
    "tiny": Suite(TINY, (REFERENCE,), 64, is_exact=False),
}


def suite_named(name: str, stories: str | None = None) -> Suite:
    """A suite.

    Args:
        name: Of `SUITES`.
        stories: Directory of the model stories260K, which adds its task to "tiny".

    Raises:
        ValueError: If there is no such suite, or Stories cannot be run.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    suite = SUITES[name]
    if stories is None:
        return suite
    if suite.is_exact:
        raise ValueError("stories is the model of a task of the suite tiny; leave it out")
    if not EXAMPLES.is_dir():
        raise ValueError("the task Stories needs the folder examples/stories of the repository, install from there")
    task = Task(**{**vars(STORIES), "arguments": {**STORIES.arguments, "model": stories}})
    return Suite({**suite.tasks, "Stories": task}, suite.policies, suite.num_envs, is_exact=False)


def model_hash(directory: str) -> str:
    """The SHA-256 (16 hexadecimal digits) of the weights of a model.

    Raises:
        ValueError: If the directory holds none.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"--stories must be a directory with a model's *.safetensors, got {directory!r}")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def make_envs(suite: Suite, task: str, num_envs: int, **changes: Any) -> Any:
    """The vector environment of a task; ``changes`` are further arguments of it, ``kl_coef`` among them."""
    chosen = suite.tasks[task]
    return gym.make_vec(chosen.env_id or f"rlhf_gym/{task}-v0", num_envs=num_envs, **{**chosen.arguments, **changes})


def make_policy(envs: Any, kind: str, seed: int) -> Any:
    """The model to train, equal to the reference. A network's initial weights depend on the seed: the spread over seeds
    is to speak of them too."""
    if kind == REFERENCE:
        return copy.deepcopy(envs.unwrapped.language_model.model).float().requires_grad_(True)
    if kind == "tabular":
        return rlhf_gym.exact.tabular_policy(envs)
    return rlhf_gym.exact.residual_policy(envs, kind, seed=seed)


def measure(
    learner: Any, envs: Any, suite: Suite, task: str, kl_coef: float, *, seed: int, quick: bool = False
) -> dict[str, Any]:
    """How good what an agent has learnt is, without any effect on the agent or its environment.

    Args:
        learner: Its ``policy_model`` is measured, a causal language model; with ``num_candidates`` N the best of N of
            its responses. Where there is no model, ``predict`` is called, which tells the score but not the KL.
        envs: The environment that it trains in.
        suite, task: What `envs` was made from.
        kl_coef: That of the task.
        seed: Of samples: the same random numbers for every agent.
        quick: Fewer samples, for a point of a learning curve.

    Returns:
        On exact tasks ``normalised``, ``objective``, ``optimum``, ``reward``, ``kl``, ``regret``, ``exact`` and
        ``standard_error`` (of the regret); on others ``score``, ``kl``, ``objective`` (score - kl_coef * kl),
        ``length``, ``exact`` and ``standard_error`` (of the score). ``gold`` where the task knows it.
    """
    chosen = suite.tasks[task]
    model = getattr(learner, "policy_model", None)
    if model is None:
        eval_envs = make_envs(suite, task, 64, **({"prompts": chosen.held_out} if chosen.held_out else {}))
        scores = scores_by_predict(learner, eval_envs, num_episodes=128 if quick else 2048, seed=seed)
        error = float(scores.std(ddof=1) / len(scores) ** 0.5)
        found = {"reward" if suite.is_exact else "score": float(scores.mean())}
        return found | {"exact": False, "standard_error": error}
    if suite.is_exact:
        effort = {"max_prefixes": 10_000, "num_samples": 512} if quick else {}
        exact = rlhf_gym.exact.evaluate(learner, envs, kl_coef, seed=seed, **effort)
        return exact_metrics(exact) | exact.metrics
    others = {} if chosen.gold is None else {"gold": chosen.gold}
    drawn = evaluate(
        learner, envs, prompts=chosen.held_out, num_episodes=64 if quick else 512, seed=seed, others=others
    )
    score, kl = drawn.score, drawn.estimate(drawn.kl).mean
    means = {name: drawn.estimate(values).mean for name, values in drawn.others.items() if name in others}
    return {
        "score": score.mean, "kl": kl, "objective": score.mean - kl_coef * kl, **means,
        "length": float(drawn.lengths.mean()), "exact": False, "standard_error": score.standard_error,
    }  # fmt: skip


def exact_metrics(found: rlhf_gym.exact.Evaluation) -> dict[str, Any]:
    """The numbers of an exact evaluation, by their names in a cell."""
    return {
        "normalised": found.normalised, "objective": found.objective, "optimum": found.solution.objective,
        "reward": found.reward, "kl": found.kl, "regret": found.regret, "exact": found.exact,
        "standard_error": found.standard_error,
    }  # fmt: skip


def scores_by_predict(learner: Any, envs: Any, *, num_episodes: int, seed: int) -> np.ndarray:
    """Scores of episodes in which an agent acts by ``predict`` alone.

    Args:
        learner: Any object with ``predict(observation) -> (actions, state)``.
        envs: An environment of our own, in next_step mode, without a KL penalty.
        num_episodes: At least so many; every row plays equally many.
        seed: Of the prompts.

    Returns:
        One score per episode, float64, row by row.
    """
    per_row = -(-num_episodes // envs.num_envs)
    scores: list[list[float]] = [[] for _ in range(envs.num_envs)]
    observation, _ = envs.reset(seed=seed)
    while min(map(len, scores)) < per_row:
        observation, _, _, _, info = envs.step(learner.predict(observation)[0])
        for row in np.flatnonzero(info.get("_score", ())):
            scores[row].append(float(info["score"][row]))
    # The first of each row, and no more: of what is played until the last is done, too many episodes are short.
    return np.array([row[:per_row] for row in scores]).ravel()
