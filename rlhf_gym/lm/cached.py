"""The key-value cache in which every row has a length of its own.

The static cache of transformers has one length for all rows, so a row that has finished would have to wait for the
others. Here each row writes its next key and value at its own position and sees the columns up to it: a finished row is
refilled with the next prompt while the others go on. Shapes never change, whatever the rows do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from .blocks import attention_windows
from .engine import inference
from .forward import forward_at
from .recompute import ModelEngine


class _RowLayer(StaticLayer):
    """One layer of the cache, as the model's own attention sees it while it decodes one token per row."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.is_initialized = keys, values, True
        self.rows = torch.arange(len(keys), device=keys.device)
        self.columns = self.rows  # where each of the first rows writes
        self.width = keys.shape[2]  # how many columns can be visible to any row

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        count = len(self.columns)
        self.keys[self.rows[:count], :, self.columns] = key_states[:, :, 0]
        self.values[self.rows[:count], :, self.columns] = value_states[:, :, 0]
        return self.keys[:count, :, : self.width], self.values[:count, :, : self.width]


class RaggedKV(ModelEngine):
    """Attention models of transformers, full and sliding-window, run through their own forward.

    The state holds ``keys.i`` and ``values.i`` (B, heads, columns, head width) of layer i. There is at least one
    column more than T: rows that do not move write there, and for every row its weight is 0.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, max_tokens: int):
        super().__init__(model, num_rows, max_tokens)
        # A multiple of 8, as attention kernels like it.
        self._num_columns = (max_tokens + 8) // 8 * 8
        self._columns = torch.arange(self._num_columns, device=self.device)
        self._windows = attention_windows(model.config.get_text_config())
        layers = []
        for i, (keys, values) in enumerate(_cache_of_one_token(model)):
            for name, example in (("keys", keys), ("values", values)):
                shape = (num_rows, example.shape[1], self._num_columns, example.shape[3])
                self.state[f"{name}.{i}"] = torch.zeros(shape, dtype=example.dtype, device=example.device)
            layers.append(_RowLayer(self.state[f"keys.{i}"], self.state[f"values.{i}"]))
        self._cache = Cache(layers=layers)

    def _prefill(self, rows: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        # Without a config every layer keeps all its tokens; with one, sliding layers would throw the oldest away.
        cache = DynamicCache()
        index = torch.arange(len(ids), device=self.device)
        logits, hidden, _ = forward_at(
            self.model, ids, index[:, None], lengths[:, None] - 1, past_key_values=cache, use_cache=True
        )
        for i, layer in enumerate(cache.layers):
            self.state[f"keys.{i}"][rows, :, : ids.shape[1]] = layer.keys
            self.state[f"values.{i}"][rows, :, : ids.shape[1]] = layer.values
        return logits[:, 0], None if hidden is None else hidden[:, 0]

    def _decode(self, tokens: Tensor, active: Tensor, longest: int | None) -> tuple[Tensor, Tensor | None]:
        positions, slots, width = self._where(active, longest)
        for layer in self._cache.layers:
            layer.columns, layer.width = slots, width
        rows = self._rows[: len(tokens), None]
        logits, hidden, _ = forward_at(
            self.model,
            tokens[:, None],
            rows,
            torch.zeros_like(rows),
            attention_mask=self._masks(positions, width),
            position_ids=positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return logits[:, 0], None if hidden is None else hidden[:, 0]

    def _where(self, active: Tensor, longest: int | None) -> tuple[Tensor, Tensor, int]:
        """Position of each of the first rows' new token, the column it writes, and how many columns are in use."""
        n = self.n[: len(active)]
        # A row that does not move must not be changed either: it writes into the spare column.
        slots = torch.where(active, n, self.max_tokens)
        # On a CPU the columns that no active row has reached are left out; a GPU would have to be waited for.
        on_cpu = self.device.type == "cpu"
        width = longest or (int((n * active).max()) + 1 if on_cpu else self._num_columns)
        if not on_cpu:
            width = min(-(-width // 8) * 8, self._num_columns)
        if on_cpu and self.model.dtype == torch.bfloat16 and 2 * width > self._num_columns:
            width = self._num_columns  # its matrix products copy what is no whole tensor
        return n.clamp(max=self.max_tokens - 1), slots, width

    def _masks(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """What each row may see, (B, 1, 1, width); one such mask per kind of layer where the model mixes them."""
        columns = self._columns[:width]
        eager = self.model.config._attn_implementation == "eager"
        masks = {}
        for kind, window in self._windows.items():
            visible = columns <= positions[:, None]
            if window is not None:
                visible &= columns > positions[:, None] - window
            masks[kind] = visible[:, None, None, :]
            if eager:  # it adds its mask to the scores; the others take booleans
                dtype = self.model.dtype
                masks[kind] = torch.where(masks[kind], 0.0, torch.finfo(dtype).min).to(dtype)
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _cache_of_one_token(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of a one-token forward: the only sure way to know the shapes and dtypes of a model's cache."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    cache, index = DynamicCache(), torch.zeros(1, 1, dtype=torch.long, device=ids.device)
    with inference(model):
        forward_at(model, ids, index, index, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]
