"""The report of a benchmark in a real browser; skipped where there is no Chromium or no playwright."""

from __future__ import annotations

import contextlib

import pytest
from benchmark_runs import full_directory

from rlhf_gym.benchmarks.report import write_report

PAGE_FITS = "document.documentElement.scrollWidth <= innerWidth"
# What reaches out of the window and cannot be scrolled into it.
CUT_OFF = """() => [...document.querySelectorAll("body *")].filter(element => {
    const box = element.getBoundingClientRect();
    return (box.left < 0 || box.right > innerWidth) && !element.parentElement.closest(".scroll");
}).map(element => element.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with a failed run, an agent with a hostile name, and every kind of picture and table."""
    directory = full_directory(tmp_path_factory.mktemp("benchmark") / "runs")
    return write_report(directory)[0]


@pytest.fixture
def visit(chromium, report):
    """Opens the report in a window of some width; what the page complains of, or asks for, fails the test."""
    complaints: list[str] = []
    address = report.as_uri()
    with contextlib.ExitStack() as after:

        def start(width):
            context = chromium.new_context(viewport={"width": width, "height": 844})
            after.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
            page.on(
                "request", lambda r: r.url.startswith((address, "data:")) or complaints.append(f"asked for {r.url}")
            )
            page.goto(address)
            return page

        yield start
    assert complaints == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_off(visit, width):
    page = visit(width)
    assert page.evaluate("innerWidth") == width and page.evaluate(PAGE_FITS)
    assert page.evaluate(CUT_OFF) == []
    boxes = page.locator(".scroll").evaluate_all(
        "all => all.map(box => [box.scrollWidth - box.clientWidth, getComputedStyle(box).overflowX, box.tabIndex])"
    )
    assert len(boxes) > 20 and {tuple(rest) for _, *rest in boxes} == {("auto", 0)}  # with the arrow keys as well
    assert width == 1280 or max(hidden for hidden, *_ in boxes) > 100
    # Negative control: what is wider is seen.
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('p'), {style: 'width: 2000px; height: 9px'}))"
    )
    assert not page.evaluate(PAGE_FITS) and len(page.evaluate(CUT_OFF)) == 1


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_seen_and_said(visit, width):
    page = visit(width)
    figures = page.locator("figure").evaluate_all("""all => all.map(figure => {
        const images = [...figure.querySelectorAll("img")], [image] = images;
        return [images.length, image.complete && image.naturalWidth > 0, image.getBoundingClientRect().width,
                image.alt.trim().length, image.alt === figure.querySelector("figcaption").textContent];
    })""")
    assert len(figures) == page.locator("img").count() == 14  # seven pictures of each suite
    for count, is_drawn, shown, said, is_caption in figures:
        assert count == 1 and is_drawn and shown > 250 and said > 50 and is_caption


def test_a_wide_picture_scrolls_to_its_end(visit):
    page = visit(390)
    image = page.locator("img").first
    image.evaluate("image => image.parentElement.scrollLeft = 10000")
    box = image.bounding_box()
    assert box["x"] < 0 and box["x"] + box["width"] <= 390
