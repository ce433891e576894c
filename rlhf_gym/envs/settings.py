"""What an environment shows of its process: the task's settings, readable and, but for ``kl_coef``, fixed."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from rlhf_gym.envs.core import TextGenerationProcess

TASK_ARGUMENTS = tuple(name for name in inspect.signature(TextGenerationProcess).parameters if name != "num_rows")


class TaskSettings:
    """Mixin of the environments: attributes that they lack (``language_model``, ``prompts``, ...) are their process's.

    Attributes:
        process: The process. Names beginning with "_" are not looked up in it.
    """

    process: TextGenerationProcess

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "process":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.process, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Stored here it would hide the process's own value and change nothing.
        if "process" in self.__dict__ and not name.startswith("_") and not hasattr(type(self), name):
            if name not in self.__dict__ and (name in TASK_ARGUMENTS or hasattr(self.process, name)):
                raise AttributeError(
                    f"{name} is fixed when the environment is made, only kl_coef can be set later; make another "
                    f"environment{f' with {name}=...' if name in TASK_ARGUMENTS else ''}"
                )
        super().__setattr__(name, value)

    @property
    def kl_coef(self) -> float:
        """Weight of the KL penalty per nat; settable between rollouts."""
        return self.process.kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        self.process.kl_coef = value


def check_argument_names(task: Iterable[str], others: Iterable[str]) -> None:
    """Refuse arguments that are not the process's.

    Args:
        task: Names that were given for the process.
        others: Names that the environment takes itself, for the hint.

    Raises:
        TypeError: Naming the first unknown one and what was perhaps meant.
    """
    for name in task:
        if name in TASK_ARGUMENTS:
            continue
        known = (*TASK_ARGUMENTS, *others)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"arguments: {', '.join(known)}"
        if name == "max_episode_steps":
            hint = "an episode is one response: use max_response_tokens"
        raise TypeError(f"text generation has no argument {name!r}; {hint}")
