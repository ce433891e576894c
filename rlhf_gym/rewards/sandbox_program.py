"""What runs inside the sandbox: takes a job from a pipe, gives up its means, runs the program, sends back one value.

It is passed to the interpreter as text and imports nothing of this package. The program that it runs shares its process
and can read and change all of it, the pipe for the answer included: nothing here is trusted by who reads the answer.
"""

from __future__ import annotations

import json
import os
import resource
import sys


def encode(value: object, depth: int = 0) -> object:
    """A value of plain types as JSON that keeps them apart; the same rule reads it back (`unit_tests.decode`)."""
    if depth > 50:
        raise ValueError("too deeply nested")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
        return {kind.__name__: [encode(item, depth + 1) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": list(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"no plain value: {type(value).__name__}")


def main(job_fd: int, answer_fd: int) -> None:
    """Run one job.

    Args:
        job_fd: JSON: the program, an expression or null, and the limits.
        answer_fd: Receives a byte once the program is about to run, and the value of the expression as JSON.
    """
    with os.fdopen(job_fd) as file:
        job = json.load(file)
    for name, limit in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    quiet = os.open("/dev/null", os.O_WRONLY)
    os.dup2(quiet, 2)
    os.close(quiet)
    os.write(answer_fd, b"\n")
    expression = job["expression"]
    namespace = {"__name__": "__main__" if expression is None else "program", "__builtins__": __builtins__}
    exec(compile(job["program"], "<program>", "exec"), namespace)
    if expression is not None:
        value = eval(compile(expression, "<test>", "eval"), namespace)
        os.write(answer_fd, json.dumps(encode(value)).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
