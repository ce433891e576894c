"""Other people's checkers on our environment, and every refusal: one clear error, nothing lost (CORRECTNESS 22, 27)."""

from __future__ import annotations

import copy
import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from worlds import EOS, V, goodness, make_env, make_envs, model, tokenizer

import rlhf_gym


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lstm"])
def test_gymnasium_and_sb3_check_env(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_env(kind)
        check_env(env.unwrapped, skip_close_check=False)
        sb3_check_env(make_env(kind).unwrapped)


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_check_vector_env(mode, output):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rlhf_gym.check_vector_env(make_envs(3, autoreset_mode=mode, output=output))


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize(
    "changes", [{"kl_coef": 0.1}, {"top_k": 3}, {"allowed_tokens": [EOS, 4, 5]}], ids=["kl", "top_k", "allowed"]
)
def test_check_vector_env_of_other_settings(mode, changes):
    """With announcements, masks and masked resets."""
    envs = make_envs(3, autoreset_mode=mode, max_response_tokens=4, **changes)

    def announce(observations, infos, actions):
        envs.unwrapped.announce_logprobs(-0.1 * (1 + np.asarray(actions)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rlhf_gym.check_vector_env(
            envs, num_steps=30, before_step=announce if "kl_coef" in changes else None, reset_mask=True
        )


def test_ids_make_both_kinds():
    assert isinstance(make_env().unwrapped, rlhf_gym.TextGenerationEnv)
    assert isinstance(make_envs(), rlhf_gym.TextGenerationVectorEnv)
    env = gym.make(
        "rlhf_gym:rlhf_gym/TextGeneration-v0",
        model=model(context=64),
        tokenizer=tokenizer(),
        prompts=["the"],
        reward=goodness,
    )
    assert env.reset(seed=0)[0]["input_ids"].shape == (33,)  # one prompt token and the default of 32


def test_observation_is_a_model_call():
    """model(**obs) on the untouched observation; the next token's logits stand at attention_mask.sum(-1) - 1."""
    for kind in ("gpt2", "llama", "lstm"):
        lm = model(kind)
        envs = make_envs(2, model=lm, output="torch")
        obs, _ = envs.reset(seed=0)
        logits = lm(**obs).logits[torch.arange(2), obs["attention_mask"].sum(-1) - 1]
        alone = [lm(input_ids=p.ids[None]).logits[0, -1] for p in envs.unwrapped.process.row_prompts]
        torch.testing.assert_close(logits, torch.stack(alone), atol=1e-5, rtol=0)


def test_autoreset_mode_is_the_instances_own():
    same, nxt = make_envs(1, autoreset_mode="same_step"), make_envs(1)
    assert (same.metadata["autoreset_mode"], nxt.metadata["autoreset_mode"]) == (
        AutoresetMode.SAME_STEP,
        AutoresetMode.NEXT_STEP,
    )


def test_sync_vector_env_of_scalars_agrees():
    """Gymnasium's own vectorisation of the scalar environment gives the native one's stream."""
    lm = model()
    kwargs = {
        "model": lm,
        "tokenizer": tokenizer(),
        "prompts": ["the cat", "a"],
        "reward": goodness,
        "max_response_tokens": 3,
    }
    sync = gym.make_vec("rlhf_gym/TextGeneration-v0", num_envs=2, vectorization_mode="sync", **kwargs)
    native = gym.make_vec("rlhf_gym/TextGeneration-v0", num_envs=2, **kwargs)
    left, right = sync.reset(seed=7), native.reset(seed=7)
    rng = np.random.default_rng(0)
    for _ in range(12):
        np.testing.assert_array_equal(left[0]["input_ids"], right[0]["input_ids"])
        actions = rng.integers(0, V, size=2)
        left, right = sync.step(actions), native.step(actions)
        np.testing.assert_allclose(left[1], right[1], atol=1e-5)
        np.testing.assert_array_equal(left[2], right[2])
        for key in ("score", "response", "stop_reason"):
            assert (key in left[4]) == (key in right[4])
            if key in left[4]:
                np.testing.assert_array_equal(left[4][key][left[4][f"_{key}"]], right[4][key][right[4][f"_{key}"]])


@pytest.mark.parametrize("render_mode", ["ansi", "rgb_array", "human"])
def test_render_modes(render_mode, capsys):
    env = make_env(render_mode=render_mode)
    env.reset(seed=0, options={"prompts": "the cat"})
    env.step(4)
    env.step(EOS)
    frame = env.render()
    if render_mode == "rgb_array":
        assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
        assert make_envs(2, render_mode=render_mode).reset()
    else:
        text = frame if render_mode == "ansi" else capsys.readouterr().out
        assert "the cat" in text and "good" in text


def test_live_models_are_not_copied_by_the_spec():
    lm = model()
    env = make_env(model=lm)
    assert (
        env.spec.kwargs["model"].model is lm
    )  # Wrapper.spec deep-copies: without the holder this would be another model


# ---- refusals


def state_of(env):
    """Everything that the future depends on, but for the cache, which is a memo."""
    base = env.unwrapped
    process = base.process
    tensors = {name: getattr(process, name).clone() for name in process._TENSORS}
    if process._announced is not None:
        tensors["announced"] = process._announced.clone()
    if hasattr(base, "num_envs") and hasattr(base, "_pending"):
        tensors["pending"] = base._pending.clone()
    return tensors, [list(process.row_prompts), copy.deepcopy(process.row_results), process.prompt_order_state()]


def assert_unchanged(before, env):
    after = state_of(env)
    assert before[0].keys() == after[0].keys() and before[1][1:] == after[1][1:]
    assert all(a is b for a, b in zip(before[1][0], after[1][0], strict=True))
    for name, tensor in before[0].items():
        torch.testing.assert_close(tensor, after[0][name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": ["the " * 9], "max_prompt_tokens": 4},
            r"prompts\[0\] has 9 tokens, more than max_prompt_tokens=4",
        ),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [{"text": "the"}]}, r"prompts\[0\] must be a string or a dict"),
        ({"prompts": "no-such.jsonl"}, "there is no file 'no-such.jsonl'"),
        ({"prompts": "tiny-review"}, "did you mean the packaged 'tiny-reviews'"),
        ({"reward": None}, "reward is missing"),
        ({"reward": "sentimet"}, "did you mean 'sentiment'"),
        ({"reward": lambda completions, answer: [0.0] * len(completions)}, "asks for the column 'answer'"),
        ({"kl_coef": -1}, "kl_coef must be a finite number >= 0"),
        ({"kl_term": "half"}, "kl_term must be one of"),
        ({"kl_estimator": "k9"}, "kl_estimator must be one of"),
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"top_k": 0}, "top_k must be None or an integer of at least 1, got 0"),
        ({"allowed_tokens": [V]}, "allowed_tokens must be token ids"),
        ({"max_response_tokens": 0}, "max_response_tokens must be an integer >= 1"),
        ({"max_response_tokens": 30}, "must fit the model's context of 32 tokens, got 4"),
        ({"missing_eos_penalty": -1}, "missing_eos_penalty must be"),
        ({"truncate_prompts": "right"}, "truncate_prompts must be"),
        ({"output": "jax"}, "output must be one of"),
        ({"autoreset_mode": "never"}, "autoreset_mode must be one of"),
        ({"render_mode": "film"}, "render_mode must be"),
    ],
)
def test_bad_arguments_are_refused_at_construction(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_envs(2, **changes)


def test_without_a_reference():
    """A tokenizer alone makes a process too; what needs the reference is refused."""

    def make(**changes):
        arguments = {"tokenizer": tokenizer(), "prompts": ["the"], "reward": goodness} | changes
        return gym.make_vec("rlhf_gym/TextGeneration-v0", num_envs=2, **arguments)

    envs = make()
    envs.reset(seed=0)
    _, rewards, _, _, info = envs.step(np.array([4, EOS]))
    assert "ref_logprob" not in info and rewards.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="reads the reference, and there is none"):
        make(reward="reference_logprob")
    with pytest.raises(ValueError, match="kl_coef=0.1 needs a reference"):
        make(kl_coef=0.1)
    with pytest.raises(ValueError, match="top_k and top_p are taken on the reference"):
        make(top_k=3)


def test_tokenizer_of_another_model():
    small = model()
    big = tokenizer().__class__(tokenizer_object=_big_tokenizer(), eos_token="<eos>", pad_token="<pad>")
    with pytest.raises(ValueError, match="tokenizer does not fit the model .* it has the id 52"):
        make_envs(2, model=small, tokenizer=big)


def _big_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(
        models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": 3 + i for i in range(50)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return raw


def test_empty_prompt_needs_a_bos():
    assert make_env(prompts=[""]).reset()[0]["input_ids"][0] == 1  # BOS stands for the empty prompt
    without = tokenizer().__class__(
        tokenizer_object=tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    lm = model()
    lm.config.bos_token_id = lm.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="empty and the tokenizer has no BOS"):
        make_env(model=lm, tokenizer=without, prompts=["the", ""])


def test_prompts_from_jsonl_with_columns(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "\ufeff"
        + json.dumps({"prompt": "the cat", "answer": "good"})
        + "\r\n\n"
        + json.dumps({"prompt": "a", "answer": "bad"})
        + "\n",
        encoding="utf-8",
    )
    seen = []

    def reward(completions, answer):
        seen.extend(answer)
        return [1.0] * len(completions)

    envs = make_envs(2, prompts=str(path), reward=reward)
    envs.reset(options={"prompt_index": [0, 1]})
    envs.step(np.array([EOS, EOS]))
    assert seen == ["good", "bad"]
    path.write_text('{"prompt": "the"}\n{"prompt": "a",}\n')
    with pytest.raises(ValueError, match="line 2, column"):
        make_envs(2, prompts=path)


def test_prompts_from_a_dataset():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "the cat", "answer": "x"}, {"prompt": "a", "answer": "y"}])
    envs = make_envs(2, prompts=data, reward=lambda completions, answer: [float(a == "y") for a in answer])
    envs.reset(options={"prompt_index": [0, 1]})
    assert envs.step(np.array([EOS, EOS]))[1].tolist() == [0.0, 1.0]


def test_truncate_left_keeps_the_end():
    env = make_env(prompts=["the cat sat and the dog ran"], max_prompt_tokens=2, truncate_prompts="left")
    assert tokenizer().decode(env.reset()[0]["input_ids"][:2]) == "dog ran"


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([5, V]), rf"action must be a token id in \[0, {V}\), got {V} in row 1"),
        (np.array([-1, 5]), "got -1 in row 0"),
        (np.array([5]), "integers of shape"),
        (np.array([0.5, 1.0]), "must be integers"),
    ],
)
def test_bad_action_changes_nothing(actions, message):
    envs = make_envs(2, kl_coef=0.1)
    envs.reset(seed=0)
    envs.unwrapped.announce_logprobs([-1.0, -1.0])
    before = state_of(envs)
    with pytest.raises(ValueError, match=message):
        envs.step(actions)
    assert_unchanged(before, envs)
    envs.step(np.array([5, 5]))  # the announcement was kept


def test_forbidden_action_changes_nothing():
    envs = make_envs(2, allowed_tokens=[4, 5, EOS])
    envs.reset(seed=0)
    before = state_of(envs)
    with pytest.raises(ValueError, match="action 7 in row 1 is forbidden"):
        envs.step(np.array([4, 7]))
    assert_unchanged(before, envs)


def test_step_without_announcement():
    envs = make_envs(2, kl_coef=0.1)
    envs.reset(seed=0)
    before = state_of(envs)
    with pytest.raises(ValueError, match="announce_logprobs.*before each step"):
        envs.step(np.array([5, 5]))
    assert_unchanged(before, envs)
    envs.unwrapped.announce_logprobs([-1.0, -1.0])
    envs.step(np.array([5, 5]))
    with pytest.raises(ValueError, match="announce_logprobs"):  # an accepted step consumes it
        envs.step(np.array([5, 5]))


@pytest.mark.parametrize("logprobs", [[-1.0], [0.5, -1.0], [np.nan, -1.0], np.zeros((2, V))])
def test_bad_announcement(logprobs):
    envs = make_envs(2, kl_coef=0.1)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="logprobs"):
        envs.unwrapped.announce_logprobs(logprobs)
        envs.step(np.array([5, 5]))


def _raises(completions):
    raise RuntimeError("no connection")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (_raises, "switch.*no connection"),
        (lambda completions: [1.0], "returned 1 values for 2 responses"),
        (lambda completions: [float("nan")] * len(completions), "nan|NaN"),
        (lambda completions: ["1"] * len(completions), "str"),
        (lambda completions: [True] * len(completions), "bool"),
    ],
    ids=["raises", "length", "nan", "string", "bool"],
)
@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_failing_reward_changes_nothing(reward, message, mode):
    flaky = {"reward": reward}

    def switch(completions):
        return flaky["reward"](completions)

    envs = make_envs(2, kl_coef=0.1, reward=switch, autoreset_mode=mode)
    envs.reset(seed=0)
    envs.unwrapped.announce_logprobs([-1.0, -1.0])
    before = state_of(envs)
    with pytest.raises(ValueError, match=message):
        envs.step(np.array([EOS, EOS]))
    assert_unchanged(before, envs)
    flaky["reward"] = lambda completions: [2.0] * len(completions)
    _, rewards, terminated, _, _ = envs.step(np.array([EOS, EOS]))  # same step again: nothing was lost
    assert terminated.all() and (rewards > 1).all()


def test_stepping_an_ended_row():
    envs = make_envs(2, autoreset_mode="disabled")
    envs.reset(seed=0)
    envs.step(np.array([EOS, 5]))
    with pytest.raises(ValueError, match="row 0 has ended"):
        envs.step(np.array([5, 5]))
    with pytest.raises(ValueError, match="never reset"):
        make_env().unwrapped.step(5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "the"}, "must be among"),
        ({"prompts": ["the"]}, "one prompt per row: 2, got 1"),
        ({"prompts": ["the", "the " * 20]}, r"options\['prompts'\]\[1\] has 20 tokens"),
        ({"prompt_index": 99}, r"must be in \[0, 4\), got 99"),
        ({"prompt_index": 0, "prompts": ["a", "a"]}, "not both"),
        ({"reset_mask": np.array([False, False])}, "at least one True"),
        ({"reset_mask": [1, 0]}, "bool array"),
    ],
)
def test_bad_reset_options_change_nothing(options, message):
    envs = make_envs(2)
    envs.reset(seed=0)
    envs.step(np.array([5, 6]))
    before = state_of(envs)
    with pytest.raises(ValueError, match=message):
        envs.reset(options=options)
    assert_unchanged(before, envs)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "7", [5, -1], [5, 1.5], [5, True], [5], [[5, 6]]], ids=repr)
def test_bad_seeds_change_nothing(seed):
    """All of a list is checked before its first row is seeded: the rows' orders of prompts go on as if unasked."""
    envs, unasked = make_envs(2), make_envs(2)
    for each in (envs, unasked):
        each.reset(seed=0)
        each.step(np.array([5, 6]))
    before = state_of(envs)
    with pytest.raises(ValueError, match="seed"):
        envs.reset(seed=seed)
    assert_unchanged(before, envs)
    for _ in range(5):
        np.testing.assert_array_equal(envs.reset()[1]["prompt_index"], unasked.reset()[1]["prompt_index"])


@pytest.mark.parametrize("name", ["reward", "temperature", "prompts", "top_k", "max_response_tokens", "language_model"])
@pytest.mark.parametrize("make", [make_env, make_envs])
def test_settings_other_than_kl_coef_are_fixed(name, make):
    """Set on the environment they would be stored there, and change nothing."""
    env = make().unwrapped
    with pytest.raises(AttributeError, match=f"{name} is fixed when the environment is made"):
        setattr(env, name, 1)
    env.kl_coef = 0.25
    env.render_mode, env.note = "ansi", "mine"  # what is the environment's own, or nobody's, is free
    assert (env.kl_coef, env.process.kl_coef, env.note) == (0.25, 0.25, "mine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_episode_steps", "use max_response_tokens"),
        ("temprature", "did you mean 'temperature'"),
        ("autoreset", "did you mean 'autoreset_mode'"),
        ("xyz", "arguments: model, tokenizer, prompts"),
    ],
)
def test_unknown_arguments(name, message):
    with pytest.raises(TypeError, match=f"no argument '{name}'.*{message}"):
        make_envs(2, **{name: 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_mask": np.array([[True, False, True]])}, "prefix"),
        ({"response_mask": np.zeros((1, 3), bool)}, "at least one token"),
        ({"response_ids": np.array([[4, EOS, 5]])}, "nothing may follow"),
        ({"response_ids": np.array([[4, 5, 6]])}, "must be finished"),
        ({"response_ids": np.array([[4, 5, V]])}, rf"response tokens must be in \[0, {V}\)"),
        ({"logprobs": None}, "logprobs are needed"),
        ({"prompt_index": [99]}, "prompt_index, row 0"),
        ({"prompt_index": [1]}, "not the tokens of prompt 1"),
        ({"prompt_ids": [[]]}, "1 to max_prompt_tokens"),
        ({"prompt_ids": [[4, V]], "prompt_index": [-1]}, r"prompt_ids, row 0: tokens must be in \[0, 14\)"),
        ({"prompt_ids": [[-1, 4]], "prompt_index": [-1]}, "prompt_ids, row 0: tokens"),
        ({"prompt_ids": [np.array([4.7])], "prompt_index": [-1]}, "prompt_ids, row 0, must be integers"),
        ({"response_ids": np.array([[4.7, 5.0, EOS]])}, "response_ids must be integers, got torch.float64"),
        ({"response_ids": np.array([[4, 13, EOS]])}, r"row 0: a token is forbidden \(allowed_tokens\)"),
        ({"logprobs": np.array([[-1.0, 0.5, -1.0]])}, "row 0: log-probs must be finite and <= 0"),
        ({"logprobs": np.array([[-1.0, np.nan, -1.0]])}, "row 0: log-probs must be finite and <= 0"),
        ({"logprobs": np.full((1, 3, V), -1.0)}, "row 0: log-probs over the vocabulary must be normalised"),
    ],
)
def test_evaluate_responses_refuses(change, message):
    envs = make_envs(1, kl_coef=0.1, allowed_tokens=[EOS, *range(4, 13)])
    good = {
        "prompt_ids": [tokenizer()("the cat")["input_ids"]],
        "response_ids": np.array([[4, 5, EOS]]),
        "response_mask": np.ones((1, 3), bool),
        "logprobs": np.full((1, 3), -1.0),
        "prompt_index": [0],
    }
    envs.unwrapped.evaluate_responses(**good)
    with pytest.raises(ValueError, match=message):
        envs.unwrapped.evaluate_responses(**{**good, **change})


def test_evaluate_responses_knows_allowed_tokens_without_a_reference():
    envs = gym.make_vec(
        "rlhf_gym/TextGeneration-v0", num_envs=1, tokenizer=tokenizer(), prompts=["the"], reward=goodness,
        allowed_tokens=[4, EOS],
    )  # fmt: skip
    mask = np.ones((1, 2), bool)
    assert envs.unwrapped.evaluate_responses([[4]], np.array([[4, EOS]]), mask).scores.tolist() == [1.0]
    with pytest.raises(ValueError, match="row 0: a token is forbidden"):
        envs.unwrapped.evaluate_responses([[4]], np.array([[5, EOS]]), mask)


def test_columns_need_the_prompt_index():
    envs = make_envs(
        1,
        prompts=[{"prompt": "the", "answer": "x"}],
        reward=lambda completions, answer: [float(a == "x") for a in answer],
    )
    arguments = ([tokenizer()("the")["input_ids"]], np.array([[EOS]]), np.array([[True]]))
    assert envs.unwrapped.evaluate_responses(*arguments, prompt_index=[0]).scores.tolist() == [1.0]
    with pytest.raises(ValueError, match="prompt_index"):
        envs.unwrapped.evaluate_responses(*arguments)
