"""Text of strangers on a page: it is shown, and nothing in it is obeyed."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from markupsafe import Markup, escape

_UNUSUAL = re.compile(r"[^\n\t\x20-\x7e]")
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def is_obeyed(character: str) -> bool:
    """Whether a character is an order to whoever draws the text: control, bidirectional, invisible.

    The zero-width (non-)joiners are not: Persian, Hindi and emoji are wrong without them.
    """
    return unicodedata.category(character) in _OBEYED and character not in "\n\t\u200c\u200d"


@lru_cache(maxsize=512)
def inert(text: str) -> Markup:
    """HTML that shows a text: markup is escaped, and each character that would be obeyed is a mark with its number.

    Example:
        >>> print(inert("<b>\\u202e"))
        &lt;b&gt;<abbr class="mark" title="RIGHT-TO-LEFT OVERRIDE">U+202E</abbr>
    """
    parts, start = [], 0
    for match in _UNUSUAL.finditer(text):
        if is_obeyed(match[0]):
            parts += [escape(text[start : match.start()]), _mark(match[0])]
            start = match.end()
    return Markup("").join([*parts, escape(text[start:])])


def editable(text: str) -> str:
    """What of a text can be edited in a form: without the characters that would be obeyed, each line ended by a line feed."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _UNUSUAL.sub(lambda match: "" if is_obeyed(match[0]) else match[0], text)


def _mark(character: str) -> Markup:
    code = f"U+{ord(character):04X}"
    name = unicodedata.name(character, "control character")
    return Markup('<abbr class="mark" title="{}">{}</abbr>').format(name, code)
