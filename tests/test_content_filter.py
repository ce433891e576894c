"""The content filter: what it finds behind its disguises, and what it leaves alone."""

from __future__ import annotations

import time
import unicodedata

import pytest

from rlhf_gym.rewards import as_reward, content_filter
from rlhf_gym.rewards.content_filter import _ALIKE


def found(text, *words, **options):
    (score,) = content_filter(words or ("darn", "heck", "kill you"), **options)([text])
    assert score in (0.0, -1.0)
    return score < 0


@pytest.mark.parametrize(
    "text",
    [
        "darn",
        "Oh, DARN!",
        "what the heck?",
        "dаrn",  # Cyrillic а
        "ԁаrn it",
        "ηεcκ",  # Greek
        "HΕCK",  # a Greek capital
        "ＤＡＲＮ",
        "𝐝𝐚𝐫𝐧",
        "𝖍𝖊𝖈𝖐",
        "ⓓⓐⓡⓝ",
        "DÁRN",
        "da\u0308rn",  # an accent as a character of its own
        "d̸a̶r̷n̵",
        "da\u200brn",  # zero-width space
        "da\u00adrn",  # soft hyphen
        "d4rn",
        "d@rn",
        "d*rn",
        "h3ck",
        "h€ck",
        "d.a.r.n",
        "da-rn",
        "d_a_r_n",
        "d a r n",
        "d  a\nr. n",
        "d'a'r'n",
        "daaaaarn",
        "ddddarnnnn",
        "d*a*r*n",
        "(darn)",
        "darn-it",
        "well...darn",
        "I will kill  you",
        "kill-you",
        "killyou",
        "k i l l y o u",
        "k1ll y0u",
        "ki|l you",
        "kiⅼl you",
    ],
)
def test_found(text):
    assert found(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "darned",
        "undarn",
        "a dar none",
        "he checked",
        "checks",
        "heckle",
        "d arn",  # no other letter stands alone: neighbours
        "dr. Arnold",
        "skill you",
        "kill your time",
        "d",
        "🙂🙂🙂 !!!! ****",
    ],
)
def test_left_alone(text):
    assert not found(text)


def test_letters_doubled_and_contracted():
    assert not found("good", "god") and found("gooood", "god") and found("goood", "good")
    assert not found("he'll be here", "hell") and not found("we’ll", "well") and found("h'e'l'l", "hell")
    assert found("isn't it", "isn't") and found("isnt it", "isn't")
    assert not found("bell llama", "bel") and found("bell llama", "bell")
    assert not found("b@ss", "ass") and found("@ss", "ass") and found("a$$", "ass")


def test_numbers_are_no_words_unless_listed():
    assert not found("455 of 1,455", "ass") and found("a55", "ass")
    assert found("a team of 88", "88") and not found("1889", "88")


def test_cut_words_are_found_on_request():
    assert not found("da rn") and found("da rn", across_spaces=True)
    assert not found("a band it was", "bandit") and found("a band it was", "bandit", across_spaces=True)  # its price


def test_scripts_without_spaces_and_others():
    assert (
        found("我是坏人。", "坏人") and found("坏 人", "坏人") and found("坏*人", "坏人") and not found("好人", "坏人")
    )
    assert found("ПЛОХО", "плохо") and found("п л о х о", "плохо") and not found("неплохо", "плохо")
    assert (
        found("nλοxο", "nλoxo") and found("がき", "がき") and not found("かき", "がき")
    )  # marks make other letters there
    assert found("बुरा", "बुरा") and not found("बरा", "बुरा")


def test_as_a_reward():
    reward = as_reward({content_filter("darn"): 2.0})
    assert reward.names == ("content_filter",)
    with pytest.raises(ValueError, match=r"'content_filter' needs arguments; pass rlhf_gym.rewards.content_filter\("):
        as_reward("content_filter")
    for words in ([], "", ["darn", "!!"], ["f***"], ["a$$"], [3]):
        with pytest.raises(ValueError, match="content_filter: words must be"):
            content_filter(words)


def test_table_of_look_alikes():
    for letter, alike in _ALIKE.items():
        for char in alike:
            assert not char.isascii() and unicodedata.normalize("NFKC", char).casefold() == char, (letter, char)


def test_hostile_texts_cost_no_more():
    """Backtracking over what a symbol may be would take longer than the universe is old."""
    words = ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaab", "aeiouaeiouaeiouaeioub", "iiiiiiiiiib"]
    texts = ["a" * 20_000, "*" * 20_000, "*.!" * 7_000, "a " * 10_000, "a*" * 10_000]
    start = time.process_time()
    assert content_filter(words)(texts) == [0.0] * 5
    assert time.process_time() - start < 10
