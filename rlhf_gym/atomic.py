"""Writing files and directories that are there whole or not at all, whenever the process dies."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
_WINDOWS = os.name == "nt"


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that the file holds either its old content or all of the new one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def write_text(path: str | Path, text: str) -> None:
    """Write a text so that the file holds either its old content or all of the new one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def replaced_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary directory that takes the place of ``directory`` when the block ends without an error.

    Everything is on disk, with the SHA-256 of every file in ``checksums.json``, before the name points to it. If the
    process dies between the two renames the previous directory stands beside it as ``.NAME.previous``, and
    `verified_files` finds it there.

    Raises:
        FileExistsError: If ``directory`` is a file, or holds files that no earlier call has written (they would be
            lost).
    """
    directory = Path(directory)
    if directory.is_file() or (
        directory.is_dir() and any(directory.iterdir()) and not (directory / CHECKSUMS).exists()
    ):
        raise FileExistsError(
            f"{directory} exists and was not written by an agent; choose another name, nothing was overwritten"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    for stale in directory.parent.glob(f".{glob.escape(directory.name)}.new-*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.new-"))
    try:
        yield temporary
        sums = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            sums[path.relative_to(temporary).as_posix()] = _sha256(path)
            _sync(path)
        write_json(temporary / CHECKSUMS, sums)
        os.chmod(temporary, 0o755)
        previous = _previous(directory)
        shutil.rmtree(previous, ignore_errors=True)
        if directory.exists():
            os.replace(directory, previous)
        os.replace(temporary, directory)
        _sync(directory.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def verified_files(directory: str | Path, needed: str) -> Path:
    """The directory, once the files in it are known to be those that were written.

    Args:
        directory: What `replaced_directory` wrote.
        needed: A file that must be there.

    Raises:
        FileNotFoundError: If the directory or the file is missing.
        ValueError: If a file is missing or has changed.
    """
    directory = Path(directory)
    if not directory.exists() and _previous(directory).exists():
        os.replace(_previous(directory), directory)
    if not (directory / needed).is_file():
        raise FileNotFoundError(f"{directory} holds no {needed}; give the directory that an agent was saved to")
    if (directory / CHECKSUMS).is_file():
        for name, expected in json.loads((directory / CHECKSUMS).read_text()).items():
            path = directory / name
            if not path.is_file() or _sha256(path) != expected:
                raise ValueError(
                    f"{path} is missing or was changed after it was saved (its SHA-256 differs); restore it from a copy"
                )
    return directory


def _previous(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.previous")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def _sync(path: Path) -> None:
    if _WINDOWS and path.is_dir():
        return  # cannot be opened there
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)  # Windows syncs only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
