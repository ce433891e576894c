"""What `throughput` compares: for each case its sides, ours first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

SMALL = {"layers": 4, "width": 256, "heads": 4, "vocab_size": 2048, "max_tokens": 128}
GPT2 = {"layers": 12, "width": 768, "heads": 12, "vocab_size": 50257, "max_tokens": 128}
TRL_PPO = "1.12.0"  # the last with PPO
TRL_GROUPS = "1.16.0"


@dataclass(frozen=True)
class Side:
    """One of those compared.

    Attributes:
        name: In the table.
        case: What it does; see `throughput_ours` and `throughput_peers`.
        peer: The TRL of the environment that it runs in; None is this project's own.
        alone: Whether its memory wants the machine for itself.
    """

    name: str
    case: dict[str, Any]
    peer: str | None = None
    alone: bool = False


def _ppo(shape: dict[str, Any], rows: int, prompt_tokens: int, response_tokens: int, alone: bool = False) -> list[Side]:
    sizes = {
        "shape": shape, "rows": rows, "prompt_tokens": prompt_tokens, "response_tokens": response_tokens, "epochs": 4,
        "reward_model": True,
    }  # fmt: skip
    tanh = shape | {"activation": "gelu_pytorch_tanh"}
    return [
        Side("ours, bfloat16 with float32 masters", sizes | {"case": "ppo", "weights": "bfloat16"}, alone=alone),
        Side("ours, float32", sizes | {"case": "ppo"}, alone=alone),
        Side("TRL 1.12, float32", sizes | {"case": "trl-ppo"}, TRL_PPO, alone),
        Side("TRL 1.12 as it ships: bf16=True", sizes | {"case": "trl-ppo", "bf16": True}, TRL_PPO, alone),
        Side(
            "TRL 1.12, tuned by hand: bfloat16 weights, tanh GELU, freed memory kept (updates round away)",
            sizes | {"case": "trl-ppo", "shape": tanh} | _TUNED, TRL_PPO, alone,
        ),
    ]  # fmt: skip


_TUNED = {"weights": "bfloat16", "keep_freed_memory": True}


def _groups(algorithm: str, group_size: int) -> list[Side]:
    """One step on 64 responses; the reward is the number of characters, by the same function on both sides."""
    sizes = _ROWS | {"group_size": group_size, "epochs": 1}
    theirs = sizes | {"case": f"trl-{algorithm}"}
    tanh = SMALL | {"activation": "gelu_pytorch_tanh"}
    return [
        Side("ours, bfloat16 with float32 masters", sizes | {"case": algorithm, "weights": "bfloat16"}),
        Side("ours, float32", sizes | {"case": algorithm}),
        Side(
            "TRL 1.16 as it ships: bf16=True, gradient checkpointing",
            theirs | {"bf16": True, "gradient_checkpointing": True}, TRL_GROUPS,
        ),
        Side("TRL 1.16, bf16=True", theirs | {"bf16": True}, TRL_GROUPS),
        Side("TRL 1.16, float32", theirs, TRL_GROUPS),
        Side(
            "TRL 1.16, tuned by hand: bfloat16 weights, tanh GELU, freed memory kept (updates round away)",
            theirs | {"shape": tanh} | _TUNED, TRL_GROUPS,
        ),
    ]  # fmt: skip


def _memory(shape: dict[str, Any]) -> list[Side]:
    """64 rows of 64 tokens, in micro-batches only where the name says so; the second epoch has the optimiser's state."""
    bfloat16, float32, theirs = (
        replace(side, case=side.case | {"epochs": 2}) for side in _ppo(shape, 64, 16, 48, alone=True)[:3]
    )
    return [
        float32,
        Side("ours, float32, micro-batches of 16", float32.case | {"micro_batch_size": 16}, alone=True),
        bfloat16,
        theirs,
    ]


def _growth(sizes: list[tuple[int, int]]) -> list[Side]:
    """Updates of one shape in several sizes (rows, response tokens), the smallest first; no peer."""
    shape = SMALL | {"max_tokens": 512}
    return [
        Side(f"{rows} rows of 16 + {tokens}", _ppo(shape, rows, 16, tokens)[1].case | {"reward_model": False})
        for rows, tokens in sizes
    ]


_ROWS = {"shape": SMALL, "rows": 64, "prompt_tokens": 16, "response_tokens": 32}
_RAGGED = _ROWS | {"response_tokens": 64, "mean_tokens": 16, "prompts": 256}
_CONTEXT = _ROWS | {"rows": 16, "prompt_tokens": 16, "response_tokens": 48}
_GPU = {
    "shape": GPT2 | {"device": "cuda"}, "rows": 512, "prompt_tokens": 32, "response_tokens": 64, "weights": "bfloat16",
}  # fmt: skip
_SIX = {"shape": SMALL | {"layers": 6, "width": 128}, "rows": 4, "prompt_tokens": 8, "response_tokens": 8}
CASES: dict[str, list[Side]] = {
    "ppo-small": _ppo(SMALL, 64, 16, 32),
    "ppo-gpt2": _ppo(GPT2, 16, 16, 32, alone=True),
    "grpo-small": _groups("grpo", 8),
    "rloo-small": _groups("rloo", 4),
    "rollout": [
        Side("ours: tokens, log-probs, values; float32", _ROWS | {"case": "rollout"}),
        Side("ours, bfloat16", _ROWS | {"case": "rollout", "weights": "bfloat16"}),
        Side("transformers.generate: tokens; float32", _ROWS | {"case": "generate"}, TRL_PPO),
        Side("transformers.generate, bfloat16", _ROWS | {"case": "generate", "weights": "bfloat16"}, TRL_PPO),
    ],
    "ragged": [
        Side("ours, rows refilled; float32", _RAGGED | {"case": "rollout"}),
        Side("ours, rows refilled; bfloat16", _RAGGED | {"case": "rollout", "weights": "bfloat16"}),
        Side("transformers.generate, padded; float32", _RAGGED | {"case": "generate"}, TRL_PPO),
        Side("transformers.generate, padded; bfloat16", _RAGGED | {"case": "generate", "weights": "bfloat16"}, TRL_PPO),
    ],
    "steps": [
        Side("envs.step with the cached reference", _ROWS | {"case": "steps"}),
        Side("transformers.generate", _ROWS | {"case": "generate"}, TRL_PPO),
    ],
    "sb3-rollout": [
        Side("SB3 PPO with our policy's cache", _CONTEXT | {"case": "sb3-rollout", "policy": "cached"}),
        Side("SB3 PPO without", _CONTEXT | {"case": "sb3-rollout", "policy": "ours"}),
        Side(
            "SB3 PPO, transformers' own forward of each observation",
            _CONTEXT | {"case": "sb3-rollout", "policy": "plain"},
        ),
    ],
    "trpo": [
        Side("ours", _SIX | {"case": "trpo", "stock": False}),
        Side("sb3-contrib's own update", _SIX | {"case": "trpo", "stock": True}),
    ],
    # Where the vocabulary is most of a model, and where the layers are.
    "memory-small": _memory(SMALL | {"vocab_size": GPT2["vocab_size"]}),
    "memory-gpt2": _memory(GPT2),
    # On a GPU.
    "ppo-gpu": _ppo(GPT2 | {"device": "cuda"}, 512, 32, 64, alone=True),
    "rollout-gpu": [
        Side("ours: tokens, log-probs, values; bfloat16", _GPU | {"case": "rollout"}),
        Side("transformers.generate: tokens; bfloat16", _GPU | {"case": "generate"}, TRL_PPO),
    ],
    "rows": _growth([(16, 32), (64, 32), (256, 32)]),
    "tokens": _growth([(32, 16), (32, 64), (32, 256)]),
}
GPU_CASES = {"ppo-gpu", "rollout-gpu"}
# TRL's side of the first takes 18 GiB of memory: not unasked.
ON_REQUEST = {"memory-gpt2"} | GPU_CASES
