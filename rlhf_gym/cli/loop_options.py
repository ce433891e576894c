"""Options of ``rlhf-gym loop``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Rounds of sampling, judging, fitting a reward model and training against it; the same command goes on."""

    out: str
    """Directory for everything, for instance runs/loop; what is finished there is not made again."""
    annotators: Literal["simulated", "people"] = "simulated"
    """Who compares: simulated annotators, who know the gold reward as well as they do, or people at the labelling page."""
    model: str = "tiny-reviews"
    """Language model to begin with: a packaged name, a directory, a run directory, a hub id or a .gguf file."""
    prompts: str = "tiny-reviews"
    """Prompts: a .jsonl file with a "prompt" in each line, or a packaged name."""
    eval_prompts: str | None = None
    """Held-out prompts to measure on; tiny-reviews/test for the packaged prompts, --prompts otherwise when left out."""
    gold: str | None = None
    """The true reward, reported and never paid: what --reward of train takes; tiny-reviews for the packaged prompts when
    left out. Simulated annotators need it."""
    rounds: int = 3
    """Rounds."""
    pairs: int = 200
    """Pairs of responses that are judged in each round."""
    members: int = 3
    """Reward models that are combined."""
    rule: Literal["mean", "min", "mean-std"] = "mean"
    """How they are combined: mean-std pays less where they disagree."""
    std_coef: float = 1.0
    """Price of disagreement under mean-std."""
    label_noise: float = 0.1
    """Share of the simulated judgements that are wrong for no reason."""
    skill: float = 10.0
    """Of simulated annotators: at a gap of 1/skill in the gold reward 73 % of their choices are right."""
    total_timesteps: int = 40_000
    """Tokens of the training in each round."""
    num_envs: int = 128
    """Episodes that run side by side."""
    kl_coef: float = 0.4
    """Weight of the KL penalty per nat; the reward model's scores have a spread of 1."""
    learning_rate: float = 1e-4
    """PPO's."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; the longest that is given when left out."""
    max_response_tokens: int = 32
    """Length limit of a response in tokens, EOS included."""
    seed: int = 0
    """Seed of all randomness."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("rounds", "pairs", "members", "total_timesteps", "num_envs", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.label_noise <= 0.5:
            raise ValueError(f"--label-noise must be from 0 to .5, got {self.label_noise}")
        if not self.skill > 0:
            raise ValueError(f"--skill must be above 0, got {self.skill}")
