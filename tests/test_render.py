"""What the renderers show, and what they must not let through."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rlhf_gym.envs.render import NEGATIVE_RGB, POSITIVE_RGB, EpisodeView, render_ansi, render_rgb, visible

OUR_COLOURS = re.compile("\x1b\\[(?:0|1|2|38;5;\\d+)m")


def view(
    tokens=(" a", " fine", " day"), rewards=(0.1, -0.2, 1.0), prompt="It was", ledger=None, stop_reason=None, **kw
):
    arguments = {"num_tokens": len(tokens), "max_tokens": 16} | kw
    return EpisodeView(prompt, list(tokens), list(rewards), ledger or {}, stop_reason=stop_reason, **arguments)


def colours(text):
    """Token text -> 256-palette colour, None for the terminal's own."""
    return dict(re.findall("\x1b\\[38;5;(\\d+)m(.*?)\x1b\\[0m", text)[i][::-1] for i in range(text.count("[38;5;")))


def test_ansi_shows_prompt_response_and_ledger():
    text = render_ansi(view(ledger={"score": 0.9, "score/length": float("nan")}, stop_reason="eos"))
    plain = OUR_COLOURS.sub("", text)
    assert plain == "It was\n a fine day\n3/16 tokens, stopped by eos | return 0.9  score 0.9  score/length -"
    assert text.startswith("\x1b[1mIt was\x1b[0m")


def test_ansi_colours_by_sign_and_size():
    # sqrt(.02) = .14 is weak, sqrt(.25) = .5 middling, 1 strong; 160 and 34 are the palette's pure red and green.
    text = render_ansi(view(["w", "m", "s", "W", "M", "S", "0"], [0.02, 0.25, 1, -0.02, -0.25, -1, 0]))
    assert colours(text) == {"w": "108", "m": "71", "s": "34", "W": "174", "M": "167", "S": "160"}


@pytest.mark.parametrize(
    "evil",
    [
        "\x1b[2J",  # clears the screen
        "\x1b]0;title\x07",  # sets the title
        "\x9b2J",  # the same as the first, in one byte
        "\r\b\x00\x7f",
        "\u202egnp.exe\u2066",  # turns the writing direction
        "\u2028\u2029",
        "\ud800",  # cannot be encoded: print would raise
    ],
)
def test_model_text_does_not_drive_the_terminal(evil):
    text = render_ansi(view([evil], [1.0], prompt=evil, ledger={evil: 1.0}, stop_reason=evil))
    rest = OUR_COLOURS.sub("", text)
    assert all(character == "\n" or character.isprintable() for character in rest)
    text.encode("utf-8")
    render_rgb(view([evil], [1.0], prompt=evil, ledger={evil: 1.0}))


def test_line_breaks_are_kept_and_marked():
    assert "a↵\nb" in OUR_COLOURS.sub("", render_ansi(view(["a\nb"], [1.0])))


def test_visible_keeps_ordinary_text():
    for text in ("Zwölf Boxkämpfer, naïve café", "你好", "می\u200cخواهم", "👩\u200d🔬", "a  b"):
        assert visible(text) == text
    assert visible("\t") == "\\t"


def test_images_of_one_environment_have_one_size():
    views = [
        view((), ()),
        view(),
        view([" word"] * 500, [0.0] * 500, prompt="long prompt " * 200, ledger={f"term {i}": 0.5 for i in range(50)}),
        view(["x" * 5000, "\n" * 40], [1.0, -1.0], stop_reason="length"),
    ]
    shapes = {render_rgb(v).shape for v in views}
    assert len(shapes) == 1
    height, width, channels = shapes.pop()
    assert (width, channels) == (640, 3) and height % 2 == 0
    assert render_rgb(view(), width=320).shape[1] == 320
    assert render_rgb(view(max_tokens=100_000)).shape[0] < 1000
    assert all(render_rgb(v).dtype == np.uint8 for v in views)


def test_image_tints_tokens_by_reward():
    def has(image, colour):
        return bool((image == np.array(colour, np.uint8)).all(-1)[:-60].any())  # above the legend

    assert has(render_rgb(view([" good"], [1.0])), POSITIVE_RGB)
    assert not has(render_rgb(view([" good"], [1.0])), NEGATIVE_RGB)
    assert has(render_rgb(view([" bad"], [-1.0])), NEGATIVE_RGB)
    none = render_rgb(view([" plain"], [0.0]))
    assert not has(none, POSITIVE_RGB) and not has(none, NEGATIVE_RGB)


def test_long_texts_show_their_end():
    ending, beginning = [0.0] * 499 + [1.0], [1.0] + [0.0] * 499
    tokens = [" word"] * 500
    blue = [(render_rgb(view(tokens, r)) == np.array(POSITIVE_RGB)).all(-1)[:-60].any() for r in (ending, beginning)]
    assert blue == [True, False]


def test_images_do_not_depend_on_what_was_drawn_before():
    first = render_rgb(view())
    render_rgb(view([" other"], [-3.0]))
    np.testing.assert_array_equal(first, render_rgb(view()))


def test_bad_arguments():
    with pytest.raises(ValueError, match="width must be at least 320 pixels, got 100"):
        render_rgb(view(), width=100)


def test_rewards_that_are_not_finite_are_drawn_plain():
    text = render_ansi(view([" a", " b"], [float("nan"), 1.0]))
    assert colours(text) == {" b": "34"}
    render_rgb(view([" a", " b"], [float("inf"), 1.0]))
