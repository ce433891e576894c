"""Rewards as functions: how they are called, what they may answer, the ledger, and each way to fail."""

from __future__ import annotations

import asyncio
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from rlhf_gym.rewards import Reward, RewardError, RewardInputs, Scores, as_reward


def inputs_of(completions, prompts=None, columns=None, completion_ids=None):
    n = len(completions)
    prompts = prompts or [f"p{i}" for i in range(n)]
    ids = completion_ids or [[7] * (len(text.split()) + 1) for text in completions]
    return RewardInputs(prompts, list(completions), [[1, 2]] * n, ids, columns or {})


ABC = inputs_of(["a", "bb", "ccc"], columns={"label": ["x", "y", "z"]})


def total(function, inputs=ABC):
    return as_reward(function).score(inputs).total.tolist()


# ---- TRL's signature, with the examples of its documentation word for word


def test_trl_example_length():
    def reward_func(completions_ids, **kwargs):
        """Reward function that assigns higher scores to longer completions (in terms of token count)."""
        return [float(len(ids)) for ids in completions_ids]

    ids = [[6303, 13], [304, 279, 12884, 13]]
    assert total(reward_func, inputs_of([" blue.", " in the sky."], ["The sky is", "The sun is"], None, ids)) == [2, 4]

    def reward_func(completions, **kwargs):
        """Reward function that assigns higher scores to longer completions (in terms of character count)."""
        return [float(len(completion)) for completion in completions]

    assert total(reward_func, inputs_of([" blue.", " in the sky."])) == [6.0, 12.0]


def test_trl_example_ground_truth():
    def reward_func(completions, ground_truth, **kwargs):
        # Regular expression to capture content inside \boxed{}
        matches = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
        contents = [match.group(1) if match else "" for match in matches]
        # Reward 1 if the content is the same as the ground truth, 0 otherwise
        return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]  # noqa: B905

    texts = [r" The solution is \boxed{2}.", r" The solution is \boxed{6}."]
    assert total(reward_func, inputs_of(texts, columns={"ground_truth": ["2", "5"]})) == [1.0, 0.0]
    assert as_reward(reward_func).columns_needed == ("ground_truth",)


def test_trl_example_multi_task_none_is_not_applicable():
    def math_reward_func(prompts, completions, task, **kwargs):
        rewards = []
        for prompt, completion, t in zip(prompts, completions, task):  # noqa: B905
            if t == "math":
                # Calculate math-specific reward
                correct = prompt + completion == "1+1=2"
                reward = 1.0 if correct else -1.0
                rewards.append(reward)
            else:
                # Return None for non-math tasks
                rewards.append(None)
        return rewards

    inputs = inputs_of(["2", "3", "x"], ["1+1=", "1+1=", "write"], {"task": ["math", "math", "code"]})
    scores = as_reward({math_reward_func: 2.0, "length": 1.0}).score(inputs)
    np.testing.assert_array_equal(scores.terms["math_reward_func"], [2.0, -2.0, math.nan])
    assert scores.total.tolist() == [4.0, 0.0, 2.0]  # each text has two tokens
    assert as_reward(math_reward_func).score(inputs).total.tolist() == [1.0, -1.0, 0.0]


def test_trl_example_async():
    async def async_reward_func(prompts, completions, **kwargs):
        # Simulate an I/O-bound call (e.g., HTTP request, database lookup)
        await asyncio.sleep(0.01)
        # Simple toy reward: 1.0 if the completion is non-empty, else 0.0
        return [1.0 if completion else 0.0 for completion in completions]

    reward = as_reward(async_reward_func)
    assert reward.score(inputs_of(["x", ""])).total.tolist() == [1.0, 0.0]

    async def in_a_notebook():  # where a loop is running already, asyncio.run would refuse
        return reward.score(inputs_of(["", "x"])).total.tolist()

    assert asyncio.run(in_a_notebook()) == [0.0, 1.0]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # the nested one, which is refused
def test_async_of_one_text_runs_all_at_once_and_keeps_its_loop():
    loops = set()
    together = 0
    most = 0

    async def slow(text):
        nonlocal together, most
        loops.add(asyncio.get_running_loop())
        together, most = together + 1, max(most, together + 1)
        await asyncio.sleep(0.01)
        together -= 1
        return len(text)

    reward = as_reward(slow)
    for _ in range(2):  # an HTTP session is bound to its loop: the loop must outlive the call
        assert reward.score(ABC).total.tolist() == [1, 2, 3]
    assert most == 3 and len(loops) == 1

    async def nested(text):
        return reward.score(ABC).total[0]  # would wait for the thread that it runs in

    with pytest.raises(RewardError, match="inside an async reward"):
        as_reward(nested).score(ABC)

    async def broken(text):
        if text == "bb":
            raise KeyError("no such thing")
        return 1

    with pytest.raises(RewardError, match=r"'broken' raised KeyError.*row 1 .*'bb'") as caught:
        as_reward(broken).score(ABC)
    assert caught.value.row == 1 and isinstance(caught.value.__cause__, KeyError)


# ---- who receives what


def test_batch_function_is_passed_only_what_it_names():
    seen = {}

    def f(completions, label, missing="default", *, prompt_ids):
        seen.update(completions=completions, label=label, missing=missing, prompt_ids=prompt_ids)
        return [0] * len(completions)

    reward = as_reward(f)
    reward.score(ABC)
    assert seen == {
        "completions": ["a", "bb", "ccc"],
        "label": ["x", "y", "z"],
        "missing": "default",
        "prompt_ids": [[1, 2]] * 3,
    }
    assert reward.columns_needed == ("label",) and reward.names == ("f",)

    def everything(**kwargs):
        seen.clear()
        seen.update(kwargs)
        return [0, 0, 0]

    total(everything)
    assert set(seen) == {"prompts", "completions", "prompt_ids", "completion_ids", "label"}


def test_per_sample_functions_by_name_and_by_position():
    inputs = inputs_of(["R"], ["P"])

    def spell(function):
        spelled = []
        reward = as_reward(lambda prompts, completions: [0.0])  # a batch form next to it changes nothing
        assert reward.score(inputs).total.tolist() == [0.0]
        as_reward(function(spelled)).score(inputs)
        return "".join(spelled)

    def note(spelled, *texts):
        spelled.extend(texts)
        return 1.0

    assert spell(lambda out: lambda text: note(out, text)) == "R"
    assert spell(lambda out: lambda anything: note(out, anything)) == "R"
    assert spell(lambda out: lambda prompt, response: note(out, prompt, response)) == "PR"
    assert spell(lambda out: lambda response, prompt: note(out, response, prompt)) == "RP"  # names win over order
    assert spell(lambda out: lambda question, answer: note(out, question, answer)) == "PR"
    assert spell(lambda out: lambda text, prompt=None: note(out, text, prompt)) == "RP"
    assert spell(lambda out: lambda text, other=".": note(out, text, other)) == "R."
    assert total(len) == [1, 2, 3]  # a builtin, positional only

    class Scorer:
        def __call__(self, text):
            return 2 * len(text)

    assert total(Scorer()) == [2, 4, 6] and as_reward(Scorer()).names == ("Scorer",)
    assert as_reward(lambda text: 0.0).names == ("lambda",)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c: 0,
        lambda: 0,
        lambda prompt: 0,
        lambda text, label: 0,
        lambda text, response: 0,
        lambda texts: 0,
        lambda responses: 0,
        lambda *args: 0,
        lambda text, **kwargs: 0,
        lambda prompt, completions: 0,
    ],
)
def test_ambiguous_signature_says_how_to_name_the_parameters(function):
    with pytest.raises(RewardError, match=r"'lambda'.*name its parameters f\(prompts, completions, <columns>\)"):
        as_reward(function)


def test_column_missing_or_mistaken():
    def needs(completions, lable):
        return [0, 0, 0]

    message = r"'lable', which the prompts lack; they have 'label' \(did you mean 'label'\?\)"
    with pytest.raises(RewardError, match=message):
        as_reward(needs).score(ABC)
    with pytest.raises(RewardError, match=message):
        as_reward({needs: 1.0, "length": 1.0}).check_columns(["label"])
    with pytest.raises(RewardError, match="'label' would receive the response.*column of that name"):
        total(lambda label: 1.0)
    with pytest.raises(ValueError, match="column cannot be named 'prompts'"):
        inputs_of(["a"], columns={"prompts": ["x"]})
    with pytest.raises(ValueError, match="label must hold one value per prompt, got 1 for 2"):
        inputs_of(["a", "b"], columns={"label": ["x"]})


def test_nothing_of_the_caller_is_mutated():
    nested = {"names": ["x"]}
    inputs = inputs_of(["b", "a"], columns={"meta": [nested, nested]})

    def vandal(prompts, completions, prompt_ids, completion_ids, meta):
        for given in (prompts, completions, prompt_ids[0], completion_ids[0], meta[0]["names"]):
            given.clear()
        return [0.0, 0.0]

    def witness(completions, completion_ids, meta):
        assert completions == ["b", "a"] and completion_ids == [[7, 7]] * 2 and meta[1] == {"names": ["x"]}
        return [1.0, 1.0]

    assert total({vandal: 1.0, witness: 1.0}, inputs) == [1.0, 1.0]
    assert inputs == inputs_of(["b", "a"], columns={"meta": [{"names": ["x"]}, {"names": ["x"]}]})


# ---- what a function may answer


@pytest.mark.parametrize(
    "scores",
    [
        [1, 2.0, -3],
        (1, 2, -3),
        np.array([1, 2, -3]),
        np.array([1, 2, -3], dtype=np.float16),
        torch.tensor([1, 2, -3]),
        torch.tensor([1, 2, -3], dtype=torch.bfloat16),
        torch.tensor([1.0, 2.0, -3.0], requires_grad=True),
        [np.float32(1), torch.tensor(2.0), np.array(-3)],
    ],
)
def test_lists_arrays_and_tensors_are_accepted(scores):
    result = as_reward(lambda completions: scores).score(ABC)
    assert result.total.dtype == np.float64 and result.total.tolist() == [1, 2, -3]


@pytest.mark.parametrize(
    ("scores", "message", "row"),
    [
        (None, "None .is a `return` missing", None),
        ([1.0, 2.0], "2 values for 3 responses", None),
        ([1.0], "1 values for 3 responses", None),  # not broadcast
        (torch.tensor([1.0]), "1 values for 3", None),
        (torch.tensor(1.0), r"shape \(\)", None),
        (np.float64(1.0), r"float64 .*expected a list of 3", None),
        (1.0, r"a float \(1.0\)", None),
        (True, r"a bool \(True\)", None),
        ("1.0", r"a str \('1.0'\)", None),
        (torch.ones(3, 1), r"shape \(3, 1\)", None),
        (np.ones((1, 3)), r"shape \(1, 3\)", None),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "a dict", None),
        ((x for x in (1, 2, 3)), "a generator", None),
        ([0.0, math.nan, 0.0], "nan; a score must be finite", 1),
        ([0.0, 0.0, math.inf], "inf; a score must be finite", 2),
        (np.array([0.0, -np.inf, np.nan]), "-inf", 1),
        (torch.tensor([0.0, 0.0, math.nan]), "nan", 2),
        ([10**400, 0, 0], "inf", 0),
        ([0.5, "0.5", "x"], "the string '0.5'", 1),
        ([0.5, 0.5, True], "the bool True", 2),
        (np.array([True, False, True]), "the bool True", 0),
        (torch.tensor([False, False, True]), "the bool False", 0),
        (torch.ones(3, dtype=torch.complex64), "a complex", 0),
        ([0.5, [0.5], 0.5], "a list; a score is a single number", 1),
        ([0.5, np.array([0.5]), 0.5], r"ndarray of shape \(1,\)", 1),
    ],
)
def test_anything_else_is_refused_with_function_rule_and_row(scores, message, row):
    def my_reward(completions):
        return scores

    with pytest.raises(RewardError, match=f"'my_reward' returned .*{message}") as caught:
        as_reward(my_reward).score(ABC)
    assert caught.value.row == row and caught.value.function == "my_reward"
    if row is not None:
        assert f"row {row} (prompt 'p{row}', response {ABC.completions[row]!r})" in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda text: None if text == "bb" else 1.0, "None .is a `return` missing.*row 1"),
        (lambda text: text == "a", "the bool True; a score is a number, write float.*row 0"),
        (lambda text: [1.0], "a list.*row 0"),
        (lambda text: 1 / (len(text) - 3), "raised ZeroDivisionError.*row 2 .*'ccc'"),
    ],
)
def test_per_sample_failures_name_the_row(function, message):
    with pytest.raises(RewardError, match=message):
        total(function)


def test_an_exception_says_where_in_the_users_file(tmp_path):
    """The last line there that led to it, whatever library it was raised in."""
    file = tmp_path / "mine.py"
    file.write_text("import json\n\ndef one(text):\n    return helper(text)\n\ndef helper(text):\n    return json.loads(text)\n"
                    "\nasync def later(completions):\n    return [helper(text) for text in completions]\n")  # fmt: skip
    for name in ("one", "later"):
        reward = as_reward(f"{file}:{name}")
        with pytest.raises(RewardError, match=rf"'{name}' raised JSONDecodeError.*\(mine\.py, line 7\)"):
            reward.score(inputs_of(["a"]))


def test_exception_is_chained_and_ctrl_c_passes():
    def failing(completions):
        raise OSError("disk on fire")

    with pytest.raises(RewardError, match="'failing' raised OSError: disk on fire") as caught:
        total(failing)
    assert isinstance(caught.value.__cause__, OSError)

    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        total(interrupted)


def test_too_large_a_sum_is_refused():
    with pytest.raises(RewardError, match="sum to inf in row 0"):
        total({"a": (lambda text: 1e308, 1.0), "b": (lambda text: 1e308, 1.0)})


# ---- the ledger


def test_ledger_holds_weighted_terms_that_sum_to_the_total():
    def tenth(completions):
        return [0.1, 0.2, None]

    inner = as_reward({"x": (lambda text: len(text), 3.0), "y": (tenth, 1.0)})
    reward = as_reward({"outer": (inner, 0.5), tenth: 10.0, "length": -1})
    scores = reward.score(ABC)
    assert reward.names == tuple(scores.terms) == ("outer/x", "outer/y", "tenth", "length")
    np.testing.assert_allclose(scores.terms["outer/x"], [1.5, 3.0, 4.5])
    np.testing.assert_allclose(scores.terms["outer/y"], [0.05, 0.1, math.nan])
    np.testing.assert_allclose(scores.total, [1.5 + 0.05 + 1 - 2, 3.0 + 0.1 + 2 - 2, 4.5 - 2], rtol=0, atol=1e-9)
    assert scores.total.dtype == np.float64 and reward.columns_needed == () and not reward.dense


def test_ledger_is_asserted():
    with pytest.raises(AssertionError, match="do not sum"):
        Scores(np.array([1.0]), {"a": np.array([0.5]), "b": np.array([0.5 + 2e-9])})
    Scores(np.array([1.0]), {"a": np.array([1.0]), "b": np.array([math.nan])})


def test_empty_batch_and_selected_rows():
    assert total(lambda completions: 1 / 0, inputs_of([])) == []
    chosen = ABC.select([2, 0])
    assert chosen.completions == ["ccc", "a"] and chosen.columns == {"label": ["z", "x"]} and len(chosen) == 2


# ---- dense terms


def dense(function):
    function.dense = True
    return function


@dense
def per_token(completion_ids):
    return [[0.5 * token for token in ids] for ids in completion_ids]


def test_dense_terms_pay_per_token_and_sum_to_their_score():
    inputs = inputs_of(["a", "b", ""], completion_ids=[[1, 2], [4], []])
    reward = as_reward({per_token: 2.0, "length": 10.0})
    assert reward.dense and not as_reward("length").dense
    assert [row.tolist() for row in reward.token_rewards(inputs)] == [[1.0, 2.0], [4.0], []]
    assert reward.score(inputs).terms["per_token"].tolist() == [3.0, 4.0, 0.0]
    assert reward.score(inputs).total.tolist() == [23.0, 14.0, 0.0]
    assert [row.tolist() for row in as_reward("length").token_rewards(inputs)] == [[0.0, 0.0], [0.0], []]

    skips = as_reward(dense(lambda completion_ids: [None, np.array([1.0]), []]))
    assert [row.tolist() for row in skips.token_rewards(inputs)] == [[0.0, 0.0], [1.0], []]
    np.testing.assert_array_equal(skips.score(inputs).terms["lambda"], [math.nan, 1.0, 0.0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0.5, 0.5], "float .*expected a list of 2 numbers, one per token; first in row 0"),
        ([[0.5, 0.5], [0.5, 0.5]], "2 values for 1 tokens.*row 1"),
        ([[0.5, math.nan], [0.5]], "nan.*token 1.*row 0"),
        ([[0.5, None], [0.5]], "None.*row 0"),
        ([[0.5, 0.5]], "1 values; a dense reward returns a list of 2 lists"),
        (0.5, "a float; a dense reward"),
    ],
)
def test_dense_failures(rows, message):
    reward = as_reward(dense(lambda completion_ids: rows))
    for method in (reward.score, reward.token_rewards):
        with pytest.raises(RewardError, match=message):
            method(inputs_of(["a", "b"], completion_ids=[[1, 2], [4]]))


# ---- the rest of the contract


def test_reward_passes_through_and_is_not_copied():
    import copy

    reward = as_reward({len: 1.0})
    assert isinstance(reward, Reward) and as_reward(reward) is reward and copy.deepcopy(reward) is reward


def test_importing_rewards_does_not_import_torch():
    code = (
        "import sys, rlhf_gym.rewards as r; r.as_reward('sentiment'); print({'torch', 'transformers'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
