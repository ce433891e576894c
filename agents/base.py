"""What every batched agent does the same way: the learning loop, predicting, saving and loading.

An algorithm is a subclass with a frozen ``config_class`` and one method, ``update(rollout) -> metrics``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_gym import __version__
from rlhf_gym.atomic import replaced_directory, verified_files
from rlhf_gym.kl import AdaptiveKL
from rlhf_gym.lm import load_language_model, make_engine, sample_tokens
from rlhf_gym.lm.blocks import checkpoint_blocks
from rlhf_gym.lm.load import no_loading_bars, vocab_size
from rlhf_gym.lm.lora import base_fingerprint, load_lora, save_lora
from rlhf_gym.lm.precision import MasterWeights, compute_dtype

from . import parallel
from .audit import Audit
from .batch import Rollout
from .config import make_config
from .logs import Progress, rollout_metrics
from .policy import Policy, adapted_reference, make_policy_model
from .rollout import Collector
from .stepping import token_filter_of

Callback = Callable[["Agent", dict[str, float]], Any]


class Agent:
    """A policy with an optimiser that learns in a text-generation environment.

    Args:
        envs: A vector environment, ours or any other whose observations hold ``input_ids`` and ``attention_mask`` (then
            ``policy`` is needed).
        policy: The causal LM to train: a ``PreTrainedModel`` (trained in place), a name or directory, or None for a
            copy of the environment's reference. On environments with known answers also "tabular", "transformer" and
            "lstm", see :mod:`rlhf_gym.exact`.
        seed: Seed of sampling, minibatches and the environment's prompts.
        audit_interval: Every so many updates the rollout is audited (``audit.py``): exact KL and entropy beside the
            sampled ones, the certificate of optimality, and a warning where they contradict each other. 0 never.
        **config: Fields of ``config_class``.

    Attributes:
        num_timesteps: Response tokens generated so far, EOS included.
        num_updates: Rollouts learnt from so far.
        state: What the algorithm carries from update to update, JSON-able; it is saved with the agent.
    """

    config_class: ClassVar[type]
    needs_baselines: ClassVar[bool] = False
    """Whether rollouts bring the summed reward of the likeliest response to each prompt."""

    def __init__(self, envs: VectorEnv, policy: Any = None, seed: int = 0, *, audit_interval: int = 10, **config: Any):
        self.config = make_config(self.config_class, config)
        self.envs, self.seed, self.audit_interval = envs, seed, audit_interval
        if not isinstance(envs, VectorEnv):
            raise ValueError(f"envs must be a vector environment, got {type(envs).__name__}; use gym.make_vec")
        space = envs.single_observation_space
        if not {"input_ids", "attention_mask"} <= set(getattr(space, "spaces", ())):
            raise ValueError(f"envs must have Dict observations with input_ids and attention_mask, got {space}")
        base = envs.unwrapped
        self.lora_rank = getattr(self.config, "lora_rank", None)
        self.is_divided = getattr(self.config, "fsdp", False)
        if self.lora_rank is None:
            model, self.tokenizer = make_policy_model(base, policy)
        else:
            model, self.tokenizer = adapted_reference(base, policy, self.lora_rank, seed)
        num_actions, num_tokens = int(envs.single_action_space.n), vocab_size(model)
        if num_tokens != num_actions:
            raise ValueError(f"policy must have the environment's vocabulary of {num_actions} tokens, got {num_tokens}")
        cfg = self.config
        dtype = compute_dtype(cfg.dtype, next(model.parameters()).device)
        critic = getattr(cfg, "critic", "none")
        if self.is_divided:
            from . import sharding  # not every build of PyTorch has what it needs

            sharding.check_can_divide(model, cfg)
        if self.lora_rank is None:
            # Its float32 weights go to the device in parts where they are to be divided.
            model = (model.cpu() if self.is_divided else model).float()
        else:
            dtype = next(model.parameters()).dtype  # these are the reference's weights: they stay as they are
            if critic == "separate":
                raise ValueError('critic must be "shared" or "none" with lora_rank: the adapter\'s base is not copied')
        if getattr(cfg, "gradient_checkpointing", False):
            checkpoint_blocks(model)
        self.policy = Policy(model, critic=critic, token_filter=token_filter_of(envs))
        self.optimizer = (
            sharding.ShardedWeights(self.policy, self.make_optimizer, compute_dtype=dtype)
            if self.is_divided
            else MasterWeights(self.policy.parameters(), self.make_optimizer, compute_dtype=dtype)
        )
        self.generator = torch.Generator().manual_seed(seed)
        self._predict_generator = torch.Generator().manual_seed(seed)
        self.collector = Collector(
            envs,
            self.policy,
            self.generator,
            cfg.num_rounds,
            group_size=getattr(cfg, "group_size", 1),
            with_baselines=self.needs_baselines,
        )
        Audit(envs, self.policy.model, audit_interval)  # learn makes its own; what is wrong with it is told now
        self.kl_controller = self._make_kl_controller(base)
        self.num_timesteps = self.num_updates = self.total_timesteps = 0
        self.state: dict[str, Any] = {}
        self._started = False
        self._predict_engines: dict[Any, Any] = {}

    def _make_kl_controller(self, base: Any) -> AdaptiveKL | None:
        """None leaves kl_coef to whoever sets it on the environment."""
        target = getattr(self.config, "ref_kl_target", None)
        if target is None:
            return None
        if not hasattr(base, "kl_coef"):
            raise ValueError(
                f"ref_kl_target={target:g} steers the environment's kl_coef, and this environment has none"
            )
        controller = AdaptiveKL(base.kl_coef, target, self.config.kl_horizon)
        # Its rule about the horizon would otherwise be met after the first update only.
        copy.copy(controller).update(target, self.envs.num_envs * self.config.num_rounds)
        return controller

    # ---- for the algorithm

    def make_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """AdamW without weight decay, which would pull the policy towards 0 and not towards the reference.

        The value head has a learning rate of its own: it starts at 0 while the trunk is trained already, and a critic
        that lags behind the scores adds its own error to every advantage.
        """
        head = self.policy.value_head
        num_head = 0 if head is None else len(list(head.parameters()))
        trunk = parameters[: len(parameters) - num_head]
        groups = [{"params": trunk, "lr": self.config.learning_rate}]
        if num_head:
            groups.append({"params": parameters[-num_head:], "lr": self.config.value_learning_rate})
        for group in groups:
            group["initial_lr"] = group["lr"]  # what schedules multiply
        # In one pass over the memory where there is much of it: a quarter of the time. The step of a small model stays what
        # the committed results on tables were made with, to the last bit.
        fused = sum(p.numel() for p in parameters) >= 2**18
        return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0, fused=fused)

    def before_rollout(self) -> None:
        """What an algorithm does before each rollout is sampled: set its policy up, or refuse the environment."""

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learn from one rollout; returns metrics. The algorithm."""
        raise NotImplementedError

    @property
    def progress_remaining(self) -> float:
        """Share of ``total_timesteps`` that is left, from 1 down to 0: for schedules."""
        return max(0.0, 1.0 - self.num_timesteps / self.total_timesteps) if self.total_timesteps else 1.0

    # ---- learning

    def learn(
        self, total_timesteps: int, callback: Callback | Sequence[Callback] | None = None, progress_bar: bool = False
    ) -> Agent:
        """Train until the agent has generated ``total_timesteps`` tokens in all.

        A loaded agent goes on from where it was saved, bit for bit as if it had never stopped (on a CPU).

        Args:
            total_timesteps: Tokens, EOS included, >= 1. Schedules end here. Whole rollouts are collected, so it ends a
                little above.
            callback: Called as ``callback(agent, metrics)`` after each update; returning False ends the training.
            progress_bar: Show a bar with tokens per second, score and KL.
        """
        if total_timesteps < 1:
            raise ValueError(f"total_timesteps must be >= 1, got {total_timesteps}")
        self.total_timesteps = int(total_timesteps)
        if self.num_timesteps >= self.total_timesteps:
            warnings.warn(
                f"nothing to learn: total_timesteps={total_timesteps} counts all tokens, those before saving too, and "
                f"{self.num_timesteps} have been generated; ask for more",
                stacklevel=2,
            )
        callbacks = [callback] if callable(callback) else list(callback or [])
        masks_reference = self.policy.mask_model is None
        audit = Audit(self.envs, self.policy.model, self.audit_interval, masks_reference=masks_reference)
        with Progress(self.total_timesteps, self.num_timesteps, show=progress_bar) as progress:
            while self.num_timesteps < self.total_timesteps:
                progress.start_rollout()
                self.before_rollout()
                # The first reset takes the seed; later ones go on in the rows' orders of prompts.
                rollout = self.collector.collect(progress.tokens, seed=None if self._started else self.seed)
                self._started = True
                progress.start_audit()
                audited = audit(rollout.batch, self.num_updates) if parallel.rank() == 0 else {}
                progress.start_update()
                self.optimizer.zero_grad()  # an update that was interrupted half-way may have left some
                metrics = self.update(rollout)
                self.optimizer.gather()
                # Counted when they have been learnt from: schedules begin at 1, and an interrupted update is made
                # again.
                self.num_timesteps += rollout.num_tokens
                self.num_updates += 1
                self._invalidate()
                metrics = rollout_metrics(self, rollout) | audited | metrics | progress.end_update(rollout)
                if self.kl_controller is not None:
                    sequence_kl = rollout.batch.kl.sum(1).mean().item()
                    self.envs.unwrapped.kl_coef = self.kl_controller.update(sequence_kl, len(rollout.batch))
                # A list: every callback hears of every update.
                stop = [call(self, metrics) is False for call in callbacks]
                if parallel.any_of(any(stop)):
                    break
        return self

    def _invalidate(self) -> None:
        for engine in self._predict_engines.values():
            engine.invalidate()

    # ---- acting

    @property
    def policy_model(self) -> Any:
        """The trained language model, a ``PreTrainedModel``."""
        return self.policy.model

    @torch.no_grad()
    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Choose the next tokens, in the manner of Stable-Baselines3.

        Args:
            observation: ``input_ids`` and ``attention_mask`` of one row (L,) or several (N, L), numpy or torch.
            deterministic: The likeliest token instead of a sample.

        Returns:
            Tokens of shape () or (N,), int64, numpy or torch like the observation; and None (there is no recurrent
            state to carry).
        """
        ids, mask = (
            torch.as_tensor(observation[key]).to(self.policy.device) for key in ("input_ids", "attention_mask")
        )
        single = ids.dim() == 1
        ids, lengths = (ids[None], mask[None].sum(1)) if single else (ids, mask.sum(1))
        policy_filter = self.policy.token_filter
        logits = self._cached_engine(self.policy.model, ids).next_logits(ids.long(), lengths.long())
        masking = logits
        if policy_filter.uses_reference:
            mask_model = self.policy.mask_model or self._reference().model
            masking = self._cached_engine(mask_model, ids).next_logits(ids.long(), lengths.long())
        allowed = policy_filter.mask(masking)
        logprobs = policy_filter.logprobs(logits, allowed)
        if deterministic:
            tokens = logprobs.argmax(-1)
        else:
            tokens = sample_tokens(logprobs, torch.rand(len(ids), generator=self._predict_generator).to(ids.device))
        tokens = tokens[0] if single else tokens
        return (tokens if isinstance(observation["input_ids"], Tensor) else tokens.cpu().numpy()), None

    def _reference(self) -> Any:
        reference = getattr(self.envs.unwrapped, "language_model", None)
        if reference is None:
            raise ValueError(
                "top_k and top_p are taken on the reference, which only a native vector environment tells; use "
                "gym.make_vec without vectorization_mode"
            )
        return reference

    def _cached_engine(self, model: Any, ids: Tensor) -> Any:
        key = (id(model), *ids.shape)
        if key not in self._predict_engines:
            while len(self._predict_engines) >= 4:  # each holds a cache of its batch's size
                del self._predict_engines[next(iter(self._predict_engines))]
            self._predict_engines[key] = make_engine(model, *ids.shape)
        return self._predict_engines[key]

    # ---- saving

    def _other_models(self) -> dict[str, Any]:
        """Folder -> a model that is saved beside the policy's."""
        models = {"critic": self.policy.critic, "mask": self.policy.mask_model}
        return {name: model for name, model in models.items() if model is not None}

    def save(self, directory: str | Path) -> None:
        """Write a directory that ``AutoModelForCausalLM.from_pretrained`` loads, with all that ``load`` needs to go on.

        Of a policy with an adapter it holds that alone, and `load_language_model` puts it into its base. The directory
        appears whole or not at all, whenever the process dies; one that was there before is replaced. With ``fsdp`` all
        processes have to call it: the first collects their parts in its host's memory, and writes.
        """
        with self.optimizer.master_precision(), no_loading_bars():
            weights = self.optimizer.weights(self.policy.model)
            head = self.optimizer.weights(self.policy.value_head) if self.policy.value_head is not None else {}
            tensors, scalars = self.optimizer.state_dict()
            if self.is_divided and parallel.rank() > 0:
                return
            with replaced_directory(directory) as folder:
                if self.lora_rank is None:
                    self.policy.model.save_pretrained(folder, state_dict=weights)
                else:
                    save_lora(self.policy.model, folder)
                for name, model in self._other_models().items():
                    model.save_pretrained(folder / name)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(folder)
                if head:
                    save_file({k: v.contiguous() for k, v in head.items()}, folder / "value_head.safetensors")
                generators = {
                    "generator": self.generator.get_state(),
                    "predict_generator": self._predict_generator.get_state(),
                }
                save_file(tensors | generators, folder / "trainer_state.safetensors")
                base = self.envs.unwrapped
                state = {
                    "agent": type(self).__name__,
                    "version": __version__,
                    "config": dataclasses.asdict(self.config),
                    "seed": self.seed,
                    "audit_interval": self.audit_interval,
                    "num_timesteps": self.num_timesteps,
                    "num_updates": self.num_updates,
                    "state": self.state,
                    "base": None if self.lora_rank is None else base_fingerprint(self.policy.model),
                    "optimizer": scalars,
                    "kl_controller": self.kl_controller.state_dict() if self.kl_controller else None,
                    "prompt_order": base.prompt_order_state() if hasattr(base, "prompt_order_state") else None,
                }
                (folder / "trainer_state.json").write_text(json.dumps(state, indent=1))

    @classmethod
    def load(cls, directory: str | Path, env: VectorEnv, *, fsdp: bool = False) -> Agent:
        """The agent that ``save`` wrote, ready to act in ``env`` and to go on learning.

        Args:
            directory, env: Where it is, and what it acts in.
            fsdp: Whether the processes of this run divide it, whatever those of the saved one did.

        Raises:
            FileNotFoundError: If there is no saved agent.
            ValueError: If a file was damaged, the agent is of another class, or ``env`` does not fit it.
        """
        folder = verified_files(Path(directory), "trainer_state.json")
        state = json.loads((folder / "trainer_state.json").read_text())
        if state["agent"] != cls.__name__:
            raise ValueError(f"{directory} holds a {state['agent']}, not a {cls.__name__}; load it with that class")
        with no_loading_bars():
            interval = state.get("audit_interval", 10)  # older agents have none
            policy = None if state.get("base") else str(folder)
            config = state["config"] | ({"fsdp": fsdp} if fsdp or state["config"].get("fsdp") else {})
            agent = cls(env, policy=policy, seed=state["seed"], audit_interval=interval, **config)
        if state.get("base"):
            if base_fingerprint(agent.policy.model) != state["base"]:
                raise ValueError(
                    f"{directory} is an adapter of another model than env's reference; give that as model="
                )
            load_lora(agent.policy.model, folder)
        for name, model in agent._other_models().items():
            path = str(folder / name)
            saved = load_language_model(path, agent.tokenizer, device=agent.policy.device, dtype="float32")
            model.load_state_dict(saved.model.state_dict())
        if agent.policy.value_head is not None:
            agent.optimizer.load_weights(agent.policy.value_head, load_file(folder / "value_head.safetensors"))
        tensors = load_file(folder / "trainer_state.safetensors")
        agent.num_timesteps, agent.num_updates = state["num_timesteps"], state["num_updates"]
        agent.generator.set_state(tensors.pop("generator"))
        agent._predict_generator.set_state(tensors.pop("predict_generator"))
        agent.optimizer.load_state_dict(tensors, state["optimizer"])
        if agent.kl_controller is not None and state["kl_controller"]:
            agent.kl_controller.load_state_dict(state["kl_controller"])
            env.unwrapped.kl_coef = agent.kl_controller.coef
        # In an environment of other prompts or another width (to act in, say) their order starts anew.
        agent._started = agent.num_updates > 0 and _restore_prompt_order(env.unwrapped, state["prompt_order"])
        agent.state = state["state"]
        return agent


def _restore_prompt_order(base: Any, states: list[Any] | None) -> bool:
    """Continue the saved orders of prompts; False where the environment's rows or prompts are not those."""
    if states is None or not hasattr(base, "load_prompt_order_state") or len(states) != base.num_envs:
        return False
    if any(state is not None and state["num_prompts"] != len(base.prompts) for state in states):
        return False
    base.load_prompt_order_state(states)
    return True


def as_floats(metrics: dict[str, Any]) -> dict[str, float]:
    """Tensors and numpy numbers as plain floats."""
    return {
        key: float(value.item() if isinstance(value, (Tensor, np.generic)) else value) for key, value in metrics.items()
    }
