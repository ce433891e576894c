"""Files that a verb is told to write."""

from __future__ import annotations

import os
from pathlib import Path


def new_file(flag: str, name: str, overwrite: bool, source: str | None = None) -> Path:
    """A file that may be written; found out before any work is done.

    Args:
        flag: The option that names it.
        name: Its name.
        overwrite: Whether --overwrite was given.
        source: What the verb reads.

    Raises:
        ValueError: If it exists and must not be replaced, is a directory, or would lie in none.
    """
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {name}: there is no directory {str(path.parent)!r}")
    if path.is_dir():
        raise ValueError(f"{flag} {name} is a directory; name a file")
    if path.exists() and not overwrite:
        given = None if source is None else Path(source).expanduser()
        what = "is the input" if given is not None and given.exists() and os.path.samefile(path, given) else "exists"
        raise ValueError(f"{flag} {name} {what}; choose another name, or replace it with --overwrite")
    return path
