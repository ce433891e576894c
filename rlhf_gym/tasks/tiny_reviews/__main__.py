"""``python -m rlhf_gym.tasks.tiny_reviews``: ten reviews, each after the probability that its writer is positive."""

from __future__ import annotations

import numpy as np

from . import sample, sentiment

if __name__ == "__main__":
    rng = np.random.default_rng()
    for text in (sample(rng) for _ in range(10)):
        print(f"{sentiment(text):.2f}  {text}")
