"""What is wrong with a file of rows, and where: collected, so that one look shows all of it."""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = 100
"""Problems that are listed; further ones are counted."""


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong."""

    line: int
    """From 1."""
    column: int
    """In characters, from 1; a byte-order mark does not count."""
    message: str
    """The rule, the value, and what to do."""

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.message}"


class DataError(ValueError):
    """A file has problems; the message names it and the first of them."""


class Problems:
    """The problems of one file.

    Args:
        file: Its name, as the user gave it.
        limit: How many to keep; further ones are only counted.
    """

    def __init__(self, file: str, limit: int = LIMIT):
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.file, self.limit = file, limit
        self.total = 0
        self._kept: list[Problem] = []

    def add(self, line: int, column: int, message: str) -> None:
        """One more."""
        self.total += 1
        if len(self._kept) < self.limit:
            self._kept.append(Problem(line, column, message))

    def listed(self) -> list[Problem]:
        """Those that were kept, from the top of the file to its end."""
        return sorted(self._kept)

    def raise_if_any(self, num_shown: int = 3, lister: str | None = "rlhf-gym data check") -> None:
        """Refuse the file.

        Args:
            num_shown: So many problems are told.
            lister: The command that tells the rest; None where there is none.

        Raises:
            DataError: If there is a problem; it shows the first ``num_shown``.
        """
        if not self.total:
            return
        shown = "; ".join(map(str, self.listed()[:num_shown]))
        more = self.total - min(num_shown, len(self._kept))
        rest = f"; and {more} more" + (f", which {lister} lists" if lister else "") if more else ""
        raise DataError(f"{self.file}: {shown}{rest}")
