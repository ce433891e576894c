"""The audit of a training run: exact numbers beside the sampled ones, and a warning when they contradict each other.

Every agent is paid by log-probabilities that were recorded while it sampled, and nothing fails when they are wrong:
when the tokens came from another distribution (top-k, top-p, a temperature in the sampling only), when a mask is applied
to the policy and not to the reference, when the policy learns in other weights, another precision or with dropout. The
KL penalty then rewards the wrong thing, quietly. So now and then the policy and the reference are run once more over a
rollout, before the update, and give in each state what sampling only estimates. Two facts make alarms that stay silent
in a sound run:

1. Given the states that were visited, log pi(a) - log pi_ref(a) of the sampled token has the state's exact KL as its
   expectation, and its variance follows from the full vocabulary as well. The differences add up to a martingale of
   known variance. A variance estimated from the samples would not do: a token of probability .01 that none of 64 rows
   has drawn leaves rows that all agree, far from the expectation. The same holds for log pi(a) and minus the entropy,
   which shows a filtered sampling even where policy and reference are still the same.
2. E[pi_ref(y) / pi(y)] <= 1 for every response y ~ pi, whatever came before. So exp(- sum of sampled KL) is a
   supermartingale: the sum ever falls to -log(1/alpha) with a probability of at most alpha (Ville 1939), for few rows
   and for heavy tails too. It costs nothing and is looked at in every rollout.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_gym.lm import TokenFilter
from rlhf_gym.lm.engine import inference
from rlhf_gym.lm.forward import forward_at
from rlhf_gym.lm.load import vocab_size

from .batch import Batch
from .stepping import token_filter_of

# Differences beyond so many standard errors are no noise, if the next rollout has them too.
NUM_STANDARD_ERRORS = 4.0
# Nats per token by which a recorded log-prob may differ from a forward's: caches add in another order.
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 2e-2
# The negative KL that is believed: the chance of it in a sound run is below 1e-8 for each rollout that it may begin in.
NEGATIVE_NATS = math.log(1e8)
# Logits (tokens times vocabulary) in memory at a time; several arrays of this size exist at once.
_MAX_LOGITS = {"cpu": 2**22}

_FIX = (
    "Give filters to the environment (temperature=, top_k=, top_p=, allowed_tokens=), which applies them to policy and "
    "reference alike, and record log-probs in the pass that samples, with the weights that learn and without dropout"
)


class AuditWarning(UserWarning):
    """What an agent recorded of its own sampling contradicts its policy."""


@dataclass(frozen=True)
class Recomputed:
    """What one more pass says of each response token. All (B, R) float32, 0 after the end.

    Attributes:
        logprobs, ref_logprobs: Of the token, under policy and reference, in nats.
        kl: The exact KL(pi(.|s) || pi_ref(.|s)) of the state that it was chosen in.
        kl_variance: Variance of log pi(a) - log pi_ref(a), a ~ pi(.|s).
        entropy: Of pi(.|s).
        logprob_variance: Variance of log pi(a), a ~ pi(.|s).
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor
    kl_variance: Tensor
    entropy: Tensor
    logprob_variance: Tensor


@torch.no_grad()
def recompute(
    batch: Batch, model: Any, reference: Any, token_filter: TokenFilter, *, masks_reference: bool = True
) -> Recomputed:
    """Teacher-forced passes of policy and reference over a batch, with exact sums over the vocabulary.

    Args:
        batch: Responses; where it has masks of allowed tokens, both distributions are renormalised on them.
        model: The policy, a causal LM.
        reference: The reference, a causal LM over the same vocabulary.
        token_filter: The environment's temperature and filters.
        masks_reference: False where the batch's masks are the policy's own.
    """
    result = {field.name: torch.zeros_like(batch.logprobs) for field in fields(Recomputed)}
    device, reference_device = batch.ids.device, next(reference.parameters()).device
    budget = _MAX_LOGITS.get(device.type, 2**26)
    rows_per_pass = max(1, budget // (batch.response_ids.shape[1] * vocab_size(model)))
    # Rows of like length share a pass, so that little of it is padding.
    for rows in (batch.prompt_lengths + batch.response_mask.sum(1)).argsort(descending=True).split(rows_per_pass):
        part = batch.rows(rows)
        row, step = part.response_mask.nonzero(as_tuple=True)
        tokens = part.response_ids[row, step]
        at = part.ids, row[None], (part.prompt_lengths[row] - 1 + step)[None]
        with inference(model):
            logits = forward_at(model, *at, use_cache=False)[0][0]
        with inference(reference):
            at_reference = (x.to(reference_device) for x in at)
            ref_logits = forward_at(reference, *at_reference, use_cache=False)[0][0].to(device)
        allowed = token_filter.mask(ref_logits, tokens) if part.allowed is None else part.allowed[row, step]
        logprobs = token_filter.logprobs(logits, allowed)
        ref_logprobs = token_filter.logprobs(
            ref_logits, allowed if masks_reference else token_filter.mask(ref_logits, tokens)
        )
        kl, kl_variance = mean_and_variance(logprobs, logprobs - ref_logprobs)
        negative_entropy, logprob_variance = mean_and_variance(logprobs, logprobs)
        found = {
            "logprobs": logprobs.gather(1, tokens[:, None])[:, 0],
            "ref_logprobs": ref_logprobs.gather(1, tokens[:, None])[:, 0],
            "kl": kl,
            "kl_variance": kl_variance,
            "entropy": -negative_entropy,
            "logprob_variance": logprob_variance,
        }
        for name, values in found.items():
            result[name][rows[row], step] = values
    return Recomputed(**result)


def mean_and_variance(logprobs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a function of the token, exactly.

    Args:
        logprobs: Log-probabilities of all tokens, -inf allowed. Shape (..., V).
        values: The function. Shape (..., V); tokens of probability 0 do not count, whatever stands there.

    Returns:
        Two tensors (...); both inf where a possible token has an infinite value.

    Example:
        >>> mean_and_variance(torch.tensor([0.25, 0.75]).log(), torch.tensor([4.0, 0.0]))
        (tensor(1.), tensor(3.0000))
    """
    probs = logprobs.exp()
    values = values.masked_fill(probs == 0, 0.0)
    mean = (probs * values).sum(-1)
    variance = (probs * (values - mean[..., None]).square()).sum(-1)
    return mean, torch.where(mean.isfinite(), variance, torch.inf)


class Audit:
    """Audits the rollouts of one call of ``learn``. It draws no random numbers and changes nothing.

    Where the environment tells no reference it does nothing.

    Metrics, in nats per response where nothing else is said: ``audit/kl_exact`` and ``audit/kl_sampled`` (by the
    recorded log-probs, k1 whatever the environment's estimator) with ``audit/kl_difference_se``, the standard error of
    their difference; ``audit/entropy_exact``, which ``objective/entropy`` samples; ``audit/logprob_mismatch`` and
    ``audit/ref_logprob_mismatch``, how far the recorded log-probs of policy and reference are from recomputed ones
    (mean, nats per token); and with ``kl_coef > 0``, where some prompt has two responses, the certificate of
    :func:`rlhf_gym.exact.certificate`: ``audit/certificate_variance``, ``audit/certificate_low``,
    ``audit/certificate_high`` (0 at the optimum and only there) and ``audit/regret_estimate``.

    Args:
        envs: The environment of the rollouts.
        model: The policy's language model, read at each audit.
        interval: Rollouts from one audit to the next; 0 never looks at any.
        masks_reference: Whether masks in a batch are the environment's, which hold for the reference too, and not the
            policy's own.
    """

    def __init__(self, envs: Any, model: Any, interval: int = 10, *, masks_reference: bool = True):
        if type(interval) is not int or interval < 0:
            raise ValueError(f"audit_interval must be an integer >= 0 (0: no audits), got {interval!r}")
        base = envs.unwrapped
        self.envs, self.model, self.interval, self.masks_reference = envs, model, interval, masks_reference
        self.reference = getattr(getattr(base, "language_model", None), "model", None) if interval else None
        self.estimator = getattr(base, "kl_estimator", "k1")
        self._beyond: dict[str, float] = {}  # what the last audit found beyond noise, with its sign
        self._negative = [0.0, 0, 0]  # nats, responses and tokens of the stretch with the least sampled KL
        self._warned: set[str] = set()

    @property
    def is_on(self) -> bool:
        """Whether any rollout is looked at."""
        return self.reference is not None

    def __call__(self, batch: Batch, num_updates: int, num_responses: int | None = None) -> dict[str, float]:
        """Look at a rollout, before the update: the weights are still those that sampled.

        Args:
            batch: The rollout.
            num_updates: Updates made before; multiples of ``interval`` are audited, and the rollout after one in which
                something was beyond noise.
            num_responses: What to divide sums over the rollout by; None is the number of rows.

        Returns:
            The metrics, empty for a rollout that is not audited.
        """
        if not self.is_on or not len(batch):
            return {}
        self._watch_sign(batch)
        if num_updates % self.interval and not self._beyond:
            return {}
        token_filter = token_filter_of(self.envs)
        found = recompute(batch, self.model, self.reference, token_filter, masks_reference=self.masks_reference)
        return self._compare(batch, found, num_responses or len(batch)) | self._certificate(batch, found)

    def _watch_sign(self, batch: Batch) -> None:
        if self.estimator != "k1":  # the other estimators are never negative
            return
        mask = batch.response_mask
        nats, num_tokens = torch.where(mask, batch.kl, 0.0).double().sum().item(), int(mask.sum())
        # Rounding may add up to something over a long run: a thousandth of a nat per token is not held against it.
        before = self._negative if self._negative[0] < 0 else [0.0, 0, 0]
        self._negative = [before[0] + nats + 1e-3 * num_tokens, before[1] + len(batch), before[2] + num_tokens]
        total, num_responses, all_tokens = self._negative
        if total < -NEGATIVE_NATS:
            mean = (total - 1e-3 * all_tokens) / num_responses
            self._warn(
                "negative",
                f"the sampled KL to the reference is negative: {mean:.3g} nats per response over the last "
                f"{num_responses} responses, and a KL never is (by chance this happens in fewer than one of 10^8 "
                "rollouts). Usual causes: tokens are sampled under a filter or mask that their log-probs know nothing "
                "of, or the reference is renormalised on the allowed tokens and the policy is not. The penalty then "
                f"rewards leaving the reference. {_FIX}",
            )

    def _ref_logprobs(self, batch: Batch, found: Recomputed) -> Tensor:
        """log pi_ref as the environment had it; recomputed where it gave another estimate than k1, or none."""
        return batch.logprobs - batch.kl if self.estimator == "k1" and bool(batch.kl.any()) else found.ref_logprobs

    def _compare(self, batch: Batch, found: Recomputed, num_responses: int) -> dict[str, float]:
        mask = batch.response_mask
        recorded, ref_logprobs = batch.logprobs[mask].double(), self._ref_logprobs(batch, found)[mask].double()
        again = {field.name: getattr(found, field.name)[mask].double() for field in fields(Recomputed)}
        mismatch = (recorded - again["logprobs"]).abs().mean().item()
        ref_mismatch = (ref_logprobs - again["ref_logprobs"]).abs().mean().item()
        kl_error = math.sqrt(again["kl_variance"].sum().item())
        tolerance = max(
            TOLERANCE.get(next(model.parameters()).dtype, HALF_TOLERANCE) for model in (self.model, self.reference)
        )
        beyond = {
            name: _beyond_noise(difference, again[variance], tolerance)
            for name, difference, variance in (
                ("kl", recorded - ref_logprobs - again["kl"], "kl_variance"),
                ("entropy", recorded + again["entropy"], "logprob_variance"),
            )
        }
        twice = any(sign * self._beyond.get(name, 0.0) > 0 for name, sign in beyond.items())
        self._beyond = {name: sign for name, sign in beyond.items() if sign}
        metrics = {
            "audit/kl_exact": again["kl"].sum().item() / num_responses,
            "audit/kl_sampled": (recorded - ref_logprobs).sum().item() / num_responses,
            "audit/kl_difference_se": kl_error / num_responses,
            "audit/entropy_exact": again["entropy"].sum().item() / num_responses,
            "audit/logprob_mismatch": mismatch,
            "audit/ref_logprob_mismatch": ref_mismatch,
        }
        if not math.isfinite(metrics["audit/kl_exact"]):
            self._warn(
                "infinite",
                "the exact KL is infinite: the policy gives probability to tokens that the reference cannot produce. "
                "Start it from the reference, or forbid such tokens to it (`action_masks()`)",
            )
        if mismatch > tolerance:
            self._warn(
                "mismatch",
                f"the recorded log-probs are {mismatch:.2g} nats per token from those of a forward of the policy "
                f"(rounding explains {tolerance:g}). The policy learns in other weights, another precision or other "
                "dropout than it sampled in, or its log-probs were recorded without the filters and masks (or with "
                f"others) that the environment tells. {_FIX}",
            )
        if twice:
            if mismatch > tolerance:
                cause = "the recorded log-probs are not the policy's (see the mismatch)"
            elif ref_mismatch > tolerance:
                cause = (
                    f"the environment's log-probs of the reference are {ref_mismatch:.2g} nats per token from the "
                    "reference's own on the tokens that the policy may choose: a filter or mask is applied to the "
                    "policy only"
                )
            else:
                cause = (
                    "log-probs are recorded as the policy has them, but the tokens were not drawn from it: top-k, "
                    "top-p, a temperature or a mask is applied in the sampling only"
                )
            self._warn(
                "disagreement",
                "sampled and exact numbers disagree beyond noise in two rollouts in a row: KL "
                f"{metrics['audit/kl_sampled']:.4g} sampled, {metrics['audit/kl_exact']:.4g} exact (standard error "
                f"{metrics['audit/kl_difference_se']:.2g}), entropy {-recorded.sum().item() / num_responses:.4g} "
                f"sampled, {metrics['audit/entropy_exact']:.4g} exact, nats per response. Cause: {cause}. {_FIX}",
            )
        return metrics

    def _certificate(self, batch: Batch, found: Recomputed) -> dict[str, float]:
        kl_coef = getattr(self.envs.unwrapped, "kl_coef", 0.0)
        scores, logprobs, ref_logprobs = (
            (torch.where(batch.response_mask, x, 0.0).double().sum(1) if x.dim() > 1 else x).cpu().numpy()
            for x in (batch.scores, batch.logprobs, self._ref_logprobs(batch, found))
        )
        use = np.isfinite(scores) & np.isfinite(logprobs - ref_logprobs)
        prompts = _prompt_groups(batch)[use]
        if not kl_coef > 0 or np.bincount(prompts, minlength=1).max() < 2:
            return {}
        from rlhf_gym.exact import certificate  # only here: it brings models along

        result = certificate(scores[use], logprobs[use], ref_logprobs[use], kl_coef=kl_coef, prompt_index=prompts)
        return {
            "audit/certificate_variance": result.variance,
            "audit/certificate_low": float(result.low),
            "audit/certificate_high": float(result.high),
            "audit/regret_estimate": result.regret_estimate,
        }

    def _warn(self, cause: str, message: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(f"audit: {message}", AuditWarning, stacklevel=5)


def _beyond_noise(differences: Tensor, variances: Tensor, tolerance: float) -> float:
    """The sum of martingale differences (n,) where it is more than chance, rounding and one rare token explain, else 0.

    One token of a probability far below 1 / n, once drawn, is beyond any number of standard errors: that alone is no
    alarm.
    """
    total = differences.sum().item()
    noise = NUM_STANDARD_ERRORS * math.sqrt(variances.sum().item()) + differences.abs().max().item()
    return 0.0 if abs(total) <= noise + tolerance * len(differences) else total


def _prompt_groups(batch: Batch) -> np.ndarray:
    """Number of each row's prompt, the same for equal prompts. (B,) int64."""
    in_prompt = torch.arange(batch.ids.shape[1], device=batch.ids.device) < batch.prompt_lengths[:, None]
    return torch.unique(torch.where(in_prompt, batch.ids, -1), dim=0, return_inverse=True)[1].cpu().numpy()
