"""A list of words that must not occur, found also where look-alikes, spaces or punctuation hide them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from .text import UNSPACED, BatchReward

# Letters of other scripts, small capitals and strokes by the Latin letters that they look like. A letter may look like
# two; the first is what it stands for in a listed word.
_ALIKE = {
    "a": "аαɑᴀⱥ",
    "b": "вьβʙƀ",
    "c": "сᴄȼ",
    "d": "ԁᴅđ",
    "e": "еєεҽᴇɇ",
    "f": "ꜰƒ",
    "g": "ɡɢǥ",
    "h": "һհʜħ",
    "i": "іιıɪɨӏ",
    "j": "јϳᴊɉ",
    "k": "кκᴋ",
    "l": "ʟł",
    "m": "мμᴍ",
    "n": "пηɴո",
    "o": "оοօᴏø",
    "p": "рρᴘ",
    "q": "ԛ",
    "r": "гʀ",
    "s": "ѕꜱ",
    "t": "тτᴛŧ",
    "u": "υսᴜʉ",
    "v": "νѵᴠ",
    "w": "ԝωᴡшѡ",
    "x": "хχ",
    "y": "уүγʏ",
    "z": "ζᴢƶ",
}
_READINGS = {alike: letter for letter, group in _ALIKE.items() for alike in group} | {
    "н": "hn",
    "ν": "vn",
    "η": "nh",
    "υ": "uy",
    "у": "yu",
    "ӏ": "il",
    "0": "0o",
    "1": "1il",
    "3": "3e",
    "4": "4a",
    "5": "5s",
    "7": "7t",
    "8": "8b",
    "9": "9g",
    "@": "a",
    "$": "s",
    "€": "e",
    "!": "i",
    "|": "li",
    "*": "aeiou",
}
_APOSTROPHES = "'’‘`´ʼ"
MOST_SYMBOLS = 3  # between two letters: without a limit a long row of "*" costs its length squared
_JOINED, _MARKED, _SPACED = range(3)
_UNSPACED = re.compile(f"[{UNSPACED}]")


class _Unit(NamedTuple):
    """A letter, digit or symbol of a text.

    Attributes:
        readings: The letters that it may stand for.
        gap: What stands before it: nothing, punctuation, or white space.
        is_word: Whether it is a letter or digit.
        is_letter: Whether it is a letter, of whatever script.
        repeats: Said three times or more; such a run is one unit, and stands for one letter or for several alike.
    """

    readings: str
    gap: int
    is_word: bool
    is_letter: bool
    repeats: bool = False


class _Pattern(NamedTuple):
    """A listed word: its letters, and for each whether white space may stand before it."""

    letters: str
    may_space: tuple[bool, ...]


def content_filter(words: str | Sequence[str], *, across_spaces: bool = False) -> BatchReward:
    """-1 if a response contains a listed word or phrase, else 0, whatever hides it.

    Found are whole words in any case and style ("ＢＡＤ", "𝐛𝐚𝐝", "bád"), with look-alikes (Cyrillic, Greek and other letters;
    digits and symbols as in "b4d", "b@d", "b*d"), invisible characters, punctuation inside ("b.a.d"), letters said
    three times or more ("baaad"), and words spelled letter by letter ("b a d"). Not found are other forms (list them),
    misspellings, other alphabets by sound, "bad" inside "badge", and "BlD" for "BID" (l for a capital I).

    Args:
        words: What to look for. A phrase also matches where its words are run together.
        across_spaces: Find a word that white space cuts anywhere ("ba d"), too. That finds innocent neighbours as well:
            "bandit" in "band it".

    Raises:
        ValueError: If there are no words, one has no letters or digits, or one is written with symbols for letters.

    Source:
        Our own short table of look-alikes, in the spirit of Unicode TS 39, "confusables". After Unicode's compatibility
        normalisation (NFKC), which resolves full width, mathematical and circled letters.

    Example:
        >>> content_filter(["darn"])(["Darn!", "D\u0430rn", "d@rn", "d a r n", "darned"])  # \u0430 is Cyrillic
        [-1.0, -1.0, -1.0, -1.0, 0.0]
    """
    listed = [words] if isinstance(words, str) else list(words)
    if not listed or not all(isinstance(word, str) for word in listed):
        raise ValueError(f"content_filter: words must be one or more strings, got {words!r}")
    patterns: dict[str, list[_Pattern]] = {}
    for word in listed:
        units = _units(word, collapse=False)
        if not units or not all(unit.is_word for unit in units):
            raise ValueError(
                f"content_filter: words must be written in letters and digits, not in symbols, got {word!r}"
            )
        letters = "".join(unit.readings[0] for unit in units)
        pattern = _Pattern(letters, tuple(unit.gap == _SPACED or _is_unspaced(unit.readings[0]) for unit in units))
        patterns.setdefault(letters[0], []).append(pattern)

    def scores(completions: list[str]) -> list[float]:
        return [-1.0 if _contains(_units(text), patterns, across_spaces) else 0.0 for text in completions]

    scores.__name__ = scores.__qualname__ = "content_filter"
    return scores


def _units(text: str, *, collapse: bool = True) -> list[_Unit]:
    """What is left of a text once style, accents and invisible characters are gone."""
    units: list[_Unit] = []
    gap, run = _JOINED, 1
    for char in unicodedata.normalize("NFKC", text).casefold():
        if not char.isascii():
            char = _plain(char)
            if not char:
                continue
        is_word = char.isalnum() or not char.isascii() and unicodedata.category(char).startswith("M")
        if not is_word and char not in _READINGS:
            # The apostrophe is as good as a space: "he'll" is no profanity, "h'e'l'l" is.
            gap = max(gap, _SPACED if char.isspace() or char in _APOSTROPHES else _MARKED)
            continue
        unit = _Unit(_READINGS.get(char, char), gap, is_word, char.isalpha())
        gap = _JOINED
        same = bool(units) and units[-1].readings == unit.readings and unit.gap in (_JOINED, units[-1].gap)
        run = run + 1 if same else 1
        if collapse and run >= 3:
            # As long as the run is two units they stand for themselves: "good" is not "god".
            if run == 3:
                units.pop()
                units[-1] = units[-1]._replace(repeats=True)
            continue
        units.append(unit)
    return units


def _plain(char: str) -> str:
    """A character without its accent where the accent is an ornament; nothing for one that is invisible."""
    category = unicodedata.category(char)
    if category == "Cf" or category == "Mn" and unicodedata.name(char, "").startswith("COMBINING"):
        return ""
    base = unicodedata.normalize("NFD", char)[0]
    # In Latin, Greek and Cyrillic; in other scripts marks make other letters.
    return base if ord(base) < 0x530 else char


def _contains(units: list[_Unit], patterns: dict[str, list[_Pattern]], across_spaces: bool) -> bool:
    # A symbol may be a letter ("a$$") or punctuation ("b*a*d"): all of them the one, or all the other.
    symbols_as_letters = (True,) if all(unit.is_word for unit in units) else (True, False)
    for start, unit in enumerate(units):
        begins_word = start == 0 or unit.gap != _JOINED or not units[start - 1].is_word
        for letter in unit.readings:
            if letter not in patterns or not (begins_word or _is_unspaced(letter)):
                continue
            for pattern in patterns[letter]:
                if any(_matches(units, start, pattern, across_spaces, symbols) for symbols in symbols_as_letters):
                    return True
    return False


def _matches(units: list[_Unit], start: int, pattern: _Pattern, across_spaces: bool, symbols: bool) -> bool:
    """Whether a listed word begins at a unit. Goes forward only, so hostile texts cost no more than others.

    Args:
        units: The text.
        start: Where it would begin.
        pattern: The word.
        across_spaces: Whether white space may cut it anywhere.
        symbols: Whether symbols stand for letters where they can; otherwise only where no letter does.
    """
    at, done, skipped, letters = start, 0, 0, pattern.letters
    any_letter = any_cut = any_joint = False
    while done < len(letters):
        if at == len(units):
            return False
        unit = units[at]
        letter_follows = not symbols and not unit.is_word and at + 1 < len(units)
        if letters[done] not in unit.readings or letter_follows and letters[done] in units[at + 1].readings:
            if unit.is_word or done == 0 or skipped == MOST_SYMBOLS:
                return False
            at, skipped = at + 1, skipped + 1
            continue
        skipped = 0
        if done and not pattern.may_space[done]:
            any_cut |= unit.gap == _SPACED
            any_joint |= unit.gap == _JOINED
        any_letter |= unit.is_letter
        done, at = done + 1, at + 1
        while unit.repeats and done < len(letters) and letters[done] in unit.readings:
            done += 1
    ends_word = at == len(units) or units[at].gap != _JOINED or not units[at].is_word or _is_unspaced(letters[-1])
    # White space inside is fine when all letters are spelled; digits alone ("455") are a number, unless one was listed.
    return ends_word and (across_spaces or not (any_cut and any_joint)) and (any_letter or letters.isdecimal())


def _is_unspaced(letter: str) -> bool:
    return _UNSPACED.match(letter) is not None
