"""Our side of `throughput`: the same cases, answered in the same way as by `throughput_peers`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.agents import GRPO, PPO, RLOO, SB3PPO, TRPO
from rlhf_gym.agents import rollout as rollouts
from rlhf_gym.envs import episodes
from rlhf_gym.lm import generate, make_engine
from rlhf_gym.lm.forward import forward_at
from rlhf_gym.memory import keep_freed_memory
from rlhf_gym.rewards import classifier

from . import throughput_peers as sides


def environment(case: dict[str, Any], **settings: Any) -> Any:
    """A text environment of the case's shape, with a reference of it.

    The reward is a random classifier of the same size where the case says so, otherwise the number of characters.
    """
    shape, rows = case["shape"], case["rows"]
    tokenizer = sides.tokenizer(shape["vocab_size"])
    reward: Any = sides.text_lengths
    if case.get("reward_model"):
        scorer = sides.gpt2(shape, "score").to(getattr(torch, case["weights"])).eval()
        reward = classifier(scorer, tokenizer=tokenizer, reads="prompt+response", output="logit")
    prompts = sides.prompts(case, 4 * rows)
    return gym.make_vec(
        "rlhf_gym/TextGeneration-v0", num_envs=rows, model=sides.gpt2(shape), tokenizer=tokenizer,
        prompts=[" ".join(f"w{i}" for i in row) for row in prompts.tolist()], reward=reward, dtype=case["weights"],
        max_prompt_tokens=case["prompt_tokens"], max_response_tokens=case["response_tokens"], **settings,
    )  # fmt: skip


def update(case: dict[str, Any]) -> None:
    """A rollout and its update by one of our agents."""
    envs = environment(case, kl_coef=0.05)
    groups = {"group_size": case["group_size"]} if "group_size" in case else {}
    agent = AGENTS[case["case"]](
        envs, seed=0, learning_rate=1e-6, num_epochs=case["epochs"], num_minibatches=1, audit_interval=0,
        micro_batch_size=case.get("micro_batch_size"), dtype=case["weights"], **groups,
    )  # fmt: skip
    agent.total_timesteps = 10**12
    phases = sides.Phases()
    phases.time(rollouts, "generate", "decode")
    phases.time(episodes, "response_logprobs", "reference")
    phases.time(envs.unwrapped.process.scorer, "score", "reward")
    phases.time(agent, "update", "update")
    envs.reset(seed=0)

    def work() -> dict[str, Any]:
        rollout = agent.collector.collect()
        agent.update(rollout)
        return {"lengths": rollout.batch.response_mask.sum(1).tolist(), "phases": phases.take()}

    sides.answer(work)


def rollout(case: dict[str, Any]) -> None:
    """Tokens with their log-probs and values; rows that finish are refilled with the next prompt."""
    model = sides.gpt2(case["shape"]).to(getattr(torch, case["weights"])).eval()
    eos = sides.eos_token_ids(case)
    prompts = list(sides.prompts(case, case.get("prompts", case["rows"])))
    engine = make_engine(model, case["rows"], case["prompt_tokens"] + case["response_tokens"])
    head = torch.nn.Linear(case["shape"]["width"], 1).to(model.device)
    generator = torch.Generator().manual_seed(2)

    def work() -> dict[str, Any]:
        engine.invalidate()
        with torch.no_grad():
            found = generate(
                engine, prompts, max_response_tokens=case["response_tokens"], eos_token_ids=eos,
                uniforms=torch.rand(len(prompts), case["response_tokens"], generator=generator),
                value_fn=lambda hidden: head(hidden.float())[:, 0],
            )  # fmt: skip
        return {"lengths": found.response_mask.sum(1).tolist()}

    sides.answer(work)


def steps(case: dict[str, Any]) -> None:
    """``envs.step`` with random actions: the reference's log-prob of every action, from its cache."""
    # In this mode every step is a token: ended rows begin anew in the same one.
    envs = environment(case, autoreset_mode="same_step")
    rng = np.random.default_rng(0)
    envs.reset(seed=0)

    def work() -> dict[str, Any]:
        for _ in range(case["response_tokens"]):
            envs.step(rng.integers(2, case["shape"]["vocab_size"], case["rows"]))
        return {"lengths": [case["response_tokens"]] * case["rows"]}

    sides.answer(work)


def sb3_rollout(case: dict[str, Any]) -> None:
    """A rollout of Stable-Baselines3's PPO; policies that have no cache read each text anew for each token."""
    agent = SB3PPO(environment(case), seed=0, n_steps=case["response_tokens"])
    algorithm = agent.algorithm
    lm = algorithm.policy.lm

    def ours(name: str, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(len(ids)), lengths - 1
        return forward_at(lm, ids[:, : int(lengths.max())], *at, use_cache=False)[:2]

    def plain(name: str, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # What a features extractor around the model does with an observation; the head reads the last token alone.
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        output = lm.transformer(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden = output.last_hidden_state[torch.arange(len(ids)), lengths - 1]
        return lm.lm_head(hidden), hidden

    if case["policy"] != "cached":
        algorithm.policy._cached = {"ours": ours, "plain": plain}[case["policy"]]
    _, callback = algorithm._setup_learn(10**9)

    def work() -> dict[str, Any]:
        algorithm.collect_rollouts(algorithm.env, callback, algorithm.rollout_buffer, algorithm.n_steps)
        return {"lengths": [case["response_tokens"]] * case["rows"]}

    sides.answer(work)


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
        return {"lengths": [case["response_tokens"]] * case["rows"]}

    sides.answer(work)


AGENTS: dict[str, Any] = {"ppo": PPO, "grpo": GRPO, "rloo": RLOO}
CASES = dict.fromkeys(AGENTS, update) | {
    "rollout": rollout, "steps": steps, "sb3-rollout": sb3_rollout, "trpo": trpo,
}  # fmt: skip


def main() -> None:
    """One case, given as JSON."""
    sides.take_answers()
    keep_freed_memory()  # as the command line does
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    CASES[case["case"]]({"weights": "float32"} | case)


if __name__ == "__main__":
    main()
