"""What a judge has answered, in memory and in a file: nothing is asked and paid for twice."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

APPLICATION_ID = 0x726C6A63  # "rljc"


class JudgeCache:
    """Answers by key. All methods may be called from any thread, and several programs may have the file open.

    Args:
        path: SQLite file, made when missing; None keeps all in memory.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the file is something else.
    """

    def __init__(self, path: str | Path | None):
        self._answers: dict[str, str] = {}
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        if path is None:
            return
        path = Path(path).expanduser()
        if not path.parent.is_dir():
            raise FileNotFoundError(f"judge: cache: there is no folder {str(path.parent)!r} to keep {path.name!r} in")
        self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        try:
            owner = self._db.execute("PRAGMA application_id").fetchone()[0]
            if owner != APPLICATION_ID and self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise ValueError(f"judge: cache: {path} is a database of another program; choose another name")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"judge: cache: {path} cannot be used as a cache ({error}); choose another name") from None
        except BaseException:
            self._db.close()
            raise

    def get(self, key: str) -> str | None:
        """The answer kept under a key, None when there is none."""
        with self._lock:
            if key not in self._answers and self._db is not None:
                row = self._db.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
                if row:
                    self._answers[key] = row[0]
            return self._answers.get(key)

    def put(self, key: str, answer: str) -> None:
        """Keep an answer; it is in the file when this returns."""
        with self._lock:
            self._answers[key] = answer
            if self._db is not None:
                self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))
