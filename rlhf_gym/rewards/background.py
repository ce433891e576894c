"""Runs coroutines from ordinary code, also where an event loop is already running (a notebook, a web server)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None


def run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Wait for a coroutine and return its result.

    All coroutines share one event loop in one daemon thread: ``asyncio.run`` refuses to start inside a running loop,
    and would close the loop after each call, and with it the HTTP session that an async reward keeps between calls.
    """
    global _loop, _thread
    if threading.current_thread() is _thread:
        coroutine.close()
        raise RuntimeError("an async reward was scored inside an async reward, which would wait for itself; await it")
    with _lock:
        # First use, or a forked child: it has the objects but not the thread.
        if _loop is None or _thread is None or not _thread.is_alive():
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_loop.run_forever, name="rlhf_gym-rewards", daemon=True)
            _thread.start()
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop)
    try:
        return future.result()
    except BaseException:  # Ctrl-C while waiting: do not leave the work going on behind the user's back
        future.cancel()
        raise
