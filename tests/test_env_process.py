"""The process: rewards, ends, KL, whole responses against stepping, copies, prompts (CORRECTNESS 8-10, 22-27)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import EOS, PROMPTS, V, make_env, make_envs, model, tokenizer

LENGTH = 6


def play(envs, actions, logprobs=None):
    """Step the rows through (N, R) actions once; returns rewards, ref log-probs, and each row's end info. Rows that end
    early are left alone (disabled mode)."""
    n, steps = actions.shape
    rewards, refs, ends = np.zeros((n, steps)), np.zeros((n, steps)), [None] * n
    process = envs.unwrapped.process
    for t in range(steps):
        active = ~process.ended
        if not active.any():
            break
        if logprobs is not None:
            process.announce_logprobs(logprobs[:, t])
        transition = process.step(actions[:, t], active)
        rewards[:, t] = transition.rewards.numpy()
        refs[:, t] = transition.ref_logprobs.numpy()
        for i, row in enumerate(transition.ended_rows):
            ends[row] = (t + 1, float(transition.scored.totals[i]), float(transition.kl[i]))
    return rewards, refs, ends


def reference_logprobs(lm, prompt, response):
    """One row alone through the plain model: the independent answer."""
    with torch.no_grad():
        logits = lm(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)[torch.arange(len(response)), torch.tensor(response)].numpy()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lstm"])
def test_reference_logprobs_are_the_models_own(kind):
    lm = model(kind)
    envs = make_envs(model=lm, max_response_tokens=LENGTH)
    envs.reset(seed=3)
    prompts = [p.ids.tolist() for p in envs.unwrapped.process.row_prompts]
    actions = np.random.default_rng(0).integers(3, V, size=(4, LENGTH))
    _, refs, ends = play(envs, actions)
    for row in range(4):
        assert ends[row][0] == LENGTH
        np.testing.assert_allclose(refs[row], reference_logprobs(lm, prompts[row], actions[row].tolist()), atol=1e-5)


def test_rewards_by_hand():
    """Score of "good good bad" is 1; two of three tokens carry only the penalty, the last one both; EOS is a token that
    counts."""
    lm = model()
    env = make_env(model=lm, kl_coef=0.1)
    env.reset(seed=0, options={"prompts": "the cat"})
    good, bad = tokenizer().convert_tokens_to_ids(["good", "bad"])
    response = [good, good, bad, EOS]
    expected_kl = -1.0 - reference_logprobs(lm, tokenizer()("the cat")["input_ids"], response)
    rewards = []
    for token in response:
        env.unwrapped.announce_logprobs(-1.0)
        _, reward, terminated, truncated, info = env.step(token)
        rewards.append(reward)
    assert terminated and not truncated
    np.testing.assert_allclose(rewards, [0, 0, 0, 1] - 0.1 * expected_kl, atol=1e-5)
    assert (
        info["score"] == 1.0
        and info["stop_reason"] == "eos"
        and info["response"] == "good good bad"
        and info["prompt"] == "the cat"
    )
    assert info["kl"] == pytest.approx(expected_kl.sum(), abs=1e-5)


def test_length_limit_terminates_and_pays():
    env = make_env(max_response_tokens=2, missing_eos_penalty=0.5)
    env.reset(seed=0)
    assert env.step(4)[1:4] == (0.0, False, False)
    _, reward, terminated, truncated, info = env.step(4)
    assert (reward, terminated, truncated) == (2 - 0.5, True, False)
    assert info["stop_reason"] == "length" and info["score/missing_eos_penalty"] == -0.5 and info["score"] == 1.5


def test_missing_eos_penalty_spares_rows_with_eos():
    env = make_env(max_response_tokens=2, missing_eos_penalty=0.5)
    env.reset(seed=0)
    env.step(4)
    _, reward, terminated, _, info = env.step(EOS)
    assert (reward, terminated, info["stop_reason"], info["score/missing_eos_penalty"]) == (1.0, True, "eos", 0.0)


def test_pad_may_equal_eos():
    """The end is told by the action, not by the id in the buffer: prompts and responses may contain the pad id."""
    tok = tokenizer()
    import copy

    same = copy.deepcopy(tok)
    same.pad_token = "<eos>"
    envs = make_envs(2, tokenizer=same)
    assert envs.unwrapped.pad_token_id == EOS
    obs, _ = envs.reset(seed=0)
    assert (obs["attention_mask"].sum(1) == [len(p.ids) for p in envs.unwrapped.process.row_prompts]).all()
    _, _, terminated, _, _ = envs.step(np.array([5, 5]))
    assert not terminated.any()


responses = st.lists(st.integers(3, V - 1), min_size=0, max_size=LENGTH)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(responses, min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["gpt2", "llama", "lstm"]),
    kl_coef=st.sampled_from([0.0, 0.3]),
    estimator=st.sampled_from(["k1", "k3", "exact"]),
    term=st.sampled_from(["both", "reference"]),
    penalty=st.sampled_from([0.0, 0.7]),
    dense=st.booleans(),
    temperature=st.sampled_from([1.0, 0.6]),
)
def test_whole_responses_equal_stepping(rows, seed, kind, kl_coef, estimator, term, penalty, dense, temperature):
    def per_token(completion_ids):
        return [[0.25 * (i % 3) - 0.1 * t for t, i in enumerate(ids)] for ids in completion_ids]

    per_token.dense = dense

    def reward(completion_ids):
        dense_rows = per_token(completion_ids)
        return dense_rows if dense else [sum(row) for row in dense_rows]

    reward.dense = dense
    envs = make_envs(
        model=model(kind, seed=seed % 7), reward=reward, kl_coef=kl_coef, kl_term=term, max_response_tokens=LENGTH,
        missing_eos_penalty=penalty, temperature=temperature, kl_estimator="k1" if estimator == "exact" else estimator,
    )  # fmt: skip
    _, info = envs.reset(seed=seed)
    finished = [row if len(row) == LENGTH else [*row, EOS] for row in rows]
    mask = np.zeros((4, LENGTH), dtype=bool)
    ids = np.full((4, LENGTH), V + 5)  # nonsense after the end must not matter ...
    for i, row in enumerate(finished):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    rng = np.random.default_rng(seed)
    all_logprobs = torch.log_softmax(torch.from_numpy(rng.normal(size=(4, LENGTH, V))).float(), -1).numpy()
    logprobs = (
        all_logprobs
        if estimator == "exact"
        else np.take_along_axis(all_logprobs, np.where(mask, ids, 0)[..., None], -1)[..., 0]
    )
    prompts = [p.ids for p in envs.unwrapped.process.row_prompts]

    whole = envs.unwrapped.evaluate_responses(
        prompts,
        ids,
        mask,
        np.where(mask if estimator != "exact" else mask[..., None], logprobs, np.nan),
        info["prompt_index"],
    )
    stepped, refs, ends = play(envs, np.where(mask, ids, 0), logprobs)
    # Relative too: k3 is an exponential, and reaches hundreds where the two models disagree.
    np.testing.assert_allclose(whole.rewards, stepped, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.ref_logprobs, refs, atol=1e-5)
    np.testing.assert_allclose(whole.kl.sum(1), [end[2] for end in ends], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(whole.scores, [end[1] for end in ends], atol=1e-5)
    if term == "both":  # statement 9: what was paid is the score minus the penalty, full-length rows too
        np.testing.assert_allclose(stepped.sum(1), whole.scores - kl_coef * whole.kl.sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_batch_equals_scalar_envs(mode):
    """Row i of a batch seeded s is a single environment seeded s + i, over several episodes, in every autoreset
    mode."""
    n, lm = 3, model()
    envs = make_envs(n, model=lm, kl_coef=0.2, autoreset_mode=mode)
    singles = [make_env(model=lm, kl_coef=0.2) for _ in range(n)]
    obs, info = envs.reset(seed=11)
    starts = [env.reset(seed=11 + i) for i, env in enumerate(singles)]
    rng, resetting = np.random.default_rng(0), np.zeros(n, dtype=bool)
    for _ in range(40):
        for i in range(n):
            np.testing.assert_array_equal(obs["input_ids"][i], starts[i][0]["input_ids"])
            np.testing.assert_array_equal(obs["attention_mask"][i], starts[i][0]["attention_mask"])
            assert info["prompt_index"][i] == starts[i][1]["prompt_index"]
        actions, logprobs = rng.integers(0, V, size=n), -rng.random(n)
        envs.unwrapped.announce_logprobs(logprobs)
        obs, rewards, terminated, _, info = envs.step(actions)
        final = info.get("final_info", {}) if mode == "same_step" else info
        for i, env in enumerate(singles):
            if resetting[i]:
                starts[i] = env.reset()
                assert rewards[i] == 0 and not terminated[i] and not info["_ref_logprob"][i]
                continue
            env.unwrapped.announce_logprobs(logprobs[i])
            single_obs, reward, ended, _, single_info = env.step(actions[i])
            starts[i] = (single_obs, single_info)
            assert rewards[i] == pytest.approx(reward, abs=1e-5) and terminated[i] == ended
            assert info["ref_logprob"][i] == pytest.approx(single_info["ref_logprob"], abs=1e-5)
            if ended:
                for key in ("score", "stop_reason", "response", "prompt", "score/goodness"):
                    assert final[key][i] == single_info[key] and final[f"_{key}"][i]
                assert final["kl"][i] == pytest.approx(single_info["kl"], abs=1e-5)
                if mode == "same_step":
                    np.testing.assert_array_equal(info["final_obs"][i]["input_ids"], single_obs["input_ids"])
                    starts[i] = env.reset()
        resetting = terminated if mode == "next_step" else np.zeros(n, dtype=bool)
        if mode == "disabled" and terminated.any():
            obs, info = envs.reset(options={"reset_mask": terminated})
            for i in np.flatnonzero(terminated):
                starts[i] = singles[i].reset()


def test_ignored_action_of_next_step_reset():
    """After an end the next action is ignored: a nonsense token there changes nothing, and is not even refused."""
    streams = []
    for junk in (4, 10**6):
        envs = make_envs(2, prompts=["the", "a dog"])
        envs.reset(seed=0)
        envs.step(np.array([EOS, 5]))
        obs, rewards, terminated, _, _ = envs.step(np.array([junk, 6]))
        streams.append(
            (obs["input_ids"].tolist(), rewards.tolist(), envs.step(np.array([7, 7]))[0]["input_ids"].tolist())
        )
        assert rewards[0] == 0 and not terminated[0]
    assert streams[0] == streams[1]


def test_masked_reset_leaves_other_rows_alone():
    envs = make_envs(3)
    obs, _ = envs.reset(seed=0)
    obs, *_ = envs.step(np.array([5, 6, 7]))
    options = {"reset_mask": np.array([False, True, False])}
    after, _ = envs.reset(options=options)
    assert set(options) == {"reset_mask"}  # the caller's dict is left as it was
    for row in (0, 2):
        np.testing.assert_array_equal(after["input_ids"][row], obs["input_ids"][row])
    assert after["attention_mask"][1].sum() == len(envs.unwrapped.process.row_prompts[1].ids)
    # The other rows' cache is untouched too: their next reference log-prob is that of an environment never reset.
    other = make_envs(3)
    other.reset(seed=0)
    other.step(np.array([5, 6, 7]))
    left, right = (e.step(np.array([8, 8, 8]))[4]["ref_logprob"] for e in (envs, other))
    np.testing.assert_allclose(left[[0, 2]], right[[0, 2]], atol=1e-6)


def test_masked_reset_clears_a_pending_autoreset():
    """A row that has ended and is reset by hand acts at the next step; the other one is still reset by it."""
    envs = make_envs(2)
    envs.reset(seed=0)
    assert envs.step(np.array([EOS, EOS]))[2].all()
    before, _ = envs.reset(options={"reset_mask": np.array([True, False])})
    after, _, _, _, info = envs.step(np.array([5, 5]))
    length = int(before["attention_mask"][0].sum())
    assert after["attention_mask"][0].sum() == length + 1 and after["input_ids"][0, length] == 5
    assert info["_ref_logprob"].tolist() == [True, False]
    assert after["attention_mask"][1].sum() == len(envs.unwrapped.process.row_prompts[1].ids)


def test_seed_with_reset_mask_seeds_the_chosen_rows():
    """Row 1 begins the order of prompts of its seed; row 0 goes on with its own."""
    envs, unasked, seeded = (make_envs(2, prompts=[str(i) for i in range(9)]) for _ in range(3))
    for each in (envs, unasked):
        each.reset(seed=0)
    _, info = envs.reset(seed=50, options={"reset_mask": np.array([False, True])})
    orders = [info["prompt_index"], *(envs.reset()[1]["prompt_index"] for _ in range(6))]
    expected = [seeded.reset(seed=50)[1]["prompt_index"], *(seeded.reset()[1]["prompt_index"] for _ in range(6))]
    assert [o[1] for o in orders] == [o[1] for o in expected]
    assert [o[0] for o in orders[1:]] == [unasked.reset()[1]["prompt_index"][0] for _ in range(6)]


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize(("kind", "top_k"), [("gpt2", None), ("lstm", None), ("gpt2", 4)])
def test_clone_and_restore_give_the_same_stream(kind, top_k, mode):
    """The state holds the announcement and the rows that await their reset; it can be restored more than once."""
    envs = make_envs(3, kind, kl_coef=0.1, top_k=top_k, autoreset_mode=mode, max_response_tokens=3)
    envs.reset(seed=5)
    rng = np.random.default_rng(1)

    def stream(draws, announced=False):
        seen = []
        for draw in draws:
            masks = envs.unwrapped.action_masks()
            if not announced:
                envs.unwrapped.announce_logprobs(np.full(3, -0.5))
            announced = False
            actions = [np.flatnonzero(mask)[i % mask.sum()] for mask, i in zip(masks, draw, strict=True)]
            obs, rewards, terminated, _, info = envs.step(np.array(actions))
            now = [obs["input_ids"], rewards, terminated, info["ref_logprob"], info["prompt_index"], masks]
            seen.append([x.tolist() for x in now])
            if mode == "disabled" and terminated.any():
                envs.reset(options={"reset_mask": terminated})
        return seen

    past = stream(rng.integers(0, V, size=(3, 3)))
    assert any(past[2][2])  # rows have ended: in next_step mode they await their reset
    envs.unwrapped.announce_logprobs(np.full(3, -0.9))
    state = envs.unwrapped.clone_state()
    future = rng.integers(0, V, size=(9, 3))
    first = stream(future, announced=True)
    for _ in range(2):
        envs.unwrapped.restore_state(state)
        assert stream(future, announced=True) == first


@pytest.mark.parametrize("changes", [{"num_envs": 4}, {"num_envs": 2, "max_response_tokens": LENGTH + 1}])
def test_a_state_of_other_sizes_is_refused(changes):
    """One row would broadcast to all; nothing changes before the refusal."""
    one, other = make_envs(1), make_envs(**changes)
    one.reset(seed=0)
    obs, _ = other.reset(seed=1)
    with pytest.raises(ValueError, match="the state is another environment's: its ids has shape"):
        other.unwrapped.restore_state(one.unwrapped.clone_state())
    assert (other.unwrapped.process.ids.numpy() == obs["input_ids"]).all()


def test_prompt_order_depends_on_the_seed_alone():
    """Two policies of very different lengths see the same prompts in each row; all prompts come before any comes
    again."""
    orders = []
    for token in (EOS, 4):
        envs = make_envs(2)
        _, info = envs.reset(seed=9)
        seen = [[int(i)] for i in info["prompt_index"]]
        while min(map(len, seen)) < 8:
            _, _, ended, _, info = envs.step(np.full(2, token))
            _, _, _, _, info = envs.step(np.full(2, token)) if ended.any() else (0, 0, 0, 0, info)
            if ended.any():
                for row in (0, 1):
                    seen[row].append(int(info["prompt_index"][row]))
        orders.append([s[:8] for s in seen])
    assert orders[0] == orders[1]
    for row in orders[0]:
        assert sorted(row[:4]) == sorted(row[4:]) == list(range(len(PROMPTS)))


def test_prompt_order_survives_json():
    import json

    envs = make_envs(2)
    envs.reset(seed=4)
    for _ in range(6):
        envs.reset()
    saved = json.loads(json.dumps(envs.unwrapped.prompt_order_state()))
    expected = [envs.reset()[1]["prompt_index"].tolist() for _ in range(9)]
    other = make_envs(2)
    other.unwrapped.load_prompt_order_state(saved)
    assert [other.reset()[1]["prompt_index"].tolist() for _ in range(9)] == expected


def test_top_k_masks_and_renormalises():
    """top_k=2 of the reference: two actions are allowed, both distributions live on them, and the KL of a policy equal
    to the reference is 0."""
    lm = model()
    envs = make_envs(2, model=lm, top_k=2, kl_coef=0.5)
    obs, info = envs.reset(seed=0)
    with torch.no_grad():
        logits = lm(input_ids=torch.from_numpy(obs["input_ids"])).logits[
            torch.arange(2), torch.from_numpy(obs["attention_mask"].sum(1)).long() - 1
        ]
    top = logits.topk(2)
    assert (
        info["action_mask"].dtype == np.int8
        and (np.flatnonzero(info["action_mask"][0]) == np.sort(top.indices[0].numpy())).all()
    )
    renormalised = torch.log_softmax(top.values, -1)
    best = top.indices[:, 0].numpy()
    envs.unwrapped.announce_logprobs(renormalised[:, 0])
    _, rewards, _, _, step_info = envs.step(best)
    np.testing.assert_allclose(step_info["ref_logprob"], renormalised[:, 0], atol=1e-5)
    np.testing.assert_allclose(rewards, 0, atol=1e-5)


def test_reference_term_alone():
    """kl_term="reference" pays kl_coef * log pi_ref and needs no announcement."""
    lm = model()
    env = make_env(model=lm, kl_coef=0.5, kl_term="reference")
    obs, _ = env.reset(seed=0)
    prompt = obs["input_ids"][obs["attention_mask"].astype(bool)].tolist()
    _, reward, *_ = env.step(5)
    assert reward == pytest.approx(0.5 * reference_logprobs(lm, prompt, [5])[0], abs=1e-5)


def test_torch_output_matches_numpy():
    lm = model()
    numpy_envs, torch_envs = make_envs(3, model=lm), make_envs(3, model=lm, output="torch")
    a, b = numpy_envs.reset(seed=1), torch_envs.reset(seed=1)
    for t in range(9):
        if t:
            actions = np.full(3, EOS if t == 4 else 4 + t)
            a, b = numpy_envs.step(actions), torch_envs.step(torch.from_numpy(actions))
            for x, y in zip(a[1:4], b[1:4], strict=True):
                assert isinstance(y, torch.Tensor)
                np.testing.assert_array_equal(x, y.numpy())
        np.testing.assert_array_equal(a[0]["input_ids"], b[0]["input_ids"].numpy())
        for key, value in b[-1].items():
            assert isinstance(value, torch.Tensor) and key not in ("prompt", "response")
            if key == "stop_reason":
                assert value.dtype == torch.int8 and value.tolist() == [
                    {None: 0, "eos": 1, "length": 2}[s] for s in a[-1][key]
                ]
            else:
                np.testing.assert_array_equal(a[-1][key], value.numpy())


def test_two_episodes_in_a_row_share_nothing():
    """A row's dense sums, KL sums and texts start anew with each episode."""
    env = make_env(kl_coef=0.1)
    for _ in range(2):
        env.reset(seed=0)
        totals = []
        for token in (4, 5, EOS):
            env.unwrapped.announce_logprobs(-0.7)
            *_, info = env.step(token)
            totals.append(info.get("kl"))
        assert totals[:2] == [None, None]
    env.reset(seed=0)
    for token in (4, 5, EOS):
        env.unwrapped.announce_logprobs(-0.7)
        *_, again = env.step(token)
    assert again["kl"] == info["kl"] and again["score"] == 0.0


def test_metrics_that_do_not_apply_are_nan_and_reach_the_evaluation():
    from rlhf_gym.evaluation import evaluate

    def long(completions):
        return [None if len(text.split()) < 2 else float(len(text.split())) for text in completions]

    envs = make_envs(2, metrics={"long": long})
    envs.reset(seed=0)
    envs.step(np.array([5, 5]))
    *_, info = envs.step(np.array([EOS, 5]))
    assert np.isnan(info["metric/long"][0]) and info["_metric/long"].tolist() == [True, False]
    found = evaluate(None, envs, num_episodes=20)
    words = [len(sample["response"].split()) for sample in found.samples]
    assert 0 < sum(n < 2 for n in words) < 20
    np.testing.assert_array_equal(found.others["metric/long"], [np.nan if n < 2 else n for n in words])
    assert found.summary()["metric/long"]["mean"] >= 2


def test_dense_rewards_that_go_by_tokens_decode_no_text_until_the_end():
    """One that reads texts is given those so far; a text is decoded when it is read."""
    read = []

    def by_text(completions):
        read.append(list(completions))
        return [[0.0] * width for width in widths]

    def by_tokens(completion_ids):
        return [[0.0] * len(ids) for ids in completion_ids]

    for reward, num_decoded in ((by_text, 2), (by_tokens, 0)):
        reward.dense = True
        process = make_envs(2, reward=reward, max_response_tokens=LENGTH).unwrapped.process
        process.begin([0, 1], [process.next_prompt(row) for row in (0, 1)])
        decoded, decode = [], process.scorer.decode
        process.scorer.decode = lambda ids, decoded=decoded, decode=decode: decoded.append(ids) or decode(ids)
        widths = [1, 1]
        process.step(torch.tensor([4, 5]))
        assert len(decoded) == num_decoded
    assert read == [[tokenizer().decode([4]), tokenizer().decode([5])]]
