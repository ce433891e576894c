"""``python -m rlhf_gym`` is the command ``rlhf-gym``."""

from __future__ import annotations

import sys

from rlhf_gym.cli import main

if __name__ == "__main__":
    sys.exit(main())
