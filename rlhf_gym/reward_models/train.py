"""Training a reward model: from judgements to something that ``reward=`` takes."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_gym import __version__
from rlhf_gym.rewards.classify import RECORDED, classifier
from rlhf_gym.rewards.ensemble import RULES
from rlhf_gym.rewards.sequences import encode_texts
from rlhf_gym.rewards.text import check_choice

from .config import RewardModelConfig
from .examples import Examples, as_examples, choose_join, hold_out
from .fit import Fit, Texts
from .linear import fit_linear
from .losses import ordered
from .model import RewardModel, texts_of
from .network import freeze, head_of, init_head, load_network, outputs_of, without_head
from .objectives import Objective, OrdinalObjective, RegressionObjective, make_objective

ASIDE = 0.1  # share of the training prompts that early stopping takes


def train_reward_model(
    records: Iterable[Any],
    *,
    model: Any = "tiny-reviews",
    tokenizer: Any = None,
    config: RewardModelConfig | None = None,
    num_members: int = 1,
    rule: str = "mean",
    std_coef: float = 1.0,
    eval_records: Iterable[Any] | None = None,
    held_out: float = 0.1,
    reference: Sequence[tuple[str, str]] | None = None,
    gold: Any = None,
    baselines: bool = True,
    seed: int = 0,
    device: torch.device | str = "auto",
    checkpoint: str | Path | None = None,
    implicit: bool = False,
    progress_bar: bool = False,
) -> RewardModel:
    """Train a reward model on what people said about responses.

    Args:
        records: `rlhf_gym.data.Preference` and `Ranking`, or `Rating`, or `Labelled`.
        model: Where it starts from: a causal language model or encoder (packaged name, directory, hub id, ``.gguf``
            file or object), or an earlier reward model. What is passed is not changed.
        tokenizer: Its tokenizer; None takes the one beside the model.
        config: How it is trained.
        num_members: K. Members differ by their heads' first weights and the order of the data; where the head alone is
            trained, which is a convex problem, by the judgements, drawn with replacement by prompts.
        rule: How their scores are combined: "mean", "min" or "mean-std".
        std_coef: Price of disagreement under "mean-std".
        eval_records: Held-out judgements for the report.
        held_out: Without ``eval_records``, share of the prompts that is held out for it; 0 is none, and no report.
        reference: (prompt, response) pairs on which rewards get mean 0 and standard deviation 1; the responses that are
            trained on when left out.
        gold: What is truly so, and the report says how far they agree: a reward, in any form that ``reward=`` takes, or
            a list with the true scores of the responses of each held-out record (of ``records`` without
            ``eval_records``).
        baselines: Report linear and n-gram models beside it.
        seed: Seed of everything.
        device: "auto" is CUDA where there is one.
        checkpoint: Directory for the state of an unfinished training: the same call with it goes on from there. Its
            content is yours to delete.
        implicit: The prompts were taken from what two responses begin with, see `rlhf_gym.data.split.prompt_key`.
        progress_bar: Show judgements per second and the loss.

    Returns:
        The reward model with its report.

    Raises:
        ValueError: If the records are not of one kind, or the model or a setting does not fit.
    """
    config = config or RewardModelConfig()
    if num_members < 1:
        raise ValueError(f"num_members must be >= 1, got {num_members}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be in [0, 1), got {held_out}")
    check_choice("rule", rule, RULES)
    told: dict[str, Any] = {"kind": config.kind, "positive_label": config.positive_label, "implicit": implicit}
    known = gold if isinstance(gold, (list, tuple)) else None
    examples = as_examples(records, **told, gold=known if eval_records is None else None)
    evaluation = None
    if eval_records is not None:
        evaluation = as_examples(eval_records, **told, classes=examples.classes, gold=known)
    elif held_out:
        examples, evaluation = hold_out(examples, held_out, seed)
    trainer = _Trainer(examples, model, tokenizer, config, device, reference, seed)
    members = []
    for i in range(num_members):
        state = None if checkpoint is None else Path(checkpoint) / f"member_{i}"
        label = "" if num_members == 1 else f"member {i + 1} of {num_members}"
        members.append(trainer.member(seed + i, num_members > 1, state, label if progress_bar else None))
    details = {
        "rlhf_gym": __version__,
        "kind": examples.kind,
        "classes": list(examples.classes),
        "num_judgements": len(examples),
        "config": dataclasses.asdict(config),
        "join": trainer.join,
        "seed": seed,
        "members": trainer.histories,
    }
    trained = RewardModel(tuple(members), examples.kind, rule, std_coef, details)
    if evaluation is None:
        return trained
    from .report import make_report

    asked = None if known is not None else gold
    report = make_report(trained, evaluation, examples if baselines else None, gold=asked)
    return dataclasses.replace(trained, report=report)


class _Trainer:
    """What the members of an ensemble share: the data, and the features of a frozen trunk."""

    def __init__(
        self,
        examples: Examples,
        model: Any,
        tokenizer: Any,
        config: RewardModelConfig,
        device: torch.device | str,
        reference: Sequence[tuple[str, str]] | None,
        seed: int,
    ):
        self.examples, self.config = examples, config
        self.histories: list[dict[str, Any]] = []
        self.objective = make_objective(examples, config)
        self.join = choose_join(examples) if config.join is None else config.join
        names = examples.classes if examples.kind == "multi-class" else ("reward",)
        self._source = {"model": model, "tokenizer": tokenizer, "names": names, "config": config, "device": device}
        self.network, self.tokenizer = self._load(seed)
        self.tokenizer.truncation_side = "left"  # the response stays
        # Also the limit of the saved model, which its tokenizer and positions would otherwise tell.
        read: dict[str, Any] = {
            "reads": config.reads,
            "join": self.join,
            "max_tokens": config.max_tokens,
            "truncation": "left",
        }
        self.recorded = {"rlhf_gym": __version__, "kind": examples.kind, **read, "output": "logit"}
        if examples.kind == "multi-class":
            positive = config.positive_label or examples.classes[-1]
            self.recorded |= {"output": "probability", "label": positive}
        self._set_recorded(self.network, self.recorded)
        limit = classifier(self.network, self.tokenizer).max_tokens
        self.reading = read | {"max_tokens": limit}
        self.reference = texts_of(examples) if reference is None else tuple(map(list, zip(*reference, strict=True)))
        self._features: np.ndarray | None = None
        if config.train_layers != 0:  # each member then loads its own
            self.network = None

    def _load(self, seed: int) -> Any:
        with torch.random.fork_rng():  # what transformers makes up for a new model, an encoder's pooler for instance
            torch.manual_seed(seed)
            return load_network(**self._source)

    @staticmethod
    def _set_recorded(network: Any, recorded: dict[str, Any]) -> None:
        setattr(network.config, RECORDED, dict(recorded))

    def _encode(self, examples: Examples) -> Texts:
        rows, types = encode_texts(self.tokenizer, *texts_of(examples), **self.reading)
        return Texts(examples.items, rows, types)

    def member(self, seed: int, differ: bool, checkpoint: Path | None, label: str | None) -> Any:
        """One trained, normalised member."""
        generator = torch.Generator().manual_seed(seed)
        if self.config.train_layers == 0:
            network, extra, shift, history = self._solve_head(generator if differ else None, label)
        else:
            network, extra, shift, history = self._train(generator, seed, checkpoint, label)
        self.histories.append({"seed": seed, **history})
        network.requires_grad_(False).eval()
        recorded = dict(self.recorded)
        self._set_recorded(network, recorded)
        if self.objective.num_outputs == 1:
            self._normalise(network, recorded, shift)
            recorded |= self._units(extra, recorded)
            self._set_recorded(network, recorded)
        return classifier(network, self.tokenizer)

    def _train(self, generator: torch.Generator, seed: int, checkpoint: Path | None, label: str | None) -> Any:
        network = self._load(seed)[0]
        init_head(network, generator)
        parameters = freeze(network, self.config.train_layers)
        examples, aside = self.examples, None
        if self.config.early_stopping:
            # Another seed than the report's: its tenth is gone already, and the same draw would find nothing more.
            examples, set_aside = hold_out(examples, ASIDE, -1 - seed)
            aside = self._encode(set_aside)
        fit = Fit(
            network,
            parameters,
            self._encode(examples),
            self.objective,
            self.config,
            seed=seed,
            held_aside=aside,
            checkpoint=checkpoint,
        )
        with _bar(label, self.config.num_epochs * len(examples), fit.step * self.config.batch_size) as advance:
            fit.run(advance)
        history = {"learning_rate": fit.learning_rate, "num_trained": sum(p.numel() for p in parameters)}
        return network, fit.extra.detach().cpu(), 0.0, history | {"epochs": fit.history}

    def _solve_head(self, generator: torch.Generator | None, label: str | None) -> Any:
        if self._features is None:
            texts = self._encode(self.examples)
            with _bar(label and "features", len(texts.rows), unit="text") as advance, without_head(self.network):
                self._features = outputs_of(self.network, texts.rows, texts.types, advance).double().numpy()
        weights = None
        if generator is not None:
            weights = self._drawn(generator)
        weight, bias, fit = solve_head(self._features, self.examples, self.objective, weights)
        # A new head on the same trunk, which is not copied.
        trunk = self.network.base_model
        network = copy.deepcopy(self.network, {id(trunk): trunk})
        head = head_of(network)[1]
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(weight.T))
            if head.bias is not None:
                head.bias.copy_(torch.from_numpy(bias))
                bias = np.zeros_like(bias)
        history = {"penalty": fit.penalty, "num_trained": weight.size}
        return network, torch.from_numpy(fit.extra), -float(bias[0]), history

    def _drawn(self, generator: torch.Generator) -> np.ndarray:
        """How often each judgement counts when prompts are drawn with replacement."""
        keys = {key: i for i, key in enumerate(dict.fromkeys(item.key for item in self.examples.items))}
        drawn = torch.randint(len(keys), (len(keys),), generator=generator)
        times = torch.bincount(drawn, minlength=len(keys)).numpy()
        return np.array([times[keys[item.key]] for item in self.examples.items], dtype=np.float64)

    def _normalise(self, network: Any, recorded: dict[str, Any], shift: float) -> None:
        """Give the rewards of the reference mean 0 and standard deviation 1; ``recorded`` gets what that took."""
        raw = classifier(network, self.tokenizer).logits(*self.reference)[:, 0] - shift
        mean, spread = float(raw.mean()), float(raw.std())
        if not spread > 1e-8:
            raise ValueError(
                "the reward model gives all reference responses the same reward; are there different ones among them?"
            )
        head = head_of(network)[1]
        with torch.no_grad():
            head.weight.div_(spread)
            if head.bias is not None:
                head.bias.sub_(mean + shift).div_(spread)
        # A head without a bias cannot hold the mean: whoever reads the directory with rlhf_gym subtracts it.
        recorded |= {"mean": mean, "spread": spread, "shift": 0.0 if head.bias is not None else (mean + shift) / spread}

    def _units(self, extra: torch.Tensor, recorded: dict[str, Any]) -> dict[str, Any]:
        """What the normalised score means: rating = rating_mean + rating_per_score * score; level thresholds."""
        mean, spread = recorded["mean"], recorded["spread"]
        if isinstance(self.objective, RegressionObjective):
            per, start = self.objective.std, self.objective.mean
            return {"rating_mean": start + per * mean, "rating_per_score": per * spread}
        if isinstance(self.objective, OrdinalObjective):
            thresholds = (ordered(extra.double()) - mean) / spread
            return {"levels": list(self.examples.classes), "thresholds": thresholds.tolist()}
        return {}


def solve_head(
    features: np.ndarray, examples: Examples, objective: Objective, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, Any]:
    """The best linear head on fixed features, which are standardised before the penalty is put on it.

    Args:
        features: Of all responses, one after the other. Shape (T, d), float64.
        examples: The judgements.
        objective: Their loss.
        weights: How often each judgement counts, or None.

    Returns:
        Weight (d, C) and bias (C,) for the features as they are, and the fit on the standardised ones.
    """
    mean, std = features.mean(0), features.std(0)
    std[std < 1e-12] = 1.0
    fit = fit_linear((features - mean) / std, examples.items, objective, weights=weights)
    weight = fit.weight / std[:, None]
    return weight, fit.bias - mean @ weight, fit


@contextmanager
def _bar(label: str | None, total: int, initial: int = 0, unit: str = "judgement") -> Iterator[Any]:
    """How far a training is, with rates: a bar on a terminal, elsewhere a line for each epoch; gives its callback."""
    from tqdm import tqdm

    shown = label is not None and sys.stderr.isatty()
    began, lines = time.monotonic(), 0
    with tqdm(total=total, initial=min(initial, total), desc=label or None, unit=unit, disable=not shown) as bar:

        def advance(*said: Any) -> None:
            nonlocal lines
            history = said[0].history if len(said) == 2 else []
            bar.update(said[-1])
            if history and shown:
                bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", refresh=False)
            elif label is not None and len(history) > lines:
                lines = len(history)
                rate = (said[0].step * said[0].config.batch_size - initial) / (time.monotonic() - began)
                where = f"{label}, " if label else ""
                print(f"{where}epoch {lines}: loss {history[-1]['loss']:.3f}, {rate:.0f} {unit}s/s", flush=True)

        yield advance
