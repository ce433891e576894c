"""Trains agents for `test_sharding`, in one process when imported and divided among several under ``torchrun``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import lm_models
import worlds
from torch.distributed.tensor import DTensor

from rlhf_gym.agents import PPO, parallel
from rlhf_gym.cli import main

# 15 rows in 3 minibatches of 5, of which the processes have 3 and 2: 2 and 1 micro-batches.
SETTINGS = {"num_epochs": 2, "num_minibatches": 3, "micro_batch_size": 2, "learning_rate": 1e-3, "vf_coef": 0.5}
MODELS: dict[str, dict] = {
    "gpt2": {},  # embeddings tied to the head
    "llama": {"gradient_checkpointing": True},
    "gemma2-mixed-softcap": {"num_epochs": 1},  # runs through its own forward, not through our blocks
    "qwen3": {"dtype": "bfloat16"},
}
CHANGES = {"gpt2": {"n_inner": 25}, "llama": {}}  # 25 biases, of which the processes hold 13 and 12
HALF, WHOLE = 60, 120  # tokens
TRAIN = (
    "train --model tiny-reviews --prompts tiny-reviews --kl-coef 0.05 --num-envs 6 --eval-episodes 4 --no-progress-bar"
)
TRAIN += " --max-prompt-tokens 24 --max-response-tokens 12 --total-timesteps 200 --config num_minibatches=1"


class Watched(PPO):
    """PPO that looks at what it holds while it learns."""

    def update(self, rollout):
        assert not any(isinstance(weight, DTensor) for weight in self.policy.parameters())
        return super().update(rollout)

    def loss(self, batch, normaliser):
        found = super().loss(batch, normaliser)
        blocks = [m for m in self.policy.modules() if type(m).__name__.startswith("FSDP") and m is not self.policy]
        assert len(blocks) == (2 if self.is_divided else 0)
        # After the forward pass no block's weights are whole any more.
        assert all(isinstance(weight, DTensor) for block in blocks for weight in block.parameters())
        return found


def make_envs(family: str):
    model = worlds.model(family, **CHANGES[family]) if family in CHANGES else lm_models.new_model(family)
    return worlds.make_envs(15, model=model, kl_coef=0.05)


def agent_of(family: str, fsdp: bool = False, seed: int = 3) -> PPO:
    return Watched(make_envs(family), seed=seed, fsdp=fsdp, **SETTINGS | MODELS[family])


calls = 0


def interrupting(completions: list[str], **_) -> list[float]:
    """A reward in the middle of which Ctrl-C is pressed, in the first process of several only."""
    global calls
    calls += 1
    if calls == 2 and os.environ.get("RANK") == "0":  # the first is of the evaluation before the training
        os.kill(os.getpid(), signal.SIGINT)
    return [len(text) / 20 for text in completions]


def held(agent: PPO) -> int:
    """Numbers of the training state that this process holds."""
    states = (value for state in agent.optimizer.optimizer.state.values() for value in state.values())
    tensors = [tensor for tensor in (*agent.optimizer.masters, *states) if tensor.dim()]
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in tensors)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    parallel.start()
    for family in MODELS:
        agent = agent_of(family, fsdp=True).learn(HALF)
        agent.save(folder / "two" / family)
        whole = 3 * sum(weight.numel() for weight in agent.policy.parameters())
        print(f"held {held(agent) / whole:.2f}\n", end="", flush=True)
        loaded = Watched.load(folder / "one" / family, make_envs(family), fsdp=True)
        loaded.save(folder / "again" / family)
        loaded.learn(WHOLE).save(folder / "on" / family)
    main([*TRAIN.split(), "--reward", f"{__file__}:interrupting", "--out", str(folder / "run"), "--fsdp"])
