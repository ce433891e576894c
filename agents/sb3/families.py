"""Which agent class is for which algorithm of Stable-Baselines3."""

from __future__ import annotations

import importlib

import sb3_contrib
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from .agent import SB3Agent
from .algorithms import A2C, SB3PPO
from .masked import MaskablePPO
from .mlp import MlpAgent
from .recurrent import RecurrentPPO
from .value import DQN, QRDQN, ValueAgent

# The first that fits. The algorithms themselves have agents with settings of their own; others take the algorithm's.
_OURS = {
    stable_baselines3.PPO: SB3PPO, stable_baselines3.A2C: A2C, stable_baselines3.DQN: DQN, sb3_contrib.QRDQN: QRDQN,
    sb3_contrib.MaskablePPO: MaskablePPO, sb3_contrib.RecurrentPPO: RecurrentPPO,
}  # fmt: skip
_FAMILIES = (
    (sb3_contrib.MaskablePPO, MaskablePPO),
    (sb3_contrib.RecurrentPPO, RecurrentPPO),
    (OnPolicyAlgorithm, SB3Agent),
    ((stable_baselines3.DQN, sb3_contrib.QRDQN), ValueAgent),
    (BaseAlgorithm, MlpAgent),
)


def agent_class(algorithm: type[BaseAlgorithm] | str) -> type[SB3Agent]:
    """The agent class of an algorithm: ``agent_class(algorithm)(envs, policy=None, seed=0, **config)``.

    * PPO, A2C, DQN, QRDQN, MaskablePPO, RecurrentPPO: ours, with defaults for text.
    * Any other on-policy algorithm, and subclasses of these: a language model as the policy, the algorithm's own defaults.
    * Any other with discrete actions (ARS): its ``MlpPolicy`` on the reference's hidden state (`MlpAgent`).

    Args:
        algorithm: The class, or "module:Class".

    Raises:
        TypeError: If it is no algorithm of Stable-Baselines3.
        ValueError: If the name does not lead to one.
    """
    algorithm = load_algorithm(algorithm)
    if algorithm in _OURS:
        return _OURS[algorithm]
    return bound(next(agent for kind, agent in _FAMILIES if issubclass(algorithm, kind)), algorithm)


def load_algorithm(algorithm: type[BaseAlgorithm] | str) -> type[BaseAlgorithm]:
    """The class that is given, or that "module:Class" names."""
    if isinstance(algorithm, str):
        module, _, name = algorithm.partition(":")
        try:
            found = getattr(importlib.import_module(module), name, None) if name else None
        except ModuleNotFoundError as error:
            raise ValueError(f"algorithm {algorithm!r}: there is no module {error.name!r}") from None
        if found is None:
            raise ValueError(f'algorithm must be a class or "module:Class", got {algorithm!r}')
        algorithm = found
    if not (isinstance(algorithm, type) and issubclass(algorithm, BaseAlgorithm)):
        raise TypeError(f"algorithm must be a class of Stable-Baselines3 such as PPO, got {algorithm!r}")
    return algorithm


def bound(agent: type[SB3Agent], algorithm: type[BaseAlgorithm]) -> type[SB3Agent]:
    """An agent class for one algorithm, with the algorithm's own arguments as its settings."""
    body = {
        "algorithm_class": algorithm,
        "config_class": None,
        "__doc__": agent.__doc__,
        "__module__": agent.__module__,
    }
    return type(f"{agent.__name__}.of({algorithm.__name__})", (agent,), body)
