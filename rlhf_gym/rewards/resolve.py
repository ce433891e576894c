"""From what the user wrote after ``reward=`` to a :class:`Reward`."""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rlhf_gym.import_file import import_file

from .classify import classifier
from .function import FunctionReward
from .human import human
from .inputs import RewardError
from .lexicon import sentiment
from .likelihood import reference_logprob
from .numeric import numeric_answer
from .references import bleu, chrf, exact_match, rouge_l, token_f1
from .reward import Reward, WeightedSum
from .text import length, repetition

if TYPE_CHECKING:
    from rlhf_gym.lm import LanguageModel


def _tiny_reviews_gold() -> Callable[..., Any]:
    from rlhf_gym.tasks.tiny_reviews import gold_sentiment

    return gold_sentiment


NAMED: dict[str, Callable[[], Callable[..., Any]]] = {
    "bleu": bleu,
    "chrf": chrf,
    "exact_match": exact_match,
    "human": human,
    "length": length,
    "numeric_answer": numeric_answer,
    "reference_logprob": reference_logprob,
    "repetition": repetition,
    "rouge_l": rouge_l,
    "sentiment": sentiment,
    "tiny-reviews": _tiny_reviews_gold,
    "token_f1": token_f1,
}
"""Rewards that a bare name gives: name -> factory without arguments."""

_NEED_ARGUMENTS = {
    "classifier": 'classifier("path/to/model")',
    "content_filter": 'content_filter(["darn", "heck"])',
    "judge": 'judge("http://localhost:8000/v1", "name-of-the-model")',
    "keyword": 'keyword(["great", "good"])',
    "perplexity": 'perplexity("path/to/model")',
    "regex": 'regex(r"\\d+")',
    "unit_tests": "unit_tests(run_code=True)",
}


def as_reward(spec: Any, *, language_model: LanguageModel | None = None) -> Reward:
    """A reward from any accepted form.

    Args:
        spec: One of

            * a function, sync or async: ``f(prompts, completions, **columns) -> list`` (TRL's signature), ``f(text) ->
              float`` or ``f(prompt, response) -> float``; how it is told is in :mod:`rlhf_gym.rewards.signature`. A
              true attribute ``dense`` says that it returns one number per token;
            * a name: "bleu", "chrf", "exact_match", "human", "length", "numeric_answer", "reference_logprob",
              "repetition", "rouge_l", "sentiment", "tiny-reviews" or "token_f1";
            * "module:function" or "path/to/file.py:function", which imports, and so runs, that code;
            * a sequence classifier: its directory or hub id, or the model; the directory of an ensemble of them;
            * a dict of weights ``{reward: weight}``, or ``{"term": (reward, weight)}`` to name the terms of the ledger;
            * a :class:`Reward`.
        language_model: The environment's reference, for the terms that wait for one.

    Raises:
        RewardError: If a function cannot be imported, or it is not clear how to call it.
        ValueError: If a name, weight or model is unknown or wrong.
        ImportError: If a named reward needs a package that is missing.
        FileNotFoundError: If a .py file or a directory does not exist.
        TypeError: If ``spec`` is none of these.
    """
    reward = _resolve(spec)
    return reward if language_model is None else reward.with_language_model(language_model)


def _resolve(spec: Any) -> Reward:
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, (str, Path)):
        function = _from_string(os.fspath(spec))
        if isinstance(function, Reward):
            return function
    elif isinstance(spec, Mapping):
        return WeightedSum([_weighted(key, value) for key, value in spec.items()])
    elif hasattr(getattr(spec, "config", None), "id2label") and hasattr(spec, "parameters"):
        function = classifier(spec)  # a model object, recognised without importing transformers
    elif isinstance(spec, type):
        raise TypeError(f"reward must be callable on responses, got the class {spec.__name__}; pass an instance of it")
    elif callable(spec):
        function = spec
    else:
        hint = "; for several rewards pass a dict {reward: weight}" if isinstance(spec, (list, tuple, set)) else ""
        raise TypeError(
            "reward must be a function, a name, a classifier, a dict of weights or a Reward, got "
            f"{type(spec).__name__}{hint}"
        )
    return FunctionReward(function, _name_of(function))


def _weighted(key: Any, value: Any) -> tuple[Reward, float, str | None]:
    if isinstance(value, tuple) and len(value) == 2:
        if not isinstance(key, str) or not key:
            raise TypeError(f'reward: the form {{"term": (reward, weight)}} needs a string as key, got {key!r}')
        return _resolve(value[0]), value[1], key
    if isinstance(value, (str, Reward, Mapping)) or callable(value):
        raise TypeError(
            f"reward: the weight of {key!r} must be a number, got {value!r}; to name a term write "
            f"{{{key!r}: (reward, 1.0)}}"
        )
    return _resolve(key), value, None


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else name


def _from_string(spec: str) -> Callable[..., Any]:
    place, colon, attribute = spec.rpartition(":")
    if colon and place.endswith(".py"):
        return _attribute(_import_file(Path(place).expanduser()), attribute, spec)
    if spec in NAMED:
        return NAMED[spec]()
    if spec in _NEED_ARGUMENTS:
        raise ValueError(f"reward: {spec!r} needs arguments; pass rlhf_gym.rewards.{_NEED_ARGUMENTS[spec]}")
    if spec.endswith(".py"):
        raise ValueError(
            f"reward: {spec!r} names a file but no function; write {spec + ':FUNCTION'!r}"
            + _functions_in(Path(spec).expanduser())
        )
    path = Path(spec).expanduser()
    if path.is_dir():
        return _from_directory(path)
    if colon and all(part.isidentifier() for part in place.split(".")):
        return _attribute(_import_module(place), attribute, spec)
    if spec.count("/") == 1 and not colon and not spec.startswith((".", "/", "~")):
        return classifier(spec)  # an id on the hub
    if "/" in spec or os.sep in spec:
        hint = f"; for a function in a file write {place + '.py:' + attribute!r}" if colon else ""
        raise FileNotFoundError(f"reward: there is no directory {spec!r} (working directory {Path.cwd()}){hint}")
    near = difflib.get_close_matches(spec, [*NAMED, *_NEED_ARGUMENTS], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the names are {', '.join(map(repr, NAMED))}."
    raise ValueError(
        f'reward: there is no reward named {spec!r}; {hint} Your own is "module:function" or "file.py:function"'
    )


def _from_directory(path: Path) -> Any:
    from .ensemble import ENSEMBLE_FILE, ensemble  # which needs this module

    return ensemble(path) if (path / ENSEMBLE_FILE).is_file() else classifier(str(path))


def _import_module(name: str) -> ModuleType:
    """Import a module, also from the working directory: console scripts, unlike ``python -m``, do not look there."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        if added:
            sys.path.remove(here)
        # Only if it is the module itself that is missing; a missing import inside it is the user's to see as it is.
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name
            and (name == error.name or name.startswith(error.name + "."))
        ):
            raise RewardError(f"reward: there is no module {name!r} on the Python path or in {here}") from None
        raise RewardError(f"reward: importing {name!r} failed with {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    """Run a Python file as a module of its own, once per version of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"reward: there is no file {str(path)!r} (working directory {Path.cwd()})")
    path = path.resolve()
    version = hashlib.sha256(f"{path}\0{path.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    name = f"rlhf_gym_reward_{path.stem}_{version}"
    try:
        return import_file(path, name)
    except Exception as error:
        raise RewardError(f"reward: importing {str(path)!r} failed with {type(error).__name__}: {error}") from error


def _attribute(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None:
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'no functions'}"
        raise RewardError(f"reward: {spec!r}: there is no function {name!r} in it; {hint}")
    if not callable(value) and not isinstance(value, Reward):
        raise RewardError(f"reward: {spec!r} is a {type(value).__name__}, not a function")
    return value


def _functions_in(path: Path) -> str:
    """ ", it defines a, b" for a readable Python file, without running it; else nothing."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ""
    names = [
        n.name
        for n in tree.body
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and not n.name.startswith("_")
    ]
    return f" (it defines {', '.join(names)})" if names else ""
