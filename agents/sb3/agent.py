"""Stable-Baselines3's algorithms behind the interface of all agents."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from safetensors.torch import load_file, save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from rlhf_gym import __version__
from rlhf_gym.atomic import replaced_directory, verified_files
from rlhf_gym.kl import AdaptiveKL
from rlhf_gym.lm import LanguageModel, load_language_model

from ..audit import Audit
from ..base import _restore_prompt_order
from ..config import make_config
from .announce import AnnounceLogprobs
from .policy import LMActorCriticPolicy, policy_kwargs
from .report import Report, StopLearning
from .state import (
    counters,
    get_generators,
    load_optimizer_state,
    load_replay_state,
    optimizer_state,
    own_generators,
    replay_state,
    set_counters,
)
from .vec_env import as_vec_env


class SB3Agent:
    """An unmodified algorithm of SB3 or sb3-contrib that trains a language model.

    This class is for on-policy algorithms; ``SB3Agent.of(algorithm)`` gives the class for any.

    The environment's KL penalty is announced, gamma is 1, and what is saved is a ``from_pretrained`` directory (never
    SB3's zip, which runs code found in it when it is loaded). Actions and minibatches are drawn from SB3's usual global
    generators, but these are the agent's own while it learns, and the caller's come back afterwards.

    Args:
        envs: A vector environment of text (ours or any other with the same spaces), or a scalar one.
        policy: The model to start from, which is copied: a ``PreTrainedModel``, ``LanguageModel``, name or directory;
            None is the environment's reference. "tabular", "transformer" and "lstm" as for every agent.
        seed: Seed of sampling, minibatches and the environment's prompts.
        algorithm: The class, for instance ``stable_baselines3.PPO``; subclasses have theirs.
        audit_interval: Every so many rollouts one is audited, as for every agent (:class:`rlhf_gym.agents.Agent`); 0
            never. Sums over a rollout are divided by the number of responses that ended in it.
        **config: ``n_steps`` (default: twice the longest response, so that most episodes begin and end in a rollout),
            ``lr_schedule`` ("constant" or "linear"), ``critic`` ("shared" or "separate" trunk), ``ref_kl_target`` and
            ``kl_horizon`` of an adaptive KL coefficient; all others are arguments of the algorithm.

    Attributes:
        algorithm: The algorithm itself, ready to be used as SB3's documentation says.
        num_updates: Rollouts learnt from so far.

    Example:
        >>> envs = gym.make_vec("rlhf_gym/TinyReviews-v0", num_envs=64, kl_coef=0.05)        # doctest: +SKIP
        >>> SB3Agent(envs, algorithm=stable_baselines3.PPO, n_epochs=4).learn(100_000)       # doctest: +SKIP
    """

    algorithm_class: type[BaseAlgorithm] | None = None
    config_class: ClassVar[type | None] = None
    policy_class: ClassVar[Any] = LMActorCriticPolicy
    buffer_class: ClassVar[type | None] = None  # None: the algorithm's own choice

    @classmethod
    def of(cls, algorithm: type[BaseAlgorithm] | str) -> type[SB3Agent]:
        """The agent class for any algorithm; see :func:`rlhf_gym.agents.sb3.families.agent_class`.

        Example:
            >>> SB3Agent.of("sb3_contrib:TRPO")(envs, seed=0, n_steps=64)                    # doctest: +SKIP
        """
        from .families import agent_class

        return agent_class(algorithm)

    def __init__(
        self,
        envs: VectorEnv | gym.Env,
        policy: Any = None,
        seed: int = 0,
        algorithm: type[OnPolicyAlgorithm] | None = None,
        *,
        audit_interval: int = 10,
        **config: Any,
    ) -> None:
        algorithm = self.algorithm_class = self.fit_algorithm(algorithm or self.algorithm_class)
        self.config: Any = config if self.config_class is None else make_config(self.config_class, config)
        self.envs, self.seed, self.audit_interval = envs, seed, audit_interval
        base = envs.unwrapped
        arguments = dict(self.config) if isinstance(self.config, dict) else dataclasses.asdict(self.config)
        if arguments.pop("lr_schedule", "constant") == "linear":
            arguments["learning_rate"] = LinearSchedule(arguments["learning_rate"], 0.0, 1.0)
        ref_kl_target, kl_horizon = arguments.pop("ref_kl_target", None), arguments.pop("kl_horizon", 10_000.0)
        # None leaves kl_coef to whoever sets it on the environment.
        self.kl_controller: AdaptiveKL | None = None
        if ref_kl_target is not None and hasattr(base, "kl_coef"):
            self.kl_controller = AdaptiveKL(base.kl_coef, ref_kl_target, kl_horizon)
        self.make_policy(policy, arguments)
        venv = self.make_venv()
        self.complete(arguments, venv)
        # Of a subclass that passes its arguments on, the class that takes them says what there is.
        if any("gamma" in inspect.signature(each).parameters for each in algorithm.__mro__):
            arguments.setdefault("gamma", 1.0)
        with own_generators(None):
            self.algorithm = algorithm(
                self.policy_class, venv, seed=seed, device=getattr(base, "device", "auto"), **arguments
            )
            self._randomness = get_generators()
        self.make_audit()  # learn makes its own; what is wrong with it is told now
        self.algorithm.set_logger(Logger(folder=None, output_formats=[]))
        self._predict_generator = torch.Generator().manual_seed(seed)
        self.num_updates = self.total_timesteps = 0
        self._begin_anew = self._learning = False

    # ---- what other families of algorithms do differently

    def fit_algorithm(self, algorithm: Any) -> type[BaseAlgorithm]:
        """The algorithm as this class uses it; TypeError for one that it cannot use."""
        if not (isinstance(algorithm, type) and issubclass(algorithm, OnPolicyAlgorithm)):
            raise TypeError(
                f"algorithm must be an on-policy class of Stable-Baselines3 such as PPO, got {algorithm!r}; "
                "SB3Agent.of(algorithm) finds the agent for others"
            )
        return algorithm

    def make_policy(self, policy: Any, arguments: dict[str, Any]) -> None:
        """Puts ``policy_kwargs`` into the algorithm's arguments; takes out what is the policy's."""
        critic = arguments.pop("critic", "shared")
        if critic not in ("shared", "separate"):
            raise ValueError(f"critic must be 'shared' or 'separate', got {critic!r}")
        source, self.tokenizer = starting_model(self.envs.unwrapped, policy)
        more = {} if critic == "shared" else {"separate_critic": True}
        arguments["policy_kwargs"] = policy_kwargs(self.envs, source, **more) | arguments.pop("policy_kwargs", {})

    def make_venv(self) -> VecEnv:
        """The environment as the algorithm wants it."""
        return as_vec_env(self.envs)

    def complete(self, arguments: dict[str, Any], venv: VecEnv) -> None:
        """Fills in, in place, what depends on the environment's size, and the buffer."""
        if arguments.get("n_steps") is None:
            arguments["n_steps"] = 2 * longest_response(self.envs)
        if self.buffer_class is not None:
            arguments.setdefault("rollout_buffer_class", self.buffer_class)
        self.prepare(arguments, arguments["n_steps"] * venv.num_envs)

    def prepare(self, arguments: dict[str, Any], num_states: int) -> None:
        """Last changes to the algorithm's arguments, in place, now that the states per rollout are known."""

    def make_audit(self) -> Audit:
        """Looks at the rollouts of one call of ``learn``."""
        return Audit(self.envs, self.policy_model, self.audit_interval)

    @property
    def _announces(self) -> bool:
        base = self.envs.unwrapped
        return hasattr(base, "announce_logprobs") and getattr(base, "language_model", None) is not None

    def save_policy(self, folder: Path) -> None:
        """Writes what ``load_policy`` reads, and a ``from_pretrained`` model."""
        policy = self.algorithm.policy
        policy.lm.save_pretrained(folder)
        if policy.critic_lm is not None:
            policy.critic_lm.save_pretrained(folder / "critic")
        save_file(policy.value_head.state_dict(), folder / "value_head.safetensors")

    def load_policy(self, folder: Path) -> None:
        """Reads what is not in the ``from_pretrained`` model, from which this agent was made."""
        policy = self.algorithm.policy
        if policy.critic_lm is not None:
            critic = load_language_model(str(folder / "critic"), self.tokenizer, device=policy.device, dtype="float32")
            policy.critic_lm.load_state_dict(critic.model.state_dict())
        policy.value_head.load_state_dict(load_file(folder / "value_head.safetensors"))

    # ---- learning

    def learn(
        self,
        total_timesteps: int,
        callback: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
        progress_bar: bool = False,
    ) -> SB3Agent:
        """Trains until the agent has generated ``total_timesteps`` tokens in all.

        A loaded agent goes on from where it was saved, bit for bit as the saved one does (on a CPU).

        Args:
            total_timesteps: Tokens, EOS included, at least 1. Schedules end here. Whole rollouts are collected, so it
                ends a little above.
            callback: One or several, each ``callback(agent, metrics)``, called after each update; returning False ends
                the training. Callbacks of SB3 (``BaseCallback``) work too.
            progress_bar: Show a bar with tokens per second, score and KL.

        Returns:
            The agent.
        """
        if total_timesteps < 1:
            raise ValueError(f"total_timesteps must be at least 1, got {total_timesteps}")
        self.total_timesteps = int(total_timesteps)
        if self.num_timesteps >= self.total_timesteps:
            return self
        self._warn_of_idle_update()
        given = [] if callback is None else list(callback) if isinstance(callback, Sequence) else [callback]
        report = Report(self, [call for call in given if not isinstance(call, BaseCallback)], progress_bar)
        callbacks = [report, *(call for call in given if isinstance(call, BaseCallback))]
        if self._announces:
            callbacks.append(announce := AnnounceLogprobs())
        try:
            with own_generators(self._randomness):
                self._learning = True
                try:
                    # The second argument of SB3's is what is left to do.
                    self.algorithm.learn(
                        self.total_timesteps - self.num_timesteps, CallbackList(callbacks), reset_num_timesteps=False
                    )
                except StopLearning:
                    pass
                finally:
                    self._learning = False
                    self._randomness = get_generators()
        finally:
            report.close()
            if self._announces:
                announce.close()
        return self

    def _warn_of_idle_update(self) -> None:
        if not isinstance(self.algorithm, OnPolicyAlgorithm):
            return
        rollout, schedule = self.algorithm.n_steps * self.algorithm.n_envs, self.algorithm.learning_rate
        if isinstance(schedule, LinearSchedule) and self.num_timesteps == 0 and self.total_timesteps <= rollout:
            warnings.warn(
                f"the learning rate of the only update will be 0: Stable-Baselines3 takes it at the end of a rollout, and "
                f"total_timesteps={self.total_timesteps} is at most one rollout of {rollout} tokens; raise it, lower "
                "n_steps, or take lr_schedule='constant'",
                stacklevel=3,
            )

    def begin_rollout(self) -> None:
        """Called before each rollout. After a save the episodes in flight are given up, here as in the saved agent."""
        if self._begin_anew:
            self._begin_anew = False
            algorithm = self.algorithm
            algorithm._last_obs = algorithm.env.reset()
            algorithm._last_episode_starts = np.ones(algorithm.n_envs, dtype=bool)

    def end_update(self, kl: float, num_episodes: int) -> None:
        """Called after each update with the mean KL of the rollout's responses."""
        self.num_updates += 1
        if self.kl_controller is not None and num_episodes:
            self.envs.unwrapped.kl_coef = self.kl_controller.update(kl, num_episodes)

    @property
    def num_timesteps(self) -> int:
        """Tokens generated so far, EOS included."""
        return self.algorithm.num_timesteps

    # ---- acting

    @property
    def policy_model(self) -> Any:
        """The trained language model, a ``PreTrainedModel``."""
        return self.algorithm.policy.lm

    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Chooses the next tokens.

        Args:
            observation: ``input_ids`` and ``attention_mask`` of one row (L,) or several (N, L), numpy or torch.
            deterministic: The likeliest token instead of a sample.

        Returns:
            Tokens of shape () or (N,), numpy or torch like the observation; and None.
        """
        tensors = isinstance(observation["input_ids"], Tensor)
        arrays = {key: value.cpu().numpy() if tensors else value for key, value in observation.items()}
        policy = self.algorithm.policy
        policy.generator = self._predict_generator
        try:
            actions, _ = self.algorithm.predict(arrays, deterministic=deterministic)
        finally:
            policy.generator = None
        return (torch.as_tensor(actions, device=observation["input_ids"].device) if tensors else actions), None

    # ---- saving

    def save(self, directory: str | Path) -> None:
        """Writes a directory that ``AutoModelForCausalLM.from_pretrained`` loads, with all that ``load`` needs.

        The directory appears whole or not at all; one that an agent wrote there before is replaced. Episodes in flight
        are not saved: this agent, too, begins its next rollout with new ones, and so goes on as the loaded one does.
        """
        algorithm, base = self.algorithm, self.envs.unwrapped
        randomness = get_generators() if self._learning else self._randomness
        optimizer = getattr(algorithm.policy, "optimizer", None)  # evolution strategies have none
        tensors, numbers = ({}, None) if optimizer is None else optimizer_state(optimizer)
        tensors["torch_generator"] = randomness[0]
        tensors["numpy_generator"] = torch.from_numpy(randomness[1][1].astype(np.int64))
        tensors["predict_generator"] = self._predict_generator.get_state()
        replay = getattr(algorithm, "replay_buffer", None)
        held, place = ({}, None) if replay is None else replay_state(replay)
        state = {
            "agent": type(self).__name__,
            "algorithm": type(algorithm).__name__,
            "version": __version__,
            "config": self.config if self.config_class is None else dataclasses.asdict(self.config),
            "seed": self.seed,
            "audit_interval": self.audit_interval,
            "num_timesteps": self.num_timesteps,
            "num_updates": self.num_updates,
            "counters": counters(algorithm),
            "optimizer": numbers,
            "numpy_generator": [randomness[1][0], *randomness[1][2:]],
            "kl_controller": self.kl_controller.state_dict() if self.kl_controller else None,
            "prompt_order": base.prompt_order_state() if hasattr(base, "prompt_order_state") else None,
            "replay_buffer": place,
        }
        with replaced_directory(directory) as folder:
            self.save_policy(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
            if held:
                save_file(held, folder / "replay_buffer.safetensors")
            save_file(tensors, folder / "trainer_state.safetensors")
            (folder / "trainer_state.json").write_text(json.dumps(state, indent=1))
        self._begin_anew = True

    @classmethod
    def load(cls, directory: str | Path, env: VectorEnv | gym.Env, algorithm: Any = None) -> SB3Agent:
        """The agent that ``save`` wrote, ready to act in ``env`` and to go on learning.

        Args:
            directory: Where it was saved.
            env: The environment, with as many rows as before.
            algorithm: The algorithm's class where this class has none of its own; code is never loaded from a file.

        Raises:
            FileNotFoundError: If there is no saved agent.
            ValueError: If a file was damaged, or the agent is of another class or algorithm.
        """
        folder = verified_files(Path(directory), "trainer_state.json")
        state = json.loads((folder / "trainer_state.json").read_text())
        if state["agent"] != cls.__name__:
            raise ValueError(f"{directory} holds a {state['agent']}, not a {cls.__name__}; load it with that class")
        common = {"seed": state["seed"], "audit_interval": state.get("audit_interval", 10)}  # older agents have none
        agent = cls(env, policy=str(folder), algorithm=algorithm, **common, **state["config"])
        if type(agent.algorithm).__name__ != state["algorithm"]:
            raise ValueError(f"{directory} was trained by {state['algorithm']}, not {type(agent.algorithm).__name__}")
        agent.load_policy(folder)
        tensors = load_file(folder / "trainer_state.safetensors")
        name, *rest = state["numpy_generator"]
        keys = tensors.pop("numpy_generator").numpy().astype(np.uint32)
        agent._randomness = tensors.pop("torch_generator"), (name, keys, *rest)
        agent._predict_generator.set_state(tensors.pop("predict_generator"))
        if state["optimizer"] is not None:
            load_optimizer_state(agent.algorithm.policy.optimizer, tensors, state["optimizer"])
        if state.get("replay_buffer"):
            held = load_file(folder / "replay_buffer.safetensors")
            load_replay_state(agent.algorithm.replay_buffer, held, state["replay_buffer"])
        if agent.kl_controller is not None and state["kl_controller"]:
            agent.kl_controller.load_state_dict(state["kl_controller"])
            env.unwrapped.kl_coef = agent.kl_controller.coef
        if _restore_prompt_order(env.unwrapped, state["prompt_order"]):
            agent.algorithm.env.unwrapped._reset_seeds()  # the rows go on in their order of prompts
        set_counters(agent.algorithm, state["counters"])
        agent.num_updates = state["num_updates"]
        return agent


def longest_response(envs: Any) -> int:
    base = envs.unwrapped
    return getattr(base, "max_response_tokens", None) or envs.observation_space["input_ids"].shape[-1]


def starting_model(base: Any, policy: Any) -> tuple[Any, Any]:
    """The model to copy and its tokenizer (None where nobody knows one)."""
    tokenizer = getattr(base, "tokenizer", None)
    if isinstance(policy, (str, Path)):
        from rlhf_gym.exact import POLICY_KINDS, make_policy

        if policy in POLICY_KINDS:
            return make_policy(base, str(policy)), tokenizer
        policy = load_language_model(str(policy), device=getattr(base, "device", "auto"), dtype="float32")
    if isinstance(policy, LanguageModel):
        tokenizer = tokenizer or policy.tokenizer
    return policy, tokenizer
