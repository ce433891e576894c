"""A language model under Stable-Baselines3's own algorithms: the policy, its cache, and the announcements."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_gym.agents.sb3 import AnnounceLogprobs, GymVectorToSB3, LMActorCriticPolicy, policy_kwargs
from rlhf_gym.agents.sb3.policy import share_prefixes
from rlhf_gym.envs.scalar import TextGenerationEnv
from rlhf_gym.envs.vector import TextGenerationVectorEnv
from rlhf_gym.lm import LSTMConfig, LSTMForCausalLM, TokenFilter

WORDS = ["<eos>", "<pad>", "the", "food", "was", "good", "bad", "very", "not", "and", "slow", "warm"]
V = len(WORDS)


def tokenizer():
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def language_model(kind="gpt2", dropout=0.0):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=V,
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=16,
                attn_pdrop=dropout,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=V,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                eos_token_id=0,
            )
        )
    return LSTMForCausalLM(LSTMConfig(vocab_size=V, hidden_size=16, eos_token_id=0))


def task(**changes):
    return (
        dict(
            model=language_model(),
            tokenizer=tokenizer(),
            prompts=["the food was", "the food", "food was very", "the"],
            reward=lambda text: text.count("good") - 0.5 * text.count("bad"),
            max_response_tokens=6,
        )
        | changes
    )


def vector(num_envs=4, autoreset_mode="next_step", **changes):
    return TextGenerationVectorEnv(num_envs, autoreset_mode=autoreset_mode, **task(**changes))


def train(cls, venv, envs, callback=None, steps=16, **arguments):
    defaults = dict(n_steps=steps, gamma=1.0, seed=0, device="cpu", policy_kwargs=policy_kwargs(envs))
    if cls is PPO:
        defaults |= dict(batch_size=16, n_epochs=2)
    agent = cls(LMActorCriticPolicy, venv, **(defaults | arguments))
    agent.set_logger(Logger(None, []))  # the default one makes a directory for each
    return agent.learn(steps * venv.num_envs, callback=callback)


class Record(list):
    """Wraps step() of an adapter or DummyVecEnv to keep what it gave."""

    def __init__(self, venv):
        super().__init__()
        step_wait = venv.step_wait

        def recording():
            out = step_wait()
            self.append(out)
            return out

        venv.step_wait = recording


# ---- the announcement


def assert_rewards_are_score_minus_kl(agent, steps, kl_coef):
    """The buffer's rewards against score and ref_logprob of the infos and the log-probs that the algorithm stored."""
    rewards = agent.rollout_buffer.rewards
    # Once the algorithm has learnt from them, the log-probs stand row by row and no longer step by step.
    logprobs = agent.rollout_buffer.log_probs.reshape(rewards.shape[::-1]).T
    expected = np.zeros_like(logprobs)
    for t, (_, _, _, infos) in enumerate(steps):
        for i, info in enumerate(infos):
            expected[t, i] = info.get("score", 0.0) - kl_coef * (logprobs[t, i] - info["ref_logprob"])
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    assert sum("score" in info for step in steps for info in step[3]) > 4
    assert np.abs(logprobs - [[info["ref_logprob"] for info in step[3]] for step in steps]).max() > 1e-3
    for step in steps:
        for info in step[3]:
            if "kl" in info:
                assert info["episode"]["r"] == pytest.approx(info["score"] - kl_coef * info["kl"], abs=1e-4)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("cls", [PPO, A2C])
def test_unmodified_algorithms_get_score_minus_kl(cls, mode):
    envs = vector(autoreset_mode=mode, kl_coef=0.3)
    venv = GymVectorToSB3(envs)
    other = language_model("llama")  # a policy that is not the reference, so that the KL is not 0
    steps = Record(venv)
    agent = train(cls, venv, envs, AnnounceLogprobs(), policy_kwargs=policy_kwargs(envs, other))
    assert_rewards_are_score_minus_kl(agent, steps, 0.3)


def test_scalar_environments_and_wrappers():
    single = task(kl_coef=0.3)
    venv = DummyVecEnv([lambda: Monitor(TextGenerationEnv(**single))] * 3)
    steps = Record(venv)
    agent = train(
        PPO,
        VecNormalize(venv, norm_obs=False, norm_reward=False),
        venv.envs[0],
        AnnounceLogprobs(),
        policy_kwargs=policy_kwargs(venv.envs[0], language_model("llama")),
    )
    assert_rewards_are_score_minus_kl(agent, steps, 0.3)


@pytest.mark.parametrize(
    "cls, policy, changes",
    [
        (PPO, "MultiInputPolicy", {}),
        (RecurrentPPO, "MultiInputLstmPolicy", {}),
        (MaskablePPO, "MultiInputPolicy", {"top_k": 4}),  # the environment refuses a token that the mask forbids
    ],
)
def test_policies_that_are_no_language_models(cls, policy, changes):
    envs = vector(kl_coef=0.3, **changes)
    venv = GymVectorToSB3(envs)
    steps = Record(venv)
    agent = cls(policy, venv, n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    agent.learn(64, callback=AnnounceLogprobs())
    assert_rewards_are_score_minus_kl(agent, steps, 0.3)


def test_without_the_callback_the_environment_says_what_to_do():
    envs = vector(kl_coef=0.3)
    with pytest.raises(ValueError, match=r"AnnounceLogprobs\(\)"):
        train(PPO, GymVectorToSB3(envs), envs)


def test_hook_is_gone_after_learning_also_after_an_error():
    envs = vector(kl_coef=0.3)
    callback = AnnounceLogprobs()
    agent = train(PPO, GymVectorToSB3(envs), envs, callback)
    assert not agent.policy._forward_hooks
    envs.process.reward.score = None  # broken reward: learning stops in the middle
    with pytest.raises(TypeError):
        agent.learn(64, callback=callback)
    del envs.process.reward.score
    agent.learn(64, callback=callback)
    assert not agent.policy._forward_hooks


def test_announcing_needs_a_text_environment_and_log_probs():
    with pytest.raises(TypeError, match="announce_logprobs"):
        PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").learn(8, callback=AnnounceLogprobs())
    envs = vector(1, kl_coef=0.3)
    with pytest.raises(TypeError, match="on-policy"):
        DQN("MultiInputPolicy", GymVectorToSB3(envs), buffer_size=8, device="cpu").learn(8, callback=AnnounceLogprobs())


# ---- the policy


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lstm"])
@pytest.mark.parametrize("separate_critic", [False, True])
def test_rollout_equals_update(kind, separate_critic):
    """Log-probs and values of the cached rollout are those of evaluate_actions, also after an update."""
    envs = vector(temperature=0.7, allowed_tokens=[0, 3, 4, 5, 6, 7, 8], model=language_model(kind))
    venv = GymVectorToSB3(envs)
    agent = PPO(
        LMActorCriticPolicy,
        venv,
        n_steps=32,
        batch_size=32,
        n_epochs=2,
        gamma=1.0,
        learning_rate=0.01,
        seed=0,
        device="cpu",
        policy_kwargs=policy_kwargs(envs, separate_critic=separate_critic),
    )
    start = {name: p.clone() for name, p in agent.policy.named_parameters()}
    worst = []

    class Compare(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            data = next(iter(self.model.rollout_buffer.get(None)))
            with torch.no_grad():
                values, logprobs, entropy = self.model.policy.evaluate_actions(
                    data.observations, data.actions.long().flatten()
                )
            worst.append(
                max((logprobs - data.old_log_prob).abs().max(), (values.flatten() - data.old_values).abs().max()).item()
            )

    agent.learn(3 * 128, callback=Compare())
    assert len(worst) == 3 and max(worst) < 1e-5
    moved = [name for name, p in agent.policy.named_parameters() if not torch.equal(p, start[name])]
    assert any(name.startswith("lm.") for name in moved) and "value_head.weight" in moved


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lstm"])
def test_one_forward_per_sequence_gives_one_forward_per_state(kind):
    """Prefix sharing against the plain model on each state alone, values and gradients too."""
    envs = vector()
    agent = PPO(
        LMActorCriticPolicy,
        GymVectorToSB3(envs),
        n_steps=8,
        batch_size=8,
        device="cpu",
        policy_kwargs=policy_kwargs(envs, language_model(kind)),
    )
    policy = agent.policy
    torch.nn.init.normal_(policy.value_head.weight)
    rng = np.random.default_rng(0)
    episodes = [rng.integers(0, V, 9) for _ in range(3)]
    states = [e[:n] for e in episodes for n in (2, 4, 5, 9)] + [episodes[0][:4], episodes[1][:1]]
    rng.shuffle(states)
    ids, mask = torch.full((len(states), 10), 7), torch.zeros(len(states), 10, dtype=torch.int8)
    for i, state in enumerate(states):
        ids[i, : len(state)], mask[i, : len(state)] = torch.as_tensor(state), 1
    actions = torch.as_tensor(rng.integers(0, V, len(states)))
    values, logprobs, entropy = policy.evaluate_actions({"input_ids": ids, "attention_mask": mask}, actions)
    alone = [policy.lm(torch.as_tensor(state)[None]).logits[0, -1].log_softmax(-1) for state in states]
    expected = torch.stack([a[action] for a, action in zip(alone, actions, strict=True)])
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, torch.stack([-(a.exp() * a).sum() for a in alone]), atol=1e-5, rtol=0)
    ours = torch.autograd.grad(logprobs.sum(), policy.lm.parameters())
    theirs = torch.autograd.grad(expected.sum(), policy.lm.parameters())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(policy.predict_values({"input_ids": ids, "attention_mask": mask}), values)


def test_share_prefixes_keeps_the_longest_sequences_only():
    ids = torch.tensor(
        [[1, 2, 9, 9], [1, 2, 3, 9], [1, 9, 9, 9], [2, 9, 9, 9], [1, 3, 9, 9], [1, 2, 3, 9], [1, 2, 3, 4]]
    )
    lengths = torch.tensor([2, 3, 1, 1, 2, 3, 4])
    sequences, rows, columns = share_prefixes(ids, lengths)
    assert sequences.tolist() == [[1, 2, 3, 4], [1, 3, 0, 0], [2, 0, 0, 0]]
    assert rows.tolist() == [0, 0, 0, 2, 1, 0, 0] and columns.tolist() == [1, 2, 0, 0, 1, 2, 3]


def test_copy_is_trainable_float32_without_dropout_and_untouched_by_orthogonal_initialisation():
    reference = language_model(dropout=0.5).to(torch.bfloat16)
    envs = vector()
    reference.requires_grad_(False)
    policy = PPO(
        LMActorCriticPolicy,
        GymVectorToSB3(envs),
        device="cpu",
        n_steps=16,
        batch_size=16,
        policy_kwargs=policy_kwargs(envs, reference),
    ).policy
    policy.set_training_mode(True)
    for (name, ours), theirs in zip(policy.lm.named_parameters(), reference.parameters(), strict=True):
        assert ours.dtype == torch.float32 and ours.requires_grad and not theirs.requires_grad, name
        assert torch.equal(ours, theirs.float()) and ours.data_ptr() != theirs.data_ptr(), name
    obs = {"input_ids": torch.tensor([[2, 3, 4]]), "attention_mask": torch.ones(1, 3, dtype=torch.int8)}
    first, second = (policy.get_distribution(obs).distribution.logits for _ in range(2))
    assert torch.equal(first, second)
    assert policy.predict_values(obs).item() == 0


def test_forbidden_tokens_have_probability_zero_and_finite_gradients():
    envs = vector(allowed_tokens=[0, 5, 6])
    policy = PPO(
        LMActorCriticPolicy,
        GymVectorToSB3(envs),
        device="cpu",
        n_steps=16,
        batch_size=16,
        policy_kwargs=policy_kwargs(envs),
    ).policy
    obs = {"input_ids": torch.tensor([[2, 3, 4]]), "attention_mask": torch.ones(1, 3, dtype=torch.int8)}
    probs = policy.get_distribution(obs).distribution.probs[0]
    assert (probs > 0).nonzero().flatten().tolist() == [0, 5, 6]
    _, logprobs, entropy = policy.evaluate_actions(obs, torch.tensor([5]))
    (logprobs.sum() + entropy.sum()).backward()
    assert all(p.grad.isfinite().all() for p in policy.lm.parameters() if p.grad is not None)
    with torch.no_grad():
        actions = torch.stack([policy(obs)[0] for _ in range(50)])
    assert set(actions.flatten().tolist()) <= {0, 5, 6}


def test_cache_follows_the_weights_whoever_changes_them():
    envs = vector(2)
    policy = PPO(
        LMActorCriticPolicy,
        GymVectorToSB3(envs),
        device="cpu",
        n_steps=16,
        batch_size=16,
        policy_kwargs=policy_kwargs(envs),
    ).policy
    obs, _ = envs.reset(seed=0)
    tensors = {key: torch.as_tensor(value) for key, value in obs.items()}

    def agrees():
        with torch.no_grad():
            actions, _, logprobs = policy(tensors)
            return torch.allclose(policy.evaluate_actions(tensors, actions)[1], logprobs, atol=1e-5)

    assert agrees()
    with torch.no_grad():
        policy.lm.lm_head.weight.mul_(1.5)  # an optimiser's way
    assert agrees()
    policy.set_training_mode(True)
    policy.lm.lm_head.weight.data.mul_(0.3)  # past the version counter, between training mode and eval mode
    policy.set_training_mode(False)
    assert agrees()


def test_predict_and_evaluate_policy():
    envs = vector(3, reward=lambda text: float("good" in text))
    venv = GymVectorToSB3(envs)
    agent = PPO(
        LMActorCriticPolicy, venv, device="cpu", n_steps=16, batch_size=16, seed=0, policy_kwargs=policy_kwargs(envs)
    )
    obs, _ = envs.reset(seed=1)
    actions, state = agent.predict(obs, deterministic=True)
    assert state is None and actions.shape == (3,)
    for i in range(3):
        row = {key: value[i] for key, value in obs.items()}
        assert agent.predict(row, deterministic=True)[0] == actions[i]
        ids = torch.as_tensor(row["input_ids"][: row["attention_mask"].sum()])
        assert agent.policy.lm(ids[None]).logits[0, -1].argmax() == actions[i]
    mean, std = evaluate_policy(agent, venv, n_eval_episodes=6)
    assert 0 <= mean <= 1


def test_refusals():
    envs = vector(top_k=3)
    with pytest.raises(ValueError, match="top_k and top_p"):
        PPO(LMActorCriticPolicy, GymVectorToSB3(envs), policy_kwargs=policy_kwargs(envs))
    with pytest.raises(TypeError, match="input_ids"):
        PPO(LMActorCriticPolicy, "CartPole-v1", policy_kwargs={"language_model": language_model()})
    small = GPT2LMHeadModel(GPT2Config(vocab_size=V - 1, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(ValueError, match="vocabulary"):
        PPO(LMActorCriticPolicy, GymVectorToSB3(vector()), policy_kwargs={"language_model": small})
    with pytest.raises(ValueError, match="reference"):
        policy_kwargs(gym.make("CartPole-v1"))
    assert policy_kwargs(vector(temperature=0.5))["token_filter"] == TokenFilter(temperature=0.5)


def test_vector_stream_is_that_of_scalar_environments():
    """Our environment through the adapter in each mode, and one scalar environment per row in a DummyVecEnv."""
    single = task(kl_coef=0.2)
    rng = np.random.default_rng(0)
    actions = rng.choice([0, 3, 4, 5, 6], p=[0.1, 0.225, 0.225, 0.225, 0.225], size=(60, 3))
    streams = []
    for make in [lambda: DummyVecEnv([lambda: Monitor(TextGenerationEnv(**single))] * 3)] + [
        lambda mode=mode: GymVectorToSB3(TextGenerationVectorEnv(3, autoreset_mode=mode, **single))
        for mode in AutoresetMode
    ]:
        venv = make()
        venv.seed(11)
        stream = [(venv.reset(), None, None, None)]
        for step in actions:
            for i in range(3):
                if isinstance(venv, DummyVecEnv):
                    venv.env_method("announce_logprobs", np.array([-1.0 - i]), indices=i)
            if isinstance(venv, GymVectorToSB3):
                venv.envs.announce_logprobs(np.array([-1.0, -2.0, -3.0]))
            stream.append(venv.step(step))
        streams.append(stream)
    scalar = streams[0]
    assert sum(step[2].sum() for step in scalar[1:]) > 20
    for stream in streams[1:]:
        for t, (ours, theirs) in enumerate(zip(stream, scalar, strict=True)):
            for key in ("input_ids", "attention_mask"):
                assert ours[0][key].dtype == theirs[0][key].dtype
                np.testing.assert_array_equal(ours[0][key], theirs[0][key])
            if t == 0:
                continue
            np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
            np.testing.assert_array_equal(ours[2], theirs[2])
            for mine, other in zip(ours[3], theirs[3], strict=True):
                ignored = {"episode", "terminal_observation"}
                for key in other.keys() - ignored:
                    expected = pytest.approx(other[key], abs=1e-5) if isinstance(other[key], float) else other[key]
                    assert mine[key] == expected, (t, key)
                if "terminal_observation" in other:
                    np.testing.assert_array_equal(
                        mine["terminal_observation"]["input_ids"], other["terminal_observation"]["input_ids"]
                    )
                    assert mine["episode"]["l"] == other["episode"]["l"]


def test_agents_leave_pythons_random_and_the_environment_alone(tmp_path):
    """Neither the caller's generator nor kl_coef is the agent's to change; other prompts start an order of their own."""
    import random

    from worlds import make_envs

    from rlhf_gym.agents import A2C

    world = make_envs(4, kl_coef=0.05)
    random.seed(1)
    expected = random.Random(1).random()
    agent = A2C(world, seed=0)
    assert random.random() == expected
    world.kl_coef = 0.5
    agent.learn(40)
    assert world.kl_coef == 0.5
    agent.save(tmp_path / "agent")
    other = make_envs(4, kl_coef=0.0, prompts=["the"])
    A2C.load(tmp_path / "agent", env=other)
    assert other.kl_coef == 0.0
