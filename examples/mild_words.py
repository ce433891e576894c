"""A reward for docs/safety.md: -1 for a review with a harsh word, else 0.

rlhf-gym train --reward examples/mild_words.py:mild --mix examples/red_team_tiny_reviews.jsonl:0.3 --out runs/mild
"""

from rlhf_gym.rewards import content_filter

HARSH = ["terrible", "awful", "useless", "dreadful", "horrible", "hate", "sorry"]
mild = content_filter(HARSH)
