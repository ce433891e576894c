"""Tabular and residual policies: they begin at the reference, differentiate without NaN, and behave as any model."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv  # noqa: F401 - imported early: it is slow
from worlds import make_envs

from rlhf_gym.agents import PPO, TRPO
from rlhf_gym.agents.policy import Policy
from rlhf_gym.exact import POLICY_KINDS, evaluate, make_policy, ngram_from_table, residual_policy, solve, tabular_policy
from rlhf_gym.lm import Recurrent, generate, load_language_model, make_engine, response_logits

TASKS = ("WoAiNi", "Brackets", "Lexicon", "Recall", "Goodhart", "Difficulty")


def task(name: str, **arguments):
    return gym.make_vec(f"rlhf_gym/{name}-v0", num_envs=4, **arguments)


def responses_of(envs, policy, count=64, seed=0):
    """Sampled responses with their prompts."""
    base = envs.unwrapped
    prompts = [base.prompts[i % len(base.prompts)].ids for i in range(count)]
    uniforms = torch.rand(count, base.max_response_tokens, generator=torch.Generator().manual_seed(seed))
    found = generate(
        make_engine(policy, 16, base.max_tokens), prompts, max_response_tokens=base.max_response_tokens,
        eos_token_ids=base.eos_token_ids, uniforms=uniforms,
    )  # fmt: skip
    return prompts, found


@pytest.mark.parametrize("kind", POLICY_KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_begins_at_the_reference(name, kind):
    """The same logits, bit for bit, on responses of the reference: KL 0."""
    envs = task(name)
    policy, reference = make_policy(envs, kind), envs.unwrapped.language_model.model
    prompts, found = responses_of(envs, reference)
    result = envs.unwrapped.evaluate_responses(prompts, found.response_ids, found.response_mask)
    again = responses_of(envs, policy)[1]
    assert torch.equal(again.response_ids, found.response_ids)
    assert torch.equal(again.logprobs, found.logprobs)
    torch.testing.assert_close(result.ref_logprobs, found.logprobs, atol=1e-6, rtol=0)
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_forbidden_tokens_stay_forbidden_without_nan(kind):
    """After 你 only 。 is possible: -inf in the logits, finite everywhere else, in gradients too."""
    envs = task("WoAiNi")
    policy = Policy(make_policy(envs, kind))
    prompts, found = responses_of(envs, envs.unwrapped.language_model.model)
    from rlhf_gym.agents.batch import Batch
    from rlhf_gym.lm import join_responses

    ids, _, lengths = join_responses(prompts, found.response_ids, found.response_mask)
    zeros = torch.zeros_like(found.logprobs)
    batch = Batch(
        ids, lengths, found.response_ids, found.response_mask, found.logprobs, zeros, zeros, zeros[:, 0],
        found.ended_by_eos, zeros,
    )  # fmt: skip
    logprobs, values, entropy = policy(batch, with_entropy_gradient=True)
    (logprobs.sum() + values.sum() + entropy.sum()).backward()
    for tensor in (logprobs, values, entropy, *(p.grad for p in policy.parameters() if p.grad is not None)):
        assert torch.isfinite(tensor).all()
    assert any(p.grad.abs().sum() > 0 for p in policy.model.parameters() if p.grad is not None)
    vocabulary = envs.unwrapped.tokenizer.get_vocab()
    after = policy.model(input_ids=torch.tensor([[vocabulary["。"], vocabulary["你"]]])).logits[0, -1]
    assert [i for i in range(4) if after[i] > -torch.inf] == [vocabulary["。"]]


@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_cached_equals_full(kind):
    """The recurrent engine on the fixed-size cache against one forward, ragged rows, without a warning."""
    envs = task("Goodhart")
    policy = residual_policy(envs, kind, num_layers=2, seed=1)
    policy.lm_head.linear.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = make_engine(policy, 3, envs.unwrapped.max_tokens)
    assert isinstance(engine, Recurrent)
    ids = torch.randint(14, (3, 7), generator=torch.Generator().manual_seed(1))
    lengths, rows = torch.tensor([2, 1, 4]), torch.arange(3)
    full = policy(input_ids=ids).logits
    found = [engine.prefill(rows, ids[:, :4], lengths)]
    for step in range(3):
        found.append(engine.decode(ids[rows, lengths + step], torch.ones(3, dtype=torch.bool)))
    for step, logits in enumerate(found):
        torch.testing.assert_close(logits, full[rows, lengths - 1 + step], atol=1e-5, rtol=1e-5)
    padded = ids.clone()
    padded[1, 1:] = 13
    torch.testing.assert_close(policy(input_ids=padded).logits[1, 0], full[1, 0], atol=1e-6, rtol=0)


def test_table_has_a_row_per_state():
    """Changing one row changes the logits in its state and in no other; the critic's input tells states apart."""
    envs = task("Recall")
    policy = tabular_policy(envs)
    solution = solve(envs, 0.3)
    assert policy.config.num_states == solution.graph.num_states + 2  # before the prompt, and after the end
    prompts, found = responses_of(envs, policy, count=200)
    ids = torch.stack([torch.cat([p, r]) for p, r in zip(prompts, found.response_ids, strict=True)])
    lengths, start = torch.full((200,), 13), torch.zeros(200, dtype=torch.long)
    before, hidden = response_logits(policy, ids, lengths, start, 12)
    states = hidden.argmax(-1)
    assert hidden.shape[-1] == policy.config.num_states and (hidden.sum(-1) == 1).all()
    # The state is (first word, current word, position): as many as there are differ.
    described = {}
    for row in range(200):
        for t in range(12):
            key = (t, *((int(ids[row, 1]), int(ids[row, t])) if t else ()))
            assert described.setdefault(key, int(states[row, t])) == int(states[row, t])
    assert len(set(described.values())) == len(described)
    chosen = int(states[0, 5])
    policy.lm_head.residual.data[chosen] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    after, _ = response_logits(policy, ids, lengths, start, 12)
    changed = (after != before).any(-1)
    assert torch.equal(changed, states == chosen)


def test_value_head_reads_what_is_meant_for_it():
    envs = task("Difficulty")
    transformer = residual_policy(envs, width=32)
    assert Policy(transformer).value_head.in_features == transformer.value_width == 32
    table = tabular_policy(envs)
    assert Policy(table).value_head.in_features == table.config.num_states
    assert Policy(envs.unwrapped.language_model.model).value_head.in_features > 1
    # The number of the reference's state reaches the head but not the value.
    policy = Policy(residual_policy(envs, width=32))
    policy.value_head.weight.data.fill_(1.0)
    hidden = torch.zeros(2, 33)
    hidden[1, -1] = 5.0
    assert policy.value(hidden).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_saved_and_loaded(kind, tmp_path):
    envs = task("WoAiNi")
    policy = make_policy(envs, kind)
    for p in policy.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    policy.save_pretrained(tmp_path)
    envs.unwrapped.tokenizer.save_pretrained(tmp_path)
    again = load_language_model(tmp_path)
    ids = torch.tensor([[3, 0, 1, 2, 3]])
    torch.testing.assert_close(again.model(input_ids=ids).logits, policy(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert again.eos_token_ids == (3,)
    expected = evaluate(policy, envs, 0.3).objective  # where memory begins can change the last bits of a product
    assert evaluate(again.model, envs, 0.3).objective == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("agent_class", "kind"), [(PPO, "tabular"), (PPO, "lstm"), (TRPO, "tabular"), (TRPO, "transformer")]
)
def test_agents_train_them_by_name(agent_class, kind, tmp_path):
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=16, kl_coef=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = agent_class(envs, policy=kind, seed=0)
        assert evaluate(agent, envs).kl == 0
        agent.learn(200)
    assert np.isfinite(evaluate(agent, envs).objective) and evaluate(agent, envs).kl > 0
    agent.save(tmp_path / "agent")
    loaded = agent_class.load(tmp_path / "agent", env=envs)
    assert evaluate(loaded, envs).objective == pytest.approx(evaluate(agent, envs).objective, abs=1e-5)


def test_many_states_are_numbered(monkeypatch):
    """Beyond MAX_ONE_HOT the head is given a number; the logits are the same."""
    envs = task("Brackets")
    small = solve(envs, 0.3).policy
    monkeypatch.setattr("rlhf_gym.exact.table.MAX_ONE_HOT", 10)
    large = solve(envs, 0.3).policy
    assert (small.lm_head.in_features, large.lm_head.in_features) == (small.config.num_states, 1)
    ids = torch.tensor([[2, 0, 0, 1, 1, 2], [2, 1, 0, 0, 2, 0]])
    assert torch.equal(large(input_ids=ids).logits, small(input_ids=ids).logits)
    assert make_engine(large, 2, 13).next_logits(ids, torch.tensor([3, 6])).shape == (2, 3)


def test_prompts_that_begin_another_are_refused():
    lm = ngram_from_table({"": {"a": 0.5, "b": 0.3, "<eos>": 0.2}}, eos="<eos>")
    envs = make_envs(1, model=lm, tokenizer=None, prompts=["a", "a b"], max_response_tokens=3)
    with pytest.raises(ValueError, match="begins another prompt"):
        tabular_policy(envs)
    with pytest.raises(ValueError, match="adds a network to a table"):
        residual_policy(make_envs(1))
    with pytest.raises(ValueError, match="kind must be one of 'transformer', 'lstm'"):
        residual_policy(task("Brackets"), "mlp")


def test_several_prompts_of_several_words():
    """A trie of prompts leads to the right state of each; a tabular policy of a transformer's prefix tree too."""
    envs = make_envs(1, max_response_tokens=2, reward=lambda text: len(text) / 10, prompts=["the cat", "the dog sat"])
    solution = solve(envs, 0.3)
    found = evaluate(solution.policy, envs, 0.3)
    assert found.regret == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(found.rewards, solution.rewards, atol=1e-5)
    assert evaluate(tabular_policy(envs), envs, 0.3).kl == pytest.approx(0, abs=1e-9)
