"""Small language models with random weights, and a tokenizer trained on texts: all that a start from nothing needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .lstm import LSTMConfig, LSTMForCausalLM

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
NUM_BYTES = 256
KINDS = ("transformer", "lstm")


def new_model(
    kind: str,
    tokenizer: Any,
    *,
    hidden_size: int = 128,
    num_layers: int | None = None,
    num_heads: int = 4,
    max_tokens: int = 256,
    seed: int = 0,
) -> PreTrainedModel:
    """A model for the tokens of a tokenizer.

    Args:
        kind: "transformer" (a Llama with tied embeddings) or "lstm" (the project's own).
        tokenizer: Says how many tokens there are, and which are special.
        hidden_size: Width; of a transformer a multiple of twice ``num_heads``.
        num_layers: None is 4 for a transformer and 1 for an LSTM.
        num_heads: Attention heads; an LSTM has none.
        max_tokens: Context of a transformer; that of an LSTM has no limit.
        seed: Of the weights.

    Raises:
        ValueError: If there is no such kind, a size is below 1 or the heads do not divide the width.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    num_layers = (4 if kind == "transformer" else 1) if num_layers is None else num_layers
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads, "max_tokens": max_tokens}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    shape = {"vocab_size": len(tokenizer), "hidden_size": hidden_size, "num_hidden_layers": num_layers, **special}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "lstm":
            model: PreTrainedModel = LSTMForCausalLM(LSTMConfig(**shape))
        else:
            if hidden_size % (2 * num_heads):
                raise ValueError(
                    f"hidden_size must be a multiple of 2 * num_heads = {2 * num_heads} (rotary positions come in pairs), "
                    f"got {hidden_size}"
                )
            config = LlamaConfig(
                **shape,
                intermediate_size=-(-8 * hidden_size // (3 * 32)) * 32,  # 8/3 of the width, as in Llama
                num_attention_heads=num_heads,
                max_position_embeddings=max_tokens,
                tie_word_embeddings=True,
                initializer_range=0.02,
            )
            model = LlamaForCausalLM(config)
    # top_k=0: `generate` would otherwise cut the distribution to its 50 best tokens, unasked.
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, **special)
    return model.eval()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it can write every text, and merges what comes often into one token.

    It puts <bos> before a text and nothing after it, so that an encoded prompt is ready to be continued.

    Args:
        texts: What to count in.
        vocab_size: Tokens in all: <pad>, <bos>, <eos>, the 256 bytes, and merges (fewer where the texts have no more).

    Raises:
        ValueError: If there is no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [PAD, BOS, EOS]
    if vocab_size < len(special) + NUM_BYTES:
        raise ValueError(
            f"vocab_size must be at least {len(special) + NUM_BYTES} (every byte and {', '.join(special)}), got {vocab_size}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, special.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
