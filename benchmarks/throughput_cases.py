"""What `throughput` compares: for each case its sides, ours first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SMALL = {"layers": 4, "width": 256, "heads": 4, "vocab_size": 2048, "max_tokens": 128}
GPT2 = {"layers": 12, "width": 768, "heads": 12, "vocab_size": 50257, "max_tokens": 128}


@dataclass(frozen=True)
class Side:
    """One of those compared.

    Attributes:
        name: In the table.
        case: What it does; see `throughput_ours` and `throughput_peers`.
        peer: Whether it runs in the peers' environment.
        alone: Whether its memory wants the machine for itself.
    """

    name: str
    case: dict[str, Any]
    peer: bool = False
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
        Side("TRL 1.12, float32 (as it ships)", sizes | {"case": "trl-ppo"}, peer=True, alone=alone),
        Side("TRL 1.12, bf16=True", sizes | {"case": "trl-ppo", "bf16": True}, peer=True, alone=alone),
        Side(
            "TRL 1.12, tuned by hand: bfloat16 weights, tanh GELU (updates round away)",
            sizes | {"case": "trl-ppo", "weights": "bfloat16", "shape": tanh}, peer=True, alone=alone,
        ),
    ]  # fmt: skip


_ROWS = {"shape": SMALL, "rows": 64, "prompt_tokens": 16, "response_tokens": 32}
_RAGGED = _ROWS | {"response_tokens": 64, "mean_tokens": 16, "prompts": 256}
_CONTEXT = _ROWS | {"rows": 16, "prompt_tokens": 16, "response_tokens": 48}
_SIX = {"shape": SMALL | {"layers": 6, "width": 128}, "rows": 4, "prompt_tokens": 8, "response_tokens": 8}
CASES: dict[str, list[Side]] = {
    "ppo-small": _ppo(SMALL, 64, 16, 32),
    "ppo-gpt2": _ppo(GPT2, 16, 16, 32, alone=True),
    "rollout": [
        Side("ours: tokens, log-probs, values; float32", _ROWS | {"case": "rollout"}),
        Side("ours, bfloat16", _ROWS | {"case": "rollout", "weights": "bfloat16"}),
        Side("transformers.generate: tokens; float32", _ROWS | {"case": "generate"}, peer=True),
        Side("transformers.generate, bfloat16", _ROWS | {"case": "generate", "weights": "bfloat16"}, peer=True),
    ],
    "ragged": [
        Side("ours, rows refilled; float32", _RAGGED | {"case": "rollout"}),
        Side("transformers.generate, padded; float32", _RAGGED | {"case": "generate"}, peer=True),
    ],
    "steps": [
        Side("envs.step with the cached reference", _ROWS | {"case": "steps"}),
        Side("transformers.generate", _ROWS | {"case": "generate"}, peer=True),
    ],
    "sb3-rollout": [
        Side("SB3 PPO with our policy's cache", _CONTEXT | {"case": "sb3-rollout", "cache": True}),
        Side("SB3 PPO without", _CONTEXT | {"case": "sb3-rollout", "cache": False}),
    ],
    "trpo": [
        Side("ours", _SIX | {"case": "trpo", "stock": False}),
        Side("sb3-contrib's own update", _SIX | {"case": "trpo", "stock": True}),
    ],
    "memory": [
        Side("ours, float32", _ppo(GPT2, 64, 16, 48)[1].case | {"micro_batch_size": 16}, alone=True),
        Side("TRL 1.12, float32", _ppo(GPT2, 64, 16, 48)[2].case, peer=True, alone=True),
    ],
}
# How an update's time grows with the rows and with the length of responses; no peer.
for _rows in (16, 64, 256):
    CASES[f"rows-{_rows}"] = [
        Side(f"{_rows} rows of 16 + 32", _ppo(SMALL, _rows, 16, 32)[1].case | {"reward_model": False})
    ]
for _tokens in (16, 64, 256):
    CASES[f"tokens-{_tokens}"] = [
        Side(
            f"32 rows of 16 + {_tokens}",
            _ppo(SMALL | {"max_tokens": 512}, 32, 16, _tokens)[1].case | {"reward_model": False},
        )
    ]
