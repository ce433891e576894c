"""The options of each verb. This module imports nothing that takes time: it is all that ``--help`` reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlhf_gym.cli.data_options import DataCheck, DataClean, DataSplit
from rlhf_gym.cli.feedback_options import FeedbackExport, FeedbackForget, FeedbackStatus, Label
from rlhf_gym.cli.loop_options import LoopOptions
from rlhf_gym.cli.safety_options import SafetyOptions
from rlhf_gym.reward_models.config import RewardModelConfig


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What makes a task: model, prompts, reward and limits."""

    model: str = "tiny-reviews"
    """Language model: a packaged name (tiny-reviews), a directory, a run directory, a hub id or a .gguf file."""
    prompts: str = "tiny-reviews"
    """Prompts: a .jsonl file with a "prompt" in each line (further columns reach the reward), or a packaged name."""
    reward: tuple[str, ...]
    """Reward: module:function, file.py:function, a name (sentiment, repetition, ...) or a classifier's directory; several
    are added up, and spec=WEIGHT gives one a weight."""
    max_prompt_tokens: int | None = None
    """Longest prompt in tokens; the longest that is given when left out."""
    max_response_tokens: int = 32
    """Length limit of a response in tokens, EOS included."""
    truncate_prompts: Literal["left"] | None = None
    """Cut longer prompts from the left; when left out they are an error."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response that does not end by itself."""
    temperature: float = 1.0
    """Sampling temperature, of policy and reference alike."""
    top_k: int | None = None
    """Only the k tokens likeliest under the reference may be chosen."""
    top_p: float | None = None
    """Only the likeliest tokens under the reference that make up this probability may be chosen."""
    seed: int = 0
    """Seed of all randomness."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    dtype: str = "auto"
    """float32 or bfloat16; auto takes what the device does well."""

    def __post_init__(self):
        _at_least("max_response_tokens", self.max_response_tokens, 1)
        _at_least("seed", self.seed, 0)
        if not self.reward:
            raise ValueError("--reward needs at least one reward")


@dataclass(frozen=True, kw_only=True)
class Train(TaskOptions):
    """Train a language model on a reward; writes a run directory."""

    agent: str = "ppo"
    """Algorithm: ppo, reinforce, rloo, remax, grpo, nlpo, vargrad, soft-q, online-dpo, expert-iteration, best-of-n, q-learning; of
    Stable-Baselines3 trpo, sb3-ppo, a2c, dqn, qrdqn, maskable-ppo, recurrent-ppo."""
    kl_coef: float = 0.05
    """Weight of the KL penalty per nat; 0 is none."""
    total_timesteps: int = 100_000
    """Tokens to generate in training."""
    num_envs: int = 64
    """Episodes that run side by side."""
    learning_rate: float | None = None
    """The agent's own when left out."""
    lora: int | None = None
    """Train a LoRA adapter of this rank and not the model; with the adapter off the policy is the reference."""
    fsdp: bool = False
    """Divide the training state among the processes that torchrun has started, for models that do not fit otherwise."""
    config: tuple[str, ...] = ()
    """Further settings of the agent as name=value, for instance num_epochs=4 vf_coef=0.1."""
    out: str
    """Run directory to write, for instance runs/x."""
    mix: str | None = None
    """Further prompts as FILE:SHARE, for instance attacks.jsonl:0.2, such that this share of the episodes is theirs; rows
    with "held_out": true are left out."""
    eval_prompts: str | None = None
    """Held-out prompts for the evaluation before and after; --prompts when left out."""
    eval_episodes: int = 128
    """Responses in each of the two evaluations."""
    checkpoint_every: int = 10
    """Updates between two checkpoints."""
    overwrite: bool = False
    """Delete an earlier run in the same directory."""
    resume: bool = False
    """Go on from the checkpoint of an earlier run in the same directory."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("total_timesteps", "num_envs", "eval_episodes", "checkpoint_every"):
            _at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class SFT:
    """Fine-tune a language model on texts or responses, or train a small one from scratch; writes a run directory."""

    data: str
    """What to learn: a .jsonl file of demonstrations, conversations, texts or preferences (the chosen response), see
    docs/data.md, or a .txt file."""
    model: str | None = None
    """Model to fine-tune: a packaged name (tiny-reviews), a directory, a run directory, a hub id or a .gguf file."""
    scratch: Literal["transformer", "lstm"] | None = None
    """Begin with a new small model in place of --model."""
    tokenizer: str | None = None
    """Tokenizer of the new model: a packaged model, a directory or a hub id; one is trained on the data when left out."""
    vocab_size: int = 1024
    """Tokens of a tokenizer that is trained."""
    hidden_size: int = 128
    """Width of the new model."""
    num_layers: int | None = None
    """Layers of the new model; 4 of a transformer and 1 of an LSTM when left out."""
    num_heads: int = 4
    """Attention heads of a new transformer."""
    max_tokens: int | None = None
    """Longest example in tokens, and the context of a new transformer: 256 of a new model, the model's context but at most
    512 otherwise when left out. Longer texts become several examples."""
    truncate: Literal["right"] | None = None
    """Cut longer responses from the right; when left out they are an error."""
    eval: str | None = None
    """File like --data to measure the perplexity with after each epoch; a part of the data when left out."""
    eval_share: float | None = None
    """Share of the prompts to hold out for that (of a single text its end); 0.1 when left out, 0 holds out nothing."""
    lora: int | None = None
    """Train a LoRA adapter of this rank and not the model."""
    merge: bool = False
    """Write the adapter's whole model to merged/, too."""
    num_epochs: int = 3
    """Passes over the data."""
    batch_size: int = 16
    """Examples of an optimiser step."""
    learning_rate: float | None = None
    """When left out 0.003 of a new model, 0.001 of an adapter, else 0.0001."""
    config: tuple[str, ...] = ()
    """Further settings as name=value: micro_batch_size, lr_schedule (cosine, linear, constant), warmup_share, weight_decay,
    max_grad_norm, dtype."""
    seed: int = 0
    """Seed of all randomness."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    out: str
    """Run directory to write, for instance runs/x."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    overwrite: bool = False
    """Delete an earlier run in the same directory."""
    resume: bool = False
    """Go on from the checkpoint of an earlier run in the same directory."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self):
        if (self.model is None) == (self.scratch is None):
            raise ValueError("give either --model, to fine-tune one, or --scratch, to begin with a new one")
        if self.tokenizer is not None and self.scratch is None:
            raise ValueError("--tokenizer goes with --scratch: a model that is fine-tuned brings its own")
        if self.merge and self.lora is None:
            raise ValueError("--merge goes with --lora: there is no adapter to merge")
        if self.eval is not None and self.eval_share:
            raise ValueError("--eval and --eval-share exclude each other: leave one of them out")
        for name in ("num_epochs", "batch_size", "checkpoint_every"):
            _at_least(name, getattr(self, name), 1)
        _at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class TrainRM(RewardModelConfig):
    """Train a reward model on preferences, rankings, ratings or labels; writes a directory that --reward takes."""

    file: str
    """A JSONL file of judgements; see docs/reward_models.md for the formats."""
    model: str = "tiny-reviews"
    """Where it starts from, a causal language model, an encoder or an earlier reward model: a packaged name, a directory, a
    run directory, a hub id or a .gguf file."""
    out: str = ""
    """Directory to write, for instance runs/rm; it must be given."""
    members: int = 1
    """Train so many and save them as an ensemble."""
    rule: Literal["mean", "min", "mean-std"] = "mean"
    """How an ensemble pays: the mean of its members, the least, or the mean less --std-coef standard deviations."""
    std_coef: float = 1.0
    """Price of disagreement."""
    criterion: str | None = None
    """Learn from the ratings by this criterion, where the file has several."""
    eval: str | None = None
    """Held-out judgements for the report, a file in the same format."""
    held_out: float = 0.1
    """Without --eval, share of the prompts that is held out for the report; 0 is none, and no report."""
    reference: str | None = None
    """A JSONL file of prompts and completions, on which rewards get mean 0 and standard deviation 1; the responses that are
    trained on when left out."""
    gold: str | None = None
    """A reward that knows the truth, as of train --reward: the report says how far they agree."""
    baselines: bool = True
    """Report linear and n-gram models beside it."""
    seed: int = 0
    """Seed of all randomness."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    overwrite: bool = False
    """Replace an earlier reward model in the same directory, or start an interrupted one anew."""
    resume: bool = False
    """Go on with a training that was interrupted."""
    progress_bar: bool = True
    """Show a progress bar."""

    def __post_init__(self):
        super().__post_init__()
        if not self.out:
            raise ValueError("rlhf-gym train-rm needs --out, the directory to write")
        _at_least("members", self.members, 1)
        _at_least("seed", self.seed, 0)
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out must be at least 0 and below 1, got {self.held_out:g}")
        if not 0 <= self.std_coef < float("inf"):
            raise ValueError(f"--std-coef must be a finite number of at least 0, got {self.std_coef:g}")


@dataclass(frozen=True, kw_only=True)
class Evaluate(SafetyOptions, TaskOptions):
    """Score a language model on prompts, with a confidence interval."""

    reference: str | None = None
    """Model to measure the KL divergence from; a run's own reference when --model is a run, else none."""
    num_episodes: int | None = None
    """Responses to sample; one for each prompt when left out."""
    greedy: bool = False
    """Take the likeliest token each time instead of a sample."""
    win_rate: bool = True
    """Sample the reference, too, where there is one, and report wins, ties and losses against it."""
    reference_column: str | None = None
    """Column of the prompts with reference texts, for BLEU, chrF and ROUGE-L; "reference" where there is one."""
    perplexity_model: str | None = None
    """An independent language model that says how fluent the texts are: a packaged name, a directory, a hub id or a .gguf
    file."""
    json: bool = False
    """Print the numbers as JSON instead of the table."""
    out: str | None = None
    """Write the samples to this .jsonl file."""
    overwrite: bool = False
    """Replace the files that --out and --review-queue name."""

    def __post_init__(self):
        super().__post_init__()
        if self.num_episodes is not None:
            _at_least("num_episodes", self.num_episodes, 1)
        _at_least("attempts", self.attempts, 1)
        _at_least("review_size", self.review_size, 1)
        if self.red_team is not None and self.review_queue is not None:
            raise ValueError("--review-queue is of the samples on --prompts; give it without --red-team")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt."""

    model: str = "tiny-reviews"
    """Language model: a packaged name (tiny-reviews), a directory, a run directory, a hub id or a .gguf file."""
    prompt: tuple[str, ...] = ("",)
    """The text to continue; several make several responses. An empty one starts from the model's BOS token."""
    num_samples: int = 1
    """Responses to each prompt."""
    max_response_tokens: int | None = None
    """Length limit of a response in tokens; 128, or what the model's context leaves, when left out."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int | None = None
    """Only the k likeliest tokens may be chosen."""
    top_p: float | None = None
    """Only the likeliest tokens that make up this probability may be chosen."""
    greedy: bool = False
    """Take the likeliest token each time instead of a sample."""
    seed: int = 0
    """Seed of the sampling."""
    device: str = "auto"
    """cpu, cuda, ...; auto takes a GPU where there is one."""
    dtype: str = "auto"
    """float32 or bfloat16; auto takes what the device does well."""

    def __post_init__(self):
        _at_least("num_samples", self.num_samples, 1)
        _at_least("seed", self.seed, 0)
        if self.max_response_tokens is not None:
            _at_least("max_response_tokens", self.max_response_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Compare agents on tasks over seeds; the same command goes on after an interruption."""

    suite: Literal["exact", "tiny"] = "exact"
    """exact: tasks whose optimum is known; tiny: small language models, measured by samples."""
    agents: tuple[str, ...] = ("ppo",)
    """Names as of train --agent, variants of them (dr-grpo, expert-iteration-optimal, online-dpo-soft, dqn-reference,
    mlp-ppo), or module:Class or file.py:Class: anything with learn and predict, or an algorithm of Stable-Baselines3."""
    out: str
    """Directory for results.jsonl, timings.jsonl and tuning.jsonl, for instance runs/exact."""
    seeds: int = 10
    """Seeds 0, 1, ...: so many runs of each agent on each task."""
    jobs: int = 1
    """Runs side by side, one thread each."""
    tasks: tuple[str, ...] = ()
    """Some of the suite's tasks; all when left out."""
    policy: str | None = None
    """What is trained on exact tasks: tabular, transformer or lstm."""
    num_envs: int | None = None
    """Episodes that run side by side; the suite's own when left out."""
    budget_tokens: int | None = None
    """Tokens that each run may generate; the task's own when left out."""
    budget_seconds: float | None = None
    """Seconds that each run may learn, besides; results then depend on the machine."""
    config: tuple[str, ...] = ()
    """Settings as name=value for all agents, or agent.name=value for one, for instance ppo.learning_rate=0.02."""
    tune: int = 0
    """First try so many random settings of each agent, on another seed, and use the best."""
    stories: str | None = None
    """Directory of the model stories260K, which adds its task to the suite tiny."""
    allow_mixed: bool = False
    """Go on in a directory whose results another commit or other versions have measured."""
    rerun: tuple[int, ...] | None = None
    """Measure nothing new: run the cells on these lines of results.jsonl again and compare."""
    progress_bar: bool = True
    """Draw a table on a terminal; without it there is a line for each finished run."""

    def __post_init__(self):
        for name in ("seeds", "jobs", "num_envs", "budget_tokens"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("tune", self.tune, 0)
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise ValueError(f"--budget-seconds must be above 0, got {self.budget_seconds:g}")
        if self.seeds > 1_000_000:
            raise ValueError(f"--seeds must be at most 1000000: those above are for tuning, got {self.seeds}")
        if not self.agents:
            raise ValueError("--agents needs at least one agent")
        if self.rerun is not None and not self.rerun:
            raise ValueError("--rerun needs at least one line of results.jsonl, counted from 1")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Tables, pictures and a page from the results of a benchmark, also of one that is still at work."""

    directory: str
    """What rlhf-gym benchmark --out has written."""
    out: str | None = None
    """Directory to write report.html, table.md and the pictures to; the same one when left out."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole story on a packaged model in minutes: PPO and TRPO against a reward, with a report."""

    out: str = "runs/demo"
    """Run directory; that of an earlier demo is replaced."""
    seed: int = 0
    """Seed of all randomness."""
    progress_bar: bool = True
    """Show progress bars."""

    def __post_init__(self):
        _at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine has, and what is wrong with the installation."""


class Verb(NamedTuple):
    """A verb's options and the module whose ``run(options)`` does the work."""

    options: type
    module: str
    positional: bool = False
    """The options without a default are given by their place: ``rlhf-gym plot DIR``."""


VERBS = {
    "demo": Verb(Demo, "rlhf_gym.cli.demo"),
    "sft": Verb(SFT, "rlhf_gym.cli.sft"),
    "train": Verb(Train, "rlhf_gym.cli.train"),
    "train-rm": Verb(TrainRM, "rlhf_gym.cli.train_rm", positional=True),
    "loop": Verb(LoopOptions, "rlhf_gym.cli.loop"),
    "evaluate": Verb(Evaluate, "rlhf_gym.cli.evaluate"),
    "generate": Verb(Generate, "rlhf_gym.cli.generate"),
    "benchmark": Verb(Benchmark, "rlhf_gym.cli.benchmark"),
    "plot": Verb(Plot, "rlhf_gym.cli.plot", positional=True),
    "data check": Verb(DataCheck, "rlhf_gym.cli.data_check", positional=True),
    "data clean": Verb(DataClean, "rlhf_gym.cli.data_clean", positional=True),
    "data split": Verb(DataSplit, "rlhf_gym.cli.data_split", positional=True),
    "label": Verb(Label, "rlhf_gym.cli.label"),
    "feedback status": Verb(FeedbackStatus, "rlhf_gym.cli.feedback_status", positional=True),
    "feedback export": Verb(FeedbackExport, "rlhf_gym.cli.feedback_export", positional=True),
    "feedback forget": Verb(FeedbackForget, "rlhf_gym.cli.feedback_forget", positional=True),
    "doctor": Verb(Doctor, "rlhf_gym.cli.doctor"),
}


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def as_dict(options: object) -> dict[str, object]:
    """Options as plain values, for ``config.json``."""
    return dataclasses.asdict(options)  # type: ignore[call-overload]
