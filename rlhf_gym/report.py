"""What a run says to people: the model card (Markdown) and one self-contained page (HTML)."""

from __future__ import annotations

import base64
import html
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from rlhf_gym.evaluation import Evaluation
from rlhf_gym.plots import as_svg
from rlhf_gym.runs import machine

TEXT_LABELS = {
    "share_without_eos": "share without EOS",
    "perplexity": "perplexity under another model",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "self_bleu": "self-BLEU",
    "repeated_bigrams": "repeated bigrams",
}


def note(evaluations: Mapping[str, Evaluation]) -> str:
    """What the numbers of their `table` are, in one line."""
    over = next(iter(evaluations.values())).intervals_over
    if over is None:
        return "means, without intervals: there is nothing but one response to one prompt"
    draws = "prompts" if over == "prompts" else "responses to the one prompt"
    return f"means ± half of their 95 % intervals over {draws}; [low, high] where an interval is not symmetric"


def table(evaluations: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Evaluations side by side.

    Args:
        evaluations: By the label of their column. The others are compared with the first, response by response, where
            they answer the same prompts.

    Returns:
        The header, and one row for each number; all are texts.
    """
    columns = list(evaluations.values())
    rows = [["score", *(str(e.score) for e in columns)]]
    for name in columns[0].terms:
        if len(columns[0].terms) > 1:
            rows.append([f"score/{name}", *(_number(e, e.terms.get(name)) for e in columns)])
    for name in columns[0].others:
        rows.append([name, *(_number(e, e.others.get(name)) for e in columns)])
    if any(e.kl is not None for e in columns):
        rows.append(["KL to the reference, nats", *(_number(e, e.kl) for e in columns)])
        errors = [None if e.kl is None else e.estimate(e.kl).standard_error for e in columns]
        rows.append(["standard error of the KL", *("" if error is None else f"{error:.3f}" for error in errors)])
    rows.append(["response length, tokens", *(_length(e) for e in columns)])
    rows.append(["ended by EOS", *(f"{e.ended_by_eos.mean():.0%}" for e in columns)])
    for name, label in TEXT_LABELS.items():
        if any(name in e.texts for e in columns):
            rows.append([label, *(str(e.texts.get(name, "")) for e in columns)])
    first, *rest = columns
    if rest and all(first.samples and e.is_paired_with(first) for e in rest):
        compared = [e.against(first) for e in rest]
        for name in compared[0]:
            rows.append([f"{name} against {next(iter(evaluations))}", "", *(str(c[name]) for c in compared)])
    return ["", *evaluations], rows


def _length(evaluation: Evaluation) -> str:
    found = evaluation.estimate(evaluation.lengths.astype(float))
    return f"{found.mean:.1f}" if found.high is None else f"{found.mean:.1f} ± {found.high - found.mean:.1f}"


def _number(evaluation: Evaluation, values: Any) -> str:
    return "" if values is None else str(evaluation.estimate(values))


def model_card(*, options: Mapping[str, Any], base_model: str, before: Evaluation, after: Evaluation) -> str:
    """The README of a run: how the model was made, how good it is, what it must not be used for."""
    evaluations = {"before": before, "after": after}
    header, rows = table(evaluations)
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    rewards = ", ".join(f"`{reward}`" for reward in options["reward"])
    prompts = options["eval_prompts"] or f"{options['prompts']} (the training prompts)"
    settings = "\n".join(f"- {name}: `{value}`" for name, value in options.items() if value not in (None, (), []))
    versions = ", ".join(f"{name} {version}" for name, version in machine()["packages"].items() if version)
    return _TEMPLATE_CARD.substitute(
        base_model=base_model,
        agent=options["agent"],
        rewards=rewards,
        table="\n".join(lines),
        num_episodes=len(after.scores),
        note=note(evaluations),
        prompts=prompts,
        settings=settings,
        versions=versions,
        how_to_try=_TRY_AGENT.get(options["agent"], _TRY),
    )


_TRY = "`rlhf-gym generate --model .` tries it."
# Of agents that are more than the model which is saved.
_TRY_AGENT = {
    "best-of-n": "The model alone is what it was made from: the agent\nkeeps the best of several of its responses under a reward. "
    "`rlhf-gym evaluate --model .` measures it.",
    "nlpo": "The model alone is without the\nmask that the agent chooses under; `rlhf-gym generate --model .` has both.",
    "maskable-ppo": "The model alone is without the\n`top_k` that the agent may have; `rlhf-gym generate --model .` has both.",
}
_TEMPLATE_CARD = Template("""\
# $base_model, trained by $agent on $rewards

`$base_model` after reinforcement learning with `rlhf-gym train`. The model is in `model/` and loads with
`AutoModelForCausalLM.from_pretrained("model")`. $how_to_try

## Evaluation

$num_episodes responses, sampled, to the prompts of `$prompts`; $note.

$table

Samples: `samples_before.jsonl`, `samples_after.jsonl`. Curves: `plots/curves.png`, `metrics.csv`, `tensorboard/`.

## Limits

The model was made to score well on this reward, and a reward is never all that one wants: read the samples before using it.
It keeps the weaknesses of `$base_model`, and its licence applies.

## Settings

$settings

Made with $versions.
""")


@dataclass(frozen=True)
class Section:
    """One part of a page: a heading, paragraphs of plain text, then a figure or table or both."""

    title: str
    text: str = ""
    figure: Any = None
    """A matplotlib figure."""
    caption: str = ""
    """Says what the figure shows; also what a screen reader reads."""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numbers: bool = False
    """The cells of the table are numbers: none is broken, a wide table scrolls."""


# Of a figure's own width. Below it the letters are too small: the figure scrolls in its box.
_SMALLEST = 0.7
_PIXELS_PER_INCH = 96


def html_report(title: str, summary: str, sections: Sequence[Section], footer: str = "") -> str:
    """A page that needs no other file and no network; every text in it is escaped.

    Args:
        title: Title of the page.
        summary: The finding in a sentence or two.
        sections: The parts, in order.
        footer: How the page was made.
    """
    text = importlib.resources.files("rlhf_gym").joinpath("templates/report.html").read_text(encoding="utf-8")
    return Template(text).substitute(
        title=html.escape(title),
        summary=_inline(summary),
        sections="\n".join(_section(section) for section in sections),
        footer=_inline(footer),
    )


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{_inline(paragraph)}</p>" for paragraph in section.text.split("\n\n") if paragraph]
    if section.figure is not None:
        # As an image: the identifiers inside one SVG then cannot clash with those of the next.
        data = base64.b64encode(as_svg(section.figure)).decode()
        caption = html.escape(section.caption)
        width = _SMALLEST * _PIXELS_PER_INCH * section.figure.get_size_inches()[0]
        image = f'<img alt="{caption}" style="min-width: {width:.0f}px" src="data:image/svg+xml;base64,{data}">'
        box = f'<div class="scroll" tabindex="0">{image}</div>'
        parts.append(f"<figure>{box}<figcaption>{caption}</figcaption></figure>")
    if section.rows:
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in section.header)
        body = "\n".join(_row(row) for row in section.rows)
        kind = ' class="numbers"' if section.numbers else ""
        table = f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
        parts.append(f'<div class="scroll" tabindex="0">{table}</div>')
    return "\n".join([*parts, "</section>"])


def _row(row: Sequence[str]) -> str:
    first, *rest = (_mark_control(html.escape(cell)) for cell in row)
    return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"


def _mark_control(escaped: str) -> str:
    """Control characters of a response as visible marks; line breaks stay (the cells keep white space)."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", escaped)


def _inline(text: str) -> str:
    """Escaped text in which `code` is set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
