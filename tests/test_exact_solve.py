"""The exact optimum against enumeration of all responses, published values and its own identities (F1 to F7)."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from exact_worlds import random_world, response_ids
from worlds import make_envs

from rlhf_gym.exact import best_of_n, certificate, evaluate, frontier, plugin_objective, solve, tabular_policy
from rlhf_gym.exact.samples import best_of_n_of, score_distribution
from rlhf_gym.exact.solve import process_of, solve_graph, task_graph
from rlhf_gym.exact.tree import prefix_tree
from rlhf_gym.lm import response_logprobs

# beta: J*, E[r], KL, each to 5 digits.
WOAINI = {
    1.0: (0.34528, 0.46190, 0.11662),
    0.5: (0.46478, 0.70000, 0.47046),
    0.2: (0.71880, 0.97911, 1.30155),
    0.1: (0.85730, 0.99986, 1.42554),
    0.05: (0.92864, 1.0, 1.42712),
    0.02: (0.97146, 1.0, 1.42712),
}


@pytest.fixture(scope="module")
def woaini():
    return gym.make("rlhf_gym/WoAiNi-v0")


@pytest.mark.parametrize("beta", WOAINI)
def test_woaini_to_five_digits(woaini, beta):
    solution = solve(woaini, beta)
    np.testing.assert_allclose((solution.objective, solution.reward, solution.kl), WOAINI[beta], atol=5.1e-6)
    assert solution.reference_objective == pytest.approx(0.24, abs=1e-7)


def test_other_published_optima():
    """J* of the variants of Brackets and Recall at beta = .3, to three digits."""
    brackets = gym.make("rlhf_gym/Brackets-v0", max_response_tokens=8)
    recall = gym.make("rlhf_gym/Recall-v0", num_states=3, max_response_tokens=6)
    assert solve(brackets, 0.3).objective == pytest.approx(0.095, abs=5e-4)
    assert solve(recall, 0.3).objective == pytest.approx(0.642, abs=5e-4)


@pytest.mark.parametrize("seed", range(24))
def test_optimum_equals_enumeration(seed):
    world, beta = random_world(seed), (0.3, 1.0, 0.05)[seed % 3]
    objective, reward, kl, _ = world.optimum(beta)
    solution = solve(world.env, beta)
    np.testing.assert_allclose(solution.objectives, objective, atol=2e-6)  # the model's own log-probs are float32
    np.testing.assert_allclose(solution.rewards, reward, atol=2e-5)
    np.testing.assert_allclose(solution.kls, kl, atol=2e-4)
    np.testing.assert_allclose(solution.reference_objectives, (world.prob * world.score).sum(1), atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_states_and_prefixes_agree(seed):
    """The same task once through merged states and once through all prefixes, to float64."""
    process = process_of(random_world(100 + seed).env)
    states, prefixes = solve_graph(task_graph(process), 0.3), solve_graph(prefix_tree(process), 0.3)
    assert states.graph.num_states <= prefixes.graph.num_states
    assert states.graph.num_prefixes() == prefixes.graph.num_prefixes()
    for name in ("objectives", "rewards", "kls", "reference_objectives"):
        np.testing.assert_allclose(getattr(states, name), getattr(prefixes, name), atol=1e-12)


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"top_k": 1}, {"top_p": 0.7}, {"allowed_tokens": [0, 1]}])
def test_temperature_and_filters_change_the_reference(change):
    """The reference of the objective is the processed one: its J* by enumeration of what the environment itself says."""
    env = gym.make("rlhf_gym/Brackets-v0", max_response_tokens=4, **change)
    beta, z = 0.3, 0.0
    for code in range(3**4):
        response = [code // 3**i % 3 for i in range(4)]
        response = response[: response.index(2) + 1] if 2 in response else response
        if any(code // 3**i % 3 for i in range(len(response), 4)):
            continue  # one code per response
        mask = np.ones((1, len(response)), dtype=bool)
        prompt = [env.unwrapped.prompts[0].ids]
        try:
            result = env.unwrapped.evaluate_responses(prompt, np.array([response]), mask)
        except ValueError as error:
            assert "forbidden" in str(error)
            continue
        z += np.exp(result.ref_logprobs.sum() + result.scores[0] / beta)
    assert solve(env, beta).objective == pytest.approx(beta * np.log(z), abs=1e-6)


def test_any_reference_and_reward_by_prefixes():
    """A random GPT-2 with a Python function as reward: against a Monte-Carlo-free enumeration of its own."""
    envs = make_envs(1, max_response_tokens=2, reward=lambda text: len(text) / 10, prompts=["the cat", "the"])
    beta, model = 0.4, envs.unwrapped.language_model.model
    expected = []
    for prompt in envs.unwrapped.prompts:
        first = torch.log_softmax(model(input_ids=prompt.ids[None]).logits[0, -1].double(), -1)
        z = 0.0
        for a, logprob in enumerate(first.tolist()):
            ids = torch.cat([prompt.ids, torch.tensor([a])])
            second = torch.log_softmax(model(input_ids=ids[None]).logits[0, -1].double(), -1)
            for b, other in [(None, 0.0)] if a == 2 else list(enumerate(second.tolist())):
                text = envs.unwrapped.tokenizer.decode([x for x in (a, b) if x is not None], skip_special_tokens=True)
                z += np.exp(logprob + other + len(text) / 10 / beta)
        expected.append(beta * np.log(z))
    np.testing.assert_allclose(solve(envs, beta).objectives, expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_envelope_and_frontier(seed):
    """F5: dJ*/dbeta = -KL, dE[r]/dKL = beta, and the frontier is concave."""
    env, step = random_world(seed).env, 1e-4
    for beta in (0.2, 0.7):
        low, mid, high = (solve(env, b) for b in (beta - step, beta, beta + step))
        assert (high.objective - low.objective) / (2 * step) == pytest.approx(-mid.kl, abs=1e-5)
        if mid.kl > 1e-3:
            assert (high.reward - low.reward) / (high.kl - low.kl) == pytest.approx(beta, abs=1e-4)
    curve = frontier(env, np.geomspace(0.05, 5, 30))
    order = np.argsort(curve.kl)
    kl, reward = curve.kl[order], curve.reward[order]
    for i in range(1, len(kl) - 1):  # no point below the chord of its neighbours
        if kl[i + 1] - kl[i - 1] > 1e-6:
            share = (kl[i] - kl[i - 1]) / (kl[i + 1] - kl[i - 1])
            assert reward[i] >= (1 - share) * reward[i - 1] + share * reward[i + 1] - 1e-7


def test_values_follow_the_token_form(woaini):
    """F3 by hand at beta 1: after 我爱 the value is log(1 + .6 (e - 1)), V(s_0) = J*, pi* is normalised."""
    solution = solve(woaini, 1.0)
    values = np.sort(solution.values[2])
    assert values[-1] == pytest.approx(np.log(1 + 0.6 * (np.e - 1)), abs=1e-6)
    np.testing.assert_allclose(values[:-1], 0, atol=1e-12)
    assert solution.values[0][solution.graph.roots[0]] == solution.objective
    for t in range(len(solution.graph.layers)):
        np.testing.assert_allclose(np.exp(solution.logprobs(t)).sum(1), 1, atol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_token_form_by_enumeration(seed):
    """F2 and F3: pi* of each token, given what came before, is the share of pi* of the whole responses that go on so;
    and V(s_0) = J*."""
    world, beta = random_world(seed), 0.4
    objective, _, _, optimum = world.optimum(beta)
    solution = solve(world.env, beta)
    graph, vocabulary = solution.graph, world.env.tokenizer.get_vocab()
    np.testing.assert_allclose(solution.values[0][graph.roots], objective, atol=2e-6)
    for p, policy in enumerate(optimum):
        mass: dict[tuple[str, ...], float] = {}
        for response, probability in zip(world.responses, policy, strict=True):
            for t in range(len(response) + 1):
                mass[response[:t]] = mass.get(response[:t], 0.0) + probability
        for response, probability in zip(world.responses, policy, strict=True):
            node = graph.roots[p]
            for t, word in enumerate(response if probability else ()):
                expected = np.log(mass[response[: t + 1]] / mass[response[:t]])
                assert solution.logprobs(t)[node, vocabulary[word]] == pytest.approx(expected, abs=2e-5)
                node = graph.layers[t].children[node, vocabulary[word]]


def test_gold_rises_and_falls():
    env = gym.make("rlhf_gym/Goodhart-v0")
    curve = frontier(env, np.geomspace(10, 0.1, 100))
    gold, peak = curve.metrics["gold"], int(curve.metrics["gold"].argmax())
    assert 0.2 < curve.kl[peak] < 0.3
    assert (np.diff(gold[: peak + 1]) > 0).all() and (np.diff(gold[peak:]) < 1e-6).all()
    assert gold[peak] > gold[0] + 0.08 and gold[-1] < gold[0] - 2
    assert (np.diff(curve.reward) > 0).all()
    beta = float(curve.kl_coef[peak])
    assert solve(env, beta).expected("gold") == pytest.approx(gold[peak], abs=1e-9)


def test_gold_by_enumeration():
    """Two words long: E[gold] under pi* by summing over all responses."""
    env = gym.make("rlhf_gym/Goodhart-v0", max_response_tokens=2)
    beta, words = 0.5, list(env.unwrapped.tokenizer.get_vocab())
    row = {c: {"great": 0.3 if c == "great" else 0.12, "<eos>": 0.1} for c in words}
    for context, probs in row.items():
        if context not in ("great", "<eos>"):
            probs[context] = 0.1
        rest = (1 - sum(probs.values())) / (len(words) - len(probs))
        row[context] = {word: probs.get(word, rest) for word in words}
    z = gold = 0.0
    for a in words:
        for b in [None] if a == "<eos>" else words:
            weight = row["<eos>"][a] * (1.0 if b is None else row[a][b])
            count = (a == "great") + (b == "great")
            weight *= np.exp(count / beta)
            z += weight
            gold += weight * (min(count, 2) - (a == b))
    assert solve(env, beta).expected("gold") == pytest.approx(gold / z, abs=1e-6)


def test_best_of_n():
    env = gym.make("rlhf_gym/WoAiNi-v0")
    found = best_of_n(env, [1, 2, 64])
    np.testing.assert_allclose(found.reward, [0.24, 1 - 0.76**2, 1 - 0.76**64], atol=1e-6)
    np.testing.assert_allclose(found.kl[[0, 2]], [0, 1.427], atol=5e-4)  # log 64 - 63/64 would be 3.17
    for reward, kl in zip(found.reward, found.kl, strict=True):  # a binary score: exactly on the frontier
        odds = reward / (1 - reward) / (0.24 / 0.76)
        if odds > 1:
            solution = solve(env, 1 / np.log(odds))
            np.testing.assert_allclose((solution.reward, solution.kl), (reward, kl), atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_best_of_n_equals_enumeration(seed):
    """N = 2 by going through all pairs of responses; the KL is that of the resulting policy over responses."""
    world = random_world(seed)
    found = best_of_n(world.env, [2])
    rewards, kls = [], []
    for prob, score in zip(world.prob, world.score, strict=True):
        score = np.round(score, 9)
        policy = np.zeros_like(prob)
        for i, j in np.ndindex(len(prob), len(prob)):
            policy[i if score[i] >= score[j] else j] += prob[i] * prob[j]
        real = policy > 0
        rewards.append((policy * score).sum())
        kls.append((policy[real] * np.log(policy[real] / prob[real])).sum())
    np.testing.assert_allclose(found.reward, np.mean(rewards), atol=1e-6)
    np.testing.assert_allclose(found.kl, np.mean(kls), atol=1e-5)


def test_best_of_n_bound():
    """Without ties the KL is log N - (N - 1) / N; with them below it."""
    many = np.full(200_000, 1 / 200_000)
    for n in (2, 16, 256):
        bound = np.log(n) - (n - 1) / n
        assert best_of_n_of(np.arange(200_000.0), many, n)[1] == pytest.approx(bound, abs=2e-3)
        assert best_of_n_of(np.arange(3.0), np.array([0.2, 0.5, 0.3]), n)[1] < bound


def test_best_of_one_is_the_reference():
    """Its KL is 0, and rounding never makes one negative; the plain sum of q log(q / p) it does."""
    rng, plain = np.random.default_rng(0), []
    for _ in range(300):
        probs = rng.dirichlet(np.ones(5))
        reward, kl = best_of_n_of(np.arange(5.0), probs, 1)
        assert reward == pytest.approx(probs @ np.arange(5)) and 0 <= kl < 1e-15
        above = np.append(np.cumsum(probs[::-1])[::-1], 0.0)
        best = -np.diff(np.minimum(above, 1.0))
        plain.append((best * np.log(best / probs)).sum())
    assert min(plain) < 0
    for task in ("Lexicon", "Recall", "Difficulty"):
        assert 0 <= best_of_n(gym.make(f"rlhf_gym/{task}-v0"), [1]).kl[0] < 1e-15


def test_best_of_n_by_hand():
    """F = .2, .7, 1, so the best of three is the lowest in .008 of all cases, the middle in .335, the highest in .657;
    of a million it is the highest in all of them, to more digits than there are."""
    scores, probs = np.array([-1.0, 0.0, 2.0]), np.array([0.2, 0.5, 0.3])
    kl = 0.008 * np.log(0.008 / 0.2) + 0.335 * np.log(0.335 / 0.5) + 0.657 * np.log(0.657 / 0.3)
    assert best_of_n_of(scores, probs, 3) == pytest.approx((2 * 0.657 - 0.008, kl), abs=1e-15)
    assert best_of_n_of(scores, probs, 10**6) == pytest.approx((2.0, -np.log(0.3)), abs=1e-15)


def test_score_distribution_sums_dense_rewards():
    world = random_world(next(s for s in range(50) if random_world(s).env.reward.dense))
    graph = task_graph(world.env)
    scores, probs = score_distribution(graph, int(graph.roots[0]))
    expected: dict[float, float] = {}
    for score, prob in zip(np.round(world.score[0], 9), world.prob[0], strict=True):
        if prob:
            expected[float(score)] = expected.get(float(score), 0.0) + prob
    np.testing.assert_allclose(scores, sorted(expected), atol=1e-9)
    np.testing.assert_allclose(probs, [expected[s] for s in sorted(expected)], atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_certificate_is_zero_at_the_optimum_only(seed):
    """F6 on the exact distribution: every response once, S from enumeration."""
    world, beta = random_world(seed), 0.4
    objective, _, _, policy = world.optimum(beta)
    for p in range(len(objective)):
        real = world.prob[p] > 0
        scores, ref = world.score[p][real], np.log(world.prob[p][real])
        found = certificate(scores, np.log(policy[p][real]), ref, kl_coef=beta)
        assert found.variance == pytest.approx(0, abs=1e-20)
        assert found.objective == pytest.approx(objective[p], abs=1e-9)
        if np.ptp(scores) > 0:
            assert certificate(scores, ref, ref, kl_coef=beta).low > 0 or len(scores) < 8


@pytest.mark.parametrize("seed", range(6))
def test_certificate_of_any_policy(seed):
    """F6 and F1 without sampling noise: S has the mean J under every policy, and varies under all but the optimum."""
    world, beta = random_world(seed), 0.4
    ids, mask = (torch.from_numpy(x) for x in response_ids(world))
    random_policy = tabular_policy(world.env)
    random_policy.lm_head.residual.data.normal_(generator=torch.Generator().manual_seed(seed))
    for policy, is_optimal in ((random_policy, False), (solve(world.env, beta).policy, True)):
        found = evaluate(policy, world.env, beta)
        for p, prompt in enumerate(world.env.prompts):
            real = world.prob[p] > 0
            logprobs = response_logprobs(policy, [prompt.ids] * len(ids), ids, mask).double().sum(1).numpy()[real]
            s = world.score[p][real] - beta * (logprobs - np.log(world.prob[p][real]))
            mean = np.exp(logprobs) @ s
            variance = np.exp(logprobs) @ (s - mean) ** 2
            assert found.objectives[p] == pytest.approx(mean, abs=1e-5)
            assert variance < 1e-9 if is_optimal or real.sum() == 1 else variance > 1e-4


def test_certificate_numbers():
    """Two prompts by hand: S = 1, 3 and 10, 10, 16; variances 2 and 12 within them."""
    s = np.array([1.0, 3.0, 10.0, 10.0, 16.0])
    logprobs = np.array([-1.0, -2.0, -3.0, -1.5, -0.5])
    scores = s + 0.5 * (logprobs - 2 * logprobs)
    found = certificate(scores, logprobs, 2 * logprobs, kl_coef=0.5, prompt_index=[7, 7, 3, 3, 3])
    assert found.objective == pytest.approx(8.0)
    assert found.variance == pytest.approx((2 * 2 + 3 * 12) / 5)
    assert found.low < found.variance < found.high and found.num_samples == 5
    # beta^2 Var[log pi/pi*] / (2 beta) comes to the regret as pi comes to pi*: one token, pi* = (.5, .5), pi = (.51, .49).
    draws = np.random.default_rng(0).random(20_000) < 0.51
    chosen = np.where(draws, np.log(0.51), np.log(0.49))
    near = certificate(np.zeros(len(draws)), chosen, np.full(len(draws), np.log(0.5)), kl_coef=0.2)
    regret = 0.2 * (0.51 * np.log(0.51 / 0.5) + 0.49 * np.log(0.49 / 0.5))
    assert near.regret_estimate == pytest.approx(regret, rel=0.02)


def test_plugin_objective():
    scores = np.array([0.0, 1.0, 1.0, 0.0])
    found = plugin_objective(scores, kl_coef=0.5)
    assert found.objective == pytest.approx(0.5 * np.log((2 + 2 * np.e**2) / 4))
    assert found.effective_samples == pytest.approx((2 + 2 * np.e**2) ** 2 / (2 + 2 * np.e**4))
    assert not found.reliable
    assert plugin_objective(np.zeros(100), kl_coef=0.5).reliable
    assert plugin_objective([1000.0, 0.0], kl_coef=0.01).objective == pytest.approx(1000 - 0.01 * np.log(2))
    both = plugin_objective([0.0, 0.0, 3.0], kl_coef=1.0, prompt_index=[0, 0, 1])
    assert both.objective == pytest.approx(1.5) and both.effective_samples == 1


def test_refusals(woaini):
    for kl_coef in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="kl_coef must be a finite number > 0"):
            solve(woaini, kl_coef)
    with pytest.raises(ValueError, match=r"more than 1,000 prefixes.*certificate"):
        solve(make_envs(1), 0.1, max_prefixes=1000)
    with pytest.raises(TypeError, match="text-generation environment"):
        solve(gym.make("CartPole-v1"), 0.1)
    with pytest.raises(ValueError, match="ns must be"):
        best_of_n(woaini, [0])
    with pytest.raises(ValueError, match="one shape"):
        certificate([1.0, 2.0], [[0.0], [0.0]], [0.0, 0.0], kl_coef=0.1)
    with pytest.raises(ValueError, match="no prompt has two"):
        certificate([1.0, 2.0], [0.0, 0.0], [0.0, 0.0], kl_coef=0.1, prompt_index=[0, 1])


def test_a_hundred_thousand_states():
    """Contexts x automata x positions, solved in a moment; the closed form of a score that counts one word."""
    from rlhf_gym.envs.scalar import TextGenerationEnv
    from rlhf_gym.exact import length_window, ngram_from_table, word_scores

    words = [f"w{i}" for i in range(20)]
    model = ngram_from_table({w: dict.fromkeys(words, 0.05) for w in words}, eos=None)
    reward = {word_scores({"w0": 1.0}, cap=1000.0): 1.0, length_window(0, 500): 0.5}
    env = TextGenerationEnv(model=model, reward=reward, prompts=["w0"], max_response_tokens=100)
    solution = solve(env, 0.5)
    assert solution.graph.num_states > 90_000
    # Tokens are independent: J* = n beta log(1 + p (e^{1/beta} - 1)) + .5.
    assert solution.objective == pytest.approx(100 * 0.5 * np.log(1 + 0.05 * (np.exp(2) - 1)) + 0.5, rel=1e-6)
