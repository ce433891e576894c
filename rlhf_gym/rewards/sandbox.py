"""Runs a stranger's Python program where it can do no harm: bubblewrap, a filter of system calls, and limits."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .seccomp import filter_program

START_S = 60.0
"""How long a sandbox may take to be ready on a busy machine, before the program's own time begins."""
_HOME = "/tmp"
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": _HOME,
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
}
_MAX_THREADS = 64
_MAX_FILES = 64


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0
    """Of the clock, and of the processor, from when the sandbox is ready."""
    memory_mb: int = 512
    """Address space in MiB; as much again at most for files in its work folder, which is in memory."""
    output_kb: int = 256
    """What it may print, or send back, in KiB; with more it is stopped."""

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.0), ("memory_mb", 32), ("output_kb", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise ValueError(f"limits: {name} must be a finite number >= {least}, got {value!r}")
        if not self.seconds > 0:
            raise ValueError(f"limits: seconds must be > 0, got {self.seconds}")


@dataclass(frozen=True)
class Outcome:
    """What became of a program. All of it is the program's own word."""

    output: bytes
    """What it printed; empty when an expression was asked for."""
    answer: bytes
    """What came back through the pipe for the expression's value: JSON, if it is honest."""
    exit_code: int | None
    """None when it was stopped: out of time, or too much output."""


class SandboxError(OSError):
    """The sandbox itself does not work here; says nothing about the program."""


class Sandbox:
    """No network, no host files but the system's programs and libraries (read-only), no environment, one process.

    Every run is new: its work folder ``/tmp`` is empty before and gone after, and nothing that it started lives on.
    It does not contain faults of the kernel; for programs by somebody who would use one take a virtual machine.

    Args:
        limits: What each program may use.

    Raises:
        SandboxError: If bubblewrap is missing, too old, or not allowed to make namespaces here.
    """

    def __init__(self, limits: Limits | None = None):
        self.limits = limits or Limits()
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxError(
                "there is no bubblewrap, without which no program is run; install it (Debian, Ubuntu: "
                "apt-get install bubblewrap)"
            )
        self._filter = filter_program()
        self._harness = Path(__file__).with_name("sandbox_program.py").read_text(encoding="utf-8")
        self._command = [bwrap, *_arguments(int(self.limits.memory_mb * 2**20))]
        outcome = self.run("", "6 * 7")
        if outcome.answer != b"42":
            raise SandboxError(f"the sandbox runs, but answers {outcome!r} to 6 * 7")

    def run(self, program: str, expression: str | None = None, stdin: str = "") -> Outcome:
        """Run a program to its end, or stop it.

        Args:
            program: Its source.
            expression: Evaluated after the program, which then is a module and no ``__main__``; its value is the
                answer.
            stdin: What it can read.

        Raises:
            SandboxError: If the sandbox does not start; never for anything that the program does.
        """
        limits = self.limits
        job = {
            "program": program,
            "expression": expression,
            "limits": {
                "RLIMIT_CPU": math.ceil(limits.seconds),
                "RLIMIT_AS": int(limits.memory_mb * 2**20),
                "RLIMIT_FSIZE": int(limits.memory_mb * 2**20),
                "RLIMIT_NPROC": _MAX_THREADS,
                "RLIMIT_NOFILE": _MAX_FILES,
                "RLIMIT_CORE": 0,
            },
        }
        with contextlib.ExitStack() as stack:
            filter_fd = stack.enter_context(_sealed(self._filter))
            job_fd = stack.enter_context(_sealed(json.dumps(job).encode()))
            stdin_fd = stack.enter_context(_sealed(stdin.encode("utf-8", "surrogatepass")))
            answer_fd, answer_end = os.pipe()
            stack.callback(os.close, answer_fd)
            python = [_python(), "-I", "-B", "-c", self._harness, str(job_fd), str(answer_end)]
            try:
                process = subprocess.Popen(
                    [*self._command, "--seccomp", str(filter_fd), "--", *python],
                    stdin=stdin_fd,
                    stdout=subprocess.DEVNULL if expression is not None else subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=_ENVIRONMENT,
                    pass_fds=(filter_fd, job_fd, answer_end),
                    start_new_session=True,
                )
            finally:
                os.close(answer_end)
            with process:
                try:
                    return _watch(process, answer_fd, limits)
                finally:
                    process.kill()  # with bwrap dies its namespace, and with that all that is left of the program


def _arguments(tmpfs_bytes: int) -> list[str]:
    """The sandbox's walls."""
    found = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    found += ["--unshare-cgroup-try", "--disable-userns", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    found += ["--cap-drop", "ALL", "--new-session", "--die-with-parent"]
    found += ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/lib", "/lib64"):
        if os.path.islink(name):
            found += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            found += ["--ro-bind", name, name]
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        found += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    # No /proc: it would tell of the machine. /dev and / are made read-only, or they would be memory without a limit.
    found += ["--dev", "/dev", "--remount-ro", "/dev", "--size", str(tmpfs_bytes), "--tmpfs", _HOME]
    return [*found, "--remount-ro", "/", "--chdir", _HOME]


def _python() -> str:
    """The interpreter behind the one in use, of which a virtual environment's own is a link."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(Path(sys.base_prefix, "bin", name))


@contextlib.contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A file descriptor from which the content can be read, and through which nothing can be written."""
    number = os.memfd_create("rlhf_gym", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(number, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(number, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
        yield number
    finally:
        os.close(number)


def _watch(process: subprocess.Popen[bytes], answer_fd: int, limits: Limits) -> Outcome:
    """Collect what the program says, until it ends or must be stopped."""
    assert process.stderr is not None
    most = int(limits.output_kb * 1024)
    found = {"answer": b"", "output": b"", "error": b""}
    deadline, ready = time.monotonic() + START_S, False
    with selectors.DefaultSelector() as selector:
        selector.register(answer_fd, selectors.EVENT_READ, "answer")
        selector.register(process.stderr.fileno(), selectors.EVENT_READ, "error")
        if process.stdout is not None:
            selector.register(process.stdout.fileno(), selectors.EVENT_READ, "output")
        while selector.get_map():
            left = deadline - time.monotonic()
            events = selector.select(left) if left > 0 else []
            if not events:
                break
            for key, _ in events:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fd)
                found[key.data] += chunk
            if not ready and found["answer"]:
                ready, deadline = True, time.monotonic() + limits.seconds
            if max(len(content) for content in found.values()) > most:
                break
        ended = not selector.get_map()
    if not ready:
        said = found["error"].decode("utf-8", "replace").strip() or f"nothing was heard from it in {START_S:g} s"
        raise SandboxError(
            f"the sandbox does not start: {said}; it needs bubblewrap 0.8 or newer and a kernel that lets you make "
            "user namespaces"
        )
    exit_code = None
    if ended:
        with contextlib.suppress(subprocess.TimeoutExpired):
            exit_code = process.wait(max(0.0, deadline - time.monotonic()))
    return Outcome(found["output"], found["answer"][1:], exit_code)
