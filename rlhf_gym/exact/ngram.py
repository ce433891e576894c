"""N-gram language models, exact and Hugging Face-compatible, from a table of probabilities or from a corpus."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rlhf_gym.lm import LanguageModel, load_language_model

from .table import TableConfig, TableForCausalLM, TableHead

Context = tuple[str, ...]


class NgramConfig(TableConfig):
    """Sizes of an `NgramForCausalLM`."""

    model_type = "rlhf_gym_ngram"

    def __init__(self, **kwargs):  # transformers makes one of its own where there is none
        super().__init__(**kwargs)


class _NgramHead(TableHead):
    def __init__(self, num_states: int, vocab_size: int):
        super().__init__(num_states, vocab_size)
        self.logprobs = nn.Parameter(torch.full((num_states, vocab_size), -math.log(vocab_size)))

    def rows(self) -> Tensor:
        return self.logprobs


class NgramForCausalLM(TableForCausalLM):
    """The next token depends on the last few only, by a table of log-probabilities.

    A state is the longest context of the table that ends the text so far. Made by `ngram_from_table` and
    `ngram_from_corpus`.
    """

    config_class = NgramConfig

    def __init__(self, config: NgramConfig):
        super().__init__(config, _NgramHead(config.num_states, config.vocab_size))


AutoConfig.register(NgramConfig.model_type, NgramConfig, exist_ok=True)
AutoModelForCausalLM.register(NgramConfig, NgramForCausalLM, exist_ok=True)


def ngram_from_table(
    table: Mapping[Any, Mapping[str, float]],
    *,
    eos: str | None,
    spread_rest: bool = False,
    separator: str = " ",
    show_eos: bool = False,
) -> LanguageModel:
    """The language model with these probabilities.

    Args:
        table: What follows a context: ``{"the": {"cat": 0.7, "dog": 0.3}}``. A context is a word, several words as a
            tuple or with spaces between them, or "" (the fall-back). The longest context that ends the text so far
            counts. Words that a row does not name cannot follow; such tokens are forbidden in an environment.
        eos: The word that ends a response. A text begins as if after it, so its row is that of the first word. None:
            responses end at the length limit only, and prompts cannot be empty.
        spread_rest: A row's missing probability is spread evenly over the words it does not name, instead of being an
            error.
        separator: What stands between words in a text, " " or "".
        show_eos: Whether `eos` is part of the text (a full stop, say) and not dropped from it.

    Returns:
        The model with its word tokenizer, ready as ``model=`` of an environment.

    Raises:
        ValueError: If a row is no distribution, or some text that can be is without a row.

    Example:
        >>> lm = ngram_from_table({"": {"yes": 0.5, "no": 0.25, "<eos>": 0.25}}, eos="<eos>")
        >>> lm.model(input_ids=torch.tensor([[2]])).logits.exp()
        tensor([[[0.5000, 0.2500, 0.2500]]])
    """
    rows = {_context(key): dict(row) for key, row in table.items()}
    named = [word for key, row in rows.items() for word in (*key, *row)]
    words = [*dict.fromkeys(word for word in named if word != eos), *([] if eos is None else [eos])]
    if not words:
        raise ValueError("table must name at least one word")
    filled = {context: _distribution(context, row, words, spread_rest) for context, row in rows.items()}
    return _language_model(filled, words, eos, separator, show_eos)


def ngram_from_corpus(
    texts: Iterable[str], *, order: int = 2, smoothing: float = 1.0, eos: str = "<eos>"
) -> LanguageModel:
    """The language model of a corpus, in which every word can follow every other.

    P(w | c) = (count(c w) + smoothing P(w | c without its first word)) / (count(c) + smoothing), and P(w) is smoothed
    with the uniform distribution: a row leans on the next shorter context as on ``smoothing`` observations.

    Args:
        texts: Texts whose words are separated by white space.
        order: Words that count, the next one included; 2 is a bigram model.
        smoothing: Above 0.
        eos: The word that ends a response; it is added behind each text.

    Raises:
        ValueError: If there are no words, a text holds ``eos``, or an argument is out of range.

    Source:
        MacKay and Peto 1995, "A hierarchical Dirichlet language model".
    """
    if not (isinstance(order, int) and order >= 1):
        raise ValueError(f"order must be an integer >= 1, got {order!r}")
    if not 0 < smoothing < math.inf:
        raise ValueError(f"smoothing must be a finite number > 0, got {smoothing!r}: without it words are impossible")
    counts: dict[Context, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    words: dict[str, None] = {}
    for text in texts:
        sequence = text.split()
        if eos in sequence:
            raise ValueError(f"texts must not hold {eos!r}, which ends a response; choose another eos")
        words.update(dict.fromkeys(sequence))
        history = [eos, *sequence, eos]
        for i in range(1, len(history)):
            for length in range(min(order - 1, i) + 1):
                counts[tuple(history[i - length : i])][history[i]] += 1
    if not words:
        raise ValueError("texts must hold at least one word")
    vocabulary = [*words, eos]
    rows: dict[Context, list[float]] = {}
    for context in sorted(counts, key=len):  # each leans on a shorter one, which is there already
        found = counts[context]
        prior = rows[context[1:]] if context else [1 / len(vocabulary)] * len(vocabulary)
        total = sum(found.values()) + smoothing
        rows[context] = [
            (found.get(word, 0) + smoothing * p) / total for word, p in zip(vocabulary, prior, strict=True)
        ]
    return _language_model(rows, vocabulary, eos, " ", False)


def word_tokenizer(words: Sequence[str], *, eos: str | None, separator: str = " ", show_eos: bool = False) -> Any:
    """A tokenizer with one token per word, whose decoding is exact: words with the separator between them.

    Args:
        words: The vocabulary, in the order of the ids.
        eos: Its end-of-text word, or None.
        separator: " " or "".
        show_eos: Whether decoding keeps `eos` when it skips special tokens.

    Raises:
        ValueError: If a word holds white space or the separator is neither.
    """
    if separator not in ("", " "):
        raise ValueError(f'separator must be " " or "", got {separator!r}')
    for word in words:
        if not word or word.split() != [word]:
            raise ValueError(f"a word must be a string without white space, got {word!r}")
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    if separator:
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        longest_first = sorted(words, key=len, reverse=True)
        escaped = "|".join("".join(f"\\x{{{ord(letter):x}}}" for letter in word) for word in longest_first)
        raw.pre_tokenizer = pre_tokenizers.Split(Regex(escaped), "isolated")
        raw.decoder = decoders.Fuse()
    special = {} if eos is None or show_eos else dict.fromkeys(("bos_token", "eos_token", "pad_token"), eos)
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **special)


def _context(key: str | Context) -> Context:
    return tuple(key.split()) if isinstance(key, str) else tuple(key)


def _distribution(context: Context, row: Mapping[str, float], words: Sequence[str], spread_rest: bool) -> list[float]:
    """The row as probabilities of all words."""
    where = f"table[{' '.join(context)!r}]"
    total = math.fsum(row.values())
    if any(not 0 <= p <= 1 for p in row.values()) or total > 1 + 1e-9:
        raise ValueError(f"{where} must hold probabilities that sum to 1, got {dict(row)}")
    unnamed = len(words) - len(row)
    rest = 0.0
    if total < 1 - 1e-9:
        if not (spread_rest and unnamed):
            raise ValueError(f"{where} sums to {total:g}, not to 1; complete it, or pass spread_rest=True")
        rest = (1 - total) / unnamed
    return [row.get(word, rest) for word in words]


def _language_model(
    rows: Mapping[Context, Sequence[float]], words: Sequence[str], eos: str | None, separator: str, show_eos: bool
) -> LanguageModel:
    ids = {word: i for i, word in enumerate(words)}
    tokens_of = {tuple(ids[word] for word in context): row for context, row in rows.items()}
    states, transitions = context_automaton(tokens_of, len(words))
    table = []
    for i, state in enumerate(states):
        suffixes = (state[start:] for start in range(len(state) + 1))
        found = next((tokens_of[suffix] for suffix in suffixes if suffix in tokens_of), None)
        if found is None:
            if i > 0 or any(0 in row for row in transitions):
                after = " ".join(words[token] for token in state) or next(w for w in words if (ids[w],) not in states)
                raise ValueError(f'table has no row for what follows {after!r}; add it, or the fall-back ""')
            found = [1 / len(words)] * len(words)  # before the first token: no text is ever there
        table.append(found)
    # An empty list says that there is none, None that nobody knows.
    special = {} if eos is None else {"bos_token_id": ids[eos], "pad_token_id": ids[eos]}
    config = NgramConfig(
        vocab_size=len(words), num_states=len(states), eos_token_id=[] if eos is None else ids[eos], **special
    )
    model = NgramForCausalLM(config)
    with torch.no_grad():
        model.transitions.copy_(torch.tensor(transitions))
        model.lm_head.logprobs.copy_(torch.tensor(table, dtype=torch.float64).log())
    tokenizer = word_tokenizer(words, eos=eos, separator=separator, show_eos=show_eos)
    return load_language_model(model, tokenizer)


def context_automaton(contexts: Iterable[tuple[int, ...]], vocab_size: int) -> tuple[list[tuple[int, ...]], list[Any]]:
    """The automaton that knows the longest context which ends the text so far (Aho and Corasick 1975).

    Args:
        contexts: Token sequences.
        vocab_size: V.

    Returns:
        The states, S sequences with () first: all contexts and their beginnings, without which a context that is
        half read would be forgotten. And the state after each token, S lists of V.
    """
    states: dict[tuple[int, ...], int] = {(): 0}
    for context in sorted(contexts, key=len):
        for end in range(1, len(context) + 1):
            states.setdefault(context[:end], len(states))

    def longest_suffix(sequence: tuple[int, ...]) -> int:
        return next(states[sequence[i:]] for i in range(len(sequence) + 1) if sequence[i:] in states)

    return list(states), [[longest_suffix((*state, token)) for token in range(vocab_size)] for state in states]
