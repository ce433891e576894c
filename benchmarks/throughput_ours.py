"""Our side of `throughput`: the same cases, answered in the same way as by `throughput_peers`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.agents import PPO, SB3PPO, TRPO
from rlhf_gym.lm import generate, make_engine
from rlhf_gym.rewards import classifier

from . import throughput_peers as sides


def environment(case: dict[str, Any], **settings: Any) -> Any:
    """A text environment of the case's shape; its reward is a random classifier of the same size where the case says so."""
    shape, rows = case["shape"], case["rows"]
    tokenizer = sides.tokenizer(shape["vocab_size"])
    reward: Any = len
    if case.get("reward_model"):
        scorer = sides.gpt2(shape, "score").to(getattr(torch, case["weights"])).eval()
        reward = classifier(scorer, tokenizer=tokenizer, reads="prompt+response", output="logit")
    prompts = sides.prompts(case, 4 * rows)
    return gym.make_vec(
        "rlhf_gym/TextGeneration-v0", num_envs=rows, model=sides.gpt2(shape), tokenizer=tokenizer,
        prompts=[" ".join(f"w{i}" for i in row) for row in prompts.tolist()], reward=reward, dtype=case["weights"],
        max_prompt_tokens=case["prompt_tokens"], max_response_tokens=case["response_tokens"], **settings,
    )  # fmt: skip


def ppo(case: dict[str, Any]) -> None:
    """A rollout and its update by our PPO, with a reference and a reward model of the policy's size."""
    envs = environment(case, kl_coef=0.05)
    agent = PPO(
        envs, seed=0, learning_rate=1e-6, num_epochs=case["epochs"], num_minibatches=1, audit_interval=0,
        micro_batch_size=case.get("micro_batch_size"), dtype=case["weights"],
    )  # fmt: skip
    agent.total_timesteps = 10**12
    rewards, evaluate = {"seconds": 0.0}, envs.unwrapped.process.scorer.score

    def timed_score(*arguments: Any) -> Any:
        start = time.perf_counter()
        scored = evaluate(*arguments)
        rewards["seconds"] += time.perf_counter() - start
        return scored

    envs.unwrapped.process.scorer.score = timed_score
    envs.reset(seed=0)

    def work() -> dict[str, Any]:
        rewards["seconds"], start = 0.0, time.perf_counter()
        rollout = agent.collector.collect()
        middle = time.perf_counter()
        agent.update(rollout)
        phases = {"rollout": middle - start, "of it reward": rewards["seconds"], "update": time.perf_counter() - middle}
        return {"tokens": rollout.num_tokens, "phases": phases}

    answer(work)


def rollout(case: dict[str, Any]) -> None:
    """Tokens with their log-probs and values; rows that finish are refilled with the next prompt."""
    model = sides.gpt2(case["shape"]).to(getattr(torch, case["weights"])).eval()
    eos = sides.eos_token_ids(case)
    prompts = list(sides.prompts(case, case.get("prompts", case["rows"])))
    engine = make_engine(model, case["rows"], case["prompt_tokens"] + case["response_tokens"])
    head = torch.nn.Linear(case["shape"]["width"], 1)
    generator = torch.Generator().manual_seed(2)

    def work() -> dict[str, Any]:
        engine.invalidate()
        with torch.no_grad():
            found = generate(
                engine, prompts, max_response_tokens=case["response_tokens"], eos_token_ids=eos,
                uniforms=torch.rand(len(prompts), case["response_tokens"], generator=generator),
                value_fn=lambda hidden: head(hidden.float())[:, 0],
            )  # fmt: skip
        return {"tokens": int(found.response_mask.sum())}

    answer(work)


def steps(case: dict[str, Any]) -> None:
    """``envs.step`` with random actions: the reference's log-prob of every action, from its cache."""
    envs = environment(case)
    rng = np.random.default_rng(0)
    envs.reset(seed=0)

    def work() -> dict[str, Any]:
        for _ in range(case["response_tokens"]):
            envs.step(rng.integers(2, case["shape"]["vocab_size"], case["rows"]))
        return {"tokens": case["response_tokens"] * case["rows"]}

    answer(work)


def sb3_rollout(case: dict[str, Any]) -> None:
    """A rollout of Stable-Baselines3's PPO with our policy, from its cache or, without, by whole forwards."""
    agent = SB3PPO(environment(case), seed=0, n_steps=case["response_tokens"])
    algorithm = agent.algorithm
    if not case["cache"]:
        policy = algorithm.policy
        policy._cached = lambda name, ids, lengths: policy._last(
            getattr(policy, name), {"input_ids": ids, "attention_mask": torch.arange(ids.shape[1]) < lengths[:, None]}
        )
    _, callback = algorithm._setup_learn(10**9)

    def work() -> dict[str, Any]:
        algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
        return {"tokens": case["rows"] * case["response_tokens"]}

    answer(work)


def trpo(case: dict[str, Any]) -> None:
    """An update of TRPO: ours, or sb3-contrib's own ``train`` on the same policy and rollout."""
    import sb3_contrib

    agent = TRPO(environment(case), seed=0, n_steps=case["response_tokens"], learning_rate=1e-3)
    algorithm = agent.algorithm
    if case["stock"]:
        algorithm.policy.lm.set_attn_implementation("eager")  # it needs a second derivative
    _, callback = algorithm._setup_learn(10**9)
    algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
    train: Callable[[], None] = sb3_contrib.TRPO.train.__get__(algorithm) if case["stock"] else algorithm.train

    def work() -> dict[str, Any]:
        train()
        return {"tokens": case["rows"] * case["response_tokens"]}

    answer(work)


def answer(work: Callable[[], dict[str, Any]]) -> None:
    """Does the work once for each line that comes."""
    sides.say("ready")
    while sys.stdin.readline():
        start = time.perf_counter()
        found = work()
        sides.tell(time.perf_counter() - start, **found)


CASES = {"ppo": ppo, "rollout": rollout, "steps": steps, "sb3-rollout": sb3_rollout, "trpo": trpo}


def main() -> None:
    """One case, given as JSON."""
    sides.take_answers()
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    CASES[case["case"]]({"weights": "float32"} | case)


if __name__ == "__main__":
    main()
