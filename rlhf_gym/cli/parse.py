"""From arguments to options; whatever is wrong with them becomes one line that says what was meant."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from rlhf_gym.cli.options import VERBS, Verb


class UsageError(Exception):
    """Arguments that are not understood; the message is one line."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'train'?"``, or the choices when none is near."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(choices)}"


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """The verb and its options.

    Raises:
        UsageError: For an unknown verb or flag, a missing or a wrong value.
        SystemExit: With code 0 after ``--help`` or ``--version``.
    """
    if argv and argv[0] == "--version":
        from rlhf_gym import __version__

        print(__version__)
        raise SystemExit(0)
    argv = _joined(argv)
    _check_names(argv)
    import tyro

    def shown(verb: Verb) -> Any:
        return Annotated[verb.options, tyro.conf.PositionalRequiredArgs] if verb.positional else verb.options

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            options = tyro.extras.subcommand_cli_from_dict(
                {name: shown(verb) for name, verb in VERBS.items()},
                prog="rlhf-gym",
                description="Reinforcement learning on text generation: train, evaluate and try language models.",
                args=argv,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        verb = argv[0]
        raise UsageError(f"{_first_sentence(output.getvalue())}; see rlhf-gym {verb} --help") from None
    return argv[0], options


def _joined(argv: Sequence[str]) -> list[str]:
    """A verb of two words as one: ``["data", "check", ...]`` becomes ``["data check", ...]``.

    Raises:
        UsageError: If the second word is missing.
    """
    if not argv or not any(name.startswith(f"{argv[0]} ") for name in VERBS):
        return list(argv)
    if argv[1:2] in (["--help"], ["-h"]):
        return ["--help"]
    if len(argv) == 1 or argv[1].startswith("-"):
        names = [f"rlhf-gym {name}" for name in VERBS if name.startswith(f"{argv[0]} ")]
        raise UsageError(f"{argv[0]!r} needs a second word: {', '.join(names)}, each with --help")
    return [f"{argv[0]} {argv[1]}", *argv[2:]]


def _check_names(argv: Sequence[str]) -> None:
    """Verb and flags by name, where a near match can be suggested."""
    if not argv:
        raise UsageError(f"a command is missing: rlhf-gym {{{','.join(VERBS)}}}; see rlhf-gym --help")
    verb, flags = argv[0], argv[1:]
    if verb in ("-h", "--help"):
        return
    if verb.startswith("-"):
        raise UsageError(f"the command comes first: rlhf-gym {{{','.join(VERBS)}}}, then its flags, got {verb!r}")
    if verb not in VERBS:
        raise UsageError(f"there is no command {verb!r}{did_you_mean(verb, VERBS)}")
    known, needed = ["--help"], []
    for field in dataclasses.fields(VERBS[verb].options):
        if VERBS[verb].positional and field.default is dataclasses.MISSING:
            if not flags:
                raise UsageError(f"rlhf-gym {verb} needs a {field.name}; see rlhf-gym {verb} --help")
            continue
        name = "--" + field.name.replace("_", "-")
        known += [name] + ([f"--no-{name[2:]}"] if isinstance(field.default, bool) else [])
        needed += [name] if field.default is dataclasses.MISSING else []
    given = [re.sub("_", "-", flag.partition("=")[0]) for flag in flags if re.match("--[a-z]", flag)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; see rlhf-gym {verb} --help"
            raise UsageError(f"rlhf-gym {verb} has no flag {name!r}{hint}")
    missing = [name for name in needed if name not in given]
    if missing and not {"--help", "-h"} & set(flags):
        raise UsageError(f"rlhf-gym {verb} needs {' and '.join(missing)}; see rlhf-gym {verb} --help")


def _first_sentence(box: str) -> str:
    """What tyro says in the first part of its box of lines, below the title."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip(" │")
        if text.startswith(("╭", "╰")):
            continue
        if text and set(text) <= {"─", "-"}:
            parts.append([])
        elif text:
            parts[-1].append(text)
    # The title stands in the box's edge; where the terminal's encoding has no such characters it is a part of its own.
    said = parts[0] if "╭" in box else parts[1]
    # A check in __post_init__ arrives as "Error parsing Train: ...".
    return re.sub(r"^Error parsing [A-Z]\w*: ", "", " ".join(" ".join(said).split())).rstrip(".")
