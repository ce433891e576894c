"""The page itself: forms and redirects, so that it works without JavaScript."""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from rlhf_gym.feedback.judgements import MAX_NAME, RATINGS, Item
from rlhf_gym.feedback.store import KeyReused

from .answer import VERDICTS, Incomplete, describe, read_answer, side_name
from .labelling import Labelling
from .panel import Panel
from .questions import Question, shown
from .security import SecurityHeaders, Signer, check_origin, equal, read_form
from .text import editable, inert, is_obeyed

SINGLE_CRITERIA = ("quality",)
"""What a response that stands alone is rated for, when nothing else is asked."""
REFRESH_S = 10

Form = Mapping[str, str]
Handler = Callable[["Visit", Form], Response]


@dataclass
class Visit:
    """One request, and who made it."""

    request: Request
    session: str
    """Random; the tokens of forms belong to it."""
    name: str
    """Of the annotator, "" before somebody has signed in."""


def make_app(labelling: Labelling, *, secret: bytes, hosts: Sequence[str], token: str | None = None) -> ASGIApp:
    """The application.

    Args:
        labelling: What is asked.
        secret: Signs cookies and forms; see `read_secret`.
        hosts: Names under which it answers; a request with another one gets 400.
        token: What a visitor must bring in the address (``?token=``) once. None: nothing, for loopback.
    """
    pages = _Pages(labelling, Signer(secret), token)
    app = Starlette(
        routes=[
            pages.route("/", pages.question),
            pages.route("/answer", pages.answer, "POST"),
            pages.route("/undo", pages.undo, "POST"),
            pages.route("/panel", pages.panel),
            pages.route("/sign-in", pages.sign_in_form, needs_name=False),
            pages.route("/sign-in", pages.sign_in, "POST", needs_name=False),
            pages.route("/sign-out", pages.sign_out, "POST"),
            Route("/favicon.ico", lambda request: Response(status_code=204)),
            Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)],
        exception_handlers={HTTPException: pages.refused, sqlite3.Error: pages.not_saved, Exception: pages.broken},  # type: ignore[dict-item]
    )
    return SecurityHeaders(app)  # outside of all, so that the answer to a fault of ours has them, too


class _Pages:
    def __init__(self, labelling: Labelling, signer: Signer, token: str | None) -> None:
        self.labelling, self.signer, self.token = labelling, signer, token
        self.numbers = Panel(labelling)
        # Cookies know no port: two pages on one machine must not sign each other's people out.
        self.cookie = f"rlhf_gym_{signer.digest('cookie', '')[:8]}"
        self.templates = Environment(
            loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self.templates.globals.update(inert=inert, VERDICTS=VERDICTS, RATINGS=RATINGS)

    def route(self, path: str, handler: Handler, method: str = "GET", *, needs_name: bool = True) -> Route:
        """A handler for those who may come in; it runs in a thread, since the store waits for the disk."""

        async def endpoint(request: Request) -> Response:
            form = await read_form(request) if method == "POST" else {}
            return await run_in_threadpool(self._serve, handler, request, form, needs_name)

        return Route(path, endpoint, methods=[method], name=f"{method} {path}")

    def _serve(self, handler: Handler, request: Request, form: Form, needs_name: bool) -> Response:
        visit = self._visit(request)
        if request.method == "POST":
            check_origin(request)
            if not equal(form.get("csrf", ""), self._csrf(visit)):
                raise HTTPException(403, "This form is not from a page of yours, or you have signed in again since.")
        if "token" in request.query_params:  # not to be seen over a shoulder, nor kept in the history
            response: Response = RedirectResponse(request.url.path, 303)
        elif needs_name and not visit.name:
            response = RedirectResponse("/sign-in", 303)
        else:
            response = handler(visit, form)
        value = self.signer.sign("session", [visit.session, visit.name])
        if request.cookies.get(self.cookie) != value:
            # Lax: with "strict" who follows the link in a message would arrive without it.
            response.set_cookie(self.cookie, value, httponly=True, samesite="lax")
        return response

    def _visit(self, request: Request) -> Visit:
        known = self.signer.read("session", request.cookies.get(self.cookie, ""))
        if known:
            return Visit(request, *known)
        if self.token is not None and not equal(request.query_params.get("token", ""), self.token):
            raise HTTPException(403, "Open the address that you were given: it ends with a token.")
        return Visit(request, secrets.token_urlsafe(16), "")

    def _csrf(self, visit: Visit) -> str:
        return self.signer.digest("form", visit.session)

    def _render(self, visit: Visit, template: str, status: int = 200, **values: Any) -> Response:
        last = self.labelling.last_submission(visit.name) if visit.name else []
        text = self.templates.get_template(template).render(
            name=visit.name, csrf=self._csrf(visit), guidelines=self.labelling.settings.guidelines,
            last=describe(last) if last else "", last_key=last[0].key.rpartition("/")[0] or last[0].key if last else "",
            **values,
        )  # fmt: skip
        return HTMLResponse(text, status)

    # What people see

    def question(self, visit: Visit, form: Form) -> Response:
        """What is asked next."""
        asked = self.labelling.next(visit.name)
        if asked is None:
            return self._render(visit, "done.html", progress=self.labelling.progress(visit.name))
        seed = self.labelling.settings.seed
        ticket = [visit.name, *asked, secrets.token_urlsafe(12), round(time.time(), 2), seed]
        return self._question(visit, asked, seed, self.signer.sign("question", ticket))

    def _question(
        self, visit: Visit, asked: Question, seed: int, ticket: str, form: Form | None = None, problems: Any = None
    ) -> Response:
        item = self.labelling.item(asked.item)
        places = shown(asked, visit.name, seed)
        return self._render(
            visit, "question.html", 422 if problems else 200, prompt=item.prompt, ticket=ticket,
            sides=[
                {"name": side_name(side, places), "text": item.responses[place], "editable": editable(item.responses[place])}
                for side, place in enumerate(places)
            ],
            criteria=self._criteria(item, asked), form=form or {}, problems=problems or {},
            progress=self.labelling.progress(visit.name),
        )  # fmt: skip

    def _criteria(self, item: Item, asked: Question) -> tuple[str, ...]:
        return self.labelling.settings.criteria or (SINGLE_CRITERIA if len(asked.responses) == 1 else ())

    def panel(self, visit: Visit, form: Form) -> Response:
        """The numbers."""
        live = visit.request.query_params.get("live") == "1"
        response = self._render(visit, "panel.html", live=live, refresh_s=REFRESH_S, **self.numbers.values())
        if live:
            response.headers["refresh"] = str(REFRESH_S)
        return response

    def sign_in_form(self, visit: Visit, form: Form) -> Response:
        """Who are you?"""
        return self._render(visit, "sign_in.html", problem="", given="")

    # What people send

    def answer(self, visit: Visit, form: Form) -> Response:
        """Store what a form says; on disk when the redirect goes out."""
        known = self.signer.read("question", form.get("ticket", ""))
        if known is None:
            raise HTTPException(400, "This form is damaged: open the page again.")
        name, item_id, responses, key, opened, seed = known
        if name != visit.name:
            raise HTTPException(409, f"This form was opened by {name}. Nothing was saved: open the page again.")
        asked = Question(item_id, tuple(responses))
        item = self.labelling.item(item_id)
        seconds = max(0.0, round(time.time() - opened, 2))
        try:
            judgements = read_answer(
                form, item, shown(asked, name, seed), self._criteria(item, asked), key=key, annotator=name, seconds=seconds
            )  # fmt: skip
        except Incomplete as error:
            return self._question(visit, asked, seed, form["ticket"], form, error.problems)
        try:
            self.labelling.record(judgements)
        except KeyReused:
            raise HTTPException(
                409, "This was answered already, and the first answer counts; undo it to change it."
            ) from None
        return RedirectResponse("/", 303)

    def undo(self, visit: Visit, form: Form) -> Response:
        """Cancel what was sent last, and ask it again."""
        self.labelling.undo(visit.name, form.get("submission", ""))
        return RedirectResponse("/", 303)

    def sign_in(self, visit: Visit, form: Form) -> Response:
        """Take a name; the forms that were open before are void then."""
        given = unicodedata.normalize("NFC", form.get("name", "")).strip()
        if not given or len(given) > MAX_NAME or any(is_obeyed(c) or c in "\n\t" for c in given):
            problem = f"A name needs 1 to {MAX_NAME} characters, without line breaks or invisible ones."
            return self._render(visit, "sign_in.html", 422, problem=problem, given=given[:MAX_NAME])
        visit.name, visit.session = given, secrets.token_urlsafe(16)
        return RedirectResponse("/", 303)

    def sign_out(self, visit: Visit, form: Form) -> Response:
        """Let somebody else sit down."""
        visit.name, visit.session = "", secrets.token_urlsafe(16)
        return RedirectResponse("/sign-in", 303)

    # What goes wrong

    def refused(self, request: Request, error: HTTPException) -> Response:
        """A page for what is no page."""
        return self._message(error.status_code, error.detail, error.headers)

    def not_saved(self, request: Request, error: Exception) -> Response:
        """The disk is full, or the file is held by another program."""
        logging.getLogger(__name__).error("the store failed: %s", error)
        return self._message(
            503, "The store did not answer. Go back and send what you sent again: it cannot count twice."
        )

    def broken(self, request: Request, error: Exception) -> Response:
        """A fault of ours; Starlette logs it."""
        return self._message(500, "Something broke here; the log says what. Answers that were saved are safe.")

    def _message(self, status: int, text: str, headers: Any = None) -> Response:
        page = self.templates.get_template("message.html").render(status=status, text=text, name="", guidelines="")
        return HTMLResponse(page, status, headers)


def link(host: str, port: int, token: str | None = None) -> str:
    """The address to open."""
    query = f"?{urlencode({'token': token})}" if token else ""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{query}"
