"""Your own agent in the benchmark: REINFORCE in one file, on Gymnasium's public vector API alone.

    rlhf-gym benchmark --agents ppo examples/custom_agent.py:Reinforce --seeds 3 --out runs/mine

An agent is a class with `learn` and `predict`. `policy_model` is what lets the benchmark measure its KL and its
distance from the optimum; without it only the score of what `predict` says is known.
"""

import copy

import gymnasium as gym
import numpy as np
import torch
from torch.distributions import Categorical


class Reinforce:
    """Reward-to-go of whole episodes, less a running mean.

    Args:
        envs: A vector environment in next_step mode.
        policy: The causal language model to train; None is a copy of the environment's reference.
        seed: Of all randomness.
        learning_rate: Adam's.
    """

    def __init__(self, envs, policy=None, seed=0, learning_rate=0.02):
        self.envs, self.seed = envs, seed
        self.policy_model = policy or copy.deepcopy(envs.unwrapped.language_model.model).float().requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.policy_model.parameters(), lr=learning_rate)
        self.num_timesteps, self.baseline = 0, None
        torch.manual_seed(seed)

    def distribution(self, observation):
        """Of the next token; a right-padded observation is a correct model input."""
        ids, mask = (torch.as_tensor(observation[key]) for key in ("input_ids", "attention_mask"))
        logits = self.policy_model(input_ids=ids, attention_mask=mask).logits
        return Categorical(logits=logits[torch.arange(len(ids)), mask.sum(1) - 1])

    def predict(self, observation, deterministic=False):
        """The next tokens, and None for the state that recurrent agents have."""
        with torch.no_grad():
            found = self.distribution(observation)
        return (found.probs.argmax(-1) if deterministic else found.sample()).numpy(), None

    def learn(self, total_timesteps, callback=None):
        """One episode in every row, one step of the optimiser, and so on."""
        observation, _ = self.envs.reset(seed=self.seed)
        while self.num_timesteps < total_timesteps:
            logprobs, rewards, running = [], [], np.ones(self.envs.num_envs, dtype=bool)
            masks = []
            while running.any():
                found = self.distribution(observation)
                tokens = found.sample()
                logprob = found.log_prob(tokens)
                # The environment subtracts kl_coef * (log pi - log pi_ref), and only the agent knows log pi.
                self.envs.unwrapped.announce_logprobs(logprob.detach())
                observation, reward, terminated, truncated, _ = self.envs.step(tokens.numpy())
                logprobs.append(logprob)
                rewards.append(reward)
                masks.append(running)
                running = running & ~(terminated | truncated)
            observation, _ = self.envs.reset()  # rows that ended early have begun their next episode: drop it

            known = torch.as_tensor(np.stack(masks))
            to_go = torch.as_tensor(np.stack(rewards) * np.stack(masks)).flip(0).cumsum(0).flip(0)
            mean = to_go[known].mean().item()
            self.baseline = mean if self.baseline is None else 0.9 * self.baseline + 0.1 * mean
            loss = -(torch.stack(logprobs) * (to_go - self.baseline))[known].sum() / self.envs.num_envs
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.num_timesteps += int(known.sum())
            # Where the benchmark draws its curve, and ends the training; False means stop.
            if callback is not None and callback(self, {"objective/rlhf_reward": to_go[0].mean().item()}) is False:
                break
        return self


def main(total_timesteps=20_000):
    envs = gym.make_vec("rlhf_gym:rlhf_gym/TinyReviews-v0", num_envs=32, kl_coef=0.05)
    agent = Reinforce(envs, learning_rate=1e-3)
    agent.learn(total_timesteps, lambda who, found: print(who.num_timesteps, f"{found['objective/rlhf_reward']:.3f}"))
    return agent


if __name__ == "__main__":
    main()
