"""Supervised fine-tuning: the learning loop, measuring, saving and going on.

A step takes ``batch_size`` examples and minimises the mean of -log p over all of their learnt tokens together, however
they are laid out in rows and micro-batches: neither changes what is learnt. There is no dropout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from rlhf_gym import __version__
from rlhf_gym.atomic import replaced_directory, verified_files
from rlhf_gym.lm import LanguageModel, load_language_model
from rlhf_gym.lm.engine import inference
from rlhf_gym.lm.load import no_loading_bars
from rlhf_gym.lm.lora import base_fingerprint, has_lora, load_lora, save_lora
from rlhf_gym.lm.precision import MasterWeights, compute_dtype
from rlhf_gym.rules import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, POSITIVE, SHARE, check_fields, one_of

from .examples import Example
from .ngram import measures
from .packing import can_pack, micro_batches, token_losses

Callback = Callable[["Trainer", dict[str, float]], Any]


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Settings of fine-tuning."""

    batch_size: int = 16
    """Examples of an optimiser step."""
    micro_batch_size: int | None = None
    """Examples per forward and backward; gradients are accumulated. None: the whole batch."""
    learning_rate: float = 1e-4
    """Of AdamW, at its highest."""
    lr_schedule: str = "cosine"
    """"cosine" or "linear" (both to 0 at the end) or "constant"."""
    warmup_share: float = 0.05
    """Share of all steps in which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Of matrices; biases and norms have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    dtype: str = "auto"
    """"auto", "float32" or "bfloat16" (with float32 master weights)."""

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "batch_size": COUNT,
                "micro_batch_size": COUNT_OR_NONE,
                "learning_rate weight_decay": NOT_NEGATIVE,
                "lr_schedule": one_of("cosine", "linear", "constant"),
                "warmup_share": SHARE,
                "max_grad_norm": POSITIVE,
            },
        )


class Trainer:
    """A language model that learns examples.

    Args:
        lm: The model, trained in place, and its tokenizer. Where it has an adapter only that is trained.
        examples: What to learn.
        eval_examples: What to measure with after each epoch; may be empty.
        config: The settings.
        seed: Of the order of the examples.

    Attributes:
        model: The model.
        packs: Whether several examples share a row.
        num_timesteps: Learnt tokens so far, each as often as it was seen.
        num_steps: Optimiser steps so far.
        history: What `evaluate` found after each epoch.
        num_cut: Demonstrations that were too long and were cut or dropped; told by whoever made the examples.
    """

    num_cut = 0

    def __init__(
        self,
        lm: LanguageModel,
        examples: Sequence[Example],
        eval_examples: Sequence[Example] = (),
        config: SFTConfig | None = None,
        seed: int = 0,
    ):
        self.config, self.seed = config or SFTConfig(), seed
        self.examples, self.eval_examples = list(examples), list(eval_examples)
        if not self.examples:
            raise ValueError("examples must hold at least one, got none")
        self.tokenizer, self.eos_token_ids, self.model = lm.tokenizer, lm.eos_token_ids, lm.model.float()
        if not has_lora(self.model):
            self.model.requires_grad_(True)
        self.packs = can_pack(self.model)
        dtype = compute_dtype(self.config.dtype, lm.device)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:  # the base of an adapter: never stepped, so it needs no master
                parameter.data = parameter.data.to(dtype)
        self.optimizer = MasterWeights(self.model.parameters(), self._make_optimizer, compute_dtype=dtype)
        self.num_timesteps = self.num_steps = 0
        self.history: list[dict[str, float]] = []

    def _make_optimizer(self, masters: list[Tensor]) -> torch.optim.Optimizer:
        matrices, vectors = ([m for m in masters if (m.dim() > 1) == wanted] for wanted in (True, False))
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((matrices, self.config.weight_decay), (vectors, 0.0))
            if params
        ]
        # .95 and not .999: a run may have a hundred steps only, and the mean of squares has to follow.
        return torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=(0.9, 0.95), eps=1e-8)

    @property
    def policy_model(self) -> Any:
        """The model, under the name that agents have for it."""
        return self.model

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer examples."""
        return -(-len(self.examples) // self.config.batch_size)

    # ---- learning

    def learn(
        self, num_epochs: int = 1, callback: Callback | Sequence[Callback] | None = None, progress_bar: bool = False
    ) -> Trainer:
        """Train until ``num_epochs`` passes over the examples have been made in all.

        A restored trainer goes on from where it was saved, bit for bit as if it had never stopped (on a CPU).

        Args:
            num_epochs: At least 1. The schedule of the learning rate ends here.
            callback: Called as ``callback(trainer, metrics)`` after each step; returning False ends the training.
            progress_bar: Show a bar with tokens per second and the loss.
        """
        if num_epochs < 1:
            raise ValueError(f"num_epochs must be at least 1, got {num_epochs}")
        callbacks = [callback] if callable(callback) else list(callback or [])
        num_steps = num_epochs * self.steps_per_epoch
        num_tokens = num_epochs * sum(example.num_tokens for example in self.examples)
        started, first = time.perf_counter(), self.num_timesteps
        bar = tqdm(total=num_tokens, initial=first, unit="tok", unit_scale=True, disable=not progress_bar)
        with bar:
            while self.num_steps < num_steps:
                batch = self._batch(self.num_steps)
                metrics = self._step(batch, self._learning_rate(self.num_steps, num_steps))
                count = sum(example.num_tokens for example in batch)
                self.num_timesteps += count
                self.num_steps += 1
                metrics["train/epoch"] = self.num_steps / self.steps_per_epoch
                metrics["time/fps"] = (self.num_timesteps - first) / max(time.perf_counter() - started, 1e-9)
                bar.update(count)
                bar.set_postfix(loss=f"{metrics['train/loss']:.3f}", refresh=False)
                if self.num_steps % self.steps_per_epoch == 0 and self.eval_examples:
                    self.history.append(self.evaluate())
                    metrics |= {f"eval/{name}": value for name, value in self.history[-1].items()}
                if any([call(self, metrics) is False for call in callbacks]):  # a list: every callback hears of it
                    break
        return self

    def _batch(self, step: int) -> list[Example]:
        """The examples of a step: a function of the seed and the step's number, so that nothing has to be remembered."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        size = self.config.batch_size
        return [self.examples[i] for i in order[place * size : (place + 1) * size]]

    def _learning_rate(self, step: int, num_steps: int) -> float:
        config = self.config
        num_warmup = round(config.warmup_share * num_steps)
        if step < num_warmup:
            return config.learning_rate * (step + 1) / (num_warmup + 1)
        done = (step - num_warmup) / max(1, num_steps - num_warmup)
        remaining = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return config.learning_rate * remaining[config.lr_schedule]

    def _step(self, batch: list[Example], learning_rate: float) -> dict[str, float]:
        # One normaliser for the whole batch: a mean of micro-batch means would weigh the tokens of short ones more.
        num_tokens = sum(example.num_tokens for example in batch)
        loss = 0.0
        for part in micro_batches(batch, self.config.micro_batch_size, pack=self.packs):
            part_loss = token_losses(self.model, part, pack=self.packs).sum() / num_tokens
            part_loss.backward()
            self.optimizer.accumulate()
            loss += part_loss.item()
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = learning_rate
        grad_norm = self.optimizer.step(self.config.max_grad_norm).item()
        return {"train/loss": loss, "train/grad_norm": grad_norm, "train/learning_rate": learning_rate}

    def evaluate(self, examples: Sequence[Example] | None = None) -> dict[str, float]:
        """How well the model predicts examples, the held-out ones where none are given.

        Returns:
            "loss" (mean nats per learnt token, EOS included), "perplexity" (e to the loss) and "bits_per_byte" (of the
            text, which allows to compare models of different tokenizers).
        """
        examples = self.eval_examples if examples is None else examples
        if not examples:
            raise ValueError("examples: there are none to measure with; give some, or hold some out")
        size = self.config.micro_batch_size or self.config.batch_size
        total = 0.0
        with inference(self.model):
            for part in micro_batches(examples, size, pack=self.packs):
                total += token_losses(self.model, part, pack=self.packs).double().sum().item()
        return measures(total, examples)

    # ---- saving

    def save(self, directory: str | Path) -> None:
        """Write a directory that `load_language_model` reads, with all that `restore` needs to go on.

        A whole model is also one that ``AutoModelForCausalLM.from_pretrained`` loads; an adapter is saved alone, with the
        name of its base. The directory appears whole or not at all, whenever the process dies; an earlier one is replaced.
        """
        with replaced_directory(directory) as folder, self.optimizer.master_precision(), no_loading_bars():
            if has_lora(self.model):
                save_lora(self.model, folder)
            else:
                self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            tensors, scalars = self.optimizer.state_dict()
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "trainer_state.safetensors")
            state = {
                "trainer": "sft",
                "version": __version__,
                "config": dataclasses.asdict(self.config),
                "seed": self.seed,
                "examples": self._fingerprint(),
                "base": self._base(),
                "num_timesteps": self.num_timesteps,
                "num_steps": self.num_steps,
                "history": self.history,
                "optimizer": scalars,
            }
            (folder / "trainer_state.json").write_text(json.dumps(state, indent=1))

    def restore(self, directory: str | Path) -> Trainer:
        """Go on from what `save` wrote. The trainer must have been made with the same model, examples and settings.

        Raises:
            FileNotFoundError: If nothing was saved there.
            ValueError: If a file was damaged, or it was saved by another kind of training, with other examples or settings.
        """
        folder = verified_files(directory, "trainer_state.json")
        state = json.loads((folder / "trainer_state.json").read_text())
        if state.get("trainer") != "sft":
            raise ValueError(f"{directory} was not saved by fine-tuning; give the directory of such a run")
        now = {"config": dataclasses.asdict(self.config), "seed": self.seed, "examples": self._fingerprint()}
        now["base"] = self._base()
        for name, value in now.items():
            if state[name] != value:
                raise ValueError(
                    f"cannot go on from {directory}: it was made with other {name} ({state[name]!r}, now {value!r}); give the "
                    "same, or start anew"
                )
        with self.optimizer.master_precision():
            if has_lora(self.model):
                load_lora(self.model, folder)
            else:
                saved = load_language_model(folder, self.tokenizer, device=self.model.device, dtype="float32")
                self.model.load_state_dict(saved.model.state_dict())
        self.optimizer.load_state_dict(load_file(folder / "trainer_state.safetensors"), state["optimizer"])
        self.num_timesteps, self.num_steps = state["num_timesteps"], state["num_steps"]
        self.history = state["history"]
        return self

    def _base(self) -> str | None:
        """Of the model under the adapter; None without one."""
        return base_fingerprint(self.model) if has_lora(self.model) else None

    def _fingerprint(self) -> str:
        """Of the examples and their order."""
        digest = hashlib.blake2b(digest_size=8)
        for example in self.examples:
            digest.update(np.array([example.num_context, *example.ids], dtype=np.int64).tobytes())
        return digest.hexdigest()
