"""``rlhf-gym feedback forget``: whoever has judged may want to be forgotten."""

from __future__ import annotations

from rlhf_gym.cli.feedback_export import existing_store
from rlhf_gym.cli.feedback_options import FeedbackForget
from rlhf_gym.cli.parse import did_you_mean
from rlhf_gym.envs.render import visible


def run(options: FeedbackForget) -> int:
    """Remove the judgements and say how many they were."""
    name = str(options.annotator)
    with existing_store(options.db) as store:
        known = {event.judgement.annotator for event in store.events()}
        if known and name not in known:
            raise ValueError(f"--annotator: there are no judgements of {name!r}{did_you_mean(name, sorted(known))}")
        # Also when none are left: it clears a log that another program held before.
        removed = store.forget(name)
    print(f"removed {removed:,} judgements of {visible(name)}; exports made before still have them: make them anew")
    return 0
