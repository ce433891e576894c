"""Teacher-forced passes: logits and log-probabilities of given responses, without a (B, L, V) tensor.

Sequences are right-padded and the models are causal, so no real position can see the padding and no mask is needed.
The attention mask that is passed is all ones: positions count from 0, and attention keeps its fast causal path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import packed
from .engine import inference
from .head import head_logprobs
from .load import vocab_size
from .matmul import fast_linear
from .sampling import TokenFilter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Float32 logits of one piece of `response_logprobs`: large enough to keep the processor busy, small enough to forget.
_MAX_LOGITS = 2**24


def forward_at(model: PreTrainedModel, ids: Tensor, rows: Tensor, columns: Tensor, **kwargs):
    """Runs the model with its head applied to some positions only.

    The head's input is cut by a hook, so that whatever the model does after its head (Gemma's soft cap, Granite's and
    Cohere's scale) still happens.

    Args:
        model: A causal language model. Differentiable unless gradients are off.
        ids: Right-padded sequences. Shape (b, L), int64.
        rows: Row of each wanted position; broadcast against ``columns``.
        columns: Column of each wanted position.
        **kwargs: Passed to the model (a cache, say, or another attention mask).

    Returns:
        Logits (..., V) and the head's input (..., d), or None for a model without an output embedding, both of the
        broadcast shape of ``rows`` and ``columns``; and the model's whole output.
    """
    if packed.supports(model, kwargs):
        logits, hidden = packed.packed_forward(model, ids, rows, columns)
        return logits, hidden, None
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    picked: list[Tensor] = []

    def pick(module, args):
        assert args[0].shape[:2] == ids.shape, "the head must be given one vector per token"
        picked.append(args[0][rows, columns])
        return picked[0], *args[1:]

    fast = ids.device.type == "cpu" and ids.shape[1] > 1 and not getattr(model, "is_table", False)
    if model.training and torch.is_grad_enabled():
        # Checkpointed layers run again during the backward pass, outside of any mode, and must then do the same.
        fast = fast and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(pick)
    try:
        with fast_linear() if fast else contextlib.nullcontext():
            output = model(input_ids=ids, **kwargs)
    finally:
        if handle is not None:
            handle.remove()
    if handle is None:
        return output.logits[rows, columns], None, output
    return output.logits, picked[0], output


def logprobs_at(
    model: PreTrainedModel,
    ids: Tensor,
    rows: Tensor,
    columns: Tensor,
    tokens: Tensor,
    token_filter: TokenFilter,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Log-probabilities of given tokens, with no logits over the vocabulary kept.

    Args:
        model: A causal language model.
        ids: Right-padded sequences. Shape (b, L), int64.
        rows, columns: Where N tokens were chosen: the positions before them. Shape (N,), int64.
        tokens: The tokens. Shape (N,), int64.
        token_filter: How they were chosen.
        allowed: Which tokens could be; None: all.

    Returns:
        Log-probabilities (N,) in nats, float32, differentiable once; entropies (N,) in nats, float32, not
        differentiable; and the head's inputs (N, d). None for a model or a filter that this does not know:
        `forward_at` does.
    """
    if (
        allowed is not None
        or token_filter.restricts
        or not packed.supports(model, {})
        or model.lm_head.bias is not None
    ):
        return None
    hidden = packed.packed_hidden(model, ids, rows, columns)
    return *head_logprobs(hidden, model.lm_head.weight, tokens, token_filter.temperature), hidden


def response_logits(
    model: PreTrainedModel, ids: Tensor, lengths: Tensor, start: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor | None]:
    """Logits of the tokens of a response, differentiable. Runs in whatever mode (train or eval) the model is in.

    Args:
        model: A causal language model.
        ids: Right-padded sequences, prompt and response. Shape (b, L), int64.
        lengths: Number of real tokens, at least 1. Shape (b,), int64.
        start: First wanted position; ``prompt_length - 1`` gives the logits that choose response tokens 0..R-1.
            Shape (b,), int64.
        num_tokens: R.

    Returns:
        Logits (b, R, V) and the head's inputs (b, R, d), or None where the model has no output embedding. Positions
        beyond the last real token repeat it, so that nothing ever depends on the padding.
    """
    offsets = torch.arange(num_tokens, device=ids.device)
    columns = torch.minimum(start[:, None] + offsets, lengths[:, None] - 1)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    logits, hidden, _ = forward_at(model, ids, rows, columns)
    return logits, hidden


@torch.no_grad()
def response_logprobs(
    model: PreTrainedModel,
    prompt_ids: Sequence[Tensor | Sequence[int]],
    response_ids: Tensor,
    response_mask: Tensor,
    *,
    token_filter: TokenFilter | None = None,
    reference_model: PreTrainedModel | None = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Log-probability of every token of some responses, each given its prompt and the tokens before it.

    Args:
        model: A causal language model; run in eval mode and without gradients.
        prompt_ids: The B prompts, of any lengths from 1 on.
        response_ids: Right-padded responses. Shape (B, R), int64.
        response_mask: True where a token is real. Shape (B, R), bool.
        token_filter: How the tokens were sampled; None is the model's own distribution.
        reference_model: The model whose logits a top-k or top-p filter looks at; None is ``model`` itself.
        rows_per_chunk: Sequences per forward; None chooses by memory. Results do not depend on it.

    Returns:
        Log-probabilities in nats, 0 where ``response_mask`` is False. Shape (B, R), float32.
    """
    device = next(model.parameters()).device
    response_ids, response_mask = response_ids.to(device), response_mask.to(device)
    ids, lengths, prompt_lengths = join_responses(prompt_ids, response_ids, response_mask)
    if rows_per_chunk is None:
        budget = _MAX_LOGITS if device.type == "cpu" else 16 * _MAX_LOGITS
        rows_per_chunk = max(1, budget // (max(1, response_ids.shape[1]) * vocab_size(model)))
    token_filter = token_filter or TokenFilter()
    logprobs = torch.zeros(response_ids.shape, dtype=torch.float32, device=device)
    # Rows of like length share a chunk, so that little of it is padding.
    for chunk in lengths.argsort(descending=True).split(rows_per_chunk):
        row, step = response_mask[chunk].nonzero(as_tuple=True)
        if len(row) == 0:
            continue
        wanted = (ids[chunk, : int(lengths[chunk].max())], row[None], (prompt_lengths[chunk][row] - 1 + step)[None])
        targets = response_ids[chunk[row], step][None]
        with inference(model):
            logits = forward_at(model, *wanted)[0]
        if token_filter.uses_reference and reference_model is not None:
            with inference(reference_model):
                reference_logits = forward_at(reference_model, *wanted)[0]
        else:
            reference_logits = logits
        mask = token_filter.mask(reference_logits, keep=targets)
        logprobs[chunk[row], step] = token_filter.token_logprobs(logits, targets, mask)[0]
    return logprobs


def pad_sequences(
    sequences: Sequence[Tensor | Sequence[int]], *, pad_token_id: int = 0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Puts sequences of different lengths into one right-padded tensor.

    Args:
        sequences: b sequences of token ids.
        pad_token_id: What fills the rest. Any valid id: padding is told by the lengths, never by its id.
        device: Where the result lives; None is the sequences' own device.

    Returns:
        Ids (b, L) and lengths (b,), int64.
    """
    tensors = [torch.as_tensor(sequence, dtype=torch.long, device=device) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad_token_id)
    return ids, torch.tensor([len(tensor) for tensor in tensors], device=ids.device)


def join_responses(
    prompt_ids: Sequence[Tensor | Sequence[int]], response_ids: Tensor, response_mask: Tensor, *, pad_token_id: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Puts each response right behind its prompt.

    Args:
        prompt_ids: B prompts.
        response_ids: Right-padded responses. Shape (B, R), int64.
        response_mask: True where a token is real, which it is up to each row's last. Shape (B, R), bool.
        pad_token_id: What fills the rest.

    Returns:
        Ids (B, L) with L the longest prompt plus R, lengths (B,) of prompt and response, and prompt lengths (B,).
    """
    if len(prompt_ids) != len(response_ids):
        raise ValueError(
            f"prompt_ids and response_ids must have as many rows, got {len(prompt_ids)} and {len(response_ids)}"
        )
    prompts, prompt_lengths = pad_sequences(prompt_ids, pad_token_id=pad_token_id, device=response_ids.device)
    ids = torch.nn.functional.pad(prompts, (0, response_ids.shape[1]), value=pad_token_id)
    columns = prompt_lengths[:, None] + torch.arange(response_ids.shape[1], device=ids.device)
    ids.scatter_(1, columns, torch.where(response_mask, response_ids, pad_token_id))
    return ids, prompt_lengths + response_mask.sum(1), prompt_lengths


def right_padded(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the padding of a batch, on whichever side it is, to the right.

    Args:
        input_ids: Padded sequences. Shape (b, L), int64.
        attention_mask: Non-zero at real tokens. Shape (b, L).

    Returns:
        Ids (b, L) with the real tokens first and in order, and lengths (b,), int64.
    """
    real = attention_mask.bool()
    order = (~real).long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), real.sum(1)


def padded_logits(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Logits of a batch with padding on either side, each position where it was: the positions follow the mask.

    It works for every causal model, also those that take no ``position_ids``: the padding is moved to the right and
    the logits are moved back. Differentiable.

    Args:
        model: A causal language model.
        input_ids: Padded sequences. Shape (b, L), int64.
        attention_mask: Non-zero at real tokens. Shape (b, L).

    Returns:
        Logits, meaningless at padding. Shape (b, L, V).
    """
    real = attention_mask.bool()
    order = (~real).long().argsort(dim=1, stable=True)
    ids = input_ids.gather(1, order)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    return forward_at(model, ids, rows, order.argsort(dim=1))[0]
