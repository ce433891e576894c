"""Settings that are frozen dataclasses: what may stand in a field, and how that is checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]

COUNT: Rule = ("an integer >= 1", lambda x: type(x) is int and x >= 1)
COUNT_OR_NONE: Rule = ("None or an integer >= 1", lambda x: x is None or (type(x) is int and x >= 1))
GROUP: Rule = ("an integer >= 2", lambda x: type(x) is int and x >= 2)
NOT_NEGATIVE: Rule = ("a finite number >= 0", lambda x: 0 <= x < math.inf)
POSITIVE: Rule = ("a number > 0", lambda x: x > 0)
POSITIVE_OR_NONE: Rule = ("None or a finite number > 0", lambda x: x is None or 0 < x < math.inf)
SHARE: Rule = ("a number in [0, 1]", lambda x: 0 <= x <= 1)


def one_of(*choices: str) -> Rule:
    """A text that is one of these."""
    return " or ".join(f'"{choice}"' for choice in choices), lambda x: x in choices


def flag() -> Rule:
    """True or False."""
    return "True or False", lambda x: isinstance(x, bool)


def check_fields(config: Any, rules: dict[str, Rule]) -> None:
    """Raises ValueError naming the first field that breaks its rule.

    Args:
        config: A dataclass.
        rules: Names of fields, parted by spaces, and what must hold for each.
    """
    for names, (rule, holds) in rules.items():
        for name in names.split():
            value = getattr(config, name)
            # True is a number to Python, and a text would be compared with numbers.
            wrong_type = isinstance(value, bool) != (rule == "True or False") or (
                isinstance(value, str) and '"' not in rule
            )
            if wrong_type or not holds(value):
                raise ValueError(f"{name} must be {rule}, got {value!r}")


def make_config(config_class: type, values: dict[str, Any]) -> Any:
    """Settings from keyword arguments.

    Raises:
        TypeError: If there is no such field, with the nearest one.
        ValueError: If a value breaks its field's rule.
    """
    known = [f.name for f in dataclasses.fields(config_class)]
    for name in values:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(
                f"{config_class.__name__} has no field {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; fields: {', '.join(known)}")
            )
    return config_class(**values)
