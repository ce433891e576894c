"""Peak memory of each process in a PPO update of GPT-2 small's shape, with the training state divided or not.

    torchrun --nproc-per-node 2 -m rlhf_gym.benchmarks.divided_memory --out benchmarks/results/divided_memory.json
    torchrun --nproc-per-node 2 -m rlhf_gym.benchmarks.divided_memory --fsdp --out benchmarks/results/divided_memory.json

Resident memory as Linux counts it, in float32, of few and short responses: what is left is weights, gradients and
moments, beside a reference and some .4 GiB of program. Freed memory is given back in both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gymnasium as gym
import torch

import rlhf_gym  # noqa: F401 - registers the environments
from rlhf_gym.agents import PPO, parallel
from rlhf_gym.atomic import write_json
from rlhf_gym.memory import give_back_freed_memory

from .cells import provenance
from .throughput_cases import GPT2
from .throughput_peers import gpt2, peak_memory_mib, text_lengths, tokenizer

PHASES = ("rollout", "update", "gathering")


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fsdp", action="store_true", help="divide weights, gradients and moments")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file, beside those of the other")
    options = parser.parse_args(argv)
    give_back_freed_memory()
    parallel.start()
    peaks = _peaks(options.fsdp)
    found = dict(zip(PHASES, parallel.add_up_numbers(dict(zip(PHASES, peaks, strict=True))).values(), strict=True))
    mean = {phase: round(peak / parallel.size()) for phase, peak in found.items()}
    if parallel.rank():
        return
    name = "fsdp" if options.fsdp else "whole"
    print(f"{name}, {parallel.size()} processes, peak MiB of each: {mean}")
    if options.out:
        kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
        write_json(options.out, kept | {name: {"processes": parallel.size(), "peak_mib": mean, **provenance()}})


def _peaks(fsdp: bool) -> list[float]:
    """MiB of a rollout, of the update after it, and from there on until the weights are whole again."""
    words = [" ".join(f"w{2 + 100 * row + i}" for i in range(16)) for row in range(16)]
    envs = gym.make_vec(
        "rlhf_gym/TextGeneration-v0", num_envs=4, model=gpt2(GPT2), tokenizer=tokenizer(GPT2["vocab_size"]), prompts=words,
        reward=text_lengths, kl_coef=0.05, dtype="float32", max_prompt_tokens=16, max_response_tokens=8,
    )  # fmt: skip
    agent = PPO(envs, seed=0, num_epochs=1, num_minibatches=2, micro_batch_size=1, fsdp=fsdp, audit_interval=0)
    agent.learn(1)  # from here on there are moments
    update, peaks = agent.update, []

    def watched(rollout):
        peaks.append(_peak_since())
        metrics = update(rollout)
        peaks.append(_peak_since())
        return metrics

    agent.update = watched
    _peak_since()
    agent.learn(agent.num_timesteps + 1)
    return [*peaks, _peak_since()]


def _peak_since() -> float:
    """MiB at most since the last call."""
    peak = peak_memory_mib()
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    return peak


if __name__ == "__main__":
    main()
