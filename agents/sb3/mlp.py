"""Any algorithm of Stable-Baselines3 for small vectors, with its own policies, on text.

The environment is wrapped in ``HiddenStateObservation`` and ``TopKAction`` (``rlhf_gym.wrappers``): the policy sees the
reference's hidden state and chooses among its k likeliest tokens. It begins anew (as good as uniform over the k tokens),
not as the reference, and what it sees may be less than the whole state (see ``HiddenStateObservation``).

Objective: of on-policy algorithms E[score] - kl_coef * KL(pi || pi_ref), where pi_ref is the whole reference, or with the
environment's ``top_k`` that renormalised on it, over policies on k tokens. Of all others (DQN, QR-DQN, ARS), whose policy
is deterministic, the same over deterministic policies (``value.py`` says how).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sb3_contrib
import stable_baselines3
import torch
from gymnasium.vector import VectorEnv
from safetensors.torch import load_file, save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from rlhf_gym import wrappers
from rlhf_gym.lm import sample_tokens

from ..audit import Audit
from .agent import SB3Agent, longest_response
from .exploration import as_certain, with_token_exploration
from .small_policy import SmallPolicyLM
from .value import complete_replay
from .vec_env import as_vec_env

VALUE_BASED = (stable_baselines3.DQN, sb3_contrib.QRDQN)
# Actions where neither the caller nor the environment says how many.
DEFAULT_TOP_K = 16


class CountedARS:
    """Mixed into ARS, which counts num_envs tokens for each row of the environment instead of one."""

    num_timesteps: int

    def _trigger_callback(self, _locals: dict[str, Any], _globals: Any, callback: Any, n_envs: int) -> None:
        self.num_timesteps += 1
        callback.on_step()


class MlpAgent(SB3Agent):
    """Any algorithm of Stable-Baselines3 for Discrete actions with its ``MlpPolicy``; ``MlpAgent.of(PPO)(envs, ...)``.

    Args:
        envs: A text environment with a reference.
        policy: Not used: the policy is Stable-Baselines3's, and always new.
        **config: ``top_k``, the number of tokens to choose from (None is the environment's own, or 16), ``exploration``
            of DQN and QR-DQN; ``ref_kl_target`` and ``kl_horizon`` as everywhere; all others are the algorithm's.

    A saved agent is no ``from_pretrained`` directory: its policy is of use with the same reference only.
    """

    policy_class = "MlpPolicy"

    @classmethod
    def of(cls, algorithm: type[BaseAlgorithm] | str) -> type[SB3Agent]:
        """The agent class of an algorithm with a small policy."""
        from .families import bound, load_algorithm

        return bound(cls, load_algorithm(algorithm))

    def fit_algorithm(self, algorithm: Any) -> type[BaseAlgorithm]:
        """The algorithm as this class uses it; TypeError for one that it cannot use."""
        if not (isinstance(algorithm, type) and issubclass(algorithm, BaseAlgorithm)):
            raise TypeError(f"algorithm must be a class of Stable-Baselines3 such as PPO, got {algorithm!r}")
        if issubclass(algorithm, sb3_contrib.RecurrentPPO):
            raise TypeError(
                f"{algorithm.__name__} remembers, and what it would do after a text cannot be said from the text alone; "
                "use the agent RecurrentPPO, or Stable-Baselines3 itself on the wrappers"
            )
        if issubclass(algorithm, VALUE_BASED):
            return with_token_exploration(algorithm)
        if issubclass(algorithm, sb3_contrib.ARS):
            return type(algorithm.__name__, (CountedARS, algorithm), {"__doc__": algorithm.__doc__})
        return algorithm

    def make_policy(self, policy: Any, arguments: dict[str, Any]) -> None:
        """Wraps the environment."""
        base = self.envs.unwrapped
        self.tokenizer = None  # nothing that it saves could use one
        k = arguments.pop("top_k", None) or base.process.token_filter.top_k or DEFAULT_TOP_K
        form: Any = wrappers.vector if isinstance(self.envs, VectorEnv) else wrappers
        takes_masks = issubclass(self.algorithm_class, sb3_contrib.MaskablePPO)
        self._small_envs = form.TopKAction(
            form.HiddenStateObservation(self.envs),
            min(k, base.process.vocab_size),
            forbidden="error" if takes_masks else "likeliest",
        )

    def make_venv(self) -> VecEnv:
        """The wrapped environment as the algorithm wants it."""
        venv = as_vec_env(self._small_envs)
        return venv if self._announces else as_certain(venv)

    def complete(self, arguments: dict[str, Any], venv: VecEnv) -> None:
        """Fills in, in place, what depends on the environment's size."""
        self.exploration = arguments.pop("exploration", "uniform")
        if issubclass(self.algorithm_class, OnPolicyAlgorithm):
            super().complete(arguments, venv)
        elif issubclass(self.algorithm_class, VALUE_BASED):
            complete_replay(arguments, venv.num_envs, longest_response(self.envs))
            if issubclass(self.algorithm_class, sb3_contrib.QRDQN):  # 200 by default, and the loss has a term per pair
                arguments["policy_kwargs"] = {"n_quantiles": 25} | arguments.get("policy_kwargs", {})
        elif issubclass(self.algorithm_class, sb3_contrib.ARS):
            arguments.setdefault("n_eval_episodes", venv.num_envs)

    def make_audit(self) -> Audit:
        """None: it reads texts out of the rollouts, and these hold hidden states."""
        return Audit(self.envs, None, 0)

    @property
    def _announces(self) -> bool:
        return issubclass(self.algorithm_class, OnPolicyAlgorithm) and super()._announces

    @property
    def policy_model(self) -> Any:
        """Reference and policy together, as a causal language model; a table where the reference is one."""
        model = SmallPolicyLM(self.algorithm.policy, self._small_envs.ranks)
        return model.as_table() or model

    def predict(self, observation: dict[str, Any], deterministic: bool = False) -> tuple[Any, None]:
        """Chooses the next tokens after these texts; see the base class."""
        ids, mask = (torch.as_tensor(observation[key]) for key in ("input_ids", "attention_mask"))
        single = ids.dim() == 1
        ids, lengths = (ids[None], mask[None].long().sum(1)) if single else (ids, mask.long().sum(1))
        model = SmallPolicyLM(self.algorithm.policy, self._small_envs.ranks)
        logits = model(ids.to(model.device).long()).logits[torch.arange(len(ids)), lengths - 1]
        if deterministic:
            tokens = logits.argmax(-1)
        else:
            scaled = logits / self.envs.unwrapped.process.token_filter.temperature
            uniforms = torch.rand(len(ids), generator=self._predict_generator).to(logits.device)
            tokens = sample_tokens(scaled.log_softmax(-1), uniforms)
        tokens = tokens[0] if single else tokens
        return (tokens if isinstance(observation["input_ids"], Tensor) else tokens.cpu().numpy()), None

    def begin_rollout(self) -> None:
        """Called before each rollout."""
        self.algorithm.exploration = self.exploration
        super().begin_rollout()

    def save_policy(self, folder: Path) -> None:
        """The small policy alone."""
        tensors = {name: p.clone().contiguous() for name, p in self.algorithm.policy.state_dict().items()}
        save_file(tensors, folder / "policy.safetensors")

    def load_policy(self, folder: Path) -> None:
        """The small policy."""
        policy = self.algorithm.policy
        policy.load_state_dict(load_file(folder / "policy.safetensors"))
        if issubclass(self.algorithm_class, sb3_contrib.ARS):  # it keeps its own copy
            self.algorithm.weights = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()


class MlpPPO(MlpAgent):
    """Stable-Baselines3's PPO with its ``MlpPolicy``: a small network chooses among the reference's likeliest tokens."""

    algorithm_class = stable_baselines3.PPO
