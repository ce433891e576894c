"""The blocks of GPT-2 and Llama models, written for a flat list of tokens: the same numbers, less work around them.

For small models most of the time goes into wrappers, masks and small operations; for larger ones into matrix products
that have a faster kernel. The blocks serve prefill and decode (`lean.py`) and updates (`packed.py`) alike: these differ
in how a token finds its keys. Weights are read from the model's modules at each call, so that an update in place is seen
at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from .matmul import linear

# (layer, queries (N, heads, d), keys and values (N, key heads, d), scale) -> (N, heads * d)
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def gpt2_trunk(model: PreTrainedModel, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Final hidden states of a GPT-2. Shapes (N,), (N,) -> (N, d)."""
    trunk = model.transformer
    x = trunk.wte(tokens) + trunk.wpe(positions)
    for i, block in enumerate(trunk.h):
        x = _run(_gpt2_block, block, x, i, attend)
    return trunk.ln_f(x)


def _gpt2_block(block: nn.Module, x: Tensor, i: int, attend: Attend) -> Tensor:
    attention, mlp = block.attn, block.mlp
    qkv = apply_linear(attention.c_attn, block.ln_1(x))
    q, k, v = qkv.view(len(x), 3, -1, attention.head_dim).unbind(1)
    x = x + apply_linear(attention.c_proj, attend(i, q, k, v, attention.scaling))
    return x + apply_linear(mlp.c_proj, apply_activation(mlp.act, apply_linear(mlp.c_fc, block.ln_2(x))))


def llama_trunk(model: PreTrainedModel, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Final hidden states of a Llama, Mistral, Qwen2 or Qwen3. Shapes (N,), (N,) -> (N, d)."""
    trunk = model.model
    x = trunk.embed_tokens(tokens)
    cos, sin = (part[0][:, None] for part in trunk.rotary_emb(x, positions[None]))
    half = cos.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # the sign of rotate_half, once for all layers
    for i, layer in enumerate(trunk.layers):
        x = _run(_llama_block, layer, x, i, attend, cos, sin)
    return apply_rms_norm(trunk.norm, x)


def _llama_block(layer: nn.Module, x: Tensor, i: int, attend: Attend, cos: Tensor, sin: Tensor) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    h = apply_rms_norm(layer.input_layernorm, x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (apply_linear(projection, h).view(len(x), -1, attention.head_dim) for projection in projections)
    if hasattr(attention, "q_norm"):
        q, k = apply_rms_norm(attention.q_norm, q), apply_rms_norm(attention.k_norm, k)
    half = cos.shape[-1] // 2
    q, k = (torch.addcmul(part * cos, part.roll(half, -1), sin) for part in (q, k))
    x = x + apply_linear(attention.o_proj, attend(i, q, k, v, attention.scaling))
    h = apply_rms_norm(layer.post_attention_layernorm, x)
    return x + apply_linear(mlp.down_proj, mlp.act_fn(apply_linear(mlp.gate_proj, h)) * apply_linear(mlp.up_proj, h))


def _run(forward: Callable[..., Tensor], block: nn.Module, *arguments: Any) -> Tensor:
    """A block; where its gradient checkpointing is on, only what went in is kept for the backward pass."""
    if torch.is_grad_enabled() and block.gradient_checkpointing:
        forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    # Where the weights are divided among processes, a block's hooks gather them before it runs and free them after.
    hooked = getattr(block, "run_hooked", None)
    return forward(block, *arguments) if hooked is None else hooked(forward, block, *arguments)


_TRUNKS = {
    "GPT2LMHeadModel": gpt2_trunk,
    "LlamaForCausalLM": llama_trunk,
    "MistralForCausalLM": llama_trunk,
    "Qwen2ForCausalLM": llama_trunk,
    "Qwen3ForCausalLM": llama_trunk,
}


def is_known(model: PreTrainedModel) -> bool:
    """Whether the model is one of those written here and nobody has put other parts or hooks into it."""
    if type(model).__name__ not in _TRUNKS or getattr(model.config, "add_cross_attention", False):
        return False
    return all(
        type(module).__module__.startswith(("transformers.", "torch.nn.", "torch.distributed.fsdp."))
        and not (isinstance(module, nn.Linear) and type(module) is not nn.Linear)
        # Of FSDP, which swaps the class of a block, there is one of each.
        and max(len(module._forward_hooks), len(module._forward_pre_hooks)) <= (1 if hasattr(module, "unshard") else 0)
        for module in model.modules()
    )


def trunk_of(model: PreTrainedModel) -> Callable[[PreTrainedModel, Tensor, Tensor, Attend], Tensor]:
    """The forward of a model that `is_known` accepts."""
    return _TRUNKS[type(model).__name__]


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Turns a model's gradient checkpointing on.

    Raises:
        ValueError: If it is none that `is_known` accepts: transformers' own checkpointing works in training mode only, and
            policies are never in it.
    """
    if not is_known(model):
        raise ValueError(
            "gradient_checkpointing must be False for a model that is no plain GPT-2, Llama, Mistral, Qwen2 or Qwen3 (with "
            f"lora_rank none is); got {type(model).__name__}. A smaller micro_batch_size saves memory as well"
        )
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    # With it comes a hook on the embeddings, for reentrant checkpoints, which ours are not; it would turn our blocks off.
    model.disable_input_require_grads()


def attention_windows(config) -> dict[str, int | None]:
    """How many tokens back each kind of attention layer sees, itself included; None is all of them.

    Args:
        config: The configuration of a text model.

    Returns:
        One entry per kind of layer in the model, under the name that its masks go by.
    """
    window = getattr(config, "sliding_window", None)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if not kinds:
        return {"attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, of either of the two kinds there are. Shapes (N, in) -> (N, out)."""
    # GPT-2's Conv1D holds its weight the other way round.
    weight = module.weight if type(module) is nn.Linear else module.weight.t()
    return linear(x, weight, module.bias)


def apply_activation(module: nn.Module, x: Tensor) -> Tensor:
    """The tanh form of GELU in one operation; the model's own takes eight."""
    return F.gelu(x, approximate="tanh") if type(module) is NewGELUActivation else module(x)


def apply_rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """A Llama norm in one operation; in other dtypes than float32 its order of roundings matters, so as it is."""
    if x.dtype != torch.float32:
        return module(x)
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
