"""Rounds of asking people and training: sample, judge, refit the reward model, train the policy against it, again.

    1. The policy of the round before (at first the base model) answers prompts, each twice.
    2. The pairs are judged, by people at the labelling page or by simulated annotators, and kept in one store.
    3. A reward model, or an ensemble of them, is fitted to all judgements so far.
    4. A policy is trained against it with PPO, from the base model again (Bai et al. 2022, section 4.5).

A policy finds what its reward model is wrong about: the score that it is paid goes on rising while the true (gold) one,
where somebody knows it, falls. The next round's judgements are about just such responses.

Everything is kept: ``feedback.sqlite`` holds the judgements, and each ``round_<n>/`` its ``judged.jsonl``, the reward
model (``reward_model/``), the policy (``policy/``), ``curve.jsonl`` (proxy, gold and KL over training) and
``evaluation.json`` on held-out prompts.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rlhf_gym.atomic import write_json, write_text
from rlhf_gym.evaluation import as_json, evaluate
from rlhf_gym.feedback import FeedbackStore, Item, SimulatedAnnotator, preferences
from rlhf_gym.feedback.items import SAMPLING
from rlhf_gym.feedback.judgements import Comparison, Skip
from rlhf_gym.reward_models import RewardModel, RewardModelConfig, train_reward_model
from rlhf_gym.reward_models.examples import as_examples
from rlhf_gym.reward_models.report import make_report
from rlhf_gym.rewards.ensemble import RULES
from rlhf_gym.rewards.text import check_choice

from .ppo import PPO

STORE, EVALUATION, CURVE = "feedback.sqlite", "evaluation.json", "curve.jsonl"
# Judges some items of a round and puts the judgements into the store; returns when all are there.
Judge = Callable[[FeedbackStore, Sequence[Item], np.ndarray | None, int], None]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the loop.

    Attributes:
        env_id: The environment's id, with the language model as ``model`` and the prompts among ``env``.
        env: Arguments of the environment, beyond ``reward``, ``metrics``, ``num_envs`` and ``kl_coef``.
        gold: The true reward, as ``reward=`` takes it; None where nobody knows it. It is reported and never paid.
        eval_prompts: Held-out prompts to measure on; None: the environment's own.
        num_rounds: Rounds.
        num_pairs: Pairs of responses that are judged in each round.
        num_members: Reward models in the ensemble.
        rule: How they are combined: "mean", "min" or "mean-std".
        std_coef: Price of disagreement under "mean-std".
        held_out: Share of the prompts whose judgements are kept from the reward model, for its report.
        reward_model: How they are trained; None: as `train_reward_model` does it, from the base model.
        tokens_per_round: Response tokens of PPO's training.
        num_envs: Rows of its environment.
        kl_coef: Weight of the KL penalty. The reward model's scores have a standard deviation of 1 on what it has seen, so
            .4 allows for about three of them; much less is an invitation to find what the model is wrong about.
        agent: Further settings of PPO.
        num_eval_episodes: Responses of each evaluation.
    """

    env_id: str = "rlhf_gym/TinyReviews-v0"
    env: dict[str, Any] = field(default_factory=dict)
    gold: Any = "tiny-reviews"
    eval_prompts: Any = "tiny-reviews/test"
    num_rounds: int = 3
    num_pairs: int = 200
    num_members: int = 3
    rule: str = "mean"
    std_coef: float = 1.0
    held_out: float = 0.1
    reward_model: RewardModelConfig | None = None
    tokens_per_round: int = 40_000
    num_envs: int = 128
    kl_coef: float = 0.4
    agent: dict[str, Any] = field(default_factory=dict)
    num_eval_episodes: int = 256

    def __post_init__(self) -> None:
        for name in ("num_rounds", "num_pairs", "num_members", "tokens_per_round", "num_envs", "num_eval_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")
        check_choice("rule", self.rule, RULES)


class Loop:
    """The rounds of one run; see the module's docstring.

    Args:
        directory: Where everything is kept. Finished rounds that are there are not made again; a round that was
            interrupted keeps its judgements.
        config: Settings.
        judge: Who judges, see `simulated` and `people`.
        seed: Seed of all randomness.
        say: Is told each step in a line.
        progress_bar: Draw PPO's.
    """

    def __init__(
        self,
        directory: str | Path,
        config: LoopConfig,
        judge: Judge,
        *,
        seed: int = 0,
        say: Callable[[str], None] = print,
        progress_bar: bool = False,
    ):
        self.directory, self.config, self.judge, self.seed = Path(directory), config, judge, seed
        self.say, self.progress_bar = say, progress_bar
        self.directory.mkdir(parents=True, exist_ok=True)

    def run(self) -> list[dict[str, Any]]:
        """Make the rounds that are missing; returns the evaluations of the base model and of each round's policy."""
        base = self.directory / EVALUATION
        if not base.is_file():
            self.say("measuring the base model")
            write_json(base, self._measure(None, self._envs("length", 1)))
        found = [json.loads(base.read_text())]
        for number in range(1, self.config.num_rounds + 1):
            folder = self._folder(number)
            if not (folder / EVALUATION).is_file():
                self._round(number, folder)
            found.append(json.loads((folder / EVALUATION).read_text()))
            self.say(f"round {number}: {_in_words(found[-1])}")
        return found

    def _folder(self, number: int) -> Path:
        return self.directory / f"round_{number}"

    def _envs(self, reward: Any, num_envs: int) -> Any:
        cfg = self.config
        metrics = {} if cfg.gold is None else {"metrics": {"gold": cfg.gold}}
        return gym.make_vec(cfg.env_id, num_envs=num_envs, reward=reward, kl_coef=cfg.kl_coef, **{**cfg.env, **metrics})

    def _round(self, number: int, folder: Path) -> None:
        cfg = self.config
        folder.mkdir(exist_ok=True)
        with FeedbackStore(self.directory / STORE) as store:
            items, gold = self._pairs(number, folder)
            store.add_items(items)
            self.judge(store, items, gold, number)
            records = preferences(store)
        self.say(f"round {number}: {len(records)} judgements so far; fitting the reward model")
        reward_model = self.fit(records, number)
        reward_model.save(folder / "reward_model")
        self.say(f"round {number}: training the policy against it")
        envs = self._envs(reward_model.reward, cfg.num_envs)
        agent = PPO(envs, seed=self._seed(number), **cfg.agent)
        curve: list[dict[str, float]] = []

        def note(agent: Any, metrics: dict[str, float]) -> None:
            names = {"proxy": "objective/scores", "kl": "objective/kl", "gold": "objective/metric/gold"}
            point = {name: metrics[key] for name, key in names.items() if key in metrics}
            curve.append({"tokens": agent.num_timesteps, **point})

        agent.learn(cfg.tokens_per_round, callback=note, progress_bar=self.progress_bar)
        agent.save(folder / "policy")
        write_text(folder / CURVE, "".join(json.dumps(point) + "\n" for point in curve))
        # Last: a round that has its evaluation is finished.
        write_json(folder / EVALUATION, self._measure(agent, envs))

    def fit(self, records: Sequence[Any], number: int) -> RewardModel:
        """The reward model of a round, from all judgements so far; those of some prompts are held out for its report.

        The members of an ensemble learn from different judgements: prompts drawn with replacement.
        """
        cfg, seed = self.config, self._seed(number)
        language_model = self._envs("length", 1).unwrapped.language_model
        # Scores have the same unit in all rounds: their spread over the base model's responses.
        base, _ = self._pairs(1, self._folder(1))
        reference = [(item.prompt, response) for item in base for response in item.responses]
        rng = np.random.default_rng([seed, 1])
        prompts = list(dict.fromkeys(record.prompt for record in records))
        aside = set(rng.choice(prompts, int(cfg.held_out * len(prompts)), replace=False).tolist())
        training = [record for record in records if record.prompt not in aside]
        members: tuple[Any, ...] = ()
        for member in range(cfg.num_members):
            drawn = training if cfg.num_members == 1 else _by_drawn_prompts(training, rng)
            model = train_reward_model(
                drawn,
                model=language_model.model,
                tokenizer=language_model.tokenizer,
                config=cfg.reward_model,
                held_out=0,
                reference=reference,
                seed=seed + member,
            )
            members += model.members
        whole = dataclasses.replace(model, members=members, rule=cfg.rule, std_coef=cfg.std_coef)
        if not aside:
            return whole
        held_out = as_examples([record for record in records if record.prompt in aside])
        return dataclasses.replace(whole, report=make_report(whole, held_out, None, gold=cfg.gold))

    def _pairs(self, number: int, folder: Path) -> tuple[list[Item], np.ndarray | None]:
        """The pairs of a round with the gold rewards of each, (n, 2); sampled once and then read from its file."""
        path = folder / "judged.jsonl"
        if not path.is_file():
            self.say(f"round {number}: sampling {self.config.num_pairs} pairs")
            write_text(path, "".join(json.dumps(row) + "\n" for row in self._sample(number)))
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # Ids of their own: a later policy may say the same again, and an item never changes where it is from.
        items = [
            Item(row["prompt"], tuple(row["responses"]), row["checkpoint"], row["sampling"], id=f"round-{number}-{i}")
            for i, row in enumerate(rows)
        ]
        known = self.config.gold is not None
        return items, np.array([row["gold"] for row in rows]) if known else None

    def _sample(self, number: int) -> list[dict[str, Any]]:
        cfg = self.config
        envs = self._envs("length", 1)
        prompts = envs.unwrapped.process.prompts
        rng = np.random.default_rng([self.seed, number])
        chosen = rng.choice(len(prompts), cfg.num_pairs, replace=cfg.num_pairs > len(prompts))
        policy, checkpoint = None, "base"
        if number > 1:
            checkpoint = f"round_{number - 1}"
            policy = PPO.load(self._folder(number - 1) / "policy", env=self._envs("length", cfg.num_envs))
        found = evaluate(
            policy,
            envs,
            # Twice the list, so that episodes i and i + num_pairs answer the same prompt.
            prompts=[{"prompt": prompts[i].text, **prompts[i].columns} for i in [*chosen, *chosen]],
            seed=self._seed(number),
            others={} if cfg.gold is None else {"gold": cfg.gold},
        )
        gold = found.others.get("gold", np.full(len(found.samples), np.nan))
        pairs = zip(found.samples, found.samples[cfg.num_pairs :], gold, gold[cfg.num_pairs :], strict=False)
        sampling = {name: cfg.env[name] for name in SAMPLING if cfg.env.get(name) is not None}
        return [
            {
                "prompt": first["prompt"],
                "responses": [first["response"], second["response"]],
                "checkpoint": checkpoint,
                "sampling": {**sampling, "seed": self._seed(number)},
                "gold": [float(x), float(y)] if cfg.gold is not None else None,
            }
            for first, second, x, y in pairs
            if first["response"] != second["response"]  # of two equal ones there is nothing to say
        ]

    def _measure(self, agent: Any, envs: Any) -> dict[str, Any]:
        cfg = self.config
        others = {} if cfg.gold is None else {"gold": cfg.gold}
        found = evaluate(
            agent, envs, prompts=cfg.eval_prompts, num_episodes=cfg.num_eval_episodes, seed=self.seed, others=others
        )
        numbers = {"kl": found.kl, "length": found.lengths, **{name: found.others[name] for name in others}}
        numbers |= {} if agent is None else {"proxy": found.scores}
        return {name: as_json(found.estimate(values)) for name, values in numbers.items() if values is not None}

    def _seed(self, number: int) -> int:
        return 1000 * self.seed + number


def simulated(annotators: Sequence[SimulatedAnnotator], seed: int = 0) -> Judge:
    """Simulated annotators, who know the gold reward as well as they do; they take turns, an item each."""

    def judge(store: FeedbackStore, items: Sequence[Item], gold: np.ndarray | None, number: int) -> None:
        if gold is None:
            raise ValueError("simulated annotators need a gold reward to judge by; set gold")
        rng = np.random.default_rng([seed, number])
        for i, (item, rewards) in enumerate(zip(items, gold, strict=True)):
            # Keys make it the same judgement when a round is made again.
            store.record(annotators[i % len(annotators)].compare(item, rewards, f"round-{number}-{i}", rng))

    return judge


def people(say: Callable[[str], None] = print, *, timeout_s: float = float("inf"), poll_s: float = 2.0) -> Judge:
    """People at the labelling page, who have the same store open; waits until each item is compared, or was skipped.

    One that somebody skips is not waited for, or whoever judges alone would wait for ever; compared later, it counts.
    """

    def judge(store: FeedbackStore, items: Sequence[Item], gold: np.ndarray | None, number: int) -> None:
        wanted, end, told = {item.id for item in items}, time.monotonic() + timeout_s, (-1, -1)
        say(f"round {number}: {len(wanted)} pairs to compare; open the page with: rlhf-gym label --db {store.path}")
        while True:
            said = [event.judgement for event in store.standing() if event.judgement.item in wanted]
            done = {judgement.item for judgement in said if isinstance(judgement.verdict, Comparison)}
            skipped = {judgement.item for judgement in said if isinstance(judgement.verdict, Skip)} - done
            if (len(done), len(skipped)) != told:
                told = len(done), len(skipped)
                more = f", {len(skipped)} skipped" if skipped else ""
                say(f"round {number}: {len(done)} of {len(wanted)} pairs are compared{more}")
            if done | skipped == wanted:
                return
            if time.monotonic() > end:
                raise TimeoutError(
                    f"{len(done)} of {len(wanted)} pairs were compared within {timeout_s:g} s; the judgements are kept, and the "
                    "same command goes on"
                )
            time.sleep(poll_s)

    return judge


def _by_drawn_prompts(records: Sequence[Any], rng: np.random.Generator) -> list[Any]:
    """As many prompts as there are, drawn with replacement, with all that is said of each."""
    by_prompt: dict[str, list[Any]] = {}
    for record in records:
        by_prompt.setdefault(record.prompt, []).append(record)
    groups = list(by_prompt.values())
    return [record for i in rng.integers(len(groups), size=len(groups)) for record in groups[i]]


def _in_words(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {found[name]['mean']:.3f}" for name in ("gold", "proxy", "kl") if name in found)
