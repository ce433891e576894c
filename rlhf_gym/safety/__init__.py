"""Safety tools: attack success and over-refusal, attacks mixed into training, and samples for people to look at."""

from .mixing import mix_prompts
from .red_team import RedTeam, is_refusal, read_red_team, red_team
from .review import review_queue

__all__ = ["RedTeam", "is_refusal", "mix_prompts", "read_red_team", "red_team", "review_queue"]
