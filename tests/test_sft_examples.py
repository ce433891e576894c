"""From records to tokens: what is read, what is learnt, and what is held out. The ids are those of worlds.VOCABULARY."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from worlds import VOCABULARY, model, tokenizer

from rlhf_gym.data import Demonstration, Labelled, Preference
from rlhf_gym.envs.prompts import PromptEncoder
from rlhf_gym.lm import load_language_model
from rlhf_gym.lm.scratch import new_model, train_tokenizer
from rlhf_gym.sft import Texts, hold_out, make_examples, read_texts

BOS, EOS = VOCABULARY["<bos>"], VOCABULARY["<eos>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %} assistant {% endif %}"
)


def ids(text):
    return tuple(VOCABULARY[word] for word in text.split())


@pytest.fixture(scope="module")
def lm():
    return load_language_model(model(), tokenizer())


def examples(lm, data, *, max_tokens=31, **options):
    return make_examples(read_texts(data, lm.tokenizer), lm, max_tokens=max_tokens, **options)


@pytest.mark.parametrize(
    ("row", "expected", "num_context"),
    [
        ({"prompt": "the cat", "completion": " sat"}, (*ids("the cat sat"), EOS), 2),
        ({"prompt": "the cat", "completion": ""}, (*ids("the cat"), EOS), 2),  # to say nothing is a response
        ({"prompt": "the cat", "completion": " sat <eos>"}, (*ids("the cat sat"), EOS), 2),  # once is enough
        ({"text": "the cat sat"}, (BOS, *ids("the cat sat"), EOS), 1),  # the empty prompt is BOS, as in the environment
        ({"prompt": "the", "chosen": " cat", "rejected": " dog"}, (*ids("the cat"), EOS), 1),
        ({"chosen": "the cat", "rejected": "the dog"}, (*ids("the cat"), EOS), 1),
        ({"prompt": "a", "completion": " dog", "label": True}, (*ids("a dog"), EOS), 1),
    ],
)
def test_what_is_read_and_what_is_learnt(lm, row, expected, num_context):
    (found,), num_cut = examples(lm, [row])
    assert (found.ids, found.num_context, num_cut) == (expected, num_context, 0)
    assert found.num_tokens == len(expected) - num_context
    texts = row.get("completion", row.get("text", row.get("chosen")))
    assert found.num_bytes == len(texts.removeprefix("the" if "rejected" in row and "prompt" not in row else ""))


def test_a_conversation_is_learnt_from_the_turn_of_the_model_on(lm):
    words = copy.deepcopy(tokenizer())
    words.chat_template = TEMPLATE
    words.add_tokens(["user", "assistant"])
    wide = load_language_model(new_model("lstm", words, hidden_size=4), words)
    row = {"prompt": [{"role": "user", "content": "the cat"}], "completion": [{"role": "assistant", "content": "sat"}]}
    (found,), _ = examples(wide, [row])
    user, assistant = words.convert_tokens_to_ids(["user", "assistant"])
    # One BOS, the template's own, and the template's EOS at the end and no other.
    assert found.ids == (BOS, user, *ids("the cat"), EOS, assistant, *ids("sat"), EOS) and found.num_context == 6
    (whole,), _ = examples(wide, [{"messages": row["prompt"] + row["completion"]}])
    assert whole.ids == found.ids and whole.num_context == 1


def test_records_files_and_texts_are_the_same(lm, tmp_path):
    records = [
        Preference("the", " cat", " dog"),
        Preference("a", " cat", " dog", tie=True),
        Labelled("a", " cat", False),
    ]
    expected, _ = examples(lm, [{"prompt": "the", "completion": " cat"}])
    assert examples(lm, records)[0] == expected == examples(lm, [Demonstration("the", " cat")])[0]
    (tmp_path / "x.txt").write_bytes("\ufeffthe cat\r\nsat".encode())
    assert examples(lm, tmp_path / "x.txt")[0][0].ids == (BOS, *ids("the cat sat"), EOS)


def test_a_prompt_is_asked_as_the_environment_asks_it():
    """Byte-level BPE merges across the seam: "su" + "nny" is not "sunny"."""
    words = train_tokenizer(["sunny sunny sun sun su su"] * 9, 300)
    lm = load_language_model(new_model("lstm", words, hidden_size=4), words)
    assert len(words("sunny", add_special_tokens=False)["input_ids"]) == 1
    (found,), _ = examples(lm, [{"prompt": "su", "completion": "nny sun"}])
    encoder = PromptEncoder(words, lm.vocab_size, lm.eos_token_ids, lm.bos_token_id, None)
    assert list(found.ids[: found.num_context]) == encoder.encode({"prompt": "su"}, None, "").ids.tolist()
    assert words.decode(found.ids[found.num_context : -1]) == "nny sun" and found.ids[-1] == words.eos_token_id


def test_a_prompt_never_begins_with_two_bos(lm):
    """The tokenizer puts one before each text, a chat template writes one into it."""
    words = copy.deepcopy(lm.tokenizer)
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    encoder = PromptEncoder(words, lm.vocab_size, lm.eos_token_ids, lm.bos_token_id, None)

    def asked(text: str) -> list[int]:
        return encoder.encode({"prompt": text}, None, "").ids.tolist()

    assert words("<bos> the cat")["input_ids"][:2] == [BOS, BOS]  # or there is nothing to test
    assert asked("the cat") == asked("<bos> the cat") == [BOS, *ids("the cat")]
    assert asked("") == asked("<bos>") == [BOS]
    assert asked("<bos> <bos> the cat") == [BOS, BOS, *ids("the cat")]  # whoever writes two means two


def test_a_long_text_becomes_pieces_that_learn_every_token_once(lm):
    text = " ".join(["the cat sat and a dog ran"] * 5)
    whole = (BOS, *ids(text), EOS)
    found, num_cut = examples(lm, [{"text": text}], max_tokens=8)
    assert num_cut == 0 and all(len(example.ids) - 1 <= 8 and example.num_context == 1 for example in found)
    assert sum((example.ids[1:] for example in found), ()) == whole[1:]
    assert [example.ids[0] for example in found[1:]] == [example.ids[-1] for example in found[:-1]]
    assert sum(example.num_bytes for example in found) == pytest.approx(len(text))


def test_a_long_response_is_refused_or_cut(lm):
    rows = [{"prompt": "the cat", "completion": " sat and ran"}, {"prompt": "a very good cat", "completion": " ran"}]
    with pytest.raises(
        ValueError, match='example 1 has 6 tokens with its prompt, more than max_tokens=3.*truncate="right"'
    ):
        examples(lm, rows, max_tokens=3)
    found, num_cut = examples(lm, rows, max_tokens=3, truncate="right")
    assert num_cut == 2  # of the second nothing is left to learn
    assert [(example.ids, example.num_context) for example in found] == [(ids("the cat sat and"), 2)]
    assert found[0].num_bytes == pytest.approx(12 * 2 / 4)
    with pytest.raises(ValueError, match="nothing is left to learn within max_tokens=3"):
        examples(lm, rows[1:], max_tokens=3, truncate="right")
    with pytest.raises(ValueError, match='truncate must be None or "right"'):
        examples(lm, rows, truncate="left")


def test_held_out_prompts_are_not_learnt():
    records = [Demonstration(prompt, answer) for prompt in ("The cat?", "the  cat", "a", "b", "c") for answer in "xy"]
    kept, held = hold_out(Texts(records), 0.25, seed=0)
    assert len(kept.records) + len(held.records) == 10 and sorted(map(repr, kept.records + held.records)) == sorted(
        map(repr, records)
    )
    names = [{"".join(r.prompt.lower().split()).rstrip("?") for r in part.records} for part in (kept, held)]
    assert len(names[1]) == 1 and not names[0] & names[1]  # a quarter of 4 different prompts
    assert hold_out(Texts(records), 0.25, seed=0)[1] == held
    assert len({hold_out(Texts(records), 0.25, seed=s)[1].records[0].prompt.lower()[:1] for s in range(12)}) > 1


def test_of_a_single_text_the_end_is_held_out():
    kept, held = hold_out(Texts([Demonstration("", "0123456789")]), 0.2, seed=3)
    assert [kept.records[0].completion, held.records[0].completion] == ["01234567", "89"]
    with pytest.raises(ValueError, match="all data have one prompt"):
        hold_out(Texts([Demonstration("a", "b"), Demonstration("a", "c")]), 0.5, seed=0)
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match="eval_share must be in"):
            hold_out(Texts([Demonstration("", "abc")]), share, seed=0)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([{"prompt": "a"}], "prompt-only.*does not say what to write"),
        ([{"prompt": "a", "completion": "b", "rating": 2}], "rating"),
        ([{"prompt": "a", "completion": "b", "label": 2}], "classification"),
        ([{"prompt": "a", "completion": "b", "label": False}], "no response to learn from"),
        ([{"prompt": "a"}, {"completion": "b"}], "completion needs prompt"),
        ([], "no rows"),
    ],
)
def test_what_cannot_be_learnt_is_refused(data, says):
    with pytest.raises(ValueError, match=says):
        read_texts(data, tokenizer())


def test_bad_text_files_are_refused(tmp_path):
    for content, says in ((b"\xff\xfe\x00", "is not UTF-8"), (b" \n", "is empty")):
        (tmp_path / "x.txt").write_bytes(content)
        with pytest.raises(ValueError, match=says):
            read_texts(tmp_path / "x.txt", tokenizer())
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        words = copy.deepcopy(tokenizer())
        lm = load_language_model(model(), words)
        words.add_tokens(["zebra"])
        examples(lm, [{"prompt": "the", "completion": " zebra"}])


def test_a_model_without_bos_learns_all_but_the_first_token():
    words = copy.deepcopy(tokenizer())
    words.bos_token = None
    network = model()
    network.config.bos_token_id = network.generation_config.bos_token_id = None
    (found,), _ = examples(load_language_model(network, words), [{"text": "the cat"}])
    assert found.ids == (*ids("the cat"), EOS) and found.num_context == 1
    assert torch.tensor(found.ids).dtype == torch.int64
