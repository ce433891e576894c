"""Examples as a batch that the model reads: several in one row, without a trace of each other, and hardly any padding.

A packed row holds sequences one after the other, each with positions that count from 0; transformers takes the jumps for
the borders of its attention mask. `can_pack` asks the model itself whether that is so. A model that cannot (an LSTM has
no mask) gets one example in a row, and rows of like length together. What is learnt does not depend on either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_gym.lm.blocks import attention_windows
from rlhf_gym.lm.engine import inference
from rlhf_gym.lm.forward import forward_at

from .examples import Example

# Without packing, shorter rows than this share of the longest go into a batch of their own.
_LIKE_LENGTH = 0.75


class Layout(NamedTuple):
    """Some examples as the model reads them, N learnt tokens in all."""

    ids: Tensor
    """What is read, right-padded. Shape (b, L), int64."""
    position_ids: Tensor | None
    """Positions within each example; None where no row holds more than one. Shape (b, L), int64."""
    rows: Tensor
    """Row of the position that predicts each learnt token. Shape (N,), int64."""
    columns: Tensor
    """Its column. Shape (N,), int64."""
    targets: Tensor
    """The learnt tokens, example by example in the order given. Shape (N,), int64."""


def lay_out(examples: Sequence[Example], *, pack: bool, device: torch.device | str = "cpu") -> Layout:
    """Puts examples into rows as long as the longest of them.

    Args:
        examples: At least one.
        pack: Fill rows up with further examples where they fit.
        device: Where the tensors go.
    """
    lengths = [len(example.ids) - 1 for example in examples]  # nothing follows the last token: it is not read
    contents = first_fit(lengths, max(lengths)) if pack else [[i] for i in range(len(lengths))]
    ids = torch.zeros(len(contents), max(lengths), dtype=torch.long)
    positions = torch.arange(max(lengths)).repeat(len(contents), 1)
    places: list[tuple[int, int]] = [(0, 0)] * len(examples)
    for row, content in enumerate(contents):
        end = 0
        for i in content:
            begin, end = end, end + lengths[i]
            places[i] = (row, begin)
            ids[row, begin:end] = torch.tensor(examples[i].ids[:-1])
            positions[row, begin:] = torch.arange(max(lengths) - begin)  # what pads the row looks at its last example
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for example, (row, begin) in zip(examples, places, strict=True):
        rows += [row] * example.num_tokens
        columns += range(begin + example.num_context - 1, begin + len(example.ids) - 1)
        targets += example.ids[example.num_context :]
    shared = any(len(content) > 1 for content in contents)
    parts = [ids, positions if shared else None, *map(torch.tensor, (rows, columns, targets))]
    return Layout(*(None if part is None else part.to(device) for part in parts))


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fills bins: each item, the longest first, goes into the first bin that has room (at most 11/9 of the fewest bins).

    Example:
        >>> first_fit([2, 5, 3, 4], 5)
        [[1], [3], [2, 0]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, free in enumerate(room) if lengths[i] <= free), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(i)
        room[place] -= lengths[i]
    return bins


def micro_batches(examples: Sequence[Example], size: int | None, *, pack: bool) -> Iterator[list[Example]]:
    """Divides examples into batches for one forward each, the longest first.

    Args:
        examples: What is to be divided.
        size: Most examples of a batch; None: no limit.
        pack: Whether rows are packed. Otherwise a batch holds examples of like length only.
    """
    part: list[Example] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        full = size is not None and len(part) == size
        if part and (full or (not pack and len(example.ids) < _LIKE_LENGTH * len(part[0].ids))):
            yield part
            part = []
        part.append(example)
    yield part


def token_losses(model: PreTrainedModel, examples: Sequence[Example], *, pack: bool) -> Tensor:
    """-log p of every learnt token, differentiable; the LM head runs on no others.

    Args:
        model: A causal language model.
        examples: What it reads in one forward.
        pack: Whether several may share a row; only for a model that `can_pack`.

    Returns:
        Nats, example by example. Shape (N,), float32.
    """
    layout = lay_out(examples, pack=pack, device=next(model.parameters()).device)
    packed = {}
    if layout.position_ids is not None:
        packed = {"position_ids": layout.position_ids, "attention_mask": None}  # a mask would hide the borders
    logits = forward_at(model, layout.ids, layout.rows[None], layout.columns[None], use_cache=False, **packed)[0][0]
    return F.cross_entropy(logits.float(), layout.targets, reduction="none")


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model reads packed rows as it reads their examples alone: tried on two, longer than its window if it has one."""
    if getattr(model, "has_fixed_size_cache", False) or not getattr(model, "has_cache", True):
        return False  # recurrent models and tables know no mask
    config = model.config.get_text_config()
    windows = [window for window in attention_windows(config).values() if window is not None]
    length = min([12 + max(windows, default=0), getattr(config, "max_position_embeddings", None) or 12])
    ids = torch.randint(config.vocab_size, (2, length + 1), generator=torch.Generator().manual_seed(0)).tolist()
    # The long one comes first, so that the two short ones share a row.
    examples = [Example(tuple(row), 1, 0.0) for row in (ids[0], ids[1][: length // 2 + 1], ids[0][1 : length // 2 + 2])]
    try:
        with inference(model):
            alone = torch.cat([token_losses(model, [example], pack=False) for example in examples])
            packed = token_losses(model, examples, pack=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever a model does not support, in whatever way it says so
        return False
    # Of the losses' own spread, since a new model's losses are all alike.
    return bool((packed - alone).abs().max() <= 1e-3 * alone.std().clamp(min=1e-6))
