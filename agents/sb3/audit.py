"""Rollouts of Stable-Baselines3 as the audit (``agents/audit.py``) reads them."""

from __future__ import annotations

import numpy as np
import torch
from stable_baselines3.common.buffers import DictRolloutBuffer

from ..batch import Batch


def buffer_batch(
    buffer: DictRolloutBuffer, ref_logprobs: np.ndarray, scores: np.ndarray, max_response_tokens: int
) -> Batch:
    """The episodes of a full rollout buffer, and the parts of episodes at its two ends, as the rows of a batch.

    A part is a row whose prompt is the text so far. Leaving parts out would not do: whether an episode ends within the
    rollout depends on what was sampled.

    Args:
        buffer: T steps of N environment rows, as they were collected.
        ref_logprobs: log pi_ref of the actions; rows with NaN (steps that were spent on a reset) are left out. Shape
            (T, N), float32.
        scores: Score of the episodes that ended with a step, NaN elsewhere. Shape (T, N), float32.
        max_response_tokens: Length limit of an episode.

    Returns:
        Rows on the buffer's device. Scores are NaN but for episodes that began so early in the rollout that they ended
        in it however they went; values and rewards are left at 0.
    """
    begins = np.array(buffer.episode_starts, dtype=bool)
    whole = begins & (np.arange(len(begins))[:, None] <= len(begins) - max_response_tokens)
    begins[0] = True
    ids, lengths = buffer.observations["input_ids"], buffer.observations["attention_mask"].sum(-1)
    actions = buffer.actions.reshape(begins.shape).astype(np.int64)
    rows = [
        (start, stop, row)
        for row in range(begins.shape[1])
        for start, stop in zip(*_bounds(begins[:, row]), strict=True)
        if not np.isnan(ref_logprobs[start:stop, row]).any()
    ]
    width = max((stop - start for start, stop, _ in rows), default=0)
    shape = (len(rows), width)
    tables = {name: np.zeros(shape, np.float32) for name in ("logprobs", "values", "rewards", "kl")}
    response_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    texts = np.zeros((len(rows), ids.shape[-1] + 1), np.int64)
    row_scores = np.full(len(rows), np.nan, np.float32)
    for i, (start, stop, row) in enumerate(rows):
        steps = slice(start, stop), row
        n, last = stop - start, int(lengths[stop - 1, row])
        texts[i, :last], texts[i, last] = ids[stop - 1, row, :last], actions[stop - 1, row]
        response_ids[i, :n], mask[i, :n] = actions[steps], True
        tables["logprobs"][i, :n] = buffer.log_probs[steps]
        tables["kl"][i, :n] = buffer.log_probs[steps] - ref_logprobs[steps]
        if whole[start, row]:
            row_scores[i] = scores[stop - 1, row]
    prompt_lengths = np.array([lengths[start, row] for start, _, row in rows], dtype=np.int64)
    arrays = {
        "ids": texts[:, : int((prompt_lengths + mask.sum(1)).max(initial=0))],
        "prompt_lengths": prompt_lengths,
        "response_ids": response_ids,
        "response_mask": mask,
        "scores": row_scores,
        "ended_by_eos": np.zeros(len(rows), bool),  # nobody asks
        **tables,
    }
    return Batch(**{name: torch.as_tensor(array, device=buffer.device) for name, array in arrays.items()})


def _bounds(begins: np.ndarray) -> tuple[list[int], list[int]]:
    """First step of each episode or part of one, and the step after its last, given where they begin. (T,) bool."""
    starts = np.flatnonzero(begins).tolist()
    return starts, [*starts[1:], len(begins)]
