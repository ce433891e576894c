"""A stranger's own agent, with Stable-Baselines3's interface, on the scalar environment of `gym.make`.

It shapes the KL penalty by hand out of `info["ref_logprob"]`, so that it need not announce anything.

    python examples/sb3_style_agent.py [TIMESTEPS]
"""

import copy
import sys

import gymnasium as gym
import torch


class Reinforce:
    """REINFORCE on whole episodes, with the mean return of the batch before as baseline.

    Args:
        env: Any environment whose observations are the input of a causal language model.
        model: The language model to train.
        beta: Weight of the KL penalty, per nat.
    """

    def __init__(self, env, model, learning_rate=3e-4, beta=0.05, episodes_per_update=16, seed=0):
        self.env, self.model = env, model.requires_grad_(True)
        self.beta, self.episodes_per_update = beta, episodes_per_update
        self.optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        self.generator = torch.Generator().manual_seed(seed)
        self.seed, self.num_timesteps, self.scores = seed, 0, []

    def _act(self, obs, deterministic=False):
        """The next token and its log-probability."""
        length = int(obs["attention_mask"].sum())
        logprobs = self.model(input_ids=torch.as_tensor(obs["input_ids"][None, :length])).logits[0, -1].log_softmax(-1)
        sampled = torch.multinomial(logprobs.detach().exp(), 1, generator=self.generator)
        action = int(logprobs.argmax() if deterministic else sampled)
        return action, logprobs[action]

    def predict(self, obs, deterministic=False):
        """The next token, and None for the state that recurrent agents have."""
        with torch.no_grad():
            return self._act(obs, deterministic)[0], None

    def learn(self, total_timesteps):
        """Play episodes and learn from each batch of them, until ``total_timesteps`` tokens are generated."""
        baseline, seed = 0.5, self.seed
        while self.num_timesteps < total_timesteps:
            loss, returns = 0.0, []
            for _ in range(self.episodes_per_update):
                obs, info = self.env.reset(seed=seed)
                seed, done, logprobs, total = None, False, [], 0.0
                while not done:
                    action, logprob = self._act(obs)
                    logprobs.append(logprob)
                    obs, reward, terminated, truncated, info = self.env.step(action)
                    total += reward - self.beta * (logprob.item() - info["ref_logprob"])
                    done = terminated or truncated
                loss = loss - (total - baseline) * torch.stack(logprobs).sum() / self.episodes_per_update
                self.num_timesteps += len(logprobs)
                returns.append(total)
                self.scores.append(info["score"])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            baseline = sum(returns) / len(returns)
        return self


def main(total_timesteps=10_000, **settings):
    """Returns the mean score of the first and of the last hundred episodes."""
    env = gym.make("rlhf_gym:rlhf_gym/TinyReviews-v0")
    model = copy.deepcopy(env.unwrapped.language_model.model).float()
    agent = Reinforce(env, model, **settings).learn(total_timesteps)
    obs, info = env.reset(seed=1)
    done = False
    while not done:
        action, _ = agent.predict(obs, deterministic=True)
        obs, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    first, last = (sum(part) / len(part) for part in (agent.scores[:100], agent.scores[-100:]))
    print(f"score: {first:.3f} -> {last:.3f}\n{info['prompt']} ... {info['response']}")
    return first, last


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
