"""Unit tests of the program in a response, run in a sandbox. Off unless asked for: it runs what a model has written."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .references import against_column

if TYPE_CHECKING:
    from .sandbox import Sandbox

_FENCED = re.compile(r"^[ \t]*```[ \t]*([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_FORMS = 'an "assert EXPRESSION == LITERAL" or {"stdin": text, "stdout": text}'


@dataclass(frozen=True)
class Returns:
    """After the program, an expression has a value."""

    expression: str
    value: Any


@dataclass(frozen=True)
class Prints:
    """Given an input, the program prints a text."""

    stdin: str
    stdout: str


Test = Returns | Prints


def unit_tests(
    column: str = "tests",
    *,
    run_code: bool = False,
    all_or_nothing: bool = False,
    seconds: float = 5.0,
    memory_mb: int = 512,
    output_kb: int = 256,
) -> Callable[..., list[float | None]]:
    """Share of its unit tests that the Python program in a response passes, in [0, 1]. Linux only, by bubblewrap.

    The program is the last block of Python between ``` fences, or the whole response where there is none. Each test is
    a run of its own in a new sandbox without network, environment, files of the host or further processes. What is
    right never enters the
    sandbox: it is asked for the value of an expression, or for what is printed, and the comparison is made out here. So
    there is nothing in there by which a program could pass but the right value.

    Args:
        column: Where the tests are: in each row a list of them, or None where there are none (the reward does not
            apply). A test is ``"assert EXPRESSION == LITERAL"`` (MBPP's form) or ``{"stdin": text, "stdout": text}``.
            Values are plain: numbers, texts, bytes, lists, tuples, sets, dicts, None. Printed lines are compared
            without white space at their ends, and the program must end by itself without an error.
        run_code: Must be True: you have decided to run programs by a model on this machine.
        all_or_nothing: 1 if all tests pass, else 0.
        seconds: Time for each test.
        memory_mb: Memory for each test in MiB; its files in memory may take as much again.
        output_kb: What a test may print or return, in KiB.

    Raises:
        ValueError: If ``run_code`` is not True or a limit is out of range.
        OSError: If bubblewrap is missing, too old, or not allowed to make namespaces here.

    Source:
        Tests as in Austin et al. 2021 (MBPP) and Hendrycks et al. 2021 (APPS). Differs from their harnesses, which run
        the asserts in the program's own process, where ``os._exit(0)`` or an ``__eq__`` that says yes passes them all.
    """
    if run_code is not True:
        raise ValueError(
            "unit_tests: it runs the programs that a model writes, in a sandbox but on this machine; pass "
            "run_code=True if you want that"
        )
    if sys.platform != "linux":
        raise OSError(f"unit_tests: programs are run by bubblewrap, which needs Linux; this is {sys.platform}")
    from .sandbox import Limits, Sandbox

    sandbox = Sandbox(Limits(seconds, memory_mb, output_kb))

    def scores(*args: Any, **kwargs: Any) -> list[float | None]:
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="rlhf_gym-sandbox")

        def submit(text: str, tests: list[Test]) -> Any:
            program = program_of(text)
            return [pool.submit(passes, sandbox, program, test) for test in tests]

        try:
            rows: list[Any] = against_column("unit_tests", column, submit, read=read_tests)(*args, **kwargs)
            return [None if row is None else _share(row, all_or_nothing) for row in rows]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    parameters = against_column("unit_tests", column, lambda text, tests: 0.0)
    scores.__signature__ = inspect.signature(parameters)  # type: ignore[attr-defined]
    scores.__name__ = scores.__qualname__ = "unit_tests"
    return scores


def _share(results: list[Future[bool]], all_or_nothing: bool) -> float:
    passed = [result.result() for result in results]
    return float(all(passed)) if all_or_nothing else sum(passed) / len(passed)


def program_of(text: str) -> str:
    """The program in a response: its last fenced block of Python, or all of it."""
    blocks = [block for tag, block in _FENCED.findall(text) if tag.strip().lower() in ("", "py", "python", "python3")]
    return blocks[-1] if blocks else text


def read_tests(cell: Any, where: str) -> list[Test]:
    """The tests of one row.

    Raises:
        ValueError: If it is no list of tests; ``where`` names the cell.

    Example:
        >>> read_tests(["assert add(1, 2) == 3"], "row 0")
        [Returns(expression='add(1, 2)', value=3)]
    """
    if not isinstance(cell, (list, tuple)) or not cell:
        raise ValueError(f"{where} must be a list of at least one test, got {cell!r:.80}")
    return [_read_test(test, f"{where}: test {number}") for number, test in enumerate(cell)]


def _read_test(test: Any, where: str) -> Test:
    if isinstance(test, dict) and test.keys() == {"stdin", "stdout"} and all(isinstance(t, str) for t in test.values()):
        return Prints(**test)
    if not isinstance(test, str):
        raise ValueError(f"{where} must be {_FORMS}, got {test!r:.80}")
    try:
        (statement,) = ast.parse(test.strip()).body
        if not isinstance(statement, ast.Assert) or not isinstance(statement.test, ast.Compare):
            raise ValueError
        ((operator,), (right,)) = statement.test.ops, statement.test.comparators
        if not isinstance(operator, ast.Eq):
            raise ValueError
        # What is expected is read here and stays here; code on that side would have to run where the program can
        # reach it.
        return Returns(ast.unparse(statement.test.left), ast.literal_eval(right))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{where} must be {_FORMS}, with a plain value as LITERAL, got {test!r:.120}") from None


def passes(sandbox: Sandbox, program: str, test: Test) -> bool:
    """Whether a program passes a test. Every claim from inside the sandbox is compared out here."""
    if isinstance(test, Prints):
        outcome = sandbox.run(program, stdin=test.stdin)
        return outcome.exit_code == 0 and _lines(outcome.output.decode("utf-8", "replace")) == _lines(test.stdout)
    outcome = sandbox.run(program, test.expression)
    if outcome.exit_code is None:
        return False
    try:
        return bool(decode(json.loads(outcome.answer)) == test.value)
    except (ValueError, TypeError, RecursionError):
        return False


def decode(value: Any) -> Any:
    """The value that `sandbox_program.encode` has written.

    Raises:
        ValueError, TypeError, RecursionError: If it is something else.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a list without its kind")
        return value
    ((kind, items),) = value.items()
    if not isinstance(items, list):
        raise ValueError("the items must be a list")  # bytes(10**10) would be ten gigabytes
    if kind == "dict":
        return {decode(key): decode(item) for key, item in items}
    if kind == "bytes":
        return bytes(items)
    if kind == "complex":
        real, imaginary = items
        return complex(real, imaginary)
    kinds: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if kind not in kinds:
        raise ValueError(f"no kind of value: {kind!r:.40}")
    return kinds[kind](decode(item) for item in items)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
