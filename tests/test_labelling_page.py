"""The labelling page by its forms alone, as in a browser without JavaScript."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette")
pytest.importorskip("jinja2")

from labelling_visitor import GRASS, ONE, SEA, SKY, Visitor, app_of  # noqa: E402

from rlhf_gym.feedback import Comparison, Correction, Flag, Item, Score, Skip, Undo  # noqa: E402
from rlhf_gym.feedback.page import PageSettings  # noqa: E402
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
