"""N-gram models: the probabilities that were asked for, in every way that a model of transformers is used."""

from __future__ import annotations

import doctest
import warnings

import pytest
import torch

import rlhf_gym.exact.ngram
from rlhf_gym.exact import ngram_from_corpus, ngram_from_table
from rlhf_gym.lm import Recurrent, load_language_model, make_engine

# Contexts of length 0, 1 and 2: after "b a" another row than after "a" or "c a".
TABLE = {
    "": {"a": 0.2, "b": 0.3, "c": 0.3, ".": 0.2},
    "a": {"a": 0.1, "b": 0.9},
    ("b", "a"): {"c": 0.25, ".": 0.75},
}


def row_after(words: str) -> dict[str, float]:
    """The row that counts, by looking for the longest context."""
    history = tuple(words.split())
    rows = {tuple(k.split()) if isinstance(k, str) else k: row for k, row in TABLE.items()}
    return next(rows[history[i:]] for i in range(len(history) + 1) if history[i:] in rows)


@pytest.mark.parametrize("text", ["a", "b", "b a", "c a", "a b a", "b a b", ". a", "c b a c", "b b a"])
def test_longest_context_counts(text):
    lm = ngram_from_table(TABLE, eos=".")
    vocabulary = lm.tokenizer.get_vocab()
    logits = lm.model(**lm.tokenizer(text, return_tensors="pt")).logits[0]
    for end in range(1, len(text.split()) + 1):
        expected = row_after(" ".join(text.split()[:end]))
        for word, i in vocabulary.items():
            assert logits[end - 1, i].exp().item() == pytest.approx(expected.get(word, 0.0), abs=1e-7)


def test_a_half_read_context_is_not_forgotten():
    """Only "b a" has a row of its own; after "b" alone the state must remember the b."""
    lm = ngram_from_table({"": {"a": 0.5, "b": 0.5}, ("b", "a"): {"a": 1.0}}, eos=None)
    ids = lm.tokenizer("a b a a", return_tensors="pt")["input_ids"]
    assert lm.model(input_ids=ids).logits[0].exp()[:, 0].tolist() == pytest.approx([0.5, 0.5, 1.0, 0.5])


def test_special_tokens_and_exact_decoding():
    lm = ngram_from_table(TABLE, eos=".")
    assert lm.vocab_size == 4 and len(lm.eos_token_ids) == 1
    end = lm.eos_token_ids[0]
    assert lm.tokenizer.convert_ids_to_tokens(end) == "." and lm.bos_token_id == lm.pad_token_id == end
    ids = lm.tokenizer("b a c .")["input_ids"]
    assert lm.tokenizer.decode(ids) == "b a c ." and lm.tokenizer.decode(ids, skip_special_tokens=True) == "b a c"
    shown = ngram_from_table({"": {"爱": 0.5, "我们": 0.3, "。": 0.2}}, eos="。", separator="", show_eos=True)
    ids = shown.tokenizer("我们爱我们。")["input_ids"]
    assert len(ids) == 4 and shown.tokenizer.decode(ids, skip_special_tokens=True) == "我们爱我们。"
    endless = ngram_from_table({"": {"a": 0.5, "b": 0.5}}, eos=None)
    assert endless.eos_token_ids == () and endless.bos_token_id is None and endless.pad_token_id == 0


def test_spread_rest():
    lm = ngram_from_table({"": {"a": 0.4}, "a": {"b": 0.7, "c": 0.3}}, eos="c", spread_rest=True)
    probs = lm.model(input_ids=torch.tensor([[0, 1]])).logits[0].exp()
    torch.testing.assert_close(probs, torch.tensor([[0.0, 0.7, 0.3], [0.4, 0.3, 0.3]]))


def test_corpus_by_hand():
    """Two texts, bigrams, smoothing 1, V = 3 words (x, y, end): P(x) = (2 + 1/3) / 6, P(y) = (1 + 1/3) / 6."""
    lm = ngram_from_corpus(["x y", "x"], order=2, smoothing=1.0)
    p = [(2 + 1 / 3) / 6, (1 + 1 / 3) / 6, (2 + 1 / 3) / 6]
    probs = lm.model(input_ids=torch.tensor([[2, 0, 1]])).logits[0].exp()
    rows = [
        [(2 + p[0]) / 3, p[1] / 3, p[2] / 3],  # after the end of a text: x twice
        [p[0] / 3, (1 + p[1]) / 3, (1 + p[2]) / 3],  # after x: y, end
        [p[0] / 2, p[1] / 2, (1 + p[2]) / 2],  # after y: end
    ]
    torch.testing.assert_close(probs, torch.tensor(rows))
    assert not lm.model.forbids_tokens


def test_corpus_falls_back_on_shorter_contexts():
    """A context that was never seen has the row of the next shorter one."""
    lm = ngram_from_corpus(["a b c", "c b a"], order=3)
    ids = {word: i for word, i in lm.tokenizer.get_vocab().items()}

    def after(*words):
        return lm.model(input_ids=torch.tensor([[ids[w] for w in words]])).logits[0, -1]

    torch.testing.assert_close(after("b", "b", "b"), after("c", "c", "b", "b"), atol=0, rtol=0)  # "b b" never was
    assert not torch.allclose(after("a", "b"), after("c", "b"))
    for words in (("a",), ("a", "b"), ("b", "b")):
        assert after(*words).exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("table", [TABLE, {"": {"a": 1.0}}, {"。": {"b": 0.5, "a": 0.5}, "": {"。": 1.0}}])
def test_engine_cache_and_padding(table):
    """Cached, padded and saved: one distribution. Zero probabilities are -inf in all of them and no warning comes."""
    lm = ngram_from_table(table, eos=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = make_engine(lm, 3, 8)
    assert isinstance(engine, Recurrent)
    ids = torch.randint(lm.vocab_size, (3, 6), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([2, 1, 3])
    full = lm.model(input_ids=ids).logits
    found = [engine.prefill(torch.arange(3), ids[:, :3], lengths)]
    rows = torch.arange(3)
    for step in range(3):
        found.append(engine.decode(ids[rows, lengths + step], torch.ones(3, dtype=torch.bool)))
    for step, logits in enumerate(found):
        torch.testing.assert_close(logits, full[rows, lengths - 1 + step], atol=0, rtol=0)


def test_saved_and_loaded(tmp_path):
    for name, lm in {
        "table": ngram_from_table(TABLE, eos="."),
        "endless": ngram_from_table({"": {"a": 0.5, "b": 0.5}}, eos=None),
    }.items():
        lm.model.save_pretrained(tmp_path / name)
        lm.tokenizer.save_pretrained(tmp_path / name)
        assert (tmp_path / name / "model.safetensors").is_file()
        again = load_language_model(tmp_path / name)
        ids = torch.tensor([[0, 1, 1, 0]])
        torch.testing.assert_close(again.model(input_ids=ids).logits, lm.model(input_ids=ids).logits, atol=0, rtol=0)
        assert (again.eos_token_ids, again.bos_token_id, again.pad_token_id) == (
            lm.eos_token_ids,
            lm.bos_token_id,
            lm.pad_token_id,
        )


def test_refusals():
    with pytest.raises(ValueError, match=r"table\['a'\] sums to 0.5"):
        ngram_from_table({"": {"a": 0.5, "b": 0.5}, "a": {"b": 0.5}}, eos=None)
    with pytest.raises(ValueError, match="must hold probabilities that sum to 1"):
        ngram_from_table({"": {"a": 1.5}}, eos=None)
    with pytest.raises(ValueError, match="no row for what follows 'b'"):
        ngram_from_table({"a": {"a": 0.5, "b": 0.5}}, eos=None)
    with pytest.raises(ValueError, match="without white space"):
        ngram_from_table({"": {"a b": 1.0}}, eos=None)
    with pytest.raises(ValueError, match="separator must be"):
        ngram_from_table({"": {"a": 1.0}}, eos=None, separator="-")
    with pytest.raises(ValueError, match="smoothing must be"):
        ngram_from_corpus(["a"], smoothing=0)
    with pytest.raises(ValueError, match="order must be"):
        ngram_from_corpus(["a"], order=0)
    with pytest.raises(ValueError, match="at least one word"):
        ngram_from_corpus([""])
    with pytest.raises(ValueError, match="choose another eos"):
        ngram_from_corpus(["a <eos> b"])


def test_documented_examples():
    assert doctest.testmod(rlhf_gym.exact.ngram).failed == 0
