"""The command line ``rlhf-gym``. Nothing heavy is imported before a verb runs: ``--help`` answers at once.

Exit codes: 0 done, 1 something is wrong with what was looked at (doctor, data), 2 bad input (one line says what and how
to mend it), 130 Ctrl-C.
Set ``RLHF_GYM_TRACEBACK=1`` to see where an error came from.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from rlhf_gym.cli.options import VERBS
from rlhf_gym.cli.parse import UsageError, parse
from rlhf_gym.memory import keep_freed_memory

# What bad input raises, here and in the libraries that read it. Anything else is a fault of ours and keeps its traceback.
_INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    try:
        try:
            verb, options = parse(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()  # what --help has printed: here it is noticed that nobody reads it, and not at exit
    except UsageError as error:
        return _fail(str(error))
    except BrokenPipeError:
        return _reader_has_gone()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character of a response shows "?"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a worker forks later
    keep_freed_memory()
    try:
        code = importlib.import_module(VERBS[verb].module).run(options) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted", code=128 + signal.SIGINT)
    except BrokenPipeError:
        return _reader_has_gone()
    except _INPUT_ERRORS as error:
        if os.environ.get("RLHF_GYM_TRACEBACK"):
            raise
        return _fail(str(error) or type(error).__name__)


def _reader_has_gone() -> int:
    """Ends as if all had been read (`| head`); without this Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(message: str, code: int = 2) -> int:
    print(f"rlhf-gym: {' '.join(message.split())}", file=sys.stderr)
    return code
