"""Train the language model that ships with the tiny reviews: ``python -m rlhf_gym.tasks.tiny_reviews.train --out DIR``.

Every review is drawn fresh from the grammar, so there is no training set to overfit, and the grammar's own perplexity
is the floor: what is above it is what the model has not learnt. Same seed and machine, same bytes. Beside the model it
writes ``provenance.json``: how it was made, the hash of the weights, and how far from the floor it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_gym.lm.scratch import new_model

from . import reviews
from .grammar import END
from .task import MODEL_DIR, gold_sentiment, grammaticality, load_prompts

PAD, BOS, UNK = "<pad>", "<bos>", "<unk>"
CONTEXT = 64
SEED = 0
NUM_STEPS = 6000
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WARMUP_STEPS = 200
# Fixed, because the order of sums depends on it. A second thread gains a third here and loses a lot on a busy machine.
NUM_THREADS = 1


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the grammar's vocabulary: one token per word, decoding joins them by single spaces.

    It lower-cases and splits off punctuation, so that a person's "The lid is great." is read; it puts <bos> before a
    text and nothing after it, so that an encoded prompt is ready to be continued.
    """
    words = [PAD, BOS, END, UNK, *reviews.GRAMMAR.vocabulary]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    core.normalizer = tokenizers.normalizers.Lowercase()
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Punctuation("isolated")]
    )
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, words.index(BOS))]
    )
    # Without a decoder, tokens are joined by single spaces, which is how the grammar writes.
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        unk_token=UNK,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A Llama of 0.8 million parameters with random weights."""
    model = new_model(
        "transformer", tokenizer, hidden_size=128, num_layers=4, num_heads=4, max_tokens=CONTEXT, seed=seed
    )
    model.generation_config.max_new_tokens = 32
    return model


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """<bos> text <eos> as ids, right-padded with the pad id. Shape (B, L), int64."""
    ids = tokenizer([f"{text} {END}" for text in texts], padding=True, return_attention_mask=False)["input_ids"]
    return torch.tensor(ids)


def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """-log p of every token after <bos>, 0 on padding. Shape (B, L - 1), float32."""
    # Right padding and causal attention: nothing real ever looks at a pad, so no mask is needed.
    logits = model(input_ids=ids[:, :-1]).logits
    # Here the pad id is used for nothing else (the grammar ends in <eos>), so it can say what to ignore.
    losses = F.cross_entropy(
        logits.transpose(1, 2).float(), ids[:, 1:], reduction="none", ignore_index=model.config.pad_token_id
    )
    return losses


def batches(rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, num_batches: int) -> Iterator[Tensor]:
    """Fresh reviews as batches of ids; pools of 16 batches are sorted by length, which saves a third of the padding."""
    while num_batches > 0:
        pool_size = min(16, num_batches)
        texts = sorted((reviews.sample(rng) for _ in range(pool_size * BATCH_SIZE)), key=lambda t: len(t.split()))
        for index in rng.permutation(pool_size):
            yield encode(texts[index * BATCH_SIZE : (index + 1) * BATCH_SIZE], tokenizer)
        num_batches -= pool_size


def train(num_steps: int, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The trained model, in eval mode, with its tokenizer."""
    rng = np.random.default_rng(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed).train()
    # No weight decay: nothing can be overfitted, and the logits of words that must not come have to go far down.
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    with tqdm(batches(rng, tokenizer, num_steps), total=num_steps, unit="step") as progress:
        for step, ids in enumerate(progress):
            warmup = min(1.0, (step + 1) / WARMUP_STEPS)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))
            losses = token_losses(model, ids)
            loss = losses.sum() / (ids[:, 1:] != tokenizer.pad_token_id).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0:
                progress.set_postfix(perplexity=f"{loss.exp().item():.3f}")
    return model.eval(), tokenizer


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, num_reviews: int = 2000, seed: int = 1
) -> dict[str, float]:
    """How good the model is, on reviews and continuations that training never saw.

    Returns:
        "perplexity" of the model and "true_perplexity" of the grammar, per token with <eos>, on the same fresh reviews;
        "grammatical", the share of the model's continuations of the test prompts that the grammar can produce whole,
        and "sentiment", their mean gold sentiment (a perfect model: 1 and 0.5).
    """
    rng = np.random.default_rng(seed)
    texts = [reviews.sample(rng) for _ in range(num_reviews)]
    losses = [token_losses(model, encode(texts[i : i + 250], tokenizer)).sum() for i in range(0, num_reviews, 250)]
    num_tokens = sum(len(text.split()) + 1 for text in texts)
    torch.manual_seed(seed)
    prompts, completions = [], []
    for row in load_prompts("test"):
        ids = tokenizer(row["prompt"], return_tensors="pt", return_token_type_ids=False)
        num_samples = max(1, num_reviews // 64)
        output = model.generate(**ids, num_return_sequences=num_samples, max_new_tokens=32)
        prompts += [row["prompt"]] * num_samples
        completions += tokenizer.batch_decode(output[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return {
        "perplexity": math.exp(torch.stack(losses).sum().item() / num_tokens),
        "true_perplexity": reviews.true_perplexity(texts),
        "grammatical": float(np.mean(grammaticality(prompts, completions))),
        "sentiment": float(np.mean(gold_sentiment(prompts, completions))),
    }


def main() -> None:
    """Train, save, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="directory for the model (default: the package's)")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()

    torch.set_num_threads(NUM_THREADS)
    start = time.perf_counter()
    model, tokenizer = train(args.steps, args.seed)
    seconds = time.perf_counter() - start
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record: dict[str, Any] = {
        "made_by": "python -m rlhf_gym.tasks.tiny_reviews.train",
        "sha256": hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest(),
        "seed": args.seed,
        "steps": args.steps,
        "batch_size": BATCH_SIZE,
        "parameters": model.num_parameters(),
        "train_seconds": round(seconds),
        "threads": NUM_THREADS,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "measured": {name: round(value, 4) for name, value in measure(model, tokenizer).items()},
    }
    (args.out / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
