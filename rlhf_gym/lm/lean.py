"""An own forward for models made of GPT-2 or Llama blocks, for sampling: the same numbers, less work around them.

For small models most of a decode step goes into wrappers, masks and small operations; for larger ones into matrix
products that have a faster kernel. The blocks here are written once, for a flat list of tokens, and serve prefill and
decode alike: the two differ in how a token finds its keys. Weights are read from the model's modules at each call, so
that an update in place is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from .cached import RaggedKV
from .matmul import linear

# (layer, queries (N, heads, d), keys and values (N, key heads, d), scale) -> (N, heads * d)
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def gpt2_trunk(model: PreTrainedModel, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Final hidden states of a GPT-2. Shapes (N,), (N,) -> (N, d)."""
    trunk = model.transformer
    x = trunk.wte(tokens) + trunk.wpe(positions)
    for i, block in enumerate(trunk.h):
        attention, mlp = block.attn, block.mlp
        qkv = _linear(attention.c_attn, block.ln_1(x))
        q, k, v = qkv.view(len(x), 3, -1, attention.head_dim).unbind(1)
        x = x + _linear(attention.c_proj, attend(i, q, k, v, attention.scaling))
        x = x + _linear(mlp.c_proj, _activation(mlp.act, _linear(mlp.c_fc, block.ln_2(x))))
    return trunk.ln_f(x)


def llama_trunk(model: PreTrainedModel, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Final hidden states of a Llama, Mistral, Qwen2 or Qwen3. Shapes (N,), (N,) -> (N, d)."""
    trunk = model.model
    x = trunk.embed_tokens(tokens)
    cos, sin = (part[0][:, None] for part in trunk.rotary_emb(x, positions[None]))
    half = cos.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # the sign of rotate_half, once for all layers
    for i, layer in enumerate(trunk.layers):
        attention, mlp = layer.self_attn, layer.mlp
        h = _rms_norm(layer.input_layernorm, x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (_linear(projection, h).view(len(x), -1, attention.head_dim) for projection in projections)
        if hasattr(attention, "q_norm"):
            q, k = _rms_norm(attention.q_norm, q), _rms_norm(attention.k_norm, k)
        q, k = (torch.addcmul(part * cos, part.roll(half, -1), sin) for part in (q, k))
        x = x + _linear(attention.o_proj, attend(i, q, k, v, attention.scaling))
        h = _rms_norm(layer.post_attention_layernorm, x)
        x = x + _linear(mlp.down_proj, mlp.act_fn(_linear(mlp.gate_proj, h)) * _linear(mlp.up_proj, h))
    return _rms_norm(trunk.norm, x)


_TRUNKS = {
    "GPT2LMHeadModel": gpt2_trunk,
    "LlamaForCausalLM": llama_trunk,
    "MistralForCausalLM": llama_trunk,
    "Qwen2ForCausalLM": llama_trunk,
    "Qwen3ForCausalLM": llama_trunk,
}


class LeanKV(RaggedKV):
    """`RaggedKV` with the forwards of this file. Only for models that `supports` accepts."""

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether the model is one of those written here and nobody has put other parts or hooks into it."""
        if type(model).__name__ not in _TRUNKS or getattr(model.config, "add_cross_attention", False):
            return False
        return all(
            type(module).__module__.startswith(("transformers.", "torch.nn."))
            and not (isinstance(module, nn.Linear) and type(module) is not nn.Linear)
            and not (module._forward_hooks or module._forward_pre_hooks)
            for module in model.modules()
        )

    def __init__(self, model: PreTrainedModel, num_rows: int, max_tokens: int):
        super().__init__(model, num_rows, max_tokens)
        self._trunk = _TRUNKS[type(model).__name__]
        num_layers = sum(name.startswith("keys.") for name in self.state)
        self._keys = [self.state[f"keys.{i}"] for i in range(num_layers)]
        self._values = [self.state[f"values.{i}"] for i in range(num_layers)]
        kinds = getattr(model.config, "layer_types", None) or list(self._windows) * num_layers
        self._kinds = kinds[:num_layers]
        key_heads = self._keys[0].shape[1]
        self._first_columns = torch.arange(num_rows * key_heads, device=self.device).view(num_rows, key_heads)
        self._first_columns *= self._num_columns  # where each head of each row begins, in rows of width d

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
        return _linear(self.model.lm_head, hidden), hidden

    def _decode(self, tokens: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        positions, slots, width = self._where(active)
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
        return _linear(self.model.lm_head, hidden), hidden


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, of either of the two kinds there are. Shapes (N, in) -> (N, out)."""
    # GPT-2's Conv1D holds its weight the other way round.
    weight = module.weight if type(module) is nn.Linear else module.weight.t()
    return linear(x, weight, module.bias)


def _activation(module: nn.Module, x: Tensor) -> Tensor:
    """The tanh form of GELU in one operation; the model's own takes eight."""
    return F.gelu(x, approximate="tanh") if type(module) is NewGELUActivation else module(x)


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """A Llama norm in one operation; in other dtypes than float32 its order of roundings matters, so as it is."""
    if x.dtype != torch.float32:
        return module(x)
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
