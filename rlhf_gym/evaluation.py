"""How good is a policy: responses to prompts, their scores with a confidence interval, and how far it went from the reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_gym.envs.episodes import evaluate_responses
from rlhf_gym.envs.prompts import read_prompts
from rlhf_gym.envs.scoring import Scorer
from rlhf_gym.lm import generate, make_engine
from rlhf_gym.rewards import as_reward


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval; the two ends are None when one prompt alone says nothing about others."""

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None

    def __str__(self) -> str:
        text = f"{self.mean:.3f}" if self.high is None else f"{self.mean:.3f} ± {self.high - self.mean:.3f}"
        return text.replace("-0.000", "0.000")


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found. N episodes; every array has shape (N,)."""

    scores: np.ndarray
    """Score of each response, without any KL penalty."""
    terms: dict[str, np.ndarray]
    """The reward's ledger; NaN where a term did not apply."""
    kl: np.ndarray | None
    """log pi - log pi_ref of each response in nats, summed over its tokens; None without a reference."""
    lengths: np.ndarray
    """Tokens of each response, EOS included."""
    ended_by_eos: np.ndarray
    """Whether it ended by EOS, not by the length limit."""
    others: dict[str, np.ndarray]
    """What the environment's metrics said (``metric/<name>``), and the further reward functions, by their names."""
    prompt_index: np.ndarray
    """Which prompt each response answers."""
    samples: list[dict[str, Any]]
    """Prompt, response and numbers of each episode, JSON-able."""

    @property
    def score(self) -> Estimate:
        """Mean score over prompts."""
        return self.estimate(self.scores)

    def estimate(self, values: np.ndarray) -> Estimate:
        """Mean of one number per episode with its interval (Student's t) over *prompts*.

        Responses to one prompt are alike, so each prompt counts once, with its mean; NaN entries are left out.
        """
        from scipy.stats import t

        known = ~np.isnan(values)
        groups = [values[known & (self.prompt_index == i)] for i in np.unique(self.prompt_index[known])]
        means = np.array([group.mean() for group in groups])
        if len(means) < 2:
            return Estimate(float(means.mean()) if len(means) else math.nan, None, None, None)
        mean, error = float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))
        half = float(t.ppf(0.975, len(means) - 1)) * error
        return Estimate(mean, mean - half, mean + half, error)

    def summary(self) -> dict[str, Any]:
        """The numbers, JSON-able: ``{name: {mean, low, high, standard_error}}`` and counts."""
        numbers = {"score": self.scores, **{f"score/{name}": term for name, term in self.terms.items()}, **self.others}
        numbers |= {} if self.kl is None else {"kl": self.kl}
        numbers |= {"length": self.lengths, "eos_share": self.ended_by_eos.astype(np.float64)}
        estimates = {name: _finite(vars(self.estimate(values))) for name, values in numbers.items()}
        return {"num_episodes": len(self.scores), "num_prompts": len(np.unique(self.prompt_index)), **estimates}


def _finite(numbers: Mapping[str, float | None]) -> dict[str, float | None]:
    return {key: None if value is None or not math.isfinite(value) else value for key, value in numbers.items()}


@torch.no_grad()
def evaluate(
    policy: Any,
    envs: Any,
    *,
    num_episodes: int | None = None,
    prompts: Any = None,
    seed: int = 0,
    greedy: bool = False,
    others: Mapping[str, Any] | None = None,
    num_rows: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Sample responses and score them, in the environment's own terms (temperature, masks, limits, reward).

    Args:
        policy: A ``PreTrainedModel``, anything with ``policy_model`` (an agent), or None for the reference itself.
        envs: One of our environments, scalar or vector; nothing in it changes.
        num_episodes: Responses to sample, >= 1; they go round the prompts. None: one for each prompt.
        prompts: Held-out prompts, from any source that the environment takes; None: the environment's own.
        seed: Seed of the sampling. The same seed gives two policies the same random numbers, which makes their
            difference less noisy.
        greedy: Take the likeliest token each time instead of a sample.
        others: Further rewards to report beside the score, by name: whatever ``as_reward`` takes.
        num_rows: Responses that are generated at once, at most.
        progress: Called with the number of new tokens after each step.

    Returns:
        The evaluation, with every sample.

    Raises:
        ValueError, TypeError: If an argument is out of range, or a prompt does not fit the environment.
    """
    process = evaluation_process(envs, prompts)
    model = process.language_model.model if policy is None else getattr(policy, "policy_model", policy)
    num_episodes = len(process.prompts) if num_episodes is None else num_episodes
    if num_episodes < 1:
        raise ValueError(f"num_episodes must be >= 1, got {num_episodes}")
    index = np.arange(num_episodes) % len(process.prompts)
    chosen = [process.prompts[i] for i in index]
    num_rows = min(num_rows, num_episodes)
    uniforms = np.random.default_rng(seed).random((num_episodes, process.max_response_tokens), dtype=np.float32)
    needs_reference = process.token_filter.uses_reference
    responses = generate(
        make_engine(model, num_rows, process.max_tokens),
        [prompt.ids for prompt in chosen],
        max_response_tokens=process.max_response_tokens,
        eos_token_ids=process.eos_token_ids,
        uniforms=None if greedy else torch.from_numpy(uniforms),
        token_filter=process.token_filter,
        reference_engine=make_engine(process.language_model, num_rows, process.max_tokens) if needs_reference else None,
        progress=progress,
    )
    mask = responses.response_mask
    memory = process.scorer.memory()
    try:
        rewards = evaluate_responses(
            process,
            [prompt.ids for prompt in chosen],
            responses.response_ids,
            mask,
            responses.logprobs,
            prompt_index=index,
        )
    finally:
        process.scorer.restore_memory(memory)
    kl = None
    if process.language_model is not None:
        difference = torch.where(mask, responses.logprobs - rewards.ref_logprobs.to(responses.logprobs), 0.0)
        kl = difference.double().sum(1).cpu().numpy()
    lengths = mask.sum(1).cpu().numpy()
    ended_by_eos = responses.ended_by_eos.cpu().numpy()
    token_lists = [row[:length] for row, length in zip(responses.response_ids.tolist(), lengths.tolist(), strict=True)]
    found = {f"metric/{name}": metric.double().cpu().numpy() for name, metric in rewards.metrics.items()}
    for name, spec in (others or {}).items():
        scorer = Scorer(as_reward(spec, language_model=process.language_model), process.tokenizer)
        scorer.check_columns(chosen, "prompts")
        found[name] = scorer.score(chosen, token_lists, ended_by_eos).totals
    numbers = {"score": rewards.scores.double().cpu().numpy()}
    terms = {name: term.double().cpu().numpy() for name, term in rewards.terms.items()}
    numbers |= {f"score/{name}": term for name, term in terms.items()} | found | ({} if kl is None else {"kl": kl})
    samples = [
        {
            "prompt": prompt.text,
            "response": completion,
            **_finite({name: float(values[b]) for name, values in numbers.items()}),
            "num_tokens": int(lengths[b]),
            "stop_reason": "eos" if ended_by_eos[b] else "length",
        }
        for b, (prompt, completion) in enumerate(zip(chosen, rewards.completions, strict=True))
    ]
    return Evaluation(numbers["score"], terms, kl, lengths, ended_by_eos, found, index, samples)


def evaluation_process(envs: Any, prompts: Any = None) -> Any:
    """The environment's process with held-out prompts instead of its own, without its KL penalty; the environment is not changed.

    Raises:
        ValueError, TypeError, FileNotFoundError: If the prompts cannot be read or do not fit the environment.
    """
    process = getattr(envs.unwrapped, "process", None)
    if process is None:
        raise TypeError(f"envs must be a text-generation environment of rlhf_gym, got {type(envs.unwrapped).__name__}")
    # A shallow copy: the caller's process must not change.
    process = copy.copy(process)
    process.kl_coef = 0.0
    if prompts is not None:
        rows = read_prompts(prompts)
        limit = process.max_prompt_tokens
        process.prompts = [
            process.encoder.encode(row, limit, f"held-out prompts[{i}]", i) for i, row in enumerate(rows)
        ]
        process.scorer.check_columns(process.prompts, "held-out prompts")
    return process
