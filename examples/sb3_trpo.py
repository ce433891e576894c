"""Stable-Baselines3 on a language model: TRPO, which needs our version of it, or any stock on-policy algorithm.

python examples/sb3_trpo.py          # TRPO
python examples/sb3_trpo.py stock    # PPO, straight out of stable_baselines3
"""

import sys

import gymnasium as gym
import stable_baselines3

from rlhf_gym.agents import TRPO, AnnounceLogprobs, GymVectorToSB3
from rlhf_gym.agents.sb3 import LMActorCriticPolicy, policy_kwargs


def print_progress(agent, metrics):
    print(f"{agent.num_timesteps:7d} tokens  score {metrics['objective/scores']:.3f}  kl {metrics['objective/kl']:.2f}")


def trpo(total_timesteps=60_000, num_envs=32):
    """TRPO with the interface of all our agents; the KL penalty is announced by itself."""
    envs = gym.make_vec("rlhf_gym:rlhf_gym/TinyReviews-v0", num_envs, kl_coef=0.05)
    return TRPO(envs, seed=0).learn(total_timesteps, callback=print_progress)


def stock_ppo(total_timesteps=60_000, num_envs=32):
    """An unmodified algorithm of Stable-Baselines3: adapter, policy, and a callback that announces its log-probs."""
    envs = gym.make_vec("rlhf_gym:rlhf_gym/TinyReviews-v0", num_envs, kl_coef=0.05)
    model = stable_baselines3.PPO(
        LMActorCriticPolicy,
        GymVectorToSB3(envs),
        policy_kwargs=policy_kwargs(envs),
        n_steps=2 * envs.unwrapped.max_response_tokens,
        batch_size=16 * num_envs,
        gamma=1.0,  # SB3's .99 would make later tokens count less
        seed=0,
        verbose=1,
    )
    return model.learn(total_timesteps, callback=AnnounceLogprobs())


def main(*arguments, **settings):
    return (stock_ppo if "stock" in arguments else trpo)(**settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
