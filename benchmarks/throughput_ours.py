"""Our side of `throughput`: the same cases, answered in the same way as by `throughput_peers`."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import gymnasium as gym
import torch

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.agents import PPO

from . import throughput_peers as sides


def environment(case: dict[str, Any], **settings: Any) -> Any:
    """A text environment of the case's shape, its reward a random sequence classifier of the same size."""
    from rlhf_gym.rewards import classifier

    shape, rows = case["shape"], case["rows"]
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, shape["vocab_size"], (4 * rows, case["prompt_tokens"]), generator=generator)
    model, tokenizer = sides.gpt2(shape), sides.tokenizer(shape["vocab_size"])
    reward: Any = len
    if case.get("reward_model", True):
        scorer = sides.gpt2(shape, "score").to(getattr(torch, case.get("weights", "float32"))).eval()
        reward = classifier(scorer, tokenizer=tokenizer, reads="prompt+response", output="logit")
    return gym.make_vec(
        "rlhf_gym/TextGeneration-v0", num_envs=rows, model=model, tokenizer=tokenizer,
        prompts=[" ".join(f"w{i}" for i in row) for row in prompts.tolist()], reward=reward,
        max_prompt_tokens=case["prompt_tokens"], max_response_tokens=case["response_tokens"], **settings,
    )  # fmt: skip


def ppo(case: dict[str, Any]) -> None:
    """A rollout and its update by our PPO, with a reference and a reward model of the policy's size."""
    envs = environment(case, kl_coef=0.05, dtype=case.get("weights", "float32"))
    agent = PPO(
        envs, seed=0, learning_rate=1e-6, num_epochs=case["epochs"], num_minibatches=1, audit_interval=0,
        dtype=case.get("weights", "float32"),
    )  # fmt: skip
    agent.total_timesteps = 10**12

    def work() -> dict[str, Any]:
        phases, start = {}, time.perf_counter()
        rollout = agent.collector.collect(seed=None)
        phases["rollout"] = time.perf_counter() - start
        agent.update(rollout)
        phases["update"] = time.perf_counter() - start - phases["rollout"]
        return {"tokens": rollout.num_tokens, **phases}

    envs.reset(seed=0)
    answer(work)


def answer(work: Any) -> None:
    """Does the work once for each line that comes."""
    sides.say("ready")
    while sys.stdin.readline():
        start = time.perf_counter()
        found = work()
        sides.tell(time.perf_counter() - start, **found)


CASES = {"ppo": ppo}


def main() -> None:
    """One case, given as JSON."""
    sides.ANSWERS = os.dup(1)  # type: ignore[attr-defined]
    os.dup2(2, 1)
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case.get("threads", 2))
    CASES[case["case"]](case)


if __name__ == "__main__":
    main()
