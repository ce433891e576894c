"""People as the reward: what they have said in a feedback store, and what they say when they are asked."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .reward import check_number
from .text import check_choice

if TYPE_CHECKING:
    from rlhf_gym.feedback import FeedbackStore, Item

Text = tuple[str, str]
"""A prompt and a response to it."""
POLL_S = 1.0


def human(
    store: str | Path | FeedbackStore = "feedback.sqlite",
    *,
    ask: str | None = "rate",
    timeout_s: float = 3600.0,
    unknown: str = "error",
    progress: bool = True,
) -> Callable[..., list[float | None]]:
    """What people think of each response, in [-1, 1], from a feedback store.

    The score of a response is the mean of all judgements of it that stand, by whoever made them: a rating r counts
    (r - 3) / 2; a comparison 1 when it won, -1 when it lost, 0 for a tie and -1 for "both bad"; a correction is a
    comparison that the response lost to its correction. One that anybody has flagged as unsafe has -1, whatever others
    say.

    Responses that nobody has judged are put into the store, where the labelling page (``rlhf-gym label --db FILE``)
    shows them, and the reward waits. An update of a policy waits with it: gather judgements, train a reward model and
    go on from that unless you have few responses and people at hand.

    Args:
        store: The store's file, or an open store. The file is made when people are to be asked.
        ask: "rate": each response by itself. "compare": each with another one of the batch to the same prompt, with two
            others where there are three or more; a batch must then hold several. None asks nobody.
        timeout_s: Seconds to wait for all answers of a batch. What came in time is in the store: the next attempt asks
            for the rest only.
        unknown: For a response without a judgement when the time is up, or when nobody is asked: "error" raises, "skip"
            leaves it without a score (the term counts 0).
        progress: Say on stderr how many answers are there.

    Raises:
        ValueError: If an argument is none of these, or the file is no feedback store.
        FileNotFoundError: If the folder does not exist, or with ``ask=None`` the file.
    """
    if ask is not None:
        check_choice("human: ask", ask, ("rate", "compare"))
    check_choice("human: unknown", unknown, ("error", "skip"))
    if check_number("human: timeout_s", timeout_s) < 0:
        raise ValueError(f"human: timeout_s must be >= 0, got {timeout_s}")
    if isinstance(store, (str, Path)) and ask is None and not Path(store).expanduser().is_file():
        raise FileNotFoundError(f"human: there is no feedback store {str(store)!r}, and with ask=None nobody is asked")
    from rlhf_gym.feedback import FeedbackStore

    opened = FeedbackStore(store) if isinstance(store, (str, Path)) else store

    def scores(prompts: list[str], completions: list[str]) -> list[float | None]:
        texts = list(zip(prompts, completions, strict=True))
        known = said_of(opened)
        if ask is not None:
            asked = _questions([text for text in dict.fromkeys(texts) if text not in known], texts, ask)
            known = _wait(opened, asked, timeout_s, progress) if asked else known
        missing = [row for row, text in enumerate(texts) if text not in known]
        if missing and unknown == "error":
            after = "" if ask is None else f" after {timeout_s:g} s"
            raise ValueError(
                f"row {missing[0]}: nobody has judged the response {completions[missing[0]][:60]!r} to "
                f"{prompts[missing[0]][:60]!r} in {opened.path}{after} "
                f"({len(missing)} of {len(texts)} are not judged); "
                'judge them with rlhf-gym label, or pass unknown="skip"'
            )
        return [known.get(text) for text in texts]

    scores.__name__ = scores.__qualname__ = "human"
    return scores


def said_of(store: FeedbackStore) -> dict[Text, float]:
    """The score of every response that somebody has judged, by the rule of :func:`human`."""
    from rlhf_gym.feedback import Comparison, Correction, Flag, Score

    judgements = [event.judgement for event in store.standing()]  # before the items, which are there before them
    items = {item.id: item for item in store.items()}
    said: dict[Text, list[float]] = defaultdict(list)
    unsafe: set[Text] = set()
    for judgement in judgements:
        item, verdict = items[judgement.item], judgement.verdict
        if isinstance(verdict, Score):
            said[item.prompt, item.responses[verdict.response]].append((verdict.rating - 3) / 2)
        elif isinstance(verdict, Comparison):
            for response in judgement.shown:
                won = 0.0 if verdict.choice == "tie" else 1.0 if verdict.choice == response else -1.0
                said[item.prompt, item.responses[response]].append(won)
        elif isinstance(verdict, Correction):
            said[item.prompt, item.responses[verdict.response]].append(-1.0)
            said[item.prompt, verdict.text].append(1.0)
        elif isinstance(verdict, Flag):
            unsafe.add((item.prompt, item.responses[verdict.response]))
    return {text: sum(values) / len(values) for text, values in said.items()} | dict.fromkeys(unsafe, -1.0)


def _questions(unknown: Sequence[Text], texts: Iterable[Text], ask: str) -> list[Item]:
    """What to put into the store, so that each unknown response is judged."""
    from rlhf_gym.feedback import Item

    if ask == "rate":
        return [Item(prompt, (response,)) for prompt, response in unknown]
    together: dict[str, list[str]] = defaultdict(list)
    for prompt, response in dict.fromkeys(texts):
        together[prompt].append(response)
    items = []
    for prompt, responses in together.items():
        new = [response for response in responses if (prompt, response) in unknown]
        if new and len(responses) == 1:
            raise ValueError(
                f'human: ask="compare" needs two different responses to each prompt in a batch, got one to '
                f"{prompt[:60]!r}; "
                'sample several for each prompt (RLOO, GRPO), or pass ask="rate"'
            )
        # In a circle, so that each is judged as often as the others.
        circle = zip(responses, responses[1:] + responses[:1], strict=True)
        pairs = dict.fromkeys(tuple(sorted(pair)) for pair in circle)
        items += [Item(prompt, pair) for pair in pairs if pair[0] in new or pair[1] in new]
    return items


def _wait(store: FeedbackStore, items: Sequence[Item], timeout_s: float, progress: bool) -> dict[Text, float]:
    """Ask, and wait for an answer to each item; returns what is known then."""
    from rlhf_gym.feedback import Comparison, Correction, Flag, Score

    there = {item.id for item in store.items()}  # from a file or a run, perhaps with where it is from
    store.add_items(item for item in items if item.id not in there)
    end, last = time.monotonic() + timeout_s, -1
    while True:
        # One who skips has not answered: somebody else may. And who flags one of two has said nothing of the other.
        judged: dict[str, set[int]] = {item.id: set() for item in items}
        for judgement in (event.judgement for event in store.standing() if event.judgement.item in judged):
            if isinstance(judgement.verdict, Comparison):
                judged[judgement.item].update(judgement.shown)
            elif isinstance(judgement.verdict, (Score, Correction, Flag)):
                judged[judgement.item].add(judgement.verdict.response)
        done, left = sum(len(judged[item.id]) == len(item.responses) for item in items), end - time.monotonic()
        if progress and done != last:
            how = f" (rlhf-gym label --db {store.path})" if last < 0 else ""
            print(
                f"waiting for people: {done} of {len(items)} answers in {store.path}{how}", file=sys.stderr, flush=True
            )
        last = done
        if done == len(items) or left <= 0:
            return said_of(store)
        time.sleep(min(POLL_S, left))
