"""What strangers may not do at the labelling page."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("starlette")
pytest.importorskip("jinja2")

from labelling_visitor import HOST, SKY, Visitor, app_of  # noqa: E402

from rlhf_gym.feedback import Correction  # noqa: E402
from rlhf_gym.feedback.page.security import (  # noqa: E402
    MAX_BODY_BYTES,
    Signer,
    allowed_hosts,
    is_loopback,
    read_secret,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "feedback.sqlite"


def verdicts(labelling):
    return [event.judgement.verdict for event in labelling.store.events()]


def test_another_host_is_refused(path):
    _, app = app_of(path, SKY)
    visitor = Visitor(app)
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "localhost@evil"):
        answer = visitor.client.get("/", headers={"host": host})
        assert answer.status_code == 400 and "sign-in" not in answer.text, host
    for host in ("localhost", "localhost:1", "127.0.0.1:8642"):
        assert visitor.client.get("/", headers={"host": host}).status_code == 200
    assert visitor.client.get("/static/page.css", headers={"host": "evil.example"}).status_code == 400


def test_forms_need_their_token(path):
    labelling, app = app_of(path, SKY, overlap=2)
    visitor, other = Visitor(app, "ann"), Visitor(app, "bo")
    for action in ("/answer", "/undo", "/sign-out", "/sign-in"):
        for data in ({}, {"csrf": "x"}, {"csrf": "ü"}, {"csrf": other.form("/answer")["csrf"]}):
            assert visitor.client.post(action, data=data | {"verdict": "A1"}).status_code == 403
    assert visitor.answer("A1", without=["csrf"]).status_code == 403
    visitor.get("/")
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert (
            visitor.client.post(
                "/answer", data=visitor.form("/answer") | {"verdict": "A1"}, headers=headers
            ).status_code
            == 403
        )
    assert verdicts(labelling) == []
    own = {"origin": HOST, "sec-fetch-site": "same-origin"}
    assert visitor.answer("A1", headers=own).status_code == 200 and len(verdicts(labelling)) == 1
    stranger = Visitor(app)
    assert stranger.client.post("/answer", data={"verdict": "A1"}).status_code == 403
    assert stranger.client.get("/answer").status_code == 405


def test_a_ticket_cannot_be_changed_or_used_by_another(path):
    labelling, app = app_of(path, SKY, overlap=2)
    ann, bo = Visitor(app, "ann"), Visitor(app, "bo")
    ticket = ann.form("/answer")["ticket"]
    assert bo.answer("A1", ticket=ticket).status_code == 409
    ann.get("/")
    for wrong in (
        ticket[:-1],
        ticket.replace(".", "A."),
        "",
        "." + ticket,
        bo.client.cookies[next(iter(bo.client.cookies))],
    ):
        assert (
            ann.client.post("/answer", data=ann.form("/answer") | {"ticket": wrong, "verdict": "A1"}).status_code == 400
        )
    assert verdicts(labelling) == []


def test_every_answer_has_the_headers(path):
    _, app = app_of(path, SKY)
    visitor = Visitor(app, "ann", raise_server_exceptions=False)
    answers = [visitor.client.get(place) for place in ("/", "/panel", "/none", "/static/page.css", "/static/../app.py")]
    answers += [visitor.client.get("/", headers={"host": "evil"}), visitor.client.post("/answer")]
    for answer in answers:
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy.pop("script-src") == policy.pop("style-src") == policy.pop("form-action") == "'self'"
        assert policy == dict.fromkeys(("default-src", "base-uri", "frame-ancestors"), "'none'")
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    assert [answer.status_code for answer in answers] == [200, 200, 404, 200, 404, 400, 415]
    cookie = Visitor(app).get("/").history[0].headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie


def test_the_policy_is_enough_for_the_pages(path):
    """Nothing inline, nothing from elsewhere: else the policy would break the page without anybody noticing."""
    _, app = app_of(path, SKY, criteria=("a",), guidelines="g")
    visitor = Visitor(app)
    pages = [visitor.client.get("/").text]
    pages += [Visitor(app, "ann").client.get(place).text for place in ("/", "/panel", "/x")]
    for page in pages:
        assert not re.search(r"\son\w+=|style=|<style|javascript:|https?:|//", page), page
        assert re.findall(r"<script[^>]*>", page) == ['<script src="/static/page.js" defer>']
    for file in ("page.css", "page.js"):
        assert not re.search(r"https?:|url\(|@import|import\(", visitor.client.get(f"/static/{file}").text)


def test_large_and_strange_bodies_are_refused(path):
    labelling, app = app_of(path, SKY)
    visitor = Visitor(app, "ann")
    form = {"content-type": "application/x-www-form-urlencoded"}
    post = visitor.client.post
    assert post("/answer", content=b"a=" + b"x" * MAX_BODY_BYTES, headers=form).status_code == 413

    def without_length():
        for _ in range(MAX_BODY_BYTES // 2**16 + 1):
            yield b"x" * 2**16

    assert post("/answer", content=without_length(), headers=form).status_code == 413
    assert post("/answer", content=b"a=1", headers=form | {"content-length": "many"}).status_code == 413
    assert post("/answer", content=b"&".join(b"a=%d" % n for n in range(300)), headers=form).status_code == 400
    assert post("/answer", content=b"a=%ff", headers=form).status_code == 400
    assert post("/answer", content="a=ü".encode(), headers=form).status_code == 400
    assert post("/answer", json={"csrf": "x"}).status_code == 415
    assert post("/answer", files={"a": b"x"}).status_code == 415
    assert verdicts(labelling) == []
    long = "ü" * 50_000  # the longest correction goes through
    assert visitor.answer("tie", **{"text-0": long, "text-1": long}).status_code == 200
    assert sum(isinstance(verdict, Correction) for verdict in verdicts(labelling)) == 2


def test_off_loopback_a_token_is_needed_once(path):
    _, app = app_of(path, SKY, token="geheim")
    visitor = Visitor(app)
    for place in ("/", "/panel", "/sign-in", "/?token=", "/?token=gehei", "/?token=geheim2", "/?token=%C3%BC"):
        answer = visitor.get(place)
        assert answer.status_code == 403 and "The sky is" not in answer.text and "csrf" not in answer.text
    assert visitor.client.post("/sign-in", data={"name": "eve"}).status_code == 403
    answer = visitor.get("/?token=geheim")
    assert answer.status_code == 200 and "geheim" not in str(answer.url) and "geheim" not in answer.text
    visitor.send("/sign-in", name="ann")
    assert visitor.shown() and visitor.get("/panel").status_code == 200
    name, value = next(iter(visitor.client.cookies.items()))
    session, mac = value.split(".")
    for forged in (session, session + ".", "." + mac, session[:-2] + "." + mac, session + "." + mac[::-1]):
        visitor.client.cookies.set(name, forged, domain="localhost.local")
        assert visitor.get("/panel").status_code == 403


def test_hosts_and_addresses():
    assert allowed_hosts("127.0.0.1") == ["localhost", "127.0.0.1", "[::1]"]
    assert allowed_hosts("10.0.0.7", ("a.example",))[3:] == ["10.0.0.7", "a.example"]
    assert allowed_hosts("::", ("a.example",))[3:] == ["a.example"] and "[fe80::1]" in allowed_hosts("fe80::1")
    for everywhere in ("0.0.0.0", "::", ""):
        with pytest.raises(ValueError, match="--allowed-hosts"):
            allowed_hosts(everywhere)
    assert [is_loopback(host) for host in ("localhost", "127.1.2.3", "::1", "[::1]", "0.0.0.0", "10.0.0.1", "a.b")] == [
        *[True] * 4, *[False] * 3
    ]  # fmt: skip


def test_the_secret_is_private_and_stays(tmp_path):
    secret = read_secret(tmp_path / "x.sqlite")
    file = tmp_path / ".x.sqlite.secret"
    assert (
        len(secret) == 32
        and read_secret(tmp_path / "x.sqlite") == secret
        and secret != read_secret(tmp_path / "y.sqlite")
    )
    assert file.stat().st_mode & 0o077 == 0
    file.write_text("short")
    with pytest.raises(ValueError, match="is damaged; delete it"):
        read_secret(tmp_path / "x.sqlite")


def test_signed_values_are_good_for_one_purpose():
    one, other = Signer(bytes(32)), Signer(bytes([1]) * 32)
    signed = one.sign("question", ["ä", 1])
    assert one.read("question", signed) == ["ä", 1]
    for reader, purpose, text in ((one, "session", signed), (other, "question", signed), (one, "question", signed[1:])):
        assert reader.read(purpose, text) is None
