"""What keeps strangers out: which hosts are answered, headers, signed values, and how a form is read.

A page on loopback can be reached by every site that is open in the same browser, and by every name that points to
127.0.0.1. So a request must name a host that we know (against DNS rebinding), a form must come with a token that only our
own pages have (against forgery by other sites), and what is shown can load and run nothing but our own two files.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import anyio
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2 * 2**20  # two corrections of 50,000 characters, escaped
MAX_FIELDS = 200
BODY_PATIENCE_S = 30.0
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not no-referrer: forms would then come with the origin "null".
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class SecurityHeaders:
    """Middleware: every answer has the headers, errors too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)


class Signer:
    """Signs values that a browser keeps for us.

    Args:
        secret: Known to nobody else.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def digest(self, purpose: str, text: str) -> str:
        """What only we can compute of a text; another one for another purpose."""
        mac = hmac.new(self._secret, f"{purpose}\0{text}".encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(mac).rstrip(b"=").decode()

    def sign(self, purpose: str, value: Any) -> str:
        """A value as text; it can be read by others, but not changed."""
        text = base64.urlsafe_b64encode(json.dumps(value, separators=(",", ":")).encode()).rstrip(b"=").decode()
        return f"{text}.{self.digest(purpose, text)}"

    def read(self, purpose: str, signed: str) -> Any:
        """The value, None if we did not sign it for this purpose."""
        text, _, mac = signed.partition(".")
        if not equal(mac, self.digest(purpose, text)):
            return None
        return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def equal(given: str, right: str) -> bool:
    """Whether two texts are equal, in a time that tells nothing of where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), right.encode("utf-8", "replace"))


def read_secret(database: Path) -> bytes:
    """The secret of a store, made when there is none: a file beside it that only its owner can read.

    It outlives the server, so that pages that are open stay good when the server is started again.
    """
    path = database.with_name(f".{database.name}.secret")
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    else:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    text = path.read_text(encoding="ascii").strip()
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(f"{path} is damaged; delete it, and people sign in again")
    return bytes.fromhex(text)


def is_loopback(host: str) -> bool:
    """Whether a host can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def allowed_hosts(host: str, others: tuple[str, ...] = ()) -> list[str]:
    """The names under which the page answers.

    Raises:
        ValueError: If it listens on all addresses, and nobody said what they are called.
    """
    if host in ("0.0.0.0", "::", "") and not others:
        raise ValueError(
            f"--host {host or '(empty)'} is every address of this machine: name those by which people reach it with "
            "--allowed-hosts, for instance --allowed-hosts labels.example.org"
        )
    names = ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host, *others]
    return [name for name in dict.fromkeys(names) if name not in ("0.0.0.0", "[::]", "")]


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form, within limits; of a field that comes twice the last one counts.

    Raises:
        HTTPException: 400, 408, 413 or 415.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise HTTPException(415, "A form must be sent as application/x-www-form-urlencoded.")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
        raise HTTPException(413, "This form is too large.")
    body = bytearray()
    try:
        with anyio.fail_after(BODY_PATIENCE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:  # also of one that did not say its length
                    raise HTTPException(413, "This form is too large.")
    except TimeoutError:
        raise HTTPException(408, "The form did not arrive in time.") from None
    try:
        return dict(parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS))
    except ValueError:
        raise HTTPException(400, "This form cannot be read.") from None


def check_origin(request: Request) -> None:
    """Refuse a form that the browser says another site has sent.

    Raises:
        HTTPException: 403.
    """
    origin = request.headers.get("origin")
    own = {f"{scheme}://{request.headers.get('host', '')}" for scheme in ("http", "https")}  # https: a proxy before us
    elsewhere = request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
    if elsewhere or (origin and origin not in own):
        raise HTTPException(403, "This form was sent by another site.")
