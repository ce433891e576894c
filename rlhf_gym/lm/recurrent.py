"""The engine of recurrent models: the state of a row is that of its last token, whatever the row's length."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .engine import inference
from .forward import forward_at
from .recompute import ModelEngine


class Recurrent(ModelEngine):
    """Models whose ``past_key_values`` is a tuple of (layers, B, width) tensors of fixed size, as `LSTMForCausalLM` has it.

    A model says so by a true attribute ``has_fixed_size_cache``. The state holds them as ``past.i`` (B, layers, width).
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, max_tokens: int):
        super().__init__(model, num_rows, max_tokens)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with inference(model):
            past = model(input_ids=ids, use_cache=True).past_key_values
        for i, example in enumerate(past):
            layers, _, width = example.shape
            self.state[f"past.{i}"] = torch.zeros(num_rows, layers, width, dtype=example.dtype, device=self.device)
        self._past = [self.state[f"past.{i}"] for i in range(len(past))]

    def _prefill(self, rows: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        index = torch.arange(len(ids), device=self.device)[:, None]
        # The mask is needed here: the state that comes back has to be that of the last real token.
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        logits, hidden, output = forward_at(
            self.model, ids, index, lengths[:, None] - 1, attention_mask=mask.long(), use_cache=True
        )
        for state, past in zip(self._past, output.past_key_values, strict=True):
            state[rows] = past.transpose(0, 1)
        return logits[:, 0], None if hidden is None else hidden[:, 0]

    def _decode(self, tokens: Tensor, active: Tensor, longest: int | None) -> tuple[Tensor, Tensor | None]:
        states = [state[: len(tokens)] for state in self._past]
        past = tuple(state.transpose(0, 1).contiguous() for state in states)
        rows = self._rows[: len(tokens), None]
        logits, hidden, output = forward_at(
            self.model, tokens[:, None], rows, torch.zeros_like(rows), past_key_values=past, use_cache=True
        )
        for state, moved in zip(states, output.past_key_values, strict=True):
            torch.where(active[:, None, None], moved.transpose(0, 1), state, out=state)
        return logits[:, 0], None if hidden is None else hidden[:, 0]
