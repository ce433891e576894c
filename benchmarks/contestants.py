"""Agents and their settings by name: ours, anybody's ``module:Class``, and every algorithm of Stable-Baselines3."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_gym.agents import AGENTS
from rlhf_gym.cli.setup import parse_config
from rlhf_gym.import_file import import_file

# Names of agents with settings of their own, that stand in tables beside the algorithm as it was published. The objective
# of the first three is the environment's (docs/agents.md), which cannot be said of the published ones.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dr-grpo": ("grpo", {"divide_by_std": False, "loss_mode": "constant", "kl_placement": "reward"}),
    "expert-iteration-optimal": ("expert-iteration", {"weights": "optimal"}),
    "online-dpo-soft": ("online-dpo", {"labels": "soft"}),
    # What uniform exploration, the negative control, costs.
    "dqn-reference": ("dqn", {"exploration": "reference"}),
    # A stock policy on the wrappers HiddenStateObservation and TopKAction.
    "mlp-ppo": ("rlhf_gym.agents.sb3.mlp:MlpPPO", {}),
}
TOLD_BY_VERSION = ("rlhf_gym", "stable_baselines3", "sb3_contrib")  # packages whose agents a cell's record says all of


def load_agent(name: str) -> Callable[..., Any]:
    """What makes an agent: ``load_agent(name)(envs, policy=model, seed=0, **config)``.

    Args:
        name: One of `AGENTS`, of `VARIANTS` (it makes the algorithm; the settings come from `tuning`), "module:Class" or
            "path/to/file.py:Class". The class has ``learn(total_timesteps, callback=None)`` and
            ``predict(observation)``, and better a ``policy_model`` too, a causal language model: without it the KL is
            unknown. An algorithm of Stable-Baselines3 (a ``BaseAlgorithm``) gets our adapter.

    Raises:
        ValueError: If there is no such agent, or the class lacks a method.
    """
    base = VARIANTS[name][0] if name in VARIANTS else name
    if base not in AGENTS and ":" not in base:
        known = [*AGENTS, *VARIANTS]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f'--agents takes {", ".join(known)}, "module:Class" or "file.py:Class", got {name!r}{hint}')
    place, _, attribute = AGENTS.get(base, base).rpartition(":")
    found = getattr(_import(place, name), attribute, None)
    if not callable(found):
        raise ValueError(f"--agents {name}: there is no class {attribute!r} in {place}")
    # Only whoever defines such a class has imported Stable-Baselines3, which takes seconds.
    sb3 = sys.modules.get("stable_baselines3.common.base_class")
    if sb3 is not None and isinstance(found, type) and issubclass(found, sb3.BaseAlgorithm):
        from rlhf_gym.agents import SB3Agent

        return SB3Agent.of(found)
    for method in ("learn", "predict"):
        if isinstance(found, type) and not callable(getattr(found, method, None)):
            raise ValueError(f"--agents {name}: an agent has the methods learn and predict, this one lacks {method}")
    return found


def known_name(name: str) -> str:
    """The name that an agent's settings are kept under: ``stable_baselines3:PPO`` is made by ours, "sb3-ppo".

    Args:
        name: As for `load_agent`.

    Returns:
        A name of `AGENTS` that makes the very same class, else the name itself.
    """
    if ":" not in name:
        return name
    found = load_agent(name)
    for known, path in AGENTS.items():
        place, _, attribute = path.partition(":")
        # If it is this class then its module is loaded: nothing else has to be.
        if getattr(sys.modules.get(place), attribute, None) is found:
            return known
    return name


def file_hash(name: str) -> str | None:
    """The SHA-256 (16 hexadecimal digits) of the file that an agent's name points to; not of what that file imports.

    None where commit and versions say it already: agents of this package and of Stable-Baselines3.
    """
    place = name.rpartition(":")[0]
    if not place or (not place.endswith(".py") and place.partition(".")[0] in TOLD_BY_VERSION):
        return None
    file = _import(place, name).__file__
    return None if file is None else _first_hash(Path(file))


@functools.cache
def _first_hash(path: Path) -> str:
    """Kept, as the module is: what is edited later is not what this process runs."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _import(place: str, name: str) -> ModuleType:
    if place.endswith(".py"):
        return _import_file(Path(place).expanduser(), name)
    # Console scripts, unlike `python -m`, do not look in the working directory; at the end, so that nothing is hidden.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place.partition(".")[0] and error.name != place:
            raise  # an import inside it, which is the author's to see as it is
        raise ValueError(f"--agents {name}: there is no module {place!r} on the Python path or here") from None


def _import_file(path: Path, name: str) -> ModuleType:
    """Runs a file as a module, once in a process, under a name that no other file and no other module has."""
    if not path.is_file():
        raise ValueError(f"--agents {name}: there is no file {str(path)!r} here ({Path.cwd()})")
    path = path.resolve()
    return import_file(path, f"agent_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}")


def settings_of(agents: Sequence[str], pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Settings of each agent from ``name=value`` (all agents) and ``agent.name=value`` (that one).

    Raises:
        ValueError: If a pair is neither.
    """
    settings: dict[str, dict[str, Any]] = {agent: {} for agent in agents}
    for own in (False, True):  # what is said of one agent counts more than what is said of all
        for pair in pairs:
            owners = [agent for agent in agents if pair.startswith(f"{agent}.")]
            if bool(owners) != own:
                continue
            owner = max(owners, key=len) if owners else None
            rest = pair if owner is None else pair[len(owner) + 1 :]
            if "." in rest.partition("=")[0]:
                raise ValueError(
                    f"--config {pair}: takes name=value, or agent.name=value with one of the agents {', '.join(agents)}"
                )
            for agent in agents if owner is None else [owner]:
                settings[agent] |= parse_config((rest,))
    return settings
