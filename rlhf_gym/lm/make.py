"""Which engine serves a model, and the proof that it does."""

from __future__ import annotations

import warnings
import weakref

import torch
from transformers import PreTrainedModel

from .blocks import attention_windows, is_known
from .cached import RaggedKV
from .engine import Engine, inference
from .lean import LeanKV
from .load import LanguageModel, max_context
from .recompute import Recompute
from .recurrent import Recurrent

# The verdicts so far: model -> {circumstances: (the engine's class, the longest max_tokens it was proved for)}.
_verdicts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def make_engine(model: PreTrainedModel | LanguageModel, num_rows: int, max_tokens: int) -> Engine:
    """The fastest engine that gives this model's own logits.

    A cached engine has to prove that it does: two rows of different lengths, longer than the model's attention window
    where there is one, are filled and moved on by a few tokens, and compared with plain forwards of the model on each
    row alone. The verdict is remembered with the model, so that further engines cost nothing. A model whose cache
    fails the proof is served by recomputing everything for each token, with one warning; one whose class says
    ``has_cache = False``, without a trial.

    Args:
        model: A causal language model.
        num_rows: B, how many sequences the engine holds.
        max_tokens: T, the most tokens that a row can hold.

    Returns:
        An engine with all rows empty. It reads the model's weights at each call: after they have changed, call
        `Engine.invalidate`.

    Raises:
        ValueError: If max_tokens is beyond the model's context, or if not even recomputing gives the model's logits.
    """
    if isinstance(model, LanguageModel):
        model = model.model
    limit = max_context(model.config)
    if limit is not None and max_tokens > limit:
        raise ValueError(
            f"max_tokens must not exceed the model's context of {limit} tokens, got {max_tokens}: use shorter prompts "
            "or responses"
        )
    return _proved_class(model, max_tokens)(model, num_rows, max_tokens)


def _proved_class(model: PreTrainedModel, max_tokens: int) -> type[Engine]:
    weight = next(model.parameters())
    candidates = _candidates(model)
    circumstances = (weight.device, weight.dtype, model.config._attn_implementation, *candidates)
    verdicts = _verdicts.setdefault(model, {})
    if circumstances in verdicts and max_tokens <= verdicts[circumstances][1]:
        return verdicts[circumstances][0]
    reasons = []
    for candidate in candidates:
        reason = _objection(candidate, model, max_tokens)
        if reason is None:
            break
        reasons.append(f"{candidate.__name__}: {reason}")
    else:
        raise ValueError(
            f"{type(model).__name__} cannot be used: a batch with padding on the right does not give the logits of its "
            f"rows alone, as a causal language model's would ({'; '.join(reasons)})"
        )
    known = circumstances in verdicts and verdicts[circumstances][0] is candidate
    if candidate is RaggedKV and reasons and not known and weight.device.type == "cuda":
        warnings.warn(
            f"{type(model).__name__} decodes by its own forward, without CUDA graphs, which is right but slow "
            f"({'; '.join(reasons)})",
            stacklevel=3,
        )
    if candidate is Recompute and reasons and not known:
        warnings.warn(
            f"{type(model).__name__} is run without a cache, which is right but slow: with one it does not give the "
            f"logits of its plain forward ({'; '.join(reasons)})",
            stacklevel=3,
        )
    verdicts[circumstances] = (candidate, max_tokens)
    return candidate


def _candidates(model: PreTrainedModel) -> list[type[Engine]]:
    if not getattr(model, "has_cache", True):
        return [Recompute]
    if getattr(model, "has_fixed_size_cache", False):
        return [Recurrent, Recompute]
    return [LeanKV, RaggedKV, Recompute] if is_known(model) else [RaggedKV, Recompute]


def _objection(candidate: type[Engine], model: PreTrainedModel, max_tokens: int) -> str | None:
    """Why an engine must not be used for a model; None if it gives the model's own logits."""
    windows = [window for window in attention_windows(model.config.get_text_config()).values() if window is not None]
    num_decodes = min(3, max_tokens - 1)
    # Long enough to leave a window behind, otherwise a handful.
    longest = min(max_tokens, max([12, *(window + 4 for window in windows)]))
    lengths = torch.tensor([longest - num_decodes, max(1, (longest - num_decodes) // 2)])
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, longest), generator=torch.Generator().manual_seed(0))
    ids, lengths = ids.to(model.device), lengths.to(model.device)
    try:
        engine = candidate(model, 2, max_tokens)
        rows = torch.arange(2, device=model.device)
        found = [engine.prefill(rows, ids[:, : int(lengths[0])], lengths)]
        for step in range(num_decodes):
            found.append(engine.decode(ids[rows, lengths + step], torch.ones_like(rows, dtype=torch.bool)))
        given = engine.logits_at(ids, lengths + num_decodes, lengths - 1, num_decodes + 1).float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model does not support, in whatever way it says so
        return f"{type(error).__name__}: {error}"
    expected = torch.stack([_plain_logits(model, ids[i, : lengths[i] + num_decodes])[lengths[i] - 1 :] for i in (0, 1)])
    found = torch.stack(found, 1)
    impossible = expected == -torch.inf  # inf - inf would be NaN
    if not all(torch.equal(each == -torch.inf, impossible) for each in (found, given)):
        return "other tokens are impossible"
    expected, found, given = (each.masked_fill(impossible, 0.0) for each in (expected, found, given))
    # Of the logits' own spread, since a small model's logits can all be small.
    # In bfloat16 the model itself is up to .13 of it off its float32 self; a wrong context is off by more than 1.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.3
    spread = expected.std(-1, correction=0).mean().clamp(min=1e-6)
    deviation = max((found - expected).abs().max(), (given - expected).abs().max()) / spread
    if not deviation <= tolerance:
        return f"logits differ by {float(deviation):.1e} of their standard deviation"
    return None


def _plain_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The truth: the model's own forward of one sequence, with no padding and no cache. Shape (L,) -> (L, V)."""
    with inference(model):
        return model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False).logits[0].float()
