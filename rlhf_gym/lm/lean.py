"""Decoding with the blocks of `blocks.py`: the fast engine for GPT-2 and Llama shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .blocks import apply_linear, trunk_of
from .cached import RaggedKV
from .graphs import StepGraphs


class LeanKV(RaggedKV):
    """`RaggedKV` with a forward of our own. Only for models that `is_known` accepts."""

    def __init__(self, model: PreTrainedModel, num_rows: int, max_tokens: int):
        super().__init__(model, num_rows, max_tokens)
        self._trunk = trunk_of(model)
        num_layers = sum(name.startswith("keys.") for name in self.state)
        self._keys = [self.state[f"keys.{i}"] for i in range(num_layers)]
        self._values = [self.state[f"values.{i}"] for i in range(num_layers)]
        kinds = getattr(model.config, "layer_types", None) or list(self._windows) * num_layers
        self._kinds = kinds[:num_layers]
        key_heads = self._keys[0].shape[1]
        self._first_columns = torch.arange(num_rows * key_heads, device=self.device).view(num_rows, key_heads)
        self._first_columns *= self._num_columns  # where each head of each row begins, in rows of width d
        self._graphs: StepGraphs | None = None
        if self.device.type == "cuda" and not _looks_at_positions(model):
            self._graphs = StepGraphs(num_rows, max_tokens, model, self.device)

    def _advance(self, tokens: Tensor, active: Tensor, longest: int | None) -> None:
        step = super()._advance
        if self._graphs is None:
            step(tokens, active, longest)
        else:
            self._graphs(step, tokens, active, longest)

    def _prefill(self, rows: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        num_sequences, width = ids.shape
        positions = torch.arange(width, device=self.device)
        masks = {}
        for kind, window in self._windows.items():
            windowed = window is not None and window < width
            distance = positions[:, None] - positions
            masks[kind] = (distance >= 0) & (distance < window) if windowed else None

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            q, k, v = (part.unflatten(0, (num_sequences, width)).transpose(1, 2) for part in (q, k, v))
            self._keys[i][rows, :, :width] = k
            self._values[i][rows, :, :width] = v
            mask = masks[self._kinds[i]]
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            return out.transpose(1, 2).flatten(0, 1).flatten(1)

        hidden = self._trunk(self.model, ids.flatten(), positions.repeat(num_sequences), attend)
        last = torch.arange(num_sequences, device=self.device) * width + lengths - 1
        hidden = hidden[last]
        return apply_linear(self.model.lm_head, hidden), hidden

    def _decode(self, tokens: Tensor, active: Tensor, longest: int | None) -> tuple[Tensor, Tensor]:
        positions, slots, width = self._where(active, longest)
        count, key_heads = len(tokens), self._first_columns.shape[1]
        slots = (self._first_columns[:count] + slots[:, None]).flatten()
        lowest = torch.finfo(self._keys[0].dtype).min
        bias = {}  # added to the scores: (k * key heads, 1, width)
        for kind, window in self._windows.items():
            hidden = self._columns[:width] > positions[:, None]
            if window is not None:
                hidden |= self._columns[:width] <= positions[:, None] - window
            added = torch.zeros_like(hidden, dtype=self._keys[0].dtype).masked_fill_(hidden, lowest)
            bias[kind] = added.repeat_interleave(key_heads, 0)[:, None]

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            d = k.shape[-1]
            for cache, new in ((self._keys[i], k), (self._values[i], v)):
                cache.view(-1, d).index_copy_(0, slots, new.reshape(-1, d))
            keys, values = (cache[i][:count].flatten(0, 1)[:, :width] for cache in (self._keys, self._values))
            # Query heads that share a key head are rows of one product: keys are never repeated.
            q = q.reshape(len(keys), -1, d)
            scores = torch.baddbmm(bias[self._kinds[i]], q, keys.transpose(1, 2), alpha=scale)
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
            return torch.bmm(weights, values).view(count, -1)

        hidden = self._trunk(self.model, tokens, positions, attend)
        return apply_linear(self.model.lm_head, hidden), hidden


def _looks_at_positions(model: PreTrainedModel) -> bool:
    """Whether the frequencies of rotary positions depend on how far they go, which the host has to be told each time."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    return getattr(rotary, "rope_type", "default") in ("dynamic", "longrope")
