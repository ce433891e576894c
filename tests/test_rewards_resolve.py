"""What may stand after ``reward=``: names, modules, files, dicts; and what is said when it cannot."""

from __future__ import annotations

import functools
import sys

import pytest

from rlhf_gym.rewards import RewardError, RewardInputs, as_reward, keyword

ONE = RewardInputs(["p"], ["good good"], [[1]], [[5, 5, 0]], {})

SOURCE = """
import neighbour

CALLS = 0
NOT_A_FUNCTION = 3

def happy_words(text):
    return float(text.count("good")) + neighbour.BONUS

class Judge:
    @staticmethod
    def score(prompt, response):
        return 7.0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with spaces in its name, and with the user's files in it."""
    folder = tmp_path / "my rewards"
    folder.mkdir()
    (folder / "mine_xyz.py").write_text(SOURCE)
    (folder / "neighbour.py").write_text("BONUS = 0.5")
    (folder / "broken_xyz.py").write_text("import a_module_that_is_not_there")
    (folder / "syntax_xyz.py").write_text("def f(:")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # as under a console script: no working directory
    yield folder
    for name in [n for n in sys.modules if "_xyz" in n or n == "neighbour"]:
        del sys.modules[name]


def score(spec):
    return as_reward(spec).score(ONE).total.tolist()


def test_names():
    assert score("sentiment") == [1.0] and as_reward("sentiment").names == ("sentiment",)
    assert score("length") == [3.0] and score("repetition") == [0.0]
    with pytest.raises(
        RewardError, match="'reference_logprob' raised ValueError: it needs the environment's reference"
    ):
        score("reference_logprob")
    assert as_reward({"reference_logprob": 1.0, "length": 1.0}).needs_language_model


def test_tiny_reviews_gold():
    assert as_reward("tiny-reviews").names == ("gold_sentiment",)
    assert score("tiny-reviews") == [0.0]  # "pgood good" is no review


@pytest.mark.parametrize("spec", ["mine_xyz:happy_words", "mine_xyz.py:happy_words", "./mine_xyz.py:happy_words"])
def test_module_and_file(folder, spec):
    assert score(spec) == [2.5] and as_reward(spec).names == ("happy_words",)
    assert score(str(folder / "mine_xyz.py") + ":Judge.score") == [7.0]


def test_file_runs_once_until_it_is_changed(folder):
    path = folder / "mine_xyz.py"
    first = as_reward(f"{path}:happy_words").function
    assert as_reward(f"{path}:happy_words").function is first
    path.write_text("def happy_words(text):\n    return 9.0\n")
    import os

    os.utime(path, ns=(1, 1))
    assert score(f"{path}:happy_words") == [9.0]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("sentimnt", ValueError, "no reward named 'sentimnt'; did you mean 'sentiment'?"),
        (
            "zzz",
            ValueError,
            "the names are 'bleu', 'chrf', 'exact_match', 'human', 'length', .*'tiny-reviews', 'token_f1'",
        ),
        ("keyword", ValueError, r"'keyword' needs arguments; pass rlhf_gym.rewards.keyword\(\["),
        ("gone_xyz:f", RewardError, "no module 'gone_xyz' on the Python path or in .*my rewards"),
        ("gone_xyz.py:f", FileNotFoundError, "no file 'gone_xyz.py' .working directory .*my rewards"),
        ("mine_xyz:happy_word", RewardError, "no function 'happy_word' in it; did you mean 'happy_words'?"),
        ("mine_xyz.py:zzz", RewardError, "no function 'zzz' in it; it has happy_words, Judge"),
        ("mine_xyz:NOT_A_FUNCTION", RewardError, "is a int, not a function"),
        ("mine_xyz.py", ValueError, r"names a file but no function; write 'mine_xyz.py:FUNCTION' \(it defines happy_"),
        ("broken_xyz:f", RewardError, "importing 'broken_xyz' failed with ModuleNotFoundError: .*a_module_that_is_not"),
        ("broken_xyz.py:f", RewardError, "importing .*broken_xyz.py' failed with ModuleNotFoundError"),
        ("syntax_xyz.py:f", RewardError, "importing .*syntax_xyz.py' failed with SyntaxError"),
        ("./no/such/folder", FileNotFoundError, "no directory './no/such/folder'"),
        ("folder/mine:f", FileNotFoundError, "for a function in a file write 'folder/mine.py:f'"),
        ("no/such", ValueError, "classifier='no/such' .* no directory here, .*hub"),
        (None, TypeError, "must be a function, a name, .* got NoneType"),
        ([len], TypeError, r"got list; for several rewards pass a dict"),
        (dict, TypeError, "got the class dict; pass an instance"),
        ({}, ValueError, "at least one term"),
        ({"length": "1"}, TypeError, "weight of 'length' must be a number"),
        ({"mine": len}, TypeError, r"write {'mine': \(reward, 1.0\)}"),
        ({"length": True}, ValueError, "weight of 'length' must be a finite number, got True"),
        ({"length": float("nan")}, ValueError, "weight of 'length' must be a finite number, got nan"),
        ({"length": None}, ValueError, "weight of 'length' must be a finite number, got None"),
        ({len: ("length", 1.0)}, TypeError, "needs a string as key"),
        ({keyword(["a"]): 1.0, keyword(["b"]): 1.0}, ValueError, "two reward terms are named 'keyword'; name them"),
        ({"lenght": 1.0}, ValueError, "did you mean 'length'"),
    ],
)
def test_errors(folder, spec, error, message):
    with pytest.raises(error, match=message):
        as_reward(spec)


def test_failed_import_leaves_the_path_as_it_was(folder):
    before = list(sys.path)
    for spec in ("gone_xyz:f", "broken_xyz:f", "broken_xyz.py:f"):
        with pytest.raises(RewardError):
            as_reward(spec)
    assert sys.path == before


def test_names_of_terms():
    def letters(text, letter):
        return float(text.count(letter))

    reward = as_reward({"happy": (keyword(["good"]), 2.0), functools.partial(letters, letter="o"): 0.5, "length": 1})
    assert reward.names == ("happy", "letters", "length")
    assert reward.score(ONE).terms == {"happy": [2.0], "letters": [2.0], "length": [3.0]}
