"""The blocks of `blocks.py` over whole sequences, differentiable: what updates and teacher-forced passes run on.

Only tokens that something asked for depends on are computed: each sequence up to its last wanted position, without its
padding where that is worth the copying. The head reads the wanted positions alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from .blocks import apply_linear, attention_windows, is_known, trunk_of

# Attention needs rectangles, so what is packed is unpacked for it in each layer. That pays from so much padding on.
PADDING_WORTH_PACKING = 0.25
MOST_SCORES_PER_QUERY = 512  # that attention in bf16 on a CPU keeps


def supports(model: PreTrainedModel, kwargs: dict) -> bool:
    """Whether `packed_forward` computes what the model would: known blocks, nothing random, nothing asked for beyond."""
    if any(value is not None and value is not False for value in kwargs.values()) or not is_known(model):
        return False
    if model.config._attn_implementation != "sdpa":  # the caller wants another: a second derivative, say
        return False
    # Dropout, wherever it is set, is the model's own business.
    return not model.training or not any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or (isinstance(rate := getattr(module, "attention_dropout", 0.0), float) and rate > 0)
        for module in model.modules()
    )


def packed_forward(model: PreTrainedModel, ids: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the head's inputs at some positions.

    Args:
        model: One that `supports` accepts.
        ids: Right-padded sequences. Shape (b, L), int64.
        rows, columns: The wanted positions; broadcast against each other.

    Returns:
        Logits (..., V) and hidden states (..., d) of the broadcast shape, in the model's dtype.
    """
    hidden = packed_hidden(model, ids, rows, columns)
    return apply_linear(model.lm_head, hidden), hidden


def packed_hidden(model: PreTrainedModel, ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The head's inputs at some positions; see `packed_forward`."""
    rows, columns = torch.broadcast_tensors(rows, columns)
    num_rows = len(ids)
    lengths = torch.zeros(num_rows, dtype=torch.long, device=ids.device)
    lengths.scatter_reduce_(0, rows.flatten(), columns.flatten() + 1, "amax")
    width = int(lengths.max())
    num_tokens = int(lengths.sum())
    if num_tokens > (1 - PADDING_WORTH_PACKING) * num_rows * width:
        packing = None
        tokens, positions = ids[:, :width].flatten(), torch.arange(width, device=ids.device).repeat(num_rows)
        places = rows * width + columns
    else:
        real = torch.arange(width, device=ids.device) < lengths[:, None]
        packing = real.flatten().nonzero()[:, 0]
        tokens, positions = ids[:, :width].flatten()[packing], packing % width
        places = (lengths.cumsum(0) - lengths)[rows] + columns
    attend = _Attention(model, num_rows, width, packing, ids.device)
    return trunk_of(model)(model, tokens, positions, attend)[places]


class _Attention:
    """Causal attention within each of b sequences of up to L tokens, for queries, keys and values in one flat list."""

    def __init__(self, model: PreTrainedModel, num_rows: int, width: int, packing: Tensor | None, device: torch.device):
        config = model.config.get_text_config()
        windows = attention_windows(config)
        self.num_rows, self.width, self.packing = num_rows, width, packing
        kinds = getattr(config, "layer_types", None) or list(windows) * config.num_hidden_layers
        positions = torch.arange(width, device=device)
        distance = positions[:, None] - positions
        masks = {}
        for kind, window in windows.items():
            windowed = window is not None and window < width
            masks[kind] = (distance >= 0) & (distance < window) if windowed else None
        self.masks = [masks[kind] for kind in kinds]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (self._unpack(part).transpose(1, 2) for part in (q, k, v))  # (b, heads, L, d)
        mask = self.masks[layer]
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            out = _bfloat16_attention(q, k, v, mask, scale)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        out = out.transpose(1, 2).flatten(0, 1).flatten(1)
        return out if self.packing is None else out[self.packing]

    def _unpack(self, part: Tensor) -> Tensor:
        if self.packing is not None:
            whole = part.new_zeros(self.num_rows * self.width, *part.shape[1:])
            part = whole.index_copy(0, self.packing, part)
        return part.unflatten(0, (self.num_rows, self.width))


def _bfloat16_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Causal attention in bf16 on a CPU, (b, heads, L, d): PyTorch's fused kernel is several times as slow backward.

    Where the scores take no more room than what surrounds them, two batched matrix products; else the fused kernel in
    float32.
    """
    num_rows, heads, width, d = q.shape
    if width > MOST_SCORES_PER_QUERY:
        grouped = heads != k.shape[1]
        q, k, v = q.float(), k.float(), v.float()
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        return out.to(torch.bfloat16)
    if mask is None:
        mask = torch.ones(width, width, dtype=torch.bool).tril_()
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    groups = heads // k.shape[1]  # query heads that share a key head are rows of one product
    q, k, v = (part.reshape(-1, part.shape[2], d) for part in (q, k, v))
    q = q.reshape(len(k), groups * width, d)
    scores = torch.baddbmm(bias.repeat(groups, 1), q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v).view(num_rows, heads, width, d)
