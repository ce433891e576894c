"""The registered tasks: conformant environments, the numbers that they promise, metrics that are seen and not paid."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from worlds import make_envs

import rlhf_gym
from rlhf_gym.exact import (
    evaluate,
    keywords,
    length_window,
    ngram_from_corpus,
    residual_policy,
    solve,
    tabular_policy,
)
from rlhf_gym.lm import generate, make_engine
from rlhf_gym.registration import EXACT_TASKS

STATES = {"WoAiNi": 22, "Brackets": 53, "Lexicon": 271, "Recall": 165, "Goodhart": 66, "Difficulty": 24}


@pytest.fixture(scope="module", params=EXACT_TASKS)
def task_id(request) -> str:
    return request.param


def test_ids_are_the_published_six():
    assert {name.removeprefix("rlhf_gym/").removesuffix("-v0") for name in EXACT_TASKS} == set(STATES)


def test_number_of_states(task_id):
    """As published, but for WoAiNi: of its 40 unfinished texts only these are possible."""
    name = task_id.removeprefix("rlhf_gym/").removesuffix("-v0")
    assert solve(gym.make(task_id), 0.3).graph.num_states == STATES[name]


def test_gymnasium_and_sb3_check_env(task_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for check in (check_env, sb3_check_env):
            env = gym.make(task_id).unwrapped
            if env.forbids_tokens:
                env.action_space = LegalActions(env)
            check(env)


class LegalActions(gym.spaces.Discrete):
    """Samples what ``action_masks`` allows; the checkers know nothing of masks."""

    def __init__(self, env):
        super().__init__(int(env.action_space.n))
        self.env = env

    def sample(self, mask=None, probability=None):
        return super().sample(self.env.action_masks().astype(np.int8))


@pytest.mark.parametrize(
    ("task", "mode"),
    [
        ("WoAiNi", "next_step"),
        ("WoAiNi", "same_step"),
        ("Brackets", "disabled"),
        ("Lexicon", "next_step"),
        ("Recall", "next_step"),
        ("Goodhart", "same_step"),
        ("Difficulty", "disabled"),
    ],
)
def test_check_vector_env(task, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rlhf_gym.check_vector_env(gym.make_vec(f"rlhf_gym/{task}-v0", num_envs=2, autoreset_mode=mode))


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_stepping_equals_whole_responses(task_id, kl_coef):
    """Random responses of a random policy, token by token and at once, metrics included."""
    envs = gym.make_vec(task_id, num_envs=8, kl_coef=kl_coef, autoreset_mode="disabled")
    base = envs.unwrapped
    policy = tabular_policy(envs)
    policy.lm_head.residual.data.normal_(generator=torch.Generator().manual_seed(1))
    _, info = envs.reset(seed=3)
    prompts = [base.prompts[i].ids for i in info["prompt_index"]]
    responses = generate(
        make_engine(policy, 8, base.max_tokens), prompts, max_response_tokens=base.max_response_tokens,
        eos_token_ids=base.eos_token_ids,
        uniforms=torch.rand(8, base.max_response_tokens, generator=torch.Generator().manual_seed(2)),
    )  # fmt: skip
    ids, mask = responses.response_ids.numpy(), responses.response_mask.numpy()
    logprobs = responses.logprobs.numpy()
    whole = base.evaluate_responses(prompts, ids, mask, logprobs, info["prompt_index"])
    for row in range(8):  # one at a time: the others would have to wait for it
        envs.reset(options={"prompt_index": info["prompt_index"]})
        for t in range(int(mask[row].sum())):
            base.announce_logprobs(np.full(8, logprobs[row, t]))
            prefix = {"reset_mask": np.arange(8) != row}
            actions = np.array([int(base.action_masks()[r].argmax()) for r in range(8)])
            actions[row] = ids[row, t]
            _, rewards, ended, _, end = envs.step(actions)
            assert rewards[row] == pytest.approx(whole.rewards[row, t], abs=1e-5)
            assert end["ref_logprob"][row] == pytest.approx(whole.ref_logprobs[row, t], abs=1e-5)
            assert ended[row] == (t + 1 == mask[row].sum())
            if ended[row]:
                assert end["score"][row] == pytest.approx(whole.scores[row], abs=1e-6)
                for name, values in whole.metrics.items():
                    assert end[f"metric/{name}"][row] == pytest.approx(values[row], abs=1e-6)
            else:
                envs.reset(options=prefix)


def test_woaini_text_and_masks():
    env = gym.make("rlhf_gym/WoAiNi-v0")
    vocabulary = env.unwrapped.tokenizer.get_vocab()
    env.reset(seed=0)
    for word, legal in zip("我爱你", (4, 4, 1), strict=True):
        _, reward, ended, _, info = env.step(vocabulary[word])
        assert info["action_mask"].sum() == legal and info["action_mask"].dtype == np.int8 and not ended
    with pytest.raises(ValueError, match="impossible under the reference"):
        env.step(vocabulary["我"])
    _, reward, ended, _, info = env.step(vocabulary["。"])
    assert (reward, ended, info["stop_reason"], info["response"]) == (1.0, True, "eos", "我爱你。")
    assert info["ref_logprob"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("task", "words", "score"),
    [
        ("Brackets", "( ( ) ) <eos>", 1.0),
        ("Brackets", "( ) <eos>", 0.0),
        ("Brackets", "( ) ) ( <eos>", 0.0),
        ("Brackets", "( ) ( ) ( ) ( ) ( ) ( )", 0.0),  # balanced, but not ended
        ("Lexicon", "superb weak film <eos>", 0.6),
        ("Recall", "b c d a b c d a b c d b", 1.0),
        ("Recall", "b c d a b c d a b c d a", 0.0),
        ("Goodhart", "great great great film <eos>", 3.0),
        ("Difficulty", "right easy", 1.0),
        ("Difficulty", "easy right", 0.0),
    ],
)
def test_scores_by_hand(task, words, score):
    env = gym.make(f"rlhf_gym/{task}-v0").unwrapped
    ids = np.array([env.tokenizer.convert_tokens_to_ids(words.split())])
    result = env.evaluate_responses([env.prompts[0].ids], ids, np.ones_like(ids, dtype=bool))
    assert result.scores[0] == pytest.approx(score, abs=1e-6)
    if task == "Goodhart":
        assert result.metrics["gold"][0] == pytest.approx(2 - 2)


def test_difficulty_rates():
    solution = solve(gym.make("rlhf_gym/Difficulty-v0"), 0.3)
    np.testing.assert_allclose(solution.reference_objectives, [0.9, 0.5, 0.1, 0.01], atol=1e-6)
    rates = solution.reference_objectives  # each prompt is a binary task of its own
    np.testing.assert_allclose(solution.objectives, 0.3 * np.log1p(rates * np.expm1(1 / 0.3)), atol=1e-6)


def test_metrics_are_reported_and_never_paid():
    def gold(completions):
        return [7.0 + len(text) for text in completions]

    arguments = {"metrics": {"gold": gold, "one": lambda text: 1.0}, "reward": lambda text: 0.5}
    for mode in ("next_step", "same_step", "disabled"):
        envs = make_envs(2, max_response_tokens=1, autoreset_mode=mode, **arguments)
        envs.reset(seed=0)
        _, rewards, _, _, info = envs.step(np.array([4, 2]))
        info = info["final_info"] if mode == "same_step" else info
        assert rewards.tolist() == [0.5, 0.5]
        assert info["metric/gold"].tolist() == [7.0 + len("good"), 7.0] and info["metric/one"].tolist() == [1.0, 1.0]
        assert info["_metric/gold"].all() and "score/gold" not in info
    needy = {"gold": lambda prompts, completions, target: [0.0] * len(prompts)}
    with pytest.raises(ValueError, match="column 'target'"):
        make_envs(1, metrics=needy)


def test_task_settings_and_overrides():
    env = gym.make("rlhf_gym/Recall-v0", num_states=3, max_response_tokens=5, kl_coef=0.1).unwrapped
    assert (env.vocab_size, env.max_response_tokens, env.kl_coef) == (3, 5, 0.1)
    one, other = (solve(gym.make("rlhf_gym/Lexicon-v0", seed=s), 1.0).objective for s in (0, 1))
    assert one != other
    assert solve(gym.make("rlhf_gym/Lexicon-v0"), 1.0).objective == one
    with pytest.raises(ValueError, match="num_states must be"):
        gym.make("rlhf_gym/Recall-v0", num_states=1)
    envs = gym.make_vec("rlhf_gym/Goodhart-v0", num_envs=2, reward=lambda text: 0.0)
    assert envs.unwrapped.reward.names == ("lambda",) and residual_policy(envs).config.vocab_size == 14


def test_a_task_of_ones_own():
    """A corpus, a reward of automata, one id: solved, evaluated and trained like the registered ones."""
    texts = ["the room was clean and the staff kind", "the staff was rude", "the room was small but clean and kind"]
    reward = {keywords(["clean", "kind"], every=True): 1.0, length_window(3, 8): 0.5}
    arguments = {"model": ngram_from_corpus(texts, order=3), "reward": reward, "prompts": ["the room", "the staff"]}
    envs = gym.make_vec("rlhf_gym/TextGeneration-v0", num_envs=4, max_response_tokens=10, kl_coef=0.2, **arguments)
    solution = solve(envs, 0.2)
    assert solution.reference_objective < solution.objective < solution.reward < 1.5
    assert evaluate(solution.policy, envs).normalised == pytest.approx(1, abs=1e-9)
    single = gym.make("rlhf_gym/TextGeneration-v0", max_response_tokens=10, **arguments)
    assert solve(single, 0.2).objective == solution.objective
    assert "frozenset" in solution.graph.layers[-1].labels(0)  # for people: the states behind a node
