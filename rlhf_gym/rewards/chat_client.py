"""One question to a server of chat completions (OpenAI's protocol), with the standard library alone."""

from __future__ import annotations

import datetime
import email.utils
import http.client
import json
import math
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from .reward import check_number

MAX_ANSWER_BYTES = 4 * 2**20
MAX_WAIT_S = 60.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ChatError(ValueError):
    """A question without a usable answer; the message says why."""


class Stopped(ChatError):
    """Given up because another question has failed."""


class _Again(Exception):
    """An attempt that failed in a way that may pass: what happened, and how long the server wants to be left alone."""

    def __init__(self, what: str, wait_s: float | None = None):
        super().__init__(what)
        self.wait_s = wait_s


class ChatClient:
    """Asks a server; see :func:`rlhf_gym.rewards.judge` for the arguments. May be used from several threads.

    Neither proxies nor redirects are followed: what is sent goes to the address given, or nowhere.

    Raises:
        ValueError: If the address is no http(s) URL, an argument is out of range, the variable of the key is not set,
            or the key would travel unencrypted to another machine.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        options: Mapping[str, Any],
        api_key_env: str | None,
        timeout_s: float,
        max_retries: int,
        backoff_s: float,
    ):
        if not isinstance(model, str) or not model:
            raise ValueError(f"judge: model must be the name of a model, got {model!r}")
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f'judge: url must be a base address such as "http://localhost:8000/v1", got {url!r}')
        if parts.username or parts.password:
            raise ValueError("judge: url must not hold a user or password; name the key's variable in api_key_env")
        if not check_number("judge: timeout_s", timeout_s) > 0:
            raise ValueError(f"judge: timeout_s must be > 0, got {timeout_s}")
        if check_number("judge: backoff_s", backoff_s) < 0:
            raise ValueError(f"judge: backoff_s must be >= 0, got {backoff_s}")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise ValueError(f"judge: max_retries must be an integer >= 0, got {max_retries!r}")
        try:
            json.dumps(options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"judge: options must be JSON ({error})") from None
        self.url, self.model, self.options = url, model, dict(options)
        self._parts, self._path = parts, parts.path.rstrip("/") + "/chat/completions"
        self._api_key_env, self._timeout_s = api_key_env, float(timeout_s)
        self._max_retries, self._backoff_s = max_retries, float(backoff_s)
        if api_key_env is not None:
            self._key()  # now, not after the first rollout
            if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
                raise ValueError(f"judge: url must be https for the key of api_key_env to be sent there, got {url!r}")

    def ask(self, question: str, stop: threading.Event) -> str:
        """The text of the answer.

        Args:
            question: The user's message.
            stop: Set by another thread, it ends the waiting for a further attempt.

        Raises:
            ChatError: If there is none: what happened, and after how many attempts.
        """
        messages = [{"role": "user", "content": question}]
        body = json.dumps({"model": self.model, "messages": messages, **self.options}).encode()
        for attempt in range(self._max_retries + 1):
            try:
                return self._attempt(body)
            except _Again as failure:
                wait_s = min(MAX_WAIT_S, self._backoff_s * 2.0**attempt) if failure.wait_s is None else failure.wait_s
                tried = f"{self.url}: {failure}, in {attempt + 1} attempt{'s' if attempt else ''}"
                if wait_s > MAX_WAIT_S:
                    raise ChatError(f"{tried}; it asks to wait {wait_s:.0f} s, more than {MAX_WAIT_S:.0f}") from None
                if attempt == self._max_retries:
                    raise ChatError(tried) from None
            if stop.wait(wait_s):
                raise Stopped(tried)
        raise AssertionError("the last attempt returns or raises")

    def _key(self) -> str:
        key = os.environ.get(self._api_key_env or "", "").strip()
        if not key:
            raise ValueError(f"judge: the environment variable {self._api_key_env!r} of api_key_env is not set")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"judge: the environment variable {self._api_key_env!r} holds no key: it is not plain ASCII"
            )
        return key

    def _attempt(self, body: bytes) -> str:
        secret = None if self._api_key_env is None else self._key()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        headers |= {} if secret is None else {"Authorization": f"Bearer {secret}"}
        deadline = time.monotonic() + self._timeout_s
        host, port = self._parts.hostname or "", self._parts.port
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(host, port, timeout=self._timeout_s)
        try:
            connection.connect()
            wire = connection.sock  # kept: the connection lets go of it when the response is to be read to its end
            wire.settimeout(_left(deadline))
            connection.request("POST", self._path, body, headers)
            wire.settimeout(_left(deadline))
            response = connection.getresponse()
            content = _read(response, wire, deadline)
        except TimeoutError:
            raise _Again(f"no answer within {self._timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"{self.url}: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if response.status == 429 or response.status >= 500:
            raise _Again(_said(response, content, secret), _retry_after(response.getheader("Retry-After")))
        if response.status != 200:
            raise ChatError(f"{self.url}: {_said(response, content, secret)}")
        try:
            answer = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            answer = None
        if not isinstance(answer, str):
            shown = _without(secret, content[:200].decode("utf-8", "replace"))
            raise ChatError(f"{self.url}: the answer is no chat completion with a text in it: {shown!r}")
        return answer


def _left(deadline: float) -> float:
    """Seconds until the deadline. A slow server that sends a byte now and then must not keep us for ever."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _read(response: http.client.HTTPResponse, wire: socket.socket, deadline: float) -> bytes:
    content = b""
    while True:
        wire.settimeout(_left(deadline))
        chunk = response.read1(65536)
        if not chunk:
            break
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise http.client.HTTPException(f"the answer is longer than {MAX_ANSWER_BYTES:,} bytes")
    declared = response.getheader("Content-Length", "")
    if declared.isdecimal() and int(declared) != len(content):
        raise http.client.HTTPException(f"the answer ended after {len(content)} of {declared} bytes")
    return content


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number of them or a date; None without one that can be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        at = at if at.tzinfo else at.replace(tzinfo=datetime.timezone.utc)
        seconds = (at - datetime.datetime.now(datetime.timezone.utc)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _said(response: http.client.HTTPResponse, content: bytes, secret: str | None) -> str:
    text = " ".join(_without(secret, content.decode("utf-8", "replace")).split())
    return f"status {response.status}" + (f" ({text[:200]})" if text else "")


def _without(secret: str | None, text: str) -> str:
    """A server may repeat the key in its complaint."""
    return text if secret is None else text.replace(secret, "[key]")
