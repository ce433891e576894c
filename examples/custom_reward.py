"""Your own reward function: a language model that likes to give five stars. `python examples/custom_reward.py`"""

import gymnasium as gym

from rlhf_gym.agents import PPO


def five_stars(completions):
    return [float("five stars" in text) for text in completions]


def main(total_timesteps=40_000):
    envs = gym.make_vec("rlhf_gym:rlhf_gym/TinyReviews-v0", num_envs=64, reward=five_stars, kl_coef=0.05)
    agent = PPO(envs, seed=0, learning_rate=1e-4).learn(total_timesteps, progress_bar=True)
    agent.save("runs/five_stars")
    return agent


if __name__ == "__main__":
    main()
