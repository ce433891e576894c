"""From options to environments, agents and models; shared by the verbs."""

from __future__ import annotations

import difflib
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import gymnasium as gym

from rlhf_gym.cli.options import TaskOptions

_TASK_ARGUMENTS = (
    "max_prompt_tokens",
    "max_response_tokens",
    "truncate_prompts",
    "missing_eos_penalty",
    "temperature",
    "top_k",
    "top_p",
    "device",
    "dtype",
)


def quiet_transformers() -> None:
    """Silence the loading bars and generation hints of transformers: stdout and stderr belong to our own lines."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def model_source(name: str) -> str:
    """What to load for ``--model``: the ``model/`` of a run directory, or the name as it is."""
    path = Path(name).expanduser()
    return str(path / "model") if (path / "metrics.csv").is_file() and (path / "model").is_dir() else name


def parse_reward(specs: tuple[str, ...]) -> Any:
    """``--reward`` as ``as_reward`` takes it: one spec, or a dict of weights.

    Raises:
        ValueError: If a weight is no number.
    """
    weights: dict[str, float] = {}
    for spec in specs:
        # A path may hold "=", so only what looks like the end of a weighted spec is split.
        match = re.fullmatch(r"(.+)=([^=/\\:]*)", spec)
        name, weight = match.groups() if match else (spec, "1")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"--reward {spec}: the weight after '=' must be a number, got {weight!r}") from None
    return specs[0] if len(specs) == 1 and specs[0] in weights else weights


def make_envs(
    options: TaskOptions, *, num_envs: int, model: Any = None, prompts: Any = None, **more: Any
) -> gym.vector.VectorEnv:
    """The vector environment of the options; ``model`` and ``prompts`` take the place of theirs."""
    task = {name: getattr(options, name) for name in _TASK_ARGUMENTS}
    return gym.make_vec(
        "rlhf_gym/TextGeneration-v0",
        num_envs=num_envs,
        model=model_source(options.model) if model is None else model,
        prompts=options.prompts if prompts is None else prompts,
        reward=parse_reward(options.reward),
        **task,
        **more,
    )


def mixed_prompts(options: TaskOptions, mix: str | None) -> list[dict[str, Any]] | None:
    """The prompts of the options with those of ``--mix FILE:SHARE`` among them; None without it.

    Raises:
        ValueError: If it is not of this form, or the share cannot be had.
        FileNotFoundError: If there is no such file.
    """
    from rlhf_gym.envs.prompts import read_prompts
    from rlhf_gym.safety.mixing import mix_prompts

    if mix is None:
        return None
    file, _, share = mix.rpartition(":")
    try:
        wanted = float(share)
    except ValueError:
        wanted = math.nan
    if not file or not 0 < wanted < 1:
        raise ValueError(
            f"--mix takes FILE:SHARE with a share above 0 and below 1, for instance a.jsonl:0.2, got {mix!r}"
        )
    return mix_prompts(read_prompts(options.prompts), read_prompts(file), wanted)


def agent_class(name: str) -> Any:
    """The class of ``--agent``.

    Raises:
        ValueError: If there is no such agent.
    """
    from rlhf_gym.agents import AGENTS
    from rlhf_gym.benchmarks.contestants import VARIANTS

    if name not in AGENTS:
        near = difflib.get_close_matches(name, AGENTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        base, settings = VARIANTS.get(name, ("", {}))
        if base in AGENTS:
            words = (
                f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()
            )
            hint = f"; {name} is --agent {base} --config {' '.join(words)}"
        raise ValueError(f"--agent must be one of {', '.join(AGENTS)}, got {name!r}{hint}")
    module, _, attribute = AGENTS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def parse_config(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``name=value`` pairs as keyword arguments; values are JSON, or strings where they are not (None, True, False work too).

    Raises:
        ValueError: If a pair has no "=".
    """
    config: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"--config takes name=value, got {pair!r}")
        try:
            config[name.replace("-", "_")] = json.loads(
                {"None": "null", "True": "true", "False": "false"}.get(value, value)
            )
        except json.JSONDecodeError:
            config[name.replace("-", "_")] = value
    return config
