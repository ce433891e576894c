"""Training the network itself, in steps that a killed process can go on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_gym.atomic import replaced_directory, verified_files
from rlhf_gym.rewards.sequences import last_token_outputs

from .config import RewardModelConfig
from .examples import Example
from .network import outputs_of
from .objectives import Objective, plain_objective

MAX_STEP_TOKENS = 8192  # of one forward and backward, padding included
POOL = 8  # batches whose judgements are sorted by length together
SMALL, SMALL_RATE, LARGE_RATE = 20_000_000, 3e-4, 2e-5
CHECKPOINT_EVERY = 100


@dataclass
class Texts:
    """The judgements with the token ids of their responses."""

    items: Sequence[Example]
    rows: list[list[int]]
    """Of the responses of the judgements one after the other."""
    types: list[list[int]] | None = None
    starts: np.ndarray = field(init=False)
    """Where the responses of each judgement begin. Shape (B + 1,)."""

    def __post_init__(self) -> None:
        self.starts = np.cumsum([0, *(len(item.responses) for item in self.items)])

    def rows_of(self, chosen: Sequence[int]) -> list[int]:
        """The rows of some judgements, one after the other."""
        return [row for i in chosen for row in range(self.starts[i], self.starts[i + 1])]

    def length(self, i: int) -> int:
        """Tokens of the longest response of a judgement."""
        return max(len(self.rows[row]) for row in range(self.starts[i], self.starts[i + 1]))


class Fit:
    """One training run of one network.

    Args:
        network: Trained in place.
        parameters: Those that are trained.
        texts: What is learnt from.
        objective: The loss.
        config: Learning rate, epochs, batch size, ...
        seed: Of the order of the judgements.
        held_aside: Judgements for early stopping, or None.
        checkpoint: Directory to save the state to and to go on from, or None.

    Attributes:
        step: Steps made.
        num_steps: Steps in all.
        history: Mean training loss of each epoch, and the loss on ``held_aside``.
    """

    def __init__(
        self,
        network: Any,
        parameters: list[nn.Parameter],
        texts: Texts,
        objective: Objective,
        config: RewardModelConfig,
        *,
        seed: int,
        held_aside: Texts | None = None,
        checkpoint: Path | None = None,
    ):
        self.network, self.parameters, self.texts, self.objective, self.config = (
            network,
            parameters,
            texts,
            objective,
            config,
        )
        self.seed, self.held_aside, self.checkpoint = seed, held_aside, checkpoint
        device = next(network.parameters()).device
        self.extra = nn.Parameter(objective.start().to(device))
        self.trained = [*parameters, self.extra] if objective.num_extra else list(parameters)
        rate = config.learning_rate
        if rate is None:
            rate = SMALL_RATE if sum(p.numel() for p in parameters) <= SMALL else LARGE_RATE
        self.learning_rate = rate
        groups = [
            {"params": [p for p in self.trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=(0.9, 0.999))
        self.steps_per_epoch = -(-len(texts.items) // config.batch_size)
        self.num_steps = self.steps_per_epoch * config.num_epochs
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._epoch_loss = 0.0
        self._best: tuple[float, list[Tensor]] | None = None
        if checkpoint is not None:
            self._resume()

    def run(self, progress: Callable[[Fit, int], Any] | None = None) -> None:
        """Train to the end. ``progress`` is called with the fit and the number of judgements after each step."""
        while self.step < self.num_steps:
            epoch, first = divmod(self.step, self.steps_per_epoch)
            for batch in self._batches(epoch)[first:]:
                self._epoch_loss += self._update(batch) * len(batch)
                self.step += 1
                if self.step % self.steps_per_epoch == 0:
                    self._end_epoch()
                if self.checkpoint is not None and (
                    self.step % CHECKPOINT_EVERY == 0 or self.step % self.steps_per_epoch == 0
                ):
                    self._save()
                if progress is not None:
                    progress(self, len(batch))
        if self._best is not None:
            with torch.no_grad():
                for parameter, value in zip(self.trained, self._best[1], strict=True):
                    parameter.copy_(value)

    def _batches(self, epoch: int) -> list[list[int]]:
        """The judgements in random order; those of a few batches are sorted by length, which saves padding."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.texts.items), generator=generator).tolist()
        size = self.config.batch_size
        pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
        batches = []
        for pool in pools:
            pool.sort(key=self.texts.length)
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _update(self, batch: list[int]) -> float:
        """One step on some judgements; returns their mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * self._schedule()
        self.network.train()
        self.optimizer.zero_grad()
        total = 0.0
        with torch.random.fork_rng(enabled=self.config.dropout):  # dropout draws from the global generator
            if self.config.dropout:
                torch.manual_seed(self.seed * 1_000_003 + self.step)
            for part in self._parts(batch):
                rows = self.texts.rows_of(part)
                types = None if self.texts.types is None else [self.texts.types[row] for row in rows]
                outputs = last_token_outputs(self.network, [self.texts.rows[row] for row in rows], types)
                losses = self.objective.losses(outputs.float(), [self.texts.items[i] for i in part], self.extra)
                loss = losses.sum() / len(batch)
                loss.backward()
                total += float(loss.detach())
        if not np.isfinite(total):
            raise ValueError(f"the loss is {total} at step {self.step}; use a smaller learning_rate")
        nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        self.optimizer.step()
        return total

    def _parts(self, batch: list[int]) -> Iterator[list[int]]:
        """A batch in pieces of limited size; it is sorted by length."""
        part: list[int] = []
        for i in batch:
            longest = max(self.texts.length(j) for j in [*part, i])
            if part and longest * len(self.texts.rows_of([*part, i])) > MAX_STEP_TOKENS:
                yield part
                part = []
            part.append(i)
        yield part

    def _schedule(self) -> float:
        warmup = max(1, round(self.config.warmup_share * self.num_steps))
        if self.step < warmup:
            return (self.step + 1) / warmup
        return (self.num_steps - self.step) / max(1, self.num_steps - warmup)

    def _end_epoch(self) -> None:
        entry = {"epoch": self.step // self.steps_per_epoch, "loss": self._epoch_loss / len(self.texts.items)}
        self._epoch_loss = 0.0
        if self.held_aside is not None:
            outputs = outputs_of(self.network, self.held_aside.rows, self.held_aside.types)
            extra = self.extra.detach().cpu()
            losses = plain_objective(self.objective).losses(outputs, self.held_aside.items, extra)
            entry["held_aside_loss"] = float(losses.mean())
            if self._best is None or entry["held_aside_loss"] < self._best[0]:
                self._best = (entry["held_aside_loss"], [p.detach().clone() for p in self.trained])
        self.history.append(entry)

    def _save(self) -> None:
        assert self.checkpoint is not None, "only called with one"
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(self.trained)}
        for i, parameter in enumerate(self.trained):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"{name}.{i}"] = value
        if self._best is not None:
            tensors |= {f"best.{i}": value for i, value in enumerate(self._best[1])}
        state = {
            "step": self.step,
            "history": self.history,
            "epoch_loss": self._epoch_loss,
            "best": None if self._best is None else self._best[0],
        }
        with replaced_directory(self.checkpoint) as folder:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, folder / "state.safetensors")
            (folder / "state.json").write_text(json.dumps(state))

    def _resume(self) -> None:
        try:
            folder = verified_files(self.checkpoint, "state.json")
        except FileNotFoundError:
            return
        state, tensors = json.loads((folder / "state.json").read_text()), load_file(folder / "state.safetensors")
        with torch.no_grad():
            for i, parameter in enumerate(self.trained):
                parameter.copy_(tensors[f"parameter.{i}"])
                names = [name.removesuffix(f".{i}") for name in tensors if name.endswith(f".{i}")]
                self.optimizer.state[parameter] = {
                    name: tensors[f"{name}.{i}"].to(parameter.device if name != "step" else "cpu")
                    for name in names
                    if name not in ("parameter", "best")
                }
        self.step, self.history, self._epoch_loss = state["step"], state["history"], state["epoch_loss"]
        if state["best"] is not None:
            device = self.extra.device
            self._best = (state["best"], [tensors[f"best.{i}"].to(device) for i in range(len(self.trained))])
