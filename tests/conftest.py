"""What holds for every test: no network, one thread per worker, nothing drawn on a screen."""

from __future__ import annotations

import os

# Before torch or transformers are imported, or they have no effect. One thread per worker: two workers with two threads
# each fight over two cores, and results no longer repeat bit by bit.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import shutil
import socket

import hypothesis
import pytest

# The same examples in every run: what fails by chance on somebody else's machine helps nobody. New ones are a matter of
# HYPOTHESIS_SEARCH=1, by hand.
hypothesis.settings.register_profile("repeatable", derandomize=True)
if not os.environ.get("HYPOTHESIS_SEARCH"):
    hypothesis.settings.load_profile("repeatable")

_LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


class NetworkBlocked(OSError):
    """A test tried to leave this machine."""


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuses every connection and name look-up that is not of this machine; Unix sockets stay open."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host) -> None:
        name = host.decode() if isinstance(host, bytes) else host
        if name and not str(name).startswith(_LOOPBACK):
            raise NetworkBlocked(f"the tests have no network, but something asked for {name!r}")

    def guarded(original):
        def call(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return original(self, address)

        return call

    def guarded_getaddrinfo(host, *args, **kwargs):
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(connect))
        patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread():
    """Pins torch to one thread also where something has already imported it."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")  # no wider: while it is open, no other test of the worker can run an event loop
def chromium():
    """A browser; skips where there is no Chromium or no playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
