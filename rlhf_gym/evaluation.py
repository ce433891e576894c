"""How good is a policy: responses to prompts, their scores with a confidence interval, and how far it went from the reference."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_gym.envs.episodes import evaluate_responses
from rlhf_gym.envs.prompts import Prompt, read_prompts
from rlhf_gym.envs.scoring import Scorer
from rlhf_gym.intervals import Estimate, mean_estimate, share_estimate
from rlhf_gym.lm import generate, make_engine
from rlhf_gym.rewards import as_reward, perplexity
from rlhf_gym.rewards.overlap import references_of
from rlhf_gym.text_metrics import diversity, perplexity_estimate, reference_overlap

REFERENCE_COLUMN = "reference"


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found. N episodes; every array has shape (N,)."""

    scores: np.ndarray
    """Score of each response, without any KL penalty."""
    terms: dict[str, np.ndarray]
    """The reward's ledger; NaN where a term did not apply."""
    kl: np.ndarray | None
    """log pi - log pi_ref of each response in nats, summed over its tokens; None without a reference. For best-of-N that
    of the model, plus log N - (N - 1) / N: the mean is then an upper bound of the KL."""
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
    references: list[list[str] | None] | None = None
    """Reference texts of each prompt, None where it has none; None when no prompt has."""
    fluency: tuple[np.ndarray, np.ndarray] | None = None
    """Under an independent language model: log-probability of each response in nats, and its tokens there."""
    greedy: bool = False
    """Whether the likeliest token was taken each time: all responses to a prompt are one and the same."""

    @property
    def intervals_over(self) -> str | None:
        """What intervals take for independent draws: "prompts", or the "responses" where there is but one prompt.

        Responses to one prompt are alike, so where there are several prompts each counts once. An interval over responses
        says nothing of other prompts. None, and no interval, where there is nothing but one response.
        """
        if (self.prompt_index != self.prompt_index[0]).any():
            return "prompts"
        return "responses" if len(self.scores) > 1 and not self.greedy else None

    @property
    def draws(self) -> np.ndarray:
        """The draw that each response belongs to, of those that `intervals_over` says. Shape (N,), integers."""
        return np.arange(len(self.scores)) if self.intervals_over == "responses" else self.prompt_index

    @property
    def score(self) -> Estimate:
        """Mean score, see `estimate`."""
        return self.estimate(self.scores)

    def estimate(self, values: np.ndarray) -> Estimate:
        """Mean of one number per episode with its interval (Student's t) over what `intervals_over` says.

        Each prompt counts once, with the mean of its responses; NaN entries are left out.
        """
        return mean_estimate(values, self.draws)

    @functools.cached_property
    def texts(self) -> dict[str, Estimate]:
        """Metrics of the texts, from ``samples``; empty without them.

        ``share_without_eos``, ``distinct_1`` to ``distinct_3``, ``self_bleu``, ``repeated_bigrams``; where prompts have
        references ``bleu`` and ``chrf`` (if sacrebleu is installed) and ``rouge_l``; ``perplexity`` where a model for it
        was given. What each means is said in :mod:`rlhf_gym.text_metrics`.
        """
        if not self.samples:
            return {}
        responses = [sample["response"] for sample in self.samples]
        found = {"share_without_eos": share_estimate(~self.ended_by_eos, self.draws)}
        found |= diversity(responses, self.draws)
        if self.references is not None:
            rows = [row for row, references in enumerate(self.references) if references is not None]
            known = [references for references in self.references if references is not None]
            found |= reference_overlap([responses[row] for row in rows], known, self.draws[rows])
        if self.fluency is not None:
            found["perplexity"] = perplexity_estimate(*self.fluency, self.draws)
        return found

    def against(self, baseline: Evaluation) -> dict[str, Estimate]:
        """``wins``, ``ties`` and ``losses`` against another policy on the same episodes: shares, which sum to 1.

        Episode i of the one is compared with episode i of the other; scores that differ by less than a millionth are a
        tie. With the same seed both have the same random numbers, so policies that are near each other write the same
        response in many episodes, at KL 0 in all: ties are more, wins and losses fewer than of independent samples.

        Raises:
            ValueError: If the two did not answer the same prompts in the same order.
        """
        if not self.is_paired_with(baseline):
            raise ValueError(
                "baseline must answer the same prompts in the same order; evaluate both with the same arguments"
            )
        scale = np.maximum(1.0, np.maximum(np.abs(self.scores), np.abs(baseline.scores)))
        difference = np.where(np.abs(self.scores - baseline.scores) <= 1e-6 * scale, 0.0, self.scores - baseline.scores)
        shares = {"wins": difference > 0, "ties": difference == 0, "losses": difference < 0}
        return {name: share_estimate(happened, self.draws) for name, happened in shares.items()}

    def is_paired_with(self, other: Evaluation) -> bool:
        """Whether both answer the same prompts in the same order."""
        same = np.array_equal(self.prompt_index, other.prompt_index)
        return same and [s["prompt"] for s in self.samples] == [s["prompt"] for s in other.samples]

    def summary(self) -> dict[str, Any]:
        """The numbers, JSON-able: ``{name: {mean, low, high, standard_error}}``; ``text/<name>`` is of `texts`.

        And the counts, and what the intervals are over.
        """
        numbers = {"score": self.scores, **{f"score/{name}": term for name, term in self.terms.items()}, **self.others}
        numbers |= {} if self.kl is None else {"kl": self.kl}
        numbers |= {"length": self.lengths, "eos_share": self.ended_by_eos.astype(np.float64)}
        estimates = {name: as_json(self.estimate(values)) for name, values in numbers.items()}
        estimates |= {f"text/{name}": as_json(estimate) for name, estimate in self.texts.items()}
        counts = {"num_episodes": len(self.scores), "num_prompts": len(np.unique(self.prompt_index))}
        return {**counts, "intervals_over": self.intervals_over, **estimates}


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """An estimate as plain numbers, None for what is not known."""
    return _finite(vars(estimate))


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
    reference_column: str | None = None,
    perplexity_model: Any = None,
    num_rows: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Sample responses and score them, in the environment's own terms (temperature, masks, limits, reward).

    Args:
        policy: A ``PreTrainedModel``, anything with ``policy_model`` (an agent), or None for the reference itself. An
            agent with ``num_candidates`` N > 1 keeps the best of N responses of its model, by the environment's score.
        envs: One of our environments, scalar or vector; nothing in it changes.
        num_episodes: Responses to sample, >= 1; they go round the prompts. None: one for each prompt.
        prompts: Held-out prompts, from any source that the environment takes; None: the environment's own.
        seed: Seed of the sampling. The same seed gives two policies the same random numbers, which makes their
            difference less noisy.
        greedy: Take the likeliest token each time instead of a sample.
        others: Further rewards to report beside the score, by name: whatever ``as_reward`` takes.
        reference_column: Column of the prompts with reference texts, for BLEU, chrF and ROUGE-L: in each row a string,
            a list of them, or None. None takes the column "reference" where there is one.
        perplexity_model: An independent language model that says how fluent the texts are, as
            :func:`rlhf_gym.rewards.perplexity` takes it; None for no such figure.
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
    references = _read_references(process.prompts, reference_column)
    judge = None if perplexity_model is None else perplexity(perplexity_model)
    index = np.arange(num_episodes) % len(process.prompts)
    chosen = [process.prompts[i] for i in index]
    num_candidates = getattr(policy, "num_candidates", 1)
    candidates = np.repeat(index, num_candidates)
    asked = [process.prompts[i].ids for i in candidates]
    num_rows = min(num_rows, len(asked))
    uniforms = np.random.default_rng(seed).random((len(asked), process.max_response_tokens), dtype=np.float32)
    needs_reference = process.token_filter.uses_reference
    responses = generate(
        make_engine(model, num_rows, process.max_tokens),
        asked,
        max_response_tokens=process.max_response_tokens,
        eos_token_ids=process.eos_token_ids,
        uniforms=None if greedy else torch.from_numpy(uniforms),
        token_filter=process.token_filter,
        reference_engine=make_engine(process.language_model, num_rows, process.max_tokens) if needs_reference else None,
        progress=progress,
    )
    memory = process.scorer.memory()
    try:
        rewards = evaluate_responses(
            process,
            asked,
            responses.response_ids,
            responses.response_mask,
            responses.logprobs,
            prompt_index=candidates,
        )
    finally:
        process.scorer.restore_memory(memory)
    if num_candidates > 1:
        best = rewards.scores.reshape(-1, num_candidates).argmax(1).cpu() + torch.arange(0, len(asked), num_candidates)
        responses, rewards = _rows(responses, best), _rows(rewards, best)
    mask, kl = responses.response_mask, None
    if process.language_model is not None:
        difference = torch.where(mask, responses.logprobs - rewards.ref_logprobs.to(responses.logprobs), 0.0)
        kl = difference.double().sum(1).cpu().numpy() + math.log(num_candidates) - (1 - 1 / num_candidates)
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
    fluency = None
    if judge is not None:
        continuations = [process.scorer.continuation(*pair) for pair in zip(chosen, token_lists, strict=True)]
        fluency = judge.logprobs([prompt.text for prompt in chosen], continuations)
    return Evaluation(
        numbers["score"],
        terms,
        kl,
        lengths,
        ended_by_eos,
        found,
        index,
        samples,
        references=None if references is None else [references[i] for i in index],
        fluency=fluency,
        greedy=greedy,
    )


def _rows(found: Any, rows: torch.Tensor) -> Any:
    """These rows of a dataclass whose fields have one entry per response, or are dicts of such."""

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: of(entry) for name, entry in value.items()}
        if isinstance(value, list):
            return [value[row] for row in rows.tolist()]
        return None if value is None else value[rows.to(value.device)]

    return dataclasses.replace(found, **{name: of(value) for name, value in vars(found).items()})


def _read_references(prompts: Sequence[Prompt], column: str | None) -> list[list[str] | None] | None:
    """The references of each prompt; None when no prompt has any.

    Raises:
        ValueError: If ``column`` was asked for and is missing, or holds anything but texts.
    """
    cells = [prompt.columns.get(column or REFERENCE_COLUMN) for prompt in prompts]
    if all(cell is None for cell in cells):
        if column is None:
            return None
        names = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
        near = difflib.get_close_matches(column, names, n=1)
        raise ValueError(
            f"reference_column: no prompt has a {column!r}; the columns are {', '.join(map(repr, names)) or 'none'}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    try:
        return [
            None if cell is None else references_of(cell, f"prompts[{i}]: the column {column or REFERENCE_COLUMN!r}")
            for i, cell in enumerate(cells)
        ]
    except ValueError:
        if column is None:  # a column of this name for something else
            return None
        raise


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
