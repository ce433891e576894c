"""Pictures of an episode: coloured text for a terminal, an image for a video.

Both show the prompt, the response with each token coloured by its reward, and one line with the ledger. The text comes
from a model, so whatever could drive a terminal (escape sequences, control and bidirectional characters) is shown, not
obeyed. The image's font, DejaVu Sans, has Latin, Greek, Cyrillic, Arabic, but no Chinese, Japanese or Korean.
"""

from __future__ import annotations

import math
import os
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import ImageDraw

# Orange and blue keep apart for every common form of colour blindness; light, since the text on them is dark.
NEGATIVE_RGB, POSITIVE_RGB = (244, 160, 66), (112, 178, 255)
TEXT_RGB, FAINT_RGB, LINE_RGB, PAPER_RGB = (28, 30, 34), (120, 124, 132), (222, 224, 228), (255, 255, 255)
# Of the 256-colour palette: dark enough for light terminals and light enough for dark ones. From weak to strong.
ANSI_RED, ANSI_GREEN = (174, 167, 160), (108, 71, 34)

MARGIN, FONT_SIZE, LINE_HEIGHT = 20, 17, 25
PROMPT_LINES, MAX_RESPONSE_LINES = 3, 30


@dataclass(frozen=True)
class EpisodeView:
    """What there is to see of one row."""

    prompt: str
    tokens: list[str]
    """Text that each response token added."""
    rewards: list[float]
    """Reward of each of them."""
    ledger: dict[str, float]
    """Score, its terms, KL, ...; empty before the end."""
    num_tokens: int
    max_tokens: int
    """Limit of the response. The height of the image follows from it."""
    stop_reason: str | None
    """"eos", "length", or None while the episode goes on."""


def visible(text: str) -> str:
    """Text with every character that a terminal could obey, or cannot encode, replaced by its escape.

    Example:
        >>> print(visible("a\\x1b[2Jb\\u202ec"))
        a\\x1b[2Jb\\u202ec
    """
    # Cc control, Cf format (bidirectional overrides, zero width), Cs surrogates, Zl and Zp separators. The zero-width
    # (non-)joiners stay: Persian, Hindi and emoji are wrong without them.
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"
        else c
        for c in text
    )


def render_ansi(view: EpisodeView) -> str:
    """The episode as text: prompt in bold, response from red (negative reward) to green, then the ledger.

    Args:
        view: The episode.

    Returns:
        A string without a final newline; its only escape sequences are colours of ours, each of them closed.
    """
    parts = [f"\x1b[1m{_lines(view.prompt)}\x1b[0m\n"]
    scale = _scale(view.rewards)
    for token, reward in zip(view.tokens, view.rewards, strict=True):
        text, level = _lines(token), _level(reward, scale)
        colours = ANSI_GREEN if level > 0 else ANSI_RED
        colour = colours[min(2, int(abs(level) * 3))]
        parts.append(f"\x1b[38;5;{colour}m{text}\x1b[0m" if level else text)
    return "".join(parts) + f"\n\x1b[2m{_progress(view)} | {_ledger(view)}\x1b[0m"


def render_rgb(view: EpisodeView, width: int = 640) -> np.ndarray:
    """The episode as an image: tokens on orange (negative reward) to blue (positive), dark on white.

    Of long texts the end is shown, so that the size depends on ``width`` and ``view.max_tokens`` only, and the frames
    of an environment stack into a video.

    Args:
        view: The episode.
        width: In pixels, at least 320.

    Returns:
        Shape (height, width, 3), uint8; height is even.

    Raises:
        ValueError: If ``width`` < 320.
    """
    if width < 320:
        raise ValueError(f"width must be at least 320 pixels, got {width}.")
    from PIL import Image, ImageDraw

    inner = width - 2 * MARGIN
    # 4.5 characters of .56 em per token are enough for most texts; more scrolls.
    response_lines = math.ceil(view.max_tokens * 4.5 * 0.56 * FONT_SIZE / inner) + 1
    response_lines = min(max(response_lines, 3), MAX_RESPONSE_LINES)
    response_top = MARGIN + (PROMPT_LINES + 1) * LINE_HEIGHT + 14
    foot_top = response_top + (response_lines + 1) * LINE_HEIGHT + 14
    height = foot_top + 2 * LINE_HEIGHT + MARGIN - 6
    image = Image.new("RGB", (width, height + height % 2), PAPER_RGB)
    draw = ImageDraw.Draw(image)

    scale = _scale(view.rewards)
    levels = [_level(reward, scale) for reward in view.rewards]
    _draw_label(draw, MARGIN, "PROMPT", "", width)
    _draw_text(draw, MARGIN + LINE_HEIGHT, [view.prompt], [0.0], PROMPT_LINES, inner)
    draw.line((MARGIN, response_top - 9, width - MARGIN, response_top - 9), LINE_RGB)
    _draw_label(draw, response_top, "RESPONSE", _progress(view), width)
    _draw_text(draw, response_top + LINE_HEIGHT, view.tokens, levels, response_lines, inner)
    draw.line((MARGIN, foot_top - 9, width - MARGIN, foot_top - 9), LINE_RGB)
    ledger = _cut(_ledger(view), inner, _font(FONT_SIZE - 3))
    draw.text((MARGIN, foot_top), ledger, TEXT_RGB, _font(FONT_SIZE - 3))
    _draw_legend(draw, foot_top + LINE_HEIGHT, scale, width)
    return np.array(image)


def _scale(rewards: list[float]) -> float:
    return max((abs(r) for r in rewards if math.isfinite(r)), default=0.0)


def _level(reward: float, scale: float) -> float:
    """Strength of the colour in [-1, 1]: a square root, or a score of 1 would hide a KL penalty of .02 per token."""
    if not math.isfinite(reward) or reward == 0:
        return 0.0
    return math.copysign(math.sqrt(abs(reward) / scale), reward)


def _lines(text: str) -> str:
    """Visible text that keeps its line breaks, marked."""
    return "↵\n".join(visible(line) for line in text.split("\n"))


def _progress(view: EpisodeView) -> str:
    stopped = f", stopped by {visible(view.stop_reason)}" if view.stop_reason else ""
    return f"{view.num_tokens}/{view.max_tokens} tokens{stopped}"


def _ledger(view: EpisodeView) -> str:
    entries = {"return": sum(view.rewards), **view.ledger}
    return "  ".join(f"{visible(name)} {'-' if math.isnan(x) else f'{x:.3g}'}" for name, x in entries.items())


@lru_cache(maxsize=8)
def _font(size: int, bold: bool = False) -> Any:
    # matplotlib brings a font of known shape: no search on the user's machine, the same picture everywhere.
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _mix(level: float) -> tuple[int, ...]:
    end = POSITIVE_RGB if level > 0 else NEGATIVE_RGB
    return tuple(round(p + abs(level) * (e - p)) for p, e in zip(PAPER_RGB, end, strict=True))


def _draw_label(draw: ImageDraw.ImageDraw, top: int, left: str, right: str, width: int) -> None:
    font = _font(FONT_SIZE - 5, bold=True)
    draw.text((MARGIN, top + 3), left, FAINT_RGB, font)
    font = _font(FONT_SIZE - 4)
    draw.text((width - MARGIN - font.getlength(right), top + 2), right, FAINT_RGB, font)


def _draw_text(draw: Any, top: int, tokens: list[str], levels: list[float], max_lines: int, inner: int) -> None:
    """Draw coloured tokens in ``max_lines`` lines; if there are more, the last ones, behind an ellipsis."""
    font = _font(FONT_SIZE)
    lines = _wrap(tokens, inner, font)
    if len(lines) > max_lines:
        lines = lines[-max_lines:]
        lines[0] = [("… ", -1), *lines[0]]
        while sum(font.getlength(text) for text, _ in lines[0]) > inner and len(lines[0]) > 1:
            lines[0].pop(1)
    for i, line in enumerate(lines):
        x, y = float(MARGIN), top + i * LINE_HEIGHT
        for text, token in line:
            end = x + font.getlength(text)
            if token >= 0 and levels[token]:
                # A pixel of paper between neighbours shows where one token ends.
                draw.rectangle((round(x), y, round(end) - 2, y + LINE_HEIGHT - 4), _mix(levels[token]))
            draw.text((x, y + 1), text, FAINT_RGB if token < 0 else TEXT_RGB, font)
            x = end


def _wrap(tokens: list[str], inner: int, font: Any) -> list[list[tuple[str, int]]]:
    """Lines of (text, index of its token); broken at spaces, within a word only if it is longer than a line."""
    lines: list[list[tuple[str, int]]] = [[]]
    word: list[tuple[str, int]] = []
    used = 0.0

    def length(pieces: list[tuple[str, int]]) -> float:
        return sum(font.getlength(text) for text, _ in pieces)

    def flush() -> None:
        nonlocal used
        if used and used + length(word) > inner:
            lines.append([])
            used = 0.0
            word[0] = (word[0][0].lstrip(" "), word[0][1])
        for text, token in word:
            for part in [text] if length(word) <= inner else text:
                if used + font.getlength(part) > inner:
                    lines.append([])
                    used = 0.0
                if lines[-1] and lines[-1][-1][1] == token:
                    lines[-1][-1] = (lines[-1][-1][0] + part, token)
                else:
                    lines[-1].append((part, token))
                used += font.getlength(part)
        word.clear()

    for index, token in enumerate(tokens):
        for row, line in enumerate(_lines(token).split("\n")):
            if row:
                flush()
                lines.append([])
                used = 0.0
            for part in line.replace(" ", "\n ").split("\n"):
                if part.startswith(" "):
                    flush()
                if part:
                    word.append((part, index))
    flush()
    return lines


def _cut(text: str, inner: int, font: Any) -> str:
    if font.getlength(text) <= inner:
        return text
    while text and font.getlength(text + "…") > inner:
        text = text[:-1]
    return text + "…"


def _draw_legend(draw: ImageDraw.ImageDraw, top: int, scale: float, width: int) -> None:
    if not scale:
        return
    font, bar = _font(FONT_SIZE - 5), 120
    left = f"reward per token   {-scale:.2g}"
    draw.text((MARGIN, top + 2), left, FAINT_RGB, font)
    x = MARGIN + round(font.getlength(left)) + 8
    for i in range(bar):
        share = 2 * i / (bar - 1) - 1
        draw.line((x + i, top + 3, x + i, top + 16), _mix(_level(share, 1.0)))
    draw.rectangle((x - 1, top + 2, x + bar, top + 17), outline=LINE_RGB)
    draw.text((x + bar + 8, top + 2), f"+{scale:.2g}", FAINT_RGB, font)
