"""Stopping at a moment when the work can be saved whole."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any


class StopRequest:
    """An agent's callback that ends the training after a signal has come.

    Ending between two updates, and not in the middle of one, is what lets a resumed run go on as if it had not stopped.
    """

    signal: int | None = None
    """The signal that came, None before."""

    def __call__(self, agent: Any, metrics: Mapping[str, float]) -> bool:
        """False ends the training."""
        return self.signal is None

    def arrive(self, number: int, frame: object) -> None:
        """The handler. A second signal does not wait."""
        if self.signal is not None:
            raise KeyboardInterrupt("stopped at once; the run directory holds the last checkpoint, if there was one")
        self.signal = number


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """While the block runs, Ctrl-C and SIGTERM set the request instead of raising."""
    request = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, request.arrive) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
