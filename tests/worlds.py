"""Small worlds for the tests: a word tokenizer and random language models of several families over one vocabulary."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlhf_gym  # noqa: F401  (registers the ids)
from rlhf_gym.lm import LSTMConfig, LSTMForCausalLM

WORDS = ("good", "bad", "cat", "dog", "sat", "ran", "the", "a", "and", "very")
VOCABULARY = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
EOS, V = 2, len(VOCABULARY)
PROMPTS = ("the cat", "a dog sat", "the", "a very good dog")


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words split at spaces; no BOS is added, as with GPT-2."""
    raw = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def model(kind: str = "gpt2", seed: int = 0, *, std: float = 0.5, context: int = 32, **changes: Any) -> torch.nn.Module:
    """A random causal LM whose distributions are far from uniform (``std`` of the weights)."""
    torch.manual_seed(seed)
    ids = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=context, initializer_range=std, **ids, **changes
        )
        return GPT2LMHeadModel(config).eval()
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=context, initializer_range=std, **ids, **changes,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    assert kind == "lstm", kind
    return LSTMForCausalLM(
        LSTMConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, initializer_range=std, **ids)
    ).eval()


def goodness(completions: list[str]) -> list[float]:
    """Number of "good" minus number of "bad", a batched reward."""
    return [float(text.split().count("good") - text.split().count("bad")) for text in completions]


def make_envs(num_envs: int = 4, kind: str = "gpt2", **changes: Any) -> gym.vector.VectorEnv:
    """A small vector environment; ``changes`` override its arguments."""
    return gym.make_vec("rlhf_gym/TextGeneration-v0", num_envs=num_envs, **_arguments(kind, changes))


def make_env(kind: str = "gpt2", **changes: Any) -> gym.Env:
    """The same world as a single environment."""
    return gym.make("rlhf_gym/TextGeneration-v0", **_arguments(kind, changes))


def _arguments(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    arguments = {
        "model": None,
        "tokenizer": tokenizer(),
        "prompts": list(PROMPTS),
        "reward": goodness,
        "max_response_tokens": 6,
    } | changes
    if arguments["model"] is None:
        arguments["model"] = model(kind)
    return arguments
