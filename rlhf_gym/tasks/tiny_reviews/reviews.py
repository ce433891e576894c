"""The grammar of the tiny reviews: its words, its rules, and what is exactly known about each text.

The writer first takes a latent sentiment, + or -, each with probability 1/2. It chooses what the review's claims *mean*;
the words only report it, with noise: the main claim agrees with it in four reviews of five, a verdict in six of seven,
and a claim against it tends to be mild. Between words and meaning stand negation ("is not bad at all"), concession
("despite the flimsy lid", "although ..."), contrast ("..., but" turns the first claim round), reported speech ("they
call it perfect, but it is not") and disappointed hopes, so that counting happy words is not enough.

Symbols of the rules carry their features after dots: ``CLAIM.+.strong.built``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from .grammar import END, Grammar

if TYPE_CHECKING:
    import numpy as np

Rules = dict[str, dict[str, float]]

# A product and its parts; a part's kind chooses the words that can be said of it.
PRODUCTS: dict[str, dict[str, str]] = {
    "backpack": {"strap": "touch", "zip": "built", "pocket": "built", "lining": "touch"},
    "bike": {"saddle": "touch", "brake": "power", "frame": "built", "light": "light"},
    "blender": {"motor": "power", "lid": "built", "jug": "built", "switch": "power"},
    "camera": {"lens": "light", "screen": "light", "battery": "power", "strap": "touch"},
    "chair": {"seat": "touch", "frame": "built", "cushion": "touch", "hinge": "built"},
    "clock": {"alarm": "power", "display": "light", "case": "built", "battery": "power"},
    "drill": {"motor": "power", "grip": "touch", "battery": "power", "case": "built"},
    "jacket": {"hood": "touch", "zip": "built", "lining": "touch", "pocket": "built"},
    "kettle": {"lid": "built", "handle": "built", "heater": "power", "switch": "power"},
    "lamp": {"bulb": "power", "switch": "power", "base": "built", "light": "light"},
    "laptop": {"screen": "light", "battery": "power", "hinge": "built", "fan": "power"},
    "phone": {"screen": "light", "battery": "power", "camera": "light", "case": "built"},
    "radio": {"dial": "light", "battery": "power", "handle": "built", "speaker": "power"},
    "tent": {"zip": "built", "frame": "built", "fabric": "touch", "lining": "touch"},
    "toaster": {"lever": "built", "heater": "power", "tray": "built", "timer": "power"},
    "umbrella": {"handle": "built", "frame": "built", "fabric": "touch", "grip": "touch"},
}

# What is said of a part: adjectives by kind, and verb phrases that only a strong claim uses.
ADJECTIVES: dict[str, dict[str, list[str]]] = {
    "+": {
        "built": ["sturdy", "solid", "strong", "neat"],
        "power": ["reliable", "quick", "steady", "powerful"],
        "light": ["bright", "clear", "sharp", "neat"],
        "touch": ["soft", "comfortable", "warm", "smooth"],
    },
    "-": {
        "built": ["flimsy", "loose", "weak", "clumsy"],
        "power": ["unreliable", "slow", "faulty", "weak"],
        "light": ["dim", "blurry", "dull", "cheap"],
        "touch": ["rough", "stiff", "thin", "cheap"],
    },
}
PHRASES: dict[str, dict[str, list[str]]] = {
    "+": {
        "built": ["feels like new", "will last for years"],
        "power": ["works like a dream", "never lets me down"],
        "light": ["looks like new", "is a joy to look at"],
        "touch": ["feels like a dream", "is a joy to hold"],
    },
    "-": {
        "built": ["broke in a week", "will not last"],
        "power": ["died in a week", "never works"],
        "light": ["looks like a toy", "is hard to look at"],
        "touch": ["fell apart in a week", "feels like paper"],
    },
}
PRAISE = {
    "+": ["great", "excellent", "wonderful", "perfect", "lovely"],
    "-": ["terrible", "awful", "useless", "dreadful", "horrible"],
}

OTHER = {"+": "-", "-": "+"}


def build_rules(products: dict[str, dict[str, str]] = PRODUCTS) -> Rules:
    """The rules of the reviews of ``products``; the start symbol is REVIEW, and REVIEW.+ given the latent sentiment."""
    rules: Rules = {"REVIEW": {"REVIEW.+": 1, "REVIEW.-": 1}}
    for latent in OTHER:
        rules[f"REVIEW.{latent}"] = {f"OPENING.{p} BODY.{latent}.{p} CLOSING.{latent}": 1 for p in products}
        for product, parts in products.items():
            rules[f"BODY.{latent}.{product}"] = _bodies(parts, latent)
        rules |= _closing(latent)
    for product in products:
        rules[f"OPENING.{product}"] = {
            f"review of the {product} :": 5,
            f"i bought this {product} WHEN .": 2,
            f"my PERSON gave me this {product} WHEN .": 2,
            f"after a PERIOD with this {product} :": 1,
        }
    rules["WHEN"] = _equally("last week", "last month", "in the spring", "on sale", "by chance")
    rules["PERSON"] = _equally("sister", "brother", "mother", "father", "friend", "neighbour")
    rules["PERIOD"] = _equally("week", "month", "year")
    for polarity in OTHER:
        rules |= _claims(polarity)
    return rules


def _equally(*alternatives: str) -> dict[str, float]:
    return dict.fromkeys(alternatives, 1.0)


def _bodies(parts: dict[str, str], latent: str) -> dict[str, float]:
    """What a writer of this sentiment says of the product. ``m`` is what the body comes to, on the whole.

    How the body is built does not depend on the sentiment, so nothing is given away before the first claim.
    """
    bodies: dict[str, float] = {}
    for m, p in ((latent, 0.8), (OTHER[latent], 0.2)):
        n = OTHER[m]
        # A claim that agrees with the writer's sentiment is made with force more often than one that does not.
        says, yields = ("SAYS", "YIELDS") if m == latent else ("YIELDS", "SAYS")
        for a, kind in parts.items():
            bodies[f"the {a} {says}.{m}.{kind} ."] = 18 * p
            verdict = "and it is" if m == "+" else "but it is not"
            bodies[f"they call it PRAISE.+ , {verdict} . the {a} {says}.{m}.{kind} ."] = 6 * p
            verdict = "and it is" if m == "-" else "but it is not"
            bodies[f"they call it PRAISE.- , {verdict} . the {a} {says}.{m}.{kind} ."] = 2 * p
            hope = "love" if m == "-" else "hate"
            bodies[f"i wanted to {hope} it , but the {a} {says}.{m}.{kind} ."] = 8 * p
            # The weights above are per part, those below per ordered pair of parts: shared out over the partners.
            share = p / (len(parts) - 1)
            for b, other_kind in parts.items():
                if a == b:
                    continue
                first, second = f"{says}.{m}.{kind}", f"{says}.{m}.{other_kind}"
                bodies[f"the {a} {first} and the {b} {second} ."] = 26 * share
                bodies[f"the {a} {yields}.{n}.{kind} , but the {b} {second} ."] = 20 * share
                bodies[f"although the {a} {yields}.{n}.{kind} , the {b} {second} ."] = 10 * share
                bodies[f"despite the QUALITY.{n}.{kind} {a} , the {b} {second} ."] = 10 * share
    return bodies


def _claims(polarity: str) -> Rules:
    """Predicates that mean + or - whatever their words are."""
    opposite = OTHER[polarity]
    rules: Rules = {f"PRAISE.{polarity}": _equally(*PRAISE[polarity])}
    for kind, adjectives in ADJECTIVES[polarity].items():
        name = f"{polarity}.{kind}"
        quality, contrary = f"QUALITY.{name}", f"QUALITY.{opposite}.{kind}"
        rules[f"SAYS.{name}"] = {f"STRONG.{name}": 5, f"MILD.{name}": 4, "NEUTRAL": 1}
        rules[f"YIELDS.{name}"] = {f"STRONG.{name}": 1, f"MILD.{name}": 6, "NEUTRAL": 3}
        rules[quality] = _equally(*adjectives)
        rules[f"STRONG.{name}"] = {f"is DEGREE {quality}": 4, f"is PRAISE.{polarity}": 3, f"PHRASE.{name}": 3}
        rules[f"PHRASE.{name}"] = _equally(*PHRASES[polarity][kind])
        if polarity == "+":
            mild = {f"is {quality}": 4, f"is not {contrary}": 2, "is not bad at all": 2, "is better than i hoped": 1}
        else:
            mild = {f"is {quality}": 4, f"is not {contrary}": 2, "is a bit " + quality: 2, "is worse than i hoped": 1}
        mild["is fine" if polarity == "+" else "is not great"] = 1
        rules[f"MILD.{name}"] = {phrase: float(weight) for phrase, weight in mild.items()}
    rules["DEGREE"] = _equally("very", "really", "so")
    rules["NEUTRAL"] = _equally("is okay", "is fine", "does its job", "is not bad")
    return rules


def _closing(latent: str) -> Rules:
    """The end of a review: nothing, a number of stars, a verdict, or a remark that says nothing of the product."""
    stars: dict[str, float] = {
        "five stars .": 38,
        "four stars .": 30,
        "three stars .": 18,
        "two stars .": 9,
        "one star .": 5,
    }
    if latent == "-":
        stars = dict(zip(stars, reversed(stars.values()), strict=True))
    return {
        f"CLOSING.{latent}": {
            "": 5,
            f"STARS.{latent}": 4,
            f"VERDICT.{latent}": 6,
            f"VERDICT.{OTHER[latent]}": 1,
            "REMARK": 4,
        },
        f"STARS.{latent}": stars,
        f"VERDICT.{latent}": _equally(
            *(
                ["i would buy it again .", "i love it .", "you will not regret it .", "it is worth every penny ."]
                + ["i have no regrets .", "i could not be happier .", "my PERSON wants one too ."]
                if latent == "+"
                else ["i would not buy it again .", "i hate it .", "you will regret it .", "it is not worth a penny ."]
                + ["i want my money back .", "i could not be more sorry .", "i sent it back ."]
            )
        ),
        "REMARK": _equally(
            "it came in a COLOUR box .", "it arrived on DAY .", "i paid PRICE dollars for it .", "mine is COLOUR ."
        ),
        "COLOUR": _equally("red", "blue", "green", "black", "white"),
        "DAY": _equally("monday", "friday", "sunday"),
        "PRICE": _equally("ten", "twenty", "thirty", "fifty"),
    }


GRAMMAR = Grammar(build_rules(), "REVIEW")
"""The grammar of all reviews."""


def sample(rng: np.random.Generator) -> str:
    """Write one review."""
    return GRAMMAR.sample(rng)


def log_prob(text: str) -> float:
    """Natural log of the exact probability that the writer produces ``text``; -inf when it cannot."""
    positive, negative = _likelihoods(text)
    both = (positive + negative) / 2
    return math.log(both) if both > 0 else -math.inf


def grammatical(text: str) -> bool:
    """Whether ``text`` is a complete review that the grammar can produce."""
    return any(_likelihoods(text))


def sentiment(text: str) -> float:
    """Exact posterior probability that the writer of ``text`` is positive, by Bayes' rule; in [0, 1].

    0.0 when the text is no complete review of the grammar, so that nothing is gained by leaving the language.
    """
    positive, negative = _likelihoods(text)
    return positive / (positive + negative) if positive else 0.0


def prefix_sentiment(prefix: str) -> float:
    """Exact posterior probability that the writer is positive, given the first words of a review.

    It is also the mean sentiment of the reviews that begin with ``prefix``, so what a perfect language model scores.

    Raises:
        ValueError: If no review begins with ``prefix``.
    """
    positive, negative = (math.fsum(GRAMMAR.parses(prefix.split(), f"REVIEW.{z}").values()) for z in OTHER)
    if not positive + negative:
        raise ValueError(f"prefix must be the beginning of a review, got {prefix!r}")
    return positive / (positive + negative)


def next_token_probs(prefix: str = "") -> dict[str, float]:
    """Exact distribution of the token after ``prefix`` ("<eos>" among them); see ``Grammar.next_token_probs``."""
    return GRAMMAR.next_token_probs(prefix)


def true_perplexity(texts: Iterable[str]) -> float:
    """Perplexity per token of ``texts`` under the grammar itself, <eos> counted: no language model can do better."""
    return GRAMMAR.perplexity(texts)


@lru_cache(maxsize=1 << 16)
def _likelihoods(text: str) -> tuple[float, float]:
    """P(text | positive writer), P(text | negative writer). Cached: a policy under training repeats itself."""
    tokens = [*text.split(), END]
    positive, negative = (math.fsum(GRAMMAR.parses(tokens, f"REVIEW.{z}").values()) for z in OTHER)
    return positive, negative
