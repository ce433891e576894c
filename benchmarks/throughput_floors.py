"""What the hardware allows: the rates of this machine, measured on the spot, and the least work that a case takes.

Floating-point operations are those that a model needs, not those that a program does: what is computed twice, or for
padding, counts once or not at all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from rlhf_gym.lm.matmul import linear

from .throughput_peers import now

Shape = dict[str, Any]
ITEM_SIZES = {"float32": 4, "bfloat16": 2}
# Cases of which all the time is decoding.
DECODING = ("rollout", "generate", "steps")
# TRL's PPO trains a value model of the policy's size beside the policy.
TRUNKS = {"trl-ppo": 2}


def machine_rates(threads: int, device: str = "cpu") -> dict[str, float]:
    """Matrix products in GFLOP/s by precision, by the faster of PyTorch's two libraries, and a copy in GB/s."""
    torch.set_num_threads(threads)
    rates = {}
    size = 2048 if device == "cpu" else 8192
    for dtype in (torch.float32, torch.bfloat16):
        pair = [torch.randn(size, size, device=device).to(dtype) for _ in range(2)]
        # MKL's float32 products reach half of what oneDNN's do on some processors: not a ceiling.
        seconds = min(_best(partial(product, *pair)) for product in (torch.matmul, linear))
        rates[f"{str(dtype).removeprefix('torch.')} GFLOP/s"] = 2 * size**3 / seconds / 1e9
    source, target = torch.ones(2**26, device=device), torch.empty(2**26, device=device)
    rates["copy GB/s"] = 2 * source.numel() * 4 / _best(lambda: target.copy_(source)) / 1e9
    return {name: round(rate, 1) for name, rate in rates.items()}


def _best(work: Callable[[], object], repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = now()
        work()
        times.append(now() - start)
    return min(times)


def forward_flops(shape: Shape, prompt_tokens: int, lengths: Sequence[int], num_trunks: int = 1) -> float:
    """Operations of one forward over prompts with their responses, in FLOP.

    A GPT-2 block of width d has 12 d^2 weights in matrix products, 4 d^2 in its attention and 8 d^2 behind it, and a
    weight is one multiplication and one addition: 24 d^2 per token and layer. A token that sees t tokens, itself
    included, takes 4 t d more per layer, for its scores and for their sum of values. The head takes 2 d V where its
    logits are asked for: once per response token. The last token of a response is not read by anyone. Look-ups, norms,
    activations, softmax and a value head are not counted.

    Args:
        shape: Of the model: ``layers``, ``width`` d and ``vocab_size`` V.
        prompt_tokens: Of every row.
        lengths: Response tokens of each row.
        num_trunks: How many models of this shape there are; only one of them has the head.

    Source:
        Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022 (PaLM), appendix B. Differs from both: attention is
        counted over the tokens that are seen and not over the whole context, the head only where it is needed.
    """
    width, total = shape["width"], 0.0
    for length in lengths:
        tokens = prompt_tokens + length - 1
        attention = 2 * width * tokens * (tokens + 1)
        total += num_trunks * shape["layers"] * (24 * width**2 * tokens + attention)
        total += 2 * width * shape["vocab_size"] * length
    return total


def update_flops(case: dict[str, Any], lengths: Sequence[int]) -> float:
    """Operations of an update: per epoch a forward, and a backward of twice its cost (PaLM, appendix B), in FLOP."""
    forward = forward_flops(case["shape"], case["prompt_tokens"], lengths, TRUNKS.get(case["case"], 1))
    return 3 * case["epochs"] * forward


def decode_bytes(shape: Shape, prompt_tokens: int, lengths: Sequence[int], rows: int, item_size: int) -> float:
    """Bytes that decoding has to read: the weights once per step, and for each token the keys and values before it.

    There are as many steps as the longest response has tokens, and more where the tokens of all do not fit into
    ``rows`` rows of so many steps. A small model stays in the processor's caches, which are faster than its memory.

    Args:
        shape: Of the model.
        prompt_tokens: Of every response.
        lengths: Tokens of each response.
        rows: Responses at a time.
        item_size: Bytes of a number.
    """
    layers, width = shape["layers"], shape["width"]
    weights = 12 * layers * width**2 + width * shape["vocab_size"]
    steps = max(max(lengths), math.ceil(sum(lengths) / rows))
    # The first token comes out of the prompt's pass; token t + 1 reads the prompt and t - 1 tokens.
    read = sum((length - 1) * prompt_tokens + (length - 1) * (length - 2) / 2 for length in lengths)
    return item_size * (steps * weights + 2 * layers * width * read)


def against_hardware(
    case: dict[str, Any], answers: Sequence[dict[str, Any]], rates: dict[str, float]
) -> dict[str, float]:
    """Medians of how close the measurements of a case came to what the hardware allows.

    Returns:
        ``update_utilisation``: model FLOP/s of the update over those of a matrix product. ``decode_floor_flops`` and
        ``decode_floor_bytes``: seconds that the arithmetic and the reads of decoding take at the measured rates.
        ``decode_over_floor``: how many times the larger of them decoding took. Each where it applies.
    """
    shape, prompt_tokens = case["shape"], case["prompt_tokens"]
    precision = "bfloat16" if case.get("bf16") else case.get("weights", "float32")
    flops, memory = rates[f"{precision} GFLOP/s"] * 1e9, rates["copy GB/s"] * 1e9
    found: dict[str, list[float]] = {}
    for each in answers:
        phases, lengths = each.get("phases", {}), each["lengths"]
        if "update" in phases:
            speed = update_flops(case, lengths) / phases["update"]
            found.setdefault("update_utilisation", []).append(speed / flops)
        decode = each["seconds"] if case["case"] in DECODING else phases.get("decode")
        if decode is not None:
            by_flops = forward_flops(shape, prompt_tokens, lengths) / flops
            by_bytes = decode_bytes(shape, prompt_tokens, lengths, case["rows"], ITEM_SIZES[precision]) / memory
            found.setdefault("decode_floor_flops", []).append(by_flops)
            found.setdefault("decode_floor_bytes", []).append(by_bytes)
            found.setdefault("decode_over_floor", []).append(decode / max(by_flops, by_bytes))
    return {name: statistics.median(values) for name, values in found.items()}
