"""The engine of last resort: no cache, the whole sequence anew for every token. Right for every causal model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .engine import Engine, inference
from .forward import forward_at, response_logits
from .load import vocab_size


class ModelEngine(Engine):
    """What the engines of a Hugging Face model share: their sizes, and the one-pass `logits_at`."""

    def __init__(self, model: PreTrainedModel, num_rows: int, max_tokens: int):
        """Allocates the rows.

        Args:
            model: A causal language model. Its weights are read at each call, never copied.
            num_rows: B.
            max_tokens: T; memory and (on CUDA) time of a decode grow with it.
        """
        head = model.get_output_embeddings()
        weight = next(model.parameters())
        super().__init__(
            num_rows,
            max_tokens,
            vocab_size(model),
            device=weight.device,
            model=model,
            hidden_size=None if head is None else head.weight.shape[1],
            hidden_dtype=weight.dtype,
        )

    def logits_at(self, ids: Tensor, lengths: Tensor, start: Tensor, num_tokens: int) -> Tensor:
        with inference(self.model):
            return response_logits(self.model, ids, lengths, start, num_tokens)[0]


class Recompute(ModelEngine):
    """The state is the ids and nothing else. B x T tokens of work for each decode."""

    def _prefill(self, rows: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        index = torch.arange(len(ids), device=self.device)
        logits, hidden, _ = forward_at(self.model, ids, index[:, None], lengths[:, None] - 1)
        return logits[:, 0], None if hidden is None else hidden[:, 0]

    def _decode(self, tokens: Tensor, active: Tensor, longest: int | None) -> tuple[Tensor, Tensor | None]:
        rows = active.nonzero()[:, 0]
        if not len(rows):  # the last step of a rollout on a GPU
            return self.state["logits"][: len(tokens)], None
        lengths = self.n[rows] + 1
        ids = self.state["ids"][rows, : int(lengths.max())]
        return tuple(
            None if moved is None else moved.new_zeros(len(tokens), moved.shape[1]).index_copy_(0, rows, moved)
            for moved in self._prefill(rows, ids, lengths)
        )
