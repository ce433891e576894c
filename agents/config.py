"""Settings that every batched agent has."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_gym.rules import (
    COUNT,
    COUNT_OR_NONE,
    GROUP,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_NONE,
    SHARE,
    check_fields,
    flag,
    make_config,
    one_of,
)

__all__ = [
    "COUNT",
    "COUNT_OR_NONE",
    "GROUP",
    "NOT_NEGATIVE",
    "POSITIVE",
    "POSITIVE_OR_NONE",
    "SHARE",
    "AgentConfig",
    "check_fields",
    "flag",
    "make_config",
    "one_of",
]


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """Settings of every batched agent. Counts are per rollout.

    Attributes:
        learning_rate: Of AdamW, at the start, > 0.
        lr_schedule: "linear" (to 0 at ``total_timesteps``) or "constant".
        num_rounds: Episodes per environment row in a rollout: num_envs * num_rounds responses are learnt from at once.
        num_epochs: Passes over each rollout.
        num_minibatches: Optimiser steps per pass.
        micro_batch_size: Responses per forward and backward; gradients are accumulated. None: the whole minibatch.
        max_grad_norm: Gradients are scaled down to this norm.
        ref_kl_target: Mean KL to the reference that an adaptive controller steers kl_coef towards, nats per response;
            None keeps kl_coef fixed.
        kl_horizon: Slowness of that controller, in episodes.
        dtype: "auto", "float32" or "bfloat16" (with float32 master weights).
        lora_rank: Rank of a LoRA adapter that is trained in place of the model. Its base is the environment's reference,
            whose weights it shares and whose precision it has. None: all weights are trained.
        gradient_checkpointing: Keep only the input of each block for the backward pass and compute the rest twice: a
            third more operations, and memory that hardly grows with the number of blocks. GPT-2 and Llama shapes.
        fsdp: Divide float32 weights, gradients and Adam's moments among the processes of a run, see `sharding.py`; the
            whole model has to fit on each device once more than the reference, in ``dtype``. All agents that take gradient
            steps, but NLPO. How a run is divided is no part of the saved agent.
    """

    learning_rate: float = 1e-4
    lr_schedule: str = "linear"
    num_rounds: int = 1
    num_epochs: int = 1
    num_minibatches: int = 1
    micro_batch_size: int | None = None
    max_grad_norm: float = 1.0
    ref_kl_target: float | None = None
    kl_horizon: float = 10_000.0
    dtype: str = "auto"
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "learning_rate": NOT_NEGATIVE,
                "lr_schedule": one_of("linear", "constant"),
                "num_rounds num_epochs num_minibatches": COUNT,
                "micro_batch_size lora_rank": COUNT_OR_NONE,
                "gradient_checkpointing fsdp": flag(),
                "max_grad_norm kl_horizon": POSITIVE,
                "ref_kl_target": POSITIVE_OR_NONE,
            },
        )
