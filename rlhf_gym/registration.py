"""The environment ids. Entry points are strings, so that registering imports nothing heavy."""

from __future__ import annotations

from typing import Any

from gymnasium.envs.registration import register, registry

SCALAR, VECTOR = "rlhf_gym.envs.scalar:TextGenerationEnv", "rlhf_gym.envs.vector:TextGenerationVectorEnv"

# Only names and numbers here: Gymnasium deep-copies these arguments at each make.
TASKS: dict[str, dict[str, Any]] = {
    "rlhf_gym/TextGeneration-v0": {},
    "rlhf_gym/TinyReviews-v0": {
        "model": "tiny-reviews",
        "prompts": "tiny-reviews",
        "reward": "tiny-reviews",
        "max_prompt_tokens": 16,
        "max_response_tokens": 32,
    },
}

# Tasks with known answers: id -> the name under which rlhf_gym.exact.tasks builds it.
EXACT_SCALAR, EXACT_VECTOR = "rlhf_gym.exact.tasks:make_env", "rlhf_gym.exact.tasks:make_vector_env"
EXACT_TASKS: dict[str, str] = {
    "rlhf_gym/WoAiNi-v0": "woaini",
    "rlhf_gym/Brackets-v0": "brackets",
    "rlhf_gym/Lexicon-v0": "lexicon",
    "rlhf_gym/Recall-v0": "recall",
    "rlhf_gym/Goodhart-v0": "goodhart",
    "rlhf_gym/Difficulty-v0": "difficulty",
}


def register_environments() -> None:
    """Register every id of this package, once."""
    for task_id, kwargs in TASKS.items():
        if task_id not in registry:
            register(id=task_id, entry_point=SCALAR, vector_entry_point=VECTOR, kwargs=kwargs)
    for task_id, name in EXACT_TASKS.items():
        if task_id not in registry:
            register(id=task_id, entry_point=EXACT_SCALAR, vector_entry_point=EXACT_VECTOR, kwargs={"task": name})
