"""REINFORCE with a baseline in one file, as a stranger would write it in the manner of CleanRL.

Nothing of ours is used but the environment: Gymnasium's vector API, and `announce_logprobs` for its KL penalty.

    python examples/cleanrl_style_reinforce.py
"""

import copy

import gymnasium as gym
import torch
from torch.distributions import Categorical


def next_token(policy, obs):
    """The policy's distribution over the next token; a right-padded observation is a correct model input."""
    lengths = obs["attention_mask"].sum(-1)
    ids, mask = (obs[key][:, : lengths.max()] for key in ("input_ids", "attention_mask"))  # no need to read the padding
    logits = policy(input_ids=ids, attention_mask=mask).logits
    return Categorical(logits=logits[torch.arange(len(lengths)), lengths - 1])


def main(num_iterations=20, num_envs=32, num_steps=64, learning_rate=1e-3, kl_coef=0.05, seed=0):
    """Returns the mean score of the episodes that ended in each iteration."""
    envs = gym.make_vec(
        "rlhf_gym:rlhf_gym/TinyReviews-v0", num_envs, output="torch", autoreset_mode="same_step", kl_coef=kl_coef
    )
    torch.manual_seed(seed)
    policy = copy.deepcopy(envs.unwrapped.language_model.model).float().requires_grad_(True)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    obs, infos = envs.reset(seed=seed)
    mean_scores = []
    for iteration in range(num_iterations):
        states, actions, rewards, dones, scores = [], [], [], [], []
        for _ in range(num_steps):
            with torch.no_grad():
                dist = next_token(policy, obs)
            action = dist.sample()
            envs.unwrapped.announce_logprobs(dist.log_prob(action))
            states.append(obs)
            actions.append(action)
            obs, reward, terminated, truncated, infos = envs.step(action)
            rewards.append(reward)
            dones.append(terminated | truncated)
            if dones[-1].any():
                scores.append(infos["final_info"]["score"][dones[-1]])

        # Reward to go, of the tokens whose episode ended in this rollout: of the others the score is not known.
        returns, known = torch.zeros(num_steps, num_envs), torch.zeros(num_steps, num_envs)
        future, ends = 0.0, torch.zeros(num_envs, dtype=torch.bool)
        for t in reversed(range(num_steps)):
            future, ends = rewards[t] + future * ~dones[t], ends | dones[t]
            returns[t], known[t] = future, ends
        mean_scores.append(torch.cat(scores).mean().item() if scores else float("nan"))
        if not known.any():  # no episode has ended: there is nothing to learn from yet
            continue
        baseline = (returns * known).sum() / known.sum()
        for t in range(num_steps):
            logprobs = next_token(policy, states[t]).log_prob(actions[t])
            (-(logprobs * (returns[t] - baseline) * known[t]).sum() / known.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"iteration {iteration + 1:3d}  score {mean_scores[-1]:.3f}  tokens {(iteration + 1) * known.numel()}")
    envs.close()
    return mean_scores


if __name__ == "__main__":
    main()
