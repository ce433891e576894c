"""Calls of one function side by side, each in a process of its own with one thread."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

GRACE = 5.0  # seconds to end by itself
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_cells(
    function: Callable[..., dict[str, Any]],
    keys: Sequence[dict[str, Any]],
    jobs: int = 1,
    *,
    died: Callable[[dict[str, Any], int], dict[str, Any]] | None = None,
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Calls ``function(**key)`` for every key, on one thread each.

    Threads add up in another order when there are more of them; with one, a result does not depend on ``jobs``.

    Args:
        function: A function of a module. Its randomness comes from its arguments.
        keys: Arguments of the calls.
        jobs: Processes side by side. 1: in this process.
        died: ``died(key, exit_code)`` stands for the result of a call whose process has died twice, of a fault in
            native code or for want of memory; None raises a RuntimeError.

    Yields:
        A key and its result, as they are finished. When it is closed or interrupted its processes end at once.
    """
    if jobs == 1:
        for key in keys:
            yield key, _on_one_thread(function, key)
        return
    # Read by the libraries when a process imports them.
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    waiting, deaths = deque(range(len(keys))), [0] * len(keys)
    busy: dict[Any, tuple[BaseProcess, int]] = {}
    idle: list[tuple[Connection, BaseProcess]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                connection, process = idle.pop() if idle else _start(function)
                index = waiting.popleft()
                busy[connection] = process, index
                with contextlib.suppress(BrokenPipeError):  # it has died while idle, which is met below
                    connection.send(keys[index])
            ready: Any
            for ready in wait(list(busy)):
                process, index = busy.pop(ready)
                key = keys[index]
                try:
                    finished, result = ready.recv()
                    idle.append((ready, process))
                except (EOFError, ConnectionResetError):
                    process.join()
                    deaths[index] += 1
                    if deaths[index] == 1:
                        waiting.appendleft(index)
                        continue
                    if died is None:
                        raise RuntimeError(f"its process has died twice, exit code {process.exitcode}: {key}") from None
                    finished, result = True, died(key, process.exitcode)
                if not finished:
                    raise result
                yield key, result
    finally:
        processes = [process for process, _ in busy.values()] + [process for _, process in idle]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(GRACE)
            process.kill()
            process.join()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _start(function: Callable[..., Any]) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function))
    process.start()
    theirs.close()  # or the end of the process would not be seen
    return ours, process


def _work(connection: Connection, function: Callable[..., Any]) -> None:
    """The life of a process: calls with what it is sent, until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not at once: what libraries have open is cleaned up
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        key = connection.recv()
        answer: tuple[bool, Any]
        try:
            answer = True, function(**key)  # on one thread: so says the environment that this process began with
        except Exception as error:
            answer = False, error
        connection.send(answer)


def _exit_with_parent() -> None:
    """A parent that was killed ends nobody, and what it had begun would compete with the run that follows."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a child"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def _on_one_thread(function: Callable[..., dict[str, Any]], key: dict[str, Any]) -> dict[str, Any]:
    import torch  # a process of its own may do without

    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        return function(**key)
