"""One decode step as one CUDA graph: a launch instead of some hundred, with which a small model keeps a GPU idle."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

COLUMNS_PER_GRAPH = 64  # a graph looks at a fixed number of cached tokens; there is one for every so many


class StepGraphs:
    """A step of fixed shapes, captured when a length is first needed and replayed from then on.

    The step must change tensors in place that stay where they are, wait for nothing on the host, and do nothing at all
    where no row is active: so it is warmed up. Weights are read where they were at capture; when they have moved (a
    model in another precision, say) the step is captured anew.

    Args:
        step: ``step(tokens (B,), active (B,), longest)``.
        num_rows: B.
        max_tokens: The largest ``longest``.
        model: What the step reads its weights from.
        device: A CUDA device.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, int], None],
        num_rows: int,
        max_tokens: int,
        model: nn.Module,
        device: torch.device,
    ):
        self._step, self._max_tokens, self._model, self._device = step, max_tokens, model, device
        self._tokens = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._active = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._addresses: list[int] = []
        self._pool = torch.cuda.graph_pool_handle()  # they run one after another, so they may share their memory

    def __call__(self, tokens: Tensor, active: Tensor, longest: int | None) -> None:
        """The step, for no more than ``longest`` tokens in any row afterwards; None: ``max_tokens``."""
        longest = min(-(-(longest or self._max_tokens) // COLUMNS_PER_GRAPH) * COLUMNS_PER_GRAPH, self._max_tokens)
        addresses = [tensor.data_ptr() for tensor in chain(self._model.parameters(), self._model.buffers())]
        if addresses != self._addresses:
            self._graphs, self._addresses = {}, addresses
        if longest not in self._graphs:
            self._graphs[longest] = self._capture(longest)
        self._tokens.copy_(tokens)
        self._active.copy_(active)
        self._graphs[longest].replay()

    def _capture(self, longest: int) -> torch.cuda.CUDAGraph:
        self._active.zero_()
        with torch.cuda.device(self._device):
            # Libraries set themselves up at their first calls, which must not be captured.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self._step(self._tokens, self._active, longest)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._step(self._tokens, self._active, longest)
        return graph
