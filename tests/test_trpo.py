"""TRPO: the stock algorithm's numbers at a transformer's speed, and the parts it is made of."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_gym.agents.sb3 import LMActorCriticPolicy
from rlhf_gym.agents.trpo import TRPO, MicroBatchTRPO
from rlhf_gym.agents.trust_region import hessian_vector_product, line_search, mean_kl, natural_direction
from rlhf_gym.exact import evaluate
from rlhf_gym.lm import LSTMConfig, LSTMForCausalLM

V, L = 11, 8


class ThreesEnv(gym.Env):
    """Text spaces without text: a prompt of one or two tokens, a reward for each token 3."""

    render_mode = None

    def __init__(self, num_tokens=V):
        self.observation_space = spaces.Dict(
            input_ids=spaces.Box(0, num_tokens - 1, (L,), np.int64), attention_mask=spaces.Box(0, 1, (L,), np.int8)
        )
        self.action_space = spaces.Discrete(num_tokens)

    def _obs(self):
        mask = (np.arange(L) < self.length).astype(np.int8)
        return {"input_ids": self.ids.copy(), "attention_mask": mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ids, self.length = np.zeros(L, dtype=np.int64), int(self.np_random.integers(1, 3))
        self.ids[: self.length] = self.np_random.integers(2, V, self.length)
        return self._obs(), {}

    def step(self, action):
        self.ids[self.length] = action
        self.length += 1
        return self._obs(), float(action == 3), bool(action == 0 or self.length == L), False, {}


def language_model(kind="gpt2"):
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=L))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=L))
    elif kind == "neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=L))
    else:
        model = LSTMForCausalLM(LSTMConfig(vocab_size=V, hidden_size=16))
    return model.eval()


def algorithm(cls, policy="lm", model=None, **arguments):
    if policy == "mlp":
        venv, policy_class, kwargs = DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2), "MlpPolicy", {"net_arch": [16]}
    else:
        venv, policy_class = DummyVecEnv([ThreesEnv] * 4), LMActorCriticPolicy
        kwargs = {"language_model": model or language_model()}
    defaults = dict(n_steps=32, batch_size=16, gamma=1.0, seed=0, device="cpu", n_critic_updates=2, cg_max_steps=6)
    agent = cls(policy_class, venv, policy_kwargs=kwargs, **(defaults | arguments))
    agent.set_logger(Logger(None, []))  # the default one makes a directory for each
    return agent


def parameters_after_update(agent, num_updates=1):
    agent.learn(agent.n_steps * agent.env.num_envs * num_updates)
    assert agent.logger.name_to_value["train/is_line_search_success"] == 1
    return {name: p.detach().clone() for name, p in agent.policy.named_parameters()}


@pytest.mark.parametrize("policy", ["mlp", "lm"])
@pytest.mark.parametrize("micro_batch_size", [None, 24])
def test_same_parameters_as_stock_after_one_update(policy, micro_batch_size):
    if policy == "lm":  # the stock algorithm needs attention with a second derivative; ours sees to it
        model = language_model()
        model.set_attn_implementation("eager")
    else:
        model = None
    stock = parameters_after_update(algorithm(sb3_contrib.TRPO, policy, model))
    ours = parameters_after_update(algorithm(MicroBatchTRPO, policy, micro_batch_size=micro_batch_size))
    start = dict(algorithm(MicroBatchTRPO, policy).policy.named_parameters())
    moved = max((stock[name] - start[name]).abs().max().item() for name in stock)
    assert moved > 1e-3
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=0, atol=1e-6)


def test_sub_sampling_takes_every_kth_state_also_of_dict_observations():
    stock = parameters_after_update(algorithm(sb3_contrib.TRPO, "mlp", sub_sampling_factor=3))
    ours = parameters_after_update(algorithm(MicroBatchTRPO, "mlp", sub_sampling_factor=3))
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], rtol=0, atol=1e-6)
    text = algorithm(MicroBatchTRPO, sub_sampling_factor=3, micro_batch_size=16)
    parameters_after_update(text)
    with pytest.raises((TypeError, KeyError)):  # the stock algorithm slices the dict
        algorithm(sb3_contrib.TRPO, sub_sampling_factor=3).learn(128)


@pytest.mark.parametrize("kind", ["llama", "neox", "lstm"])
def test_every_parameter_of_the_language_model_is_the_actors(kind):
    """Pythia's query_key_value has "value" in its name; Llama's attention is SDPA; an LSTM has none."""
    agent = algorithm(MicroBatchTRPO, model=language_model(kind), learning_rate=0.0)
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    after = parameters_after_update(agent)
    for name in before:
        is_actor = name.startswith("lm.")
        assert torch.equal(before[name], after[name]) != is_actor, name  # learning_rate=0: the critic stands still


def test_critic_of_its_own_is_trained_and_leaves_the_actor_alone():
    agent = algorithm(MicroBatchTRPO)
    agent.policy_kwargs["separate_critic"] = True
    agent._setup_model()
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters()}
    agent.line_search_max_iter = 0
    agent.learn(128)
    after = dict(agent.policy.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("lm."))
    assert not torch.equal(before["critic_lm.transformer.wte.weight"], after["critic_lm.transformer.wte.weight"])


def test_trust_region_holds_and_objective_improves():
    agent = algorithm(MicroBatchTRPO, target_kl=0.02, n_steps=64)
    old = copy.deepcopy(agent.policy)
    agent.learn(256)
    data = next(iter(agent.rollout_buffer.get(None)))
    with torch.no_grad():
        new_logits = agent.policy.get_distribution(data.observations).distribution.logits
        old_logits = old.get_distribution(data.observations).distribution.logits
    kl = (new_logits.exp() * (new_logits - old_logits)).sum(-1).mean().item()
    logged = agent.logger.name_to_value
    assert 0.002 < kl < 0.02 and logged["train/kl_divergence_loss"] == pytest.approx(kl, abs=1e-6)
    assert logged["train/policy_objective"] > 0


def test_it_learns():
    agent = algorithm(MicroBatchTRPO, n_steps=64, target_kl=0.03)
    rewards = []
    for _ in range(12):
        agent.learn(256, reset_num_timesteps=False)
        rewards.append(agent.rollout_buffer.rewards.mean())
    assert np.mean(rewards[-3:]) > 2.5 * np.mean(rewards[:2])


# ---- the parts


def test_fisher_vector_product_is_the_hessian_of_the_kl():
    """Three parameters, three outcomes in two states; the Hessian by torch's own functional, and in closed form."""
    features = torch.tensor(
        [[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [[0.5, 1, 0], [1, -1, 2], [0, 0.3, 1]]], dtype=torch.float64
    )
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    old = torch.log_softmax(features @ theta.detach(), -1)

    def kl(parameters):
        new = torch.log_softmax(features @ parameters, -1)
        return (new.exp() * (new - old)).sum(-1).mean()

    assert kl(theta).item() == pytest.approx(0, abs=1e-15)
    hessian = torch.autograd.functional.hessian(kl, theta.detach())
    p = old.exp()
    covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    closed_form = torch.einsum("sai,sab,sbj->ij", features, covariance, features) / 2
    torch.testing.assert_close(hessian, closed_form)
    halves = [lambda i=i: _one_state(features[i], old[i], theta) / 2 for i in range(2)]
    for losses in ([lambda: kl(theta)], halves):
        product = hessian_vector_product(losses, [theta])
        columns = torch.stack([product(unit) for unit in torch.eye(3, dtype=torch.float64)])
        torch.testing.assert_close(columns, closed_form)


def _one_state(features, old, theta):
    new = torch.log_softmax(features @ theta, -1)
    return (new.exp() * (new - old)).sum()


def test_kl_of_a_policy_to_itself_is_zero_with_its_gradient_and_has_the_fisher_matrix_as_hessian():
    """A softmax of three logits, one token of a fourth forbidden; away from the old policy none of the three holds."""

    def policy(theta):
        return CategoricalDistribution(4).proba_distribution(torch.cat([theta, torch.tensor([-1e9])])[None])

    start = torch.tensor([1.0, -0.5, 0.2])
    p = torch.softmax(start, 0)
    expected = torch.diag(p) - torch.outer(p, p)
    for theta, same in ((start.clone(), True), (start + torch.tensor([0.5, 0.0, -0.5]), False)):
        theta.requires_grad_()

        def kl(theta=theta):
            return mean_kl(policy(theta), policy(start))

        product = hessian_vector_product([kl], [theta])
        hessian = torch.stack([product(unit) for unit in torch.eye(3)])
        assert (abs(kl().item()) < 1e-7) == same
        assert (torch.autograd.grad(kl(), theta)[0].abs().max().item() < 1e-7) == same
        assert torch.allclose(hessian, expected, atol=1e-6) == same


def test_natural_direction_solves_the_damped_system():
    """Three parameters: conjugate gradients are exact after three steps. Other units, the same change of the policy."""
    fisher = torch.tensor([[0.2, 0.05, 0.0], [0.05, 0.1, 0.02], [0.0, 0.02, 0.4]], dtype=torch.float64)
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rayleigh = float(gradient @ fisher @ gradient) / 5.25
    for relative, expected in ((False, 0.1), (True, 0.1 * rayleigh)):
        direction, curvature, damping = natural_direction(
            lambda v: fisher @ v, gradient, damping=0.1, relative=relative, max_iter=3
        )
        matrix = fisher + expected * torch.eye(3, dtype=torch.float64)
        assert damping == pytest.approx(expected)
        torch.testing.assert_close(direction, torch.linalg.solve(matrix, gradient))
        assert curvature == pytest.approx(float(direction @ matrix @ direction))
        # Parameters a tenth as large: g is ten times and F a hundred times what it was.
        scaled = natural_direction(
            lambda v: 100 * fisher @ v, 10 * gradient, damping=0.1, relative=relative, max_iter=3
        )[0]
        assert torch.allclose(10 * scaled, direction) == relative


def test_relative_damping_is_in_units_of_the_curvature_along_the_gradient():
    """g and F of a table in closed form: g_sa = mean (1[a] - p_a) A over visits, F_s = d_s (diag p - p p^T)."""
    envs = gym.make_vec("rlhf_gym/Brackets-v0", num_envs=16, kl_coef=0.1)
    agent = TRPO(envs, policy="tabular", fisher_sub_sampling_factor=1, cg_damping=0.3, relative_damping=True)
    seen, update = [], agent.algorithm._update_actor

    def spied():
        data, _ = agent.algorithm._rollout()
        with torch.no_grad():
            seen.append((data, agent.algorithm.policy.get_distribution(data.observations).distribution.probs))
        return update()

    agent.algorithm._update_actor = spied
    logged = []
    agent.learn(1, callback=lambda agent, metrics: logged.append(metrics["train/cg_damping"]))
    data, probs = seen[0]
    lengths = data.observations["attention_mask"].sum(1)
    advantages = (data.advantages - data.advantages.mean()) / data.advantages.std()
    actions = torch.nn.functional.one_hot(data.actions.long().flatten(), probs.shape[1])
    texts, state = torch.unique(
        torch.cat([lengths[:, None].long(), data.observations["input_ids"]], 1), dim=0, return_inverse=True
    )
    # Several texts share a row of the table; the model's own reading says which.
    model = agent.policy_model
    row = torch.tensor([model.state_after(text[1 : 1 + text[0]].long()) for text in texts])[state]
    numerator = denominator = 0.0
    for one in row.unique():
        here = row == one
        p = probs[here][0].double()
        gradient = ((actions[here] - p) * advantages[here, None]).sum(0) / len(row)
        fisher = here.double().mean() * (torch.diag(p) - torch.outer(p, p))
        numerator += float(gradient @ fisher @ gradient)
        denominator += float(gradient @ gradient)
    assert 0 < numerator / denominator < 0.2  # far below what is usual for a network: an absolute .1 would swamp it
    assert logged == [pytest.approx(0.3 * numerator / denominator, rel=1e-3)]


def test_policy_without_a_doubt_takes_no_step_into_nan():
    """All probabilities 0 or 1: no curvature and no gradient."""
    envs = gym.make_vec("rlhf_gym/Recall-v0", num_envs=8, kl_coef=0.0)
    agent = TRPO(envs, policy="tabular", n_critic_updates=1, relative_damping=True)
    agent.policy_model.lm_head.residual.data[:, 0] = 1e4
    agent.learn(8 * 24 * 3)
    assert agent.num_updates == 3 and torch.isfinite(agent.policy_model.lm_head.residual).all()


def test_tabular_policy_comes_near_the_optimum():
    envs = gym.make_vec("rlhf_gym/WoAiNi-v0", num_envs=128, kl_coef=0.3)
    agent = TRPO(envs, policy="tabular", relative_damping=True, cg_damping=0.1, target_kl=0.01).learn(128 * 8 * 20)
    assert evaluate(agent, envs, 0.3).normalised > 0.9


def test_prepared_states_give_the_same_numbers():
    agent = algorithm(MicroBatchTRPO)
    agent.learn(128)
    data, _ = agent._rollout()
    policy = agent.policy
    for method in (lambda s: policy.get_distribution(s).distribution.logits, policy.predict_values):
        assert torch.equal(method(policy.prepare(data.observations)), method(data.observations))


def test_failed_line_search_restores_the_parameters():
    parameters = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    step, seen = torch.tensor([1.0, 1.0, 10.0]), []

    def measure():
        seen.append(parameters[1].item() - 3)
        return seen[-1]

    assert line_search(parameters, step, measure, lambda m: False, shrink=0.5, max_iter=3) is None
    assert seen == [10, 5, 2.5]
    assert parameters[0].tolist() == [1, 2] and parameters[1].tolist() == [[3]]
    assert line_search(parameters, step, measure, lambda m: m < 6, shrink=0.5, max_iter=3) == 5
    assert parameters[0].tolist() == [1.5, 2.5] and parameters[1].tolist() == [[8]]


def test_an_update_whose_line_search_fails_leaves_the_policy_as_it_was(monkeypatch):
    """Every try is taken for one that leaves the trust region."""
    agent, tried = algorithm(MicroBatchTRPO, "mlp", line_search_max_iter=4), []

    def measured(new, old):
        if not torch.is_grad_enabled():  # the line search; the Fisher-vector products differentiate
            tried.append(agent.policy.action_net.weight.detach().clone())
        return mean_kl(new, old) if torch.is_grad_enabled() else torch.tensor(torch.inf)

    monkeypatch.setattr("rlhf_gym.agents.trpo.mean_kl", measured)
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters() if "value" not in name}
    agent.learn(64)
    assert agent.logger.name_to_value["train/is_line_search_success"] == 0 and len(tried) == 4
    assert all(not torch.equal(weight, before["action_net.weight"]) for weight in tried)
    assert all(torch.equal(p, before[name]) for name, p in agent.policy.named_parameters() if name in before)
    monkeypatch.undo()  # the negative control: the same update when it is measured rightly
    agent = algorithm(MicroBatchTRPO, "mlp", line_search_max_iter=4)
    assert not torch.equal(parameters_after_update(agent)["action_net.weight"], before["action_net.weight"])


def test_update_without_a_signal_changes_no_policy():
    """Equal rewards everywhere: there is no direction of improvement, so the line search fails and restores."""
    agent = algorithm(MicroBatchTRPO, "mlp", gae_lambda=0.0, gamma=0.0, n_steps=8)
    before = copy.deepcopy(agent.policy.action_net.weight)
    for parameter in agent.policy.value_net.parameters():  # V = 1 = the reward of each step: advantages are exactly 0
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(agent.policy.value_net.bias)
    agent.learn(16)
    assert agent.logger.name_to_value["train/is_line_search_success"] == 0
    assert torch.equal(before, agent.policy.action_net.weight)


def test_fisher_matrix_of_some_rows_only():
    agent = algorithm(MicroBatchTRPO, "mlp", fisher_sub_sampling_factor=2)
    used, measured = [], agent._micro_batches
    agent._micro_batches = lambda observations, keep: used.append(keep) or measured(observations, keep)
    agent.learn(64)
    data, row = agent._rollout()
    returns = agent.rollout_buffer.returns.reshape(2, 32)  # row by row
    for value, i in zip(data.returns.tolist(), row.tolist(), strict=True):
        assert value in returns[i]
    everything, chosen = used
    assert len(everything) == 64 and len(chosen) == 32
    parameters_after_update(agent)


def test_target_kl_falls_linearly():
    agent, targets = algorithm(MicroBatchTRPO, "mlp", target_kl=0.04, target_kl_schedule="linear", n_steps=16), []
    update = agent.train
    agent.train = lambda: (update(), targets.append(agent.logger.name_to_value["train/target_kl"]))
    agent.learn(4 * 32)
    assert targets == pytest.approx([0.04, 0.03, 0.02, 0.01])


@pytest.mark.parametrize("name, value", [("micro_batch_size", 0), ("fisher_sub_sampling_factor", 0)])
def test_wrong_arguments(name, value):
    with pytest.raises(ValueError, match=name):
        algorithm(MicroBatchTRPO, **{name: value})
    with pytest.raises(ValueError, match="target_kl_schedule"):
        algorithm(MicroBatchTRPO, target_kl_schedule="cosine")


def test_interrupted_line_search_restores():
    """Ctrl-C in the middle of a trial step leaves the parameters as they were."""
    weight = torch.zeros(2)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        line_search([weight], torch.ones(2), interrupted, bool, shrink=0.5, max_iter=3)
    assert weight.tolist() == [0.0, 0.0]
