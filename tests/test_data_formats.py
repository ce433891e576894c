"""The formats: which one a row has, what is wrong in it, and the one form that they all become."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import tokenizer

from rlhf_gym.data import (
    DataError,
    Demonstration,
    Labelled,
    Preference,
    PromptOnly,
    Rating,
    as_demonstrations,
    as_labelled,
    as_row,
    load_records,
    read_dataset,
)
from rlhf_gym.data.chat import extract_prompt

ASK = [{"role": "user", "content": "What color is the sky?"}]
BLUE = [{"role": "assistant", "content": "It is blue."}]
GREEN = [{"role": "assistant", "content": "It is green."}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = "<bos><user>What color is the sky?<eos><assistant>"


def with_template(template):
    """A tokenizer of its own: the one of worlds.py is shared."""
    words = copy.deepcopy(tokenizer())
    words.chat_template = template
    return words


@pytest.fixture(scope="module")
def chat():
    return with_template(TEMPLATE)


@pytest.mark.parametrize(
    ("row", "name", "record"),
    [
        # The examples of TRL's page on dataset formats.
        ({"text": "The sky is blue."}, "language modeling", Demonstration("", "The sky is blue.")),
        ({"prompt": "The sky is"}, "prompt-only", PromptOnly("The sky is")),
        ({"prompt": "The sky is", "completion": " blue."}, "prompt-completion", Demonstration("The sky is", " blue.")),
        (
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
            "preference",
            Preference("The sky is", " blue.", " green."),
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            "preference with implicit prompt",
            Preference("The sky is", " blue.", " green."),
        ),
        (
            {"prompt": "The sky is", "completion": " blue.", "label": True},
            "unpaired preference",
            Labelled("The sky is", " blue.", True),
        ),
        # Ours.
        ({"prompt": "a", "completion": "b", "label": 2}, "classification", Labelled("a", "b", 2)),
        ({"prompt": "a", "completion": "b", "label": "joy"}, "classification", Labelled("a", "b", "joy")),
        ({"text": "b", "label": 0}, "classification", Labelled("", "b", 0)),
        ({"prompt": "a", "completion": "b", "rating": 4}, "rating", Rating("a", "b", 4.0)),
        ({"text": "b", "rating": -0.5, "criterion": "tone"}, "rating", Rating("", "b", -0.5, "tone")),
        # Further columns.
        ({"prompt": "a", "label": 1, "text": "x", "rating": "n/a"}, "prompt-only", PromptOnly("a")),
        (
            {
                "prompt": "a",
                "chosen": "b",
                "rejected": "c",
                "margin": 2,
                "tie": None,
                "annotator": 7,
                "id": 3,
                "score": 1,
            },
            "preference",
            Preference("a", "b", "c", margin=2.0, annotator="7", id="3"),
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "tie": True, "position": "left"},
            "preference",
            Preference("a", "b", "c", tie=True, position="left"),
        ),
        ({"prompt": "", "completion": ""}, "prompt-completion", Demonstration("", "")),
    ],
)
def test_standard_rows(row, name, record):
    data = read_dataset([row])
    assert (data.format.name, data.format.conversational, data.problems.total) == (name, False, 0)
    assert data.records == [record] and load_records([row], type(record)) == [record]
    # label: True == 1, so the types are compared as well
    assert repr(data.records) == repr([record])


@pytest.mark.parametrize(
    ("row", "name", "record"),
    [
        ({"messages": ASK + BLUE}, "language modeling", Demonstration("", ASKED + "It is blue.<eos>")),
        ({"prompt": ASK}, "prompt-only", PromptOnly(ASKED)),
        ({"prompt": ASK, "completion": BLUE}, "prompt-completion", Demonstration(ASKED, "It is blue.<eos>")),
        (
            {"prompt": ASK, "chosen": BLUE, "rejected": GREEN},
            "preference",
            Preference(ASKED, "It is blue.<eos>", "It is green.<eos>"),
        ),
        (
            {"chosen": ASK + BLUE, "rejected": ASK + GREEN},
            "preference with implicit prompt",
            Preference(ASKED, "It is blue.<eos>", "It is green.<eos>"),
        ),
        # A prompt in plain text beside whole conversations is not used.
        (
            {"prompt": "What color is the sky?", "chosen": ASK + BLUE, "rejected": ASK + GREEN},
            "preference with implicit prompt",
            Preference(ASKED, "It is blue.<eos>", "It is green.<eos>"),
        ),
        (
            {"prompt": ASK, "completion": GREEN, "label": False},
            "unpaired preference",
            Labelled(ASKED, "It is green.<eos>", False),
        ),
        # The assistant's message goes on.
        (
            {"prompt": [*ASK, {"role": "assistant", "content": "It is"}]},
            "prompt-only",
            PromptOnly("<bos><user>What color is the sky?<eos><assistant>It is"),
        ),
    ],
)
def test_conversations(chat, row, name, record):
    data = read_dataset([row], chat)
    assert (data.format.name, data.format.conversational, data.problems.total) == (name, True, 0)
    assert data.records == [record]


def test_conversations_without_a_template(chat):
    row = {"prompt": ASK, "completion": BLUE}
    plain = Demonstration("user: What color is the sky?", "assistant: It is blue.")
    assert read_dataset([row]).records == [plain]  # enough to count and compare
    with pytest.raises(ValueError, match="holds conversations: give a tokenizer with a chat template"):
        load_records([row])
    with pytest.raises(ValueError, match="tokenizer must have a chat template"):
        load_records([row], tokenizer=tokenizer())
    chat_less = read_dataset([{"prompt": "a", "completion": "b"}], tokenizer())
    assert chat_less.records == [Demonstration("a", "b")]


def test_a_template_that_writes_the_prompt_otherwise_when_it_stands_alone():
    """As of models that think: the generation prompt holds what the conversation does not."""
    words = with_template(TEMPLATE.replace("<assistant>{% endif", "<assistant><think>{% endif"))
    (record,) = load_records([{"prompt": ASK, "completion": BLUE}], tokenizer=words)
    assert record == Demonstration(ASKED, "It is blue.<eos>")


def test_a_template_that_refuses():
    words = with_template("{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}ok")
    data = read_dataset([{"messages": ASK}, {"messages": ASK + BLUE}], words)
    assert [r.completion for r in data.records] == ["ok"]
    assert [(p.line, "one message only" in p.message) for p in data.problems.listed()] == [(2, True)]


def test_tools_and_settings_reach_the_template():
    words = with_template("{{ tools[0].name }} {{ style }}")
    tools = [{"name": "lamp"}]
    for given_tools in (tools, json.dumps(tools)):
        row = {"messages": ASK, "tools": given_tools, "chat_template_kwargs": {"style": "short"}}
        assert load_records([row], tokenizer=words) == [Demonstration("", "lamp short")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("abx", "aby", ("ab", "x", "y")),  # inside of a word, as TRL does
        ("abc", "abcd", ("ab", "c", "cd")),  # one begins with the other: its last character stays
        ("same", "same", ("sam", "e", "e")),
        ("x ", "y", ("", "x ", "y")),  # TRL takes "x" for the prompt
        (ASK + BLUE, ASK + GREEN, (ASK, BLUE, GREEN)),
    ],
)
def test_implicit_prompts(chosen, rejected, expected):
    assert extract_prompt(chosen, rejected) == expected


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("row", "marked", "says"),
    [
        ('{"question": "a", "answer": "b"}', '{"question', "no format: 'question', 'answer'"),
        ('{"prompt": "a", "chosen": "b"}', '{"prompt', "chosen needs rejected"),
        ('{"completion": "b"}', '{"comp', "completion needs prompt"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}',
            '{"prompt',
            "completion together are no",
        ),
        ('{"prompt": "a", "messages": []}', '{"prompt', "messages and prompt together are no format"),
        ('{"prompt": "a", "completion": "b", "label": true, "rating": 1}', '{"prompt', "label and rating together"),
        ('{"prompt": "a", "completions": ["b"], "labels": [true]}', '{"prompt', "stepwise supervision"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', "3,", "'chosen' must be a text or a list of messages, got 3"),
        ('{"prompt": null, "chosen": "b", "rejected": "c"}', "null", "got null"),
        ('{"prompt": "a", "chosen": [], "rejected": "c"}', "[]", "got []"),
        ('{"text": ["a"]}', '["a"]', "'text' must be a text"),
        ('{"messages": "a"}', '"a"', "'messages' must be a list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}, "b"]}', '"b"', "a message must be an object"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "1,", 'the "role" of a message'),
        ('{"messages": [{"role": "user"}]}', '{"role', 'the "content" of a message must be a text'),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', '[{"type', "in parts (images)"),
        ('{"prompt": [{"role": "system", "content": "a"}]}', '"system"', "must end with a message of user, tool or"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}',
            '"b"',
            "'chosen' is a text while prompt is a list of messages",
        ),
        (
            '{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}',
            '"a"',
            "'prompt' is a text while completion is a list",
        ),
        (
            '{"prompt": "q", "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}',
            '[{"role',
            "no prompt in common; write the prompt as a list of messages",
        ),
        ('{"chosen": "", "rejected": "c"}', '""', "must not be empty"),
        ('{"prompt": "a", "completion": "b", "label": 0.5}', "0.5", "'label' must be true or false"),
        ('{"prompt": "a", "completion": "b", "label": null}', "null", "got null"),
        ('{"prompt": "a", "completion": "b", "rating": "4"}', '"4"', "'rating' must be a number, got \"4\""),
        ('{"prompt": "a", "completion": "b", "rating": true}', "true", "must be a number, got true"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": true}', "true", "'margin' must be a number"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "tie": 1}', "1}", "'tie' must be true or false"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "position": "up"}', '"up"', "'position' must be \"left\" or"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c", "annotator": 0.5}',
            "0.5",
            "'annotator' must be a text or an",
        ),
    ],
)
def test_what_is_wrong_in_a_row(tmp_path, row, marked, says):
    """The column is where the marked text stands."""
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    data = read_dataset(path)
    (problem,) = data.problems.listed()
    assert not data.records and says in problem.message
    assert (problem.line, problem.column) == (1, row.index(marked) + 1)
    with pytest.raises(DataError, match=f"line 1, column {problem.column}"):
        load_records(path)


def test_all_that_is_wrong_in_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": 1, "chosen": 2, "rejected": "c", "tie": 3}\n')
    assert [(p.column, p.message[:9]) for p in read_dataset(path).problems.listed()] == [
        (12, "'prompt' "),
        (25, "'chosen' "),
        (52, "'tie' mus"),
    ]


def test_one_format_in_a_file():
    """That of most rows, and of the first where two are as frequent."""
    data = read_dataset([{"prompt": "a"}, GOOD, GOOD])
    assert data.format.name == "preference" and [row.line for row in data.rows] == [2, 3]
    (problem,) = data.problems.listed()
    assert problem.line == 1 and "is prompt-only (standard), but most are preference (standard)" in problem.message
    assert read_dataset([{"prompt": "a"}, GOOD]).format.name == "prompt-only"
    assert read_dataset([{"prompt": "a"}, {"prompt": ASK}, {"prompt": ASK}]).problems.listed()[0].line == 1
    assert read_dataset([{"x": 1}]).format is None


def test_another_kind_is_refused():
    assert load_records([GOOD], Preference, Rating) == [Preference("a", "b", "c")]
    with pytest.raises(DataError, match="is preference .standard.; here the format must be .* 'rating'"):
        load_records([GOOD], Labelled, Rating)


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ({"prompt": "a"}, TypeError, "data must be a JSONL file or rows"),
        (7, TypeError, "got int"),
        ([], DataError, "there are no rows"),
        ([{"prompt": "a"}, "b"], DataError, "line 2, column 1: a row must be a dict, got str"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], DataError, "the id '1' is that of line 1"),
    ],
)
def test_rows_in_memory(rows, error, says):
    with pytest.raises(error, match=says):
        load_records(rows)


WORDS = st.text(max_size=8)
WHO = {"annotator": st.none() | WORDS, "id": st.none() | WORDS}
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
RECORDS = st.one_of(
    st.builds(PromptOnly, WORDS, WHO["id"]),
    st.builds(Demonstration, WORDS, WORDS, **WHO),
    st.builds(
        Preference,
        WORDS,
        WORDS,
        WORDS,
        st.none() | NUMBER,
        st.booleans(),
        st.sampled_from([None, "left", "right"]),
        **WHO,
    ),
    st.builds(Labelled, WORDS, WORDS, st.booleans() | st.integers() | WORDS, **WHO),
    st.builds(Rating, WORDS, WORDS, NUMBER, st.none() | WORDS, **WHO),
)


@settings(max_examples=200, deadline=None)
@given(RECORDS)
def test_a_record_comes_back_from_its_row(record):
    assert repr(load_records([as_row(record)])) == repr([record])


def test_demonstrations_and_labels():
    tie, pair = Preference("p", "a", "b", tie=True), Preference("p", "a", "b", annotator="ann", id="1")
    assert as_demonstrations(
        [pair, tie, Labelled("p", "x", True), Labelled("p", "y", False), Demonstration("q", "z")]
    ) == [
        Demonstration("p", "a", "ann", "1"),
        Demonstration("p", "x"),
        Demonstration("q", "z"),
    ]
    assert as_labelled([pair, tie]) == [Labelled("p", "a", True, "ann"), Labelled("p", "b", False, "ann")]
    for record in (PromptOnly("p"), Rating("p", "x", 1.0), Labelled("p", "x", 1)):
        with pytest.raises(TypeError, match="must be demonstrations, preferences or good/bad labels"):
            as_demonstrations([record])


def test_the_rows_of_the_documentation():
    """Each row that docs/data.md shows has the format and the record that it says."""
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z -]+?)(?: \(not TRL's\))? \| `(\{.*\})` \| `(\w+)`", page, re.MULTILINE)
    assert len(rows) == 9
    for name, text, kind in rows:
        data = read_dataset([json.loads(text)])
        assert (data.format.name, type(data.records[0]).__name__) == (name, kind)
    block = page.split("```json\n")[1].split("```")[0]
    data = read_dataset([json.loads(line) for line in block.splitlines()])
    assert str(data.format) == "preference (conversational)" and len(data.records) == 2
