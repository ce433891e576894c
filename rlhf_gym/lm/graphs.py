"""One decode step as one CUDA graph: a launch instead of some hundred, with which a small model keeps a GPU idle."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

COLUMNS_PER_GRAPH = 64  # a graph looks at a fixed number of cached tokens; there is one for every so many

# Graphs of a device run one after another and leave nothing in their memory, so those of all engines share it, and the
# stream of their capture. They must: what cuBLAS works in belongs to that stream, and PyTorch frees it when any graph of
# the stream goes (pytorch/pytorch#193402). In the common memory nobody but another graph can then write there.
_captured: dict[torch.device, weakref.WeakSet[torch.cuda.CUDAGraph]] = {}
_capture_stream = functools.cache(torch.cuda.Stream)  # of a device

# (tokens (B,), active (B,), longest)
Step = Callable[[Tensor, Tensor, int], None]


class StepGraphs:
    """A step of fixed shapes, captured when a length is first needed and replayed from then on.

    The step must change tensors in place that stay where they are, wait for nothing on the host, and do nothing at all
    where no row is active: so it is warmed up. Weights are read where they were at capture; when they have moved (a
    model in another precision, say) the step is captured anew.

    Args:
        num_rows: B.
        max_tokens: The largest ``longest``.
        model: What the step reads its weights from.
        device: A CUDA device.
    """

    def __init__(self, num_rows: int, max_tokens: int, model: nn.Module, device: torch.device):
        self._max_tokens, self._device = max_tokens, device
        self._tokens = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._active = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # Where modules keep their weights: to walk through a model for each token would take as long as the token.
        self._weights = [held for each in model.modules() for held in (each._parameters, each._buffers) if held]
        self._addresses: list[int] = []

    def __call__(self, step: Step, tokens: Tensor, active: Tensor, longest: int | None) -> None:
        """The step, always the same, for no more than ``longest`` tokens in any active row afterwards; None: T."""
        longest = min(-(-(longest or self._max_tokens) // COLUMNS_PER_GRAPH) * COLUMNS_PER_GRAPH, self._max_tokens)
        addresses = [tensor.data_ptr() for held in self._weights for tensor in held.values() if tensor is not None]
        if addresses != self._addresses:
            self._graphs, self._addresses = {}, addresses
        if longest not in self._graphs:
            self._active.zero_()
            self._graphs[longest] = self._capture(step, longest)
        self._tokens.copy_(tokens)
        self._active.copy_(active)
        self._graphs[longest].replay()

    def _capture(self, step: Step, longest: int) -> torch.cuda.CUDAGraph:
        living = _captured.setdefault(self._device, weakref.WeakSet())
        with torch.cuda.device(self._device):
            for _ in range(2):  # libraries set themselves up at their first calls, which must not be captured
                step(self._tokens, self._active, longest)
            graph = torch.cuda.CUDAGraph()
            pool = next(
                (other.pool() for other in living), None
            )  # that of graphs which are gone must not be used again
            # Other threads of the process, NCCL's among them, may go on with what they do.
            stream, mode = _capture_stream(self._device), "thread_local"
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
                step(self._tokens, self._active, longest)
        living.add(graph)
        return graph
