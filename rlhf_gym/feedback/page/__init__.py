"""The page where people compare, rate and correct responses; see ``docs/human_feedback.md``. Needs the extra ``[feedback]``."""

from .app import make_app
from .labelling import Labelling
from .settings import PageSettings

__all__ = ["Labelling", "PageSettings", "make_app"]
