"""The tables of a feedback store, and how an older file becomes a newer one."""

from __future__ import annotations

import sqlite3

APPLICATION_ID = 0x524C4846  # "RLHF", in the header of the file: another program's database is not touched

# `forget` alone takes this trigger away, and puts it back within the same transaction.
KEEP_JUDGEMENTS = """
CREATE TRIGGER judgements_are_kept BEFORE DELETE ON judgements
BEGIN SELECT RAISE(ABORT, 'judgements are only ever added; use undo, or forget'); END"""

# Each entry brings a file from the version that is its index to the next. Never change one that was released: add one.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE items (
            id TEXT PRIMARY KEY NOT NULL,
            prompt TEXT NOT NULL,
            responses TEXT NOT NULL,
            checkpoint TEXT,
            sampling TEXT,
            gold INTEGER
        )""",
        # AUTOINCREMENT: the number of a row that was forgotten is never given again.
        """
        CREATE TABLE judgements (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            at TEXT NOT NULL,
            key TEXT NOT NULL UNIQUE,
            annotator TEXT NOT NULL,
            item TEXT NOT NULL REFERENCES items (id),
            kind TEXT NOT NULL CHECK (kind IN ('comparison', 'rating', 'correction', 'flag', 'skip', 'undo')),
            verdict TEXT NOT NULL,
            cancels TEXT UNIQUE REFERENCES judgements (key),
            shown TEXT NOT NULL,
            seconds REAL,
            CHECK ((kind = 'undo') = (cancels IS NOT NULL))
        )""",
        "CREATE INDEX judgements_by_annotator ON judgements (annotator, number)",
        """
        CREATE TRIGGER judgements_do_not_change BEFORE UPDATE ON judgements
        BEGIN SELECT RAISE(ABORT, 'judgements are only ever added'); END""",
        """
        CREATE TRIGGER items_do_not_change BEFORE UPDATE ON items
        BEGIN SELECT RAISE(ABORT, 'items are only ever added'); END""",
        """
        CREATE TRIGGER items_are_kept BEFORE DELETE ON items
        BEGIN SELECT RAISE(ABORT, 'items are only ever added'); END""",
        KEEP_JUDGEMENTS,
    ),
)


def migrate(connection: sqlite3.Connection, file: str) -> None:
    """Bring a file to the newest version, all of the way or not at all.

    Args:
        connection: Without a transaction under way.
        file: Its name, for the messages.

    Raises:
        ValueError: If the file is of another program, or of a newer version of this one.
    """
    connection.execute("BEGIN IMMEDIATE")  # two programs that open a new file at once: the second finds it made
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        if owner != APPLICATION_ID and connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise ValueError(f"{file} is a database of another program; choose another name, nothing was changed")
        if version > len(MIGRATIONS):
            raise ValueError(
                f"{file} has version {version} of the feedback store, and this rlhf_gym knows up to "
                f"{len(MIGRATIONS)}; install a newer one, nothing was changed"
            )
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
