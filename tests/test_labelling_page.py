"""The labelling page by its forms alone, as in a browser without JavaScript."""

from __future__ import annotations

import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette")
pytest.importorskip("jinja2")

from labelling_visitor import GRASS, HOST, ONE, SEA, SKY, Visitor, app_of  # noqa: E402

from rlhf_gym.feedback import Comparison, Correction, Flag, Item, Score, Skip, Undo  # noqa: E402
from rlhf_gym.feedback.page import PageSettings  # noqa: E402
from rlhf_gym.feedback.page.security import (  # noqa: E402
    MAX_BODY_BYTES,
    Signer,
    allowed_hosts,
    is_loopback,
    read_secret,
)
from rlhf_gym.feedback.page.text import editable, inert  # noqa: E402


@pytest.fixture
def path(tmp_path):
    return tmp_path / "feedback.sqlite"


def verdicts(labelling):
    return [event.judgement.verdict for event in labelling.store.events()]


def judgements(labelling):
    return [event.judgement for event in labelling.store.events()]


@pytest.mark.parametrize(
    ("button", "side", "strength"),
    [("A3", 0, 3), ("A2", 0, 2), ("A1", 0, 1), ("B1", 1, 1), ("B2", 1, 2), ("B3", 1, 3)],
)
def test_a_comparison_is_of_what_was_shown(path, button, side, strength):
    labelling, app = app_of(path, SKY)
    visitor = Visitor(app, "ann")
    left, right = visitor.shown()
    assert {left, right} == set(SKY.responses)
    assert visitor.answer(button).status_code == 200
    (judgement,) = judgements(labelling)
    assert judgement.shown == (SKY.responses.index(left), SKY.responses.index(right))
    assert judgement.verdict == Comparison(SKY.responses.index([left, right][side]), strength)
    assert (judgement.annotator, judgement.item) == ("ann", "sky") and 0 <= judgement.seconds < 60
    assert visitor.texts("h1") == ["Nothing is left for you"]


@pytest.mark.parametrize(
    ("button", "verdict"), [("tie", Comparison("tie")), ("both bad", Comparison("both bad")), ("skip", Skip())]
)
def test_no_winner(path, button, verdict):
    labelling, app = app_of(path, SKY)
    Visitor(app, "ann").answer(button)
    assert verdicts(labelling) == [verdict] and len(judgements(labelling)[0].shown) == 2


def test_ratings_corrections_and_flags_come_with_the_answer(path):
    labelling, app = app_of(path, SKY, criteria=("helpful", "honest"))
    visitor = Visitor(app, "ann")
    places = [SKY.responses.index(text) for text in visitor.shown()]
    assert visitor.form("/answer")["text-1"] == visitor.shown()[1]
    fields = {"rating-0-0": "5", "rating-0-1": "4", "rating-1-0": "1", "rating-1-1": "2"}
    visitor.answer("A1", **fields, **{"text-1": "a \r\nb", "unsafe-0": "1", "reason-0": " rude "})
    expected = [
        Flag(places[0], "rude"),
        Score(places[0], "helpful", 5),
        Score(places[0], "honest", 4),
        Correction(places[1], "a \nb"),
        Score(places[1], "helpful", 1),
        Score(places[1], "honest", 2),
        Comparison(places[0], 1),
    ]
    assert verdicts(labelling) == expected
    assert visitor.texts(".last span") == [
        "Last answer: A is slightly better, with an unsafe response and ratings and a corrected text."
    ]
    visitor.undo()  # all of it
    assert len(verdicts(labelling)) == 14 and labelling.store.standing() == []


def test_what_is_missing_is_said_and_what_was_given_stays(path):
    labelling, app = app_of(path, SKY, criteria=("helpful",))
    visitor = Visitor(app, "ann")
    shown, ticket = visitor.shown(), visitor.form("/answer")["ticket"]
    done = visitor.answer("B2", **{"rating-0-0": "2", "text-1": "  ", "reason-1": "why <b>"})
    assert done.status_code == 422 and verdicts(labelling) == []
    assert visitor.texts(".problems li") == [
        "Response B: the corrected text is empty.",
        "Response B: rate “helpful” from 1 to 5.",
    ]
    for anchor in visitor.select(".problems a"):
        assert len(visitor.select(anchor.get("href"))) == 1  # leads to the field
    form = visitor.form("/answer")
    assert (form["rating-0-0"], form["reason-1"], form["ticket"]) == (
        "2",
        "why <b>",
        ticket,
    ) and visitor.shown() == shown
    visitor.answer("B2", **{"rating-1-0": "3", "text-1": shown[1]})
    assert [type(verdict) for verdict in verdicts(labelling)] == [Score, Flag, Score, Comparison]
    visitor.undo()
    assert visitor.answer("A9", **{"rating-0-0": "2", "rating-1-0": "2"}).status_code == 422
    assert visitor.answer("save", **{"rating-0-0": "2", "rating-1-0": "2"}).status_code == 422
    assert visitor.answer("skip").status_code == 200  # needs no rating


def test_one_response_is_rated(path):
    labelling, app = app_of(path, ONE)
    visitor = Visitor(app, "ann")
    assert visitor.texts("h1") == ["How good is this response?"] and visitor.shown() == [" hot."]
    assert visitor.answer("save").status_code == 422 and visitor.answer("A1", **{"rating-0-0": "1"}).status_code == 422
    visitor.answer("save", **{"rating-0-0": "4"})
    assert verdicts(labelling) == [Score(0, "quality", 4)] and visitor.texts("h1") == ["Nothing is left for you"]


def test_a_form_sent_twice_counts_once(path):
    labelling, app = app_of(path, SKY, SEA)
    visitor = Visitor(app, "ann")
    form = visitor.form("/answer") | {"verdict": "A2"}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: visitor.client.post("/answer", data=form).status_code, range(8)))
    assert answers == [200] * 8 and len(verdicts(labelling)) == 1
    other = visitor.client.post("/answer", data=form | {"verdict": "B2"})  # back, and another button
    assert other.status_code == 409 and "answered already" in other.text and len(verdicts(labelling)) == 1


def test_undo_asks_again_and_twice_is_once(path):
    labelling, app = app_of(path, SKY, SEA)
    visitor = Visitor(app, "ann")
    first, order = visitor.texts(".prompt .text"), visitor.shown()
    visitor.answer("A1")
    second = visitor.texts(".prompt .text")
    undo = visitor.form("/undo")
    visitor.undo()
    assert first != second and visitor.texts(".prompt .text") == first and visitor.shown() == order
    assert visitor.client.post("/undo", data=undo).status_code == 200
    assert [type(verdict) for verdict in verdicts(labelling)] == [Comparison, Undo]
    assert visitor.select(".last") == []  # nothing is left to undo
    visitor.answer("B1"), visitor.answer("tie"), visitor.undo(), visitor.undo()
    assert labelling.store.standing() == [] and visitor.texts(".prompt .text") == first


def test_reload_and_restart_show_the_same(path):
    labelling, app = app_of(path, SKY, SEA, GRASS)
    visitor = Visitor(app, "ann")
    visitor.answer("A1")
    before, question = visitor.shown(), visitor.form("/answer")
    visitor.get("/")
    assert visitor.shown() == before and visitor.texts(".how-far label") == ["1 answered, 2 left"]
    again = Visitor(app, "ann")  # another window of the same person
    assert again.shown() == before
    labelling.store.close()
    labelling, app = app_of(path, SKY, SEA, GRASS)
    visitor.client.app = app
    later = Visitor(app)
    later.client.cookies = visitor.client.cookies
    assert later.get("/").status_code == 200 and later.shown() == before
    # The form that was open when the server went down is still good.
    assert later.client.post("/answer", data=question | {"verdict": "tie"}).status_code == 200
    assert len(labelling.store.standing("ann")) == 2


def test_the_side_is_drawn_for_each_person_and_nothing_tells_where_a_response_is_from(path):
    items = [
        Item(f"p{n}", ("old-text", "new-text"), "checkpoint-77", {"seed": 12345}, id=f"item-{n}") for n in range(40)
    ]
    labelling, app = app_of(path, *items, overlap=2)
    sides = []
    for name in ("ann", "bo"):
        visitor = Visitor(app, name)
        for _ in range(40):
            page = visitor.client.get("/").text
            assert "checkpoint" not in page and "12345" not in page and "gold" not in page
            sides.append(visitor.shown()[0] == "old-text")
            visitor.answer("tie")
    assert 12 <= sum(sides[:40]) <= 28 and 12 <= sum(sides[40:]) <= 28  # 20 ± 2.5 standard deviations
    ann, bo = ({j.item: j.shown for j in judgements(labelling) if j.annotator == name} for name in ("ann", "bo"))
    assert 8 <= sum(ann[item] == bo[item] for item in ann) <= 32 and set(ann) == set(bo)


EVIL = '<script>document.title="x"</script><img src=x onerror=alert(1)>\u202e\u2066x\x00\x1b[2J\u200b\ufeff{{ 7*7 }}</div>&lt;'


def test_what_a_model_says_is_shown_and_not_obeyed(path):
    _, app = app_of(path, Item(EVIL, (EVIL, "\n بسم\u200cالله 天空 \u200d")), guidelines=EVIL)
    visitor = Visitor(app, EVIL[:7] + "'\"")
    text = visitor.client.get("/").text
    assert "<script>document" not in text and "<img" not in text and "{{" in text and "49" not in text
    assert not set("\u202e\u2066\x00\x1b\u200b\ufeff") & set(text)  # nowhere, not in the text to edit either
    assert len(visitor.select("script")) == 1 and visitor.select("img") == []
    for selector in (".prompt .text", ".guidelines .text"):
        marked = visitor.select(selector)[0].text_content()
        assert marked.endswith("U+202EU+2066xU+0000U+001B[2JU+200BU+FEFF{{ 7*7 }}</div>&lt;")
    side = visitor.shown().index("\n بسم\u200cالله 天空 \u200d")
    assert visitor.form("/answer")[f"text-{side}"] == "\r\n بسم\u200cالله 天空 \u200d"  # its first line break, too
    assert "Signed in as <script'\"" in visitor.texts(".who span")[0]
    assert all(div.get("dir") == "auto" for div in visitor.select(".text, textarea"))


def test_marks():
    assert inert("a\u202eb<") == ('a<abbr class="mark" title="RIGHT-TO-LEFT OVERRIDE">U+202E</abbr>b&lt;')
    assert inert("\x07") == '<abbr class="mark" title="control character">U+0007</abbr>'
    assert inert("é\n\t天\u200d") == "é\n\t天\u200d"
    assert editable("a\r\nb\rc\u202e\x00\u200cd") == "a\nb\nc\u200cd"


def test_an_unchanged_text_is_no_correction(path):
    labelling, app = app_of(path, Item("p", ("\n a\r\nb\u202e ", "c\rd")))
    visitor = Visitor(app, "ann")
    visitor.answer("tie")  # sends both texts as the browser would
    assert verdicts(labelling) == [Comparison("tie")]


# What strangers may not do


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


# People


@pytest.mark.parametrize("name", ["", "  ", "a" * 201, "a\u202eb", "a\nb"])
def test_names_that_are_none(path, name):
    _, app = app_of(path, SKY)
    visitor = Visitor(app)
    visitor.get("/")
    assert visitor.send("/sign-in", name=name).status_code == 422 and visitor.texts("#problem")
    assert visitor.send("/sign-in", name=" Zoë ").status_code == 200 and "Zoë" in visitor.texts(".who span")[0]


def test_whoever_signs_out_is_nobody(path):
    labelling, app = app_of(path, SKY)
    visitor = Visitor(app, "ann")
    form = visitor.form("/answer") | {"verdict": "A1"}
    visitor.send("/sign-out")
    assert visitor.texts("h1") == ["Who judges?"] and visitor.get("/").url.path == "/sign-in"
    assert visitor.client.post("/answer", data=form).status_code == 403
    assert verdicts(labelling) == []


def test_the_panel_counts(path):
    labelling, app = app_of(path, SKY, SEA, overlap=2)
    ann, bo = Visitor(app, "ann"), Visitor(app, "bo")
    ann.get("/panel")
    assert ann.texts(".counts dd")[:4] == ["2", "0", "0", "0"] and "Nothing was judged yet." in ann.texts(".card")
    for visitor in (ann, bo):
        for _ in range(2):
            visitor.get("/")
            blue_or_wide = [text in (" blue.", " wide.") for text in visitor.shown()].index(True)
            visitor.answer("AB"[blue_or_wide] + "2")
    ann.get("/panel")
    assert ann.texts(".counts dd") == ["2", "2", "0", "4", "0", "0", "0", "0", "0"]
    assert ann.texts("tbody th") == ["Krippendorff’s α, choices", "Cohen’s κ, ann, bo", "ann", "bo", "everyone"]
    # Both said "first" of both: nothing shows that they can tell things apart.
    assert ann.texts("tbody td")[:2] == ["not known: all answers are alike", "2"]
    answer = ann.get("/panel?live=1")
    assert answer.headers["refresh"] == "10" and "refresh" not in ann.get("/panel").headers


def test_a_store_that_fails_says_so_and_a_fault_is_no_secret(path, monkeypatch):
    labelling, app = app_of(path, SKY)
    visitor = Visitor(app, "ann", raise_server_exceptions=False)
    form = visitor.form("/answer") | {"verdict": "A1"}

    def fails(error):
        def record_all(judgements):
            raise error

        return record_all

    for error, status in ((sqlite3.OperationalError("disk is full"), 503), (RuntimeError("hidden detail"), 500)):
        monkeypatch.setattr(labelling.store, "record_all", fails(error))
        answer = visitor.client.post("/answer", data=form)
        assert answer.status_code == status and "hidden" not in answer.text and "disk" not in answer.text
        assert "content-security-policy" in answer.headers
    monkeypatch.undo()
    assert visitor.client.post("/answer", data=form).status_code == 200 and len(verdicts(labelling)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 0.5}, "overlap must be at least 1, got 0.5"),
        ({"overlap": float("nan")}, "overlap must be"),
        ({"gold_rate": 1.1}, r"gold_rate must be in \[0, 1\], got 1.1"),
        ({"criteria": ("a", "a")}, "criteria must be at most 12 different names"),
        ({"criteria": ("",)}, "a criterion must have 1 to 200 characters"),
        ({"guidelines": "x" * 100_001}, "guidelines must have at most 100,000 characters"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        PageSettings(**change)
