"""``rlhf-gym label``: the page where people judge, served from this machine."""

from __future__ import annotations

import os
import socket
import sys
import threading
import webbrowser
from pathlib import Path

from rlhf_gym.cli.feedback_options import Label
from rlhf_gym.envs.render import visible
from rlhf_gym.feedback import FeedbackStore
from rlhf_gym.feedback.items import Source, items_of_run, read_items


def run(options: Label) -> int:
    """Serve until Ctrl-C, then say what to do with the judgements."""
    try:
        import uvicorn

        from rlhf_gym.feedback.page import Labelling, PageSettings, make_app
        from rlhf_gym.feedback.page.app import link
        from rlhf_gym.feedback.page.security import Signer, allowed_hosts, is_loopback, read_secret
    except ModuleNotFoundError as error:
        raise ImportError(
            f"rlhf-gym label needs {error.name}: pip install 'rlhf-gym[feedback]' installs what is missing"
        ) from None
    hosts = allowed_hosts(options.host, options.allowed_hosts)
    settings = PageSettings(
        criteria=options.criteria, guidelines=_read_guidelines(options.guidelines), overlap=options.overlap,
        gold_rate=options.gold_rate, seed=options.seed,
    )  # fmt: skip
    source, path = _read(options)
    with FeedbackStore(path) as store, _listen(options) as listening:
        items, numbers = source or (None, {})
        labelling = Labelling(store, settings, items, numbers)
        secret = read_secret(store.path)
        # Made of the secret, so that a link that was handed out outlives a restart.
        token = None if is_loopback(options.host) else Signer(secret).digest("token", "")
        named = options.allowed_hosts[0] if options.host in ("0.0.0.0", "::", "") else options.host
        address = link(named, listening.getsockname()[1], token)
        print(f"{address}\n{labelling.num_questions:,} questions; judgements go to {visible(str(path))}; Ctrl-C stops")
        if token is not None:
            print("whoever has this address can judge; it is plain HTTP, so use it in a network that you trust")
        sys.stdout.flush()
        if options.open and _has_screen():
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
        app = make_app(labelling, secret=secret, hosts=hosts, token=token)
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False,
            proxy_headers=False, timeout_graceful_shutdown=5,
        )  # fmt: skip
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # the way to stop it
            pass
        count = store.counts()[1]
    print(f"\n{count:,} judgements are in {visible(str(path))}; rlhf-gym feedback export writes them for training")
    return 0


def _read(options: Label) -> tuple[Source | None, Path]:
    """The items, None for those that the store has, and where the store is."""
    db = None if options.db is None else Path(options.db).expanduser()
    if options.run is not None:
        return items_of_run(options.run, options.order_by), db or Path(options.run).expanduser() / "feedback.sqlite"
    if options.file is not None:
        file = Path(options.file).expanduser()
        return read_items(file, options.order_by), db or file.with_name(f"{file.stem}.feedback.sqlite")
    assert db is not None
    if not db.is_file():
        raise FileNotFoundError(
            f"--db: there is no file {options.db!r} yet; give items with --file or --run, or wait until rlhf-gym loop or "
            "the reward human has made it"
        )
    return None, db


def _read_guidelines(name: str | None) -> str:
    if name is None:
        return ""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError(f"--guidelines {name} is not UTF-8 text; save it as such") from None
    except OSError as error:
        raise ValueError(f"--guidelines {name} cannot be read ({error.strerror}); give a text file") from None


def _listen(options: Label) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=128)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot listen on --host {options.host} --port {options.port} ({reason}); choose another port, 0 for any"
        ) from None


def _has_screen() -> bool:
    """Whether a browser has a window: one that runs in the terminal would take it over."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
