"""The labelling page in a real browser; skipped where there is no Chromium or no playwright."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from labelling_visitor import app_of  # noqa: E402

from rlhf_gym.feedback import Comparison, Correction, Flag, Item, Score, Undo  # noqa: E402

PAIRS = [Item(f"Question {n}?", (f"old answer {n}", f"new answer {n}"), id=f"i{n}") for n in range(4)]
LONG = Item("Long?", tuple(f"{word} " * 900 for word in ("alpha", "beta")), id="long")


@pytest.fixture
def serve(tmp_path):
    """Serves items; returns the labelling and the address."""
    with contextlib.ExitStack() as after:

        def start(*items, **settings):
            labelling, app = app_of(tmp_path / "feedback.sqlite", *items, **settings)
            listening = socket.create_server(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()

            def stop():
                server.should_exit = True
                thread.join()
                labelling.store.close()

            after.callback(stop)
            return labelling, f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start


@pytest.fixture
def visit(chromium):
    """Opens a window of somebody's own and signs in; what the page complains of fails the test."""
    complaints: list[str] = []
    with contextlib.ExitStack() as after:

        def start(address, name="ann", **options):
            context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            after.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(10_000)
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda r: r.url.startswith(address) or complaints.append(f"asked for {r.url}"))
            page.goto(address)
            page.get_by_label("Your name").fill(name)
            with page.expect_navigation():  # until all is loaded, the style as well
                page.get_by_role("button", name="Begin").click()
            return page

        yield start
    assert complaints == []


def verdicts(labelling, annotator=None):
    return [event.judgement.verdict for event in labelling.store.events(annotator)]


def wait_until(true):
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def press(page, key):
    """Press a key and wait for the page that follows."""
    with page.expect_navigation():
        page.keyboard.press(key)


def test_compare_rate_correct_undo_reload(serve, visit):
    labelling, address = serve(*PAIRS, criteria=("helpful",))
    page = visit(address)
    prompt, left = page.locator(".prompt .text").inner_text(), page.locator(".response .text").first.inner_text()
    page.reload()
    assert page.locator(".prompt .text").inner_text() == prompt
    page.get_by_role("button", name="A is better").click()  # the browser says what is missing
    assert verdicts(labelling) == [] and page.locator("input:invalid").count() == 10
    for side, rating in ((0, 4), (1, 2)):
        page.locator(f"input[name=rating-{side}-0][value='{rating}']").check(force=True)
    page.get_by_text("Correct the text").first.click()
    page.get_by_label("Response A as it should be").fill(left + "\nwith a second line")
    page.get_by_text("Flag as unsafe").last.click()
    page.get_by_label("Response B is unsafe").check()
    page.get_by_role("button", name="A is better").click()
    page.wait_for_selector(".last")
    place = PAIRS[int(prompt[9])].responses.index(left)
    assert verdicts(labelling) == [
        Correction(place, left + "\nwith a second line"),
        Score(place, "helpful", 4),
        Flag(1 - place, ""),
        Score(1 - place, "helpful", 2),
        Comparison(place, 2),
    ]
    assert page.locator(".prompt .text").inner_text() != prompt
    page.get_by_role("button", name="Undo").click()
    page.wait_for_function("!document.querySelector('.last')")
    assert page.locator(".prompt .text").inner_text() == prompt
    assert verdicts(labelling)[5:] == [Undo(event.judgement.key) for event in labelling.store.events()[:5]]
    page.go_back(), page.reload()
    assert labelling.store.standing() == []


def test_a_double_click_counts_once(serve, visit):
    labelling, address = serve(*PAIRS)
    page = visit(address)
    page.get_by_role("button", name="Equally good").dblclick()
    page.wait_for_selector(".last")
    wait_until(lambda: len(verdicts(labelling)) >= 1)
    events = labelling.store.events()
    assert len({event.judgement.item for event in events}) == len(events)  # the second may have hit the next question


def test_two_annotators_at_once(serve, visit):
    labelling, address = serve(*PAIRS, overlap=2)
    ann, bo = visit(address, "ann"), visit(address, "Bø")
    for _ in range(4):
        press(ann, "2"), press(bo, "6")
    for page in (ann, bo):
        assert page.locator("h1").inner_text() == "Nothing is left for you"
        assert "Last answer" in page.locator(".last").inner_text()
    for name, strength in (("ann", 2), ("Bø", 2)):
        events = labelling.store.events(name)
        assert {event.judgement.item for event in events} == {item.id for item in PAIRS}
        assert all(event.judgement.verdict.strength == strength for event in events)
    ann.get_by_role("link", name="Panel", exact=True).click()
    assert ann.locator("tbody th").all_inner_texts()[-3:] == ["Bø", "ann", "everyone"]


EVIL = (
    "<script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>\u202eevil\u202c\x00\x1b</textarea><b>bold</b>"
)


def test_what_a_model_says_does_nothing(serve, visit):
    _, address = serve(Item(EVIL, (EVIL, "سلام دنیا 123 (abc)"), id="evil"))
    page = visit(address)
    assert page.evaluate("document.scripts.length") == 1 and page.locator("img, b").count() == 0
    shown = page.locator(".response .text").all_inner_texts()
    assert any("<script>alert(1)</script><img" in text and "U+202EevilU+202CU+0000U+001B" in text for text in shown)
    directions = page.locator(".response .text").evaluate_all(
        "all => all.map(each => getComputedStyle(each).direction)"
    )
    assert sorted(directions) == ["ltr", "rtl"]
    # The letters after the override still run from left to right.
    assert page.locator(".prompt .text").evaluate("""box => {
        const text = [...box.childNodes].find(node => node.data === 'evil'), range = document.createRange();
        const left = [0, 3].map(at => (range.setStart(text, at), range.setEnd(text, at + 1), range.getBoundingClientRect().x));
        return left[0] < left[1];
    }""")
    assert page.title() == "Which response is better? – rlhf_gym"


def test_by_keyboard_alone(serve, visit, chromium):
    labelling, address = serve(*PAIRS, LONG, criteria=("helpful",))
    context = chromium.new_context()
    page = context.new_page()
    page.goto(address)
    page.keyboard.type("ann")  # the field has the focus
    press(page, "Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"

    def tab_to(selector):
        for _ in range(40):
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to("[name=rating-0-0]"), page.keyboard.press("Space"), page.keyboard.press("ArrowRight")
    tab_to("summary"), page.keyboard.press("Enter")
    tab_to("textarea"), page.keyboard.type("1 s b u")  # letters, not shortcuts
    tab_to(".response:first-child details:last-of-type summary"), page.keyboard.press("Space")
    tab_to("[type=checkbox]"), page.keyboard.press("Space")
    tab_to("[name=reason-0]"), page.keyboard.type("7"), page.keyboard.press("Enter")  # sends nothing
    tab_to("[name=rating-1-0]"), page.keyboard.press("5"), page.keyboard.press("7")  # a rating, and nothing
    assert verdicts(labelling) == []
    tab_to("[name=verdict][value=B1]"), press(page, "Enter")
    kinds = [type(verdict) for verdict in verdicts(labelling)]
    assert kinds == [Flag, Correction, Score, Score, Comparison] and [
        verdicts(labelling)[n].rating for n in (2, 3)
    ] == [2, 5]
    press(page, "u")
    assert labelling.store.standing() == []
    press(page, "s")
    tab_to("[data-shortcuts]"), page.keyboard.press("Enter")  # switched off, and after a reload still
    page.reload()
    before = len(verdicts(labelling))
    for key in "1sbu":
        page.keyboard.press(key)
    page.wait_for_timeout(200)
    assert len(verdicts(labelling)) == before and page.locator("kbd").first.is_hidden()
    tab_to("[data-shortcuts]"), page.keyboard.press("Space")
    assert page.locator("kbd").first.is_visible()
    page.keyboard.press("Control+s"), page.wait_for_timeout(100)
    assert len(verdicts(labelling)) == before
    context.close()


@pytest.mark.parametrize("width", [1280, 320])
def test_what_has_the_focus_is_in_sight_and_nothing_is_cut_off(serve, visit, width):
    _, address = serve(LONG, criteria=tuple("abcdefgh"), guidelines="g")
    page = visit(address, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    seen = 0
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate("""() => {
            const element = document.activeElement, box = element.getBoundingClientRect();
            if (element === document.body) return null;
            const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
            return [element.outerHTML.slice(0, 80), !!top && (element.contains(top) || !!top.closest("label, header")),
                    Math.min(box.width, box.height) >= 24 || element.matches("a, input")];
        }""")
        if found is None:
            break
        seen += 1
        assert found[1] and found[2], found
    assert seen > 15


def test_without_javascript(serve, visit):
    labelling, address = serve(*PAIRS)
    page = visit(address, java_script_enabled=False)
    assert page.locator(".shortcuts").is_hidden() and page.locator("kbd").first.is_hidden()
    page.get_by_role("button", name="B is much better").click()
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("Correct the text").first.click()
    page.get_by_label("Response A as it should be").fill("better")
    page.get_by_role("button", name="Skip").click()
    assert [type(verdict).__name__ for verdict in verdicts(labelling)] == ["Comparison", "Undo", "Correction", "Skip"]
    page.get_by_role("link", name="Panel", exact=True).click()
    assert page.locator("dd").first.inner_text() == "4"
    page.get_by_role("button", name="Sign out").click()
    assert page.locator("h1").inner_text() == "Who judges?"


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing(serve, chromium, colours):
    """WCAG 2.2 AA, and axe's best practices, as far as a program can see them; on every page and in every state."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    items = [PAIRS[0], Item("سؤال؟", ("שלום", "世界\u202e <b>")), Item("One?", ("alone",), id="one")]
    _, address = serve(*items, criteria=("helpful", "honest"), guidelines="Be kind.")
    looked_at = []

    def look(name):
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        found = axe.run(page).response
        assert found["passes"], "or it has not looked"
        assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found["violations"]] == [], name
        looked_at.append(name)

    def send(button):
        button.evaluate("button => button.form.noValidate = true")
        with page.expect_navigation():
            button.click()

    with contextlib.closing(chromium.new_context(color_scheme=colours)) as context:
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.goto(address)
        look("sign in")
        for name in (" ", "ann"):
            page.get_by_label("Your name").fill(name)
            send(page.get_by_role("button", name="Begin"))
            look("not signed in" if name == " " else "signed in")
        for _ in items:
            look("question")
            send(page.locator("[data-key='1']"))
            assert "Not saved yet" in page.title()
            look("not saved yet")
            for rating in page.locator(".scale input[value='4']").all():
                rating.check()
            send(page.locator("[data-key='1']"))
        assert page.title().startswith("Nothing is left")
        for path in ("/", "/panel", "/nowhere"):
            page.goto(address + path)
            look(path)
    assert len(looked_at) == 12
