"""Tiny random language models of many families, and the truth about them: plain forwards of one row at a time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_gym.lm import LSTMConfig, LSTMForCausalLM

V, CONTEXT, WINDOW = 37, 40, 5

_SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,  # far from uniform, so that a wrong context shows
}
_GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.3}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": 0}
_NEO = {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "max_position_embeddings": CONTEXT}

FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, _GPT2),
    "gpt2-scaled": (GPT2LMHeadModel, GPT2Config, _GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, _SHAPE),
    "mistral-window": (MistralForCausalLM, MistralConfig, _SHAPE | {"sliding_window": WINDOW}),
    "qwen2-mixed": (Qwen2ForCausalLM, Qwen2Config, _SHAPE | {"use_sliding_window": True, **_MIXED}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _SHAPE),
    "gemma2-mixed-softcap": (Gemma2ForCausalLM, Gemma2Config, _SHAPE | _MIXED | {"final_logit_softcapping": 5.0}),
    "gemma3-mixed": (Gemma3ForCausalLM, Gemma3TextConfig, _SHAPE | _MIXED | {"initializer_range": 0.08}),
    "granite-scaled-logits": (GraniteForCausalLM, GraniteConfig, _SHAPE | {"logits_scaling": 3.0}),
    "lstm": (LSTMForCausalLM, LSTMConfig, {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}),
    "gptneo": (GPTNeoForCausalLM, GPTNeoConfig, {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, **_NEO}),
}  # fmt: skip


def new_model(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A model of its own, for tests that change it."""
    model_class, config_class, shape = FAMILIES[family]
    torch.manual_seed(seed)
    return model_class(config_class(**_NO_TOKENS, **shape, **changes)).eval()


@functools.cache
def model(family: str) -> PreTrainedModel:
    """The same model for all tests."""
    return new_model(family)


@torch.no_grad()
def true_logits(model: PreTrainedModel, row: Tensor) -> Tensor:
    """Logits after each token of one sequence, with no padding, cache or engine. Shape (L,) -> (L, V)."""
    return model(input_ids=row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits[0].float()


def sequences(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (length,), generator=generator) for length in lengths]
