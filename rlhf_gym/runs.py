"""A run is a directory: what was asked for, what happened, what came out. Nothing in it is lost when the process dies.

config.json          the options, versions and machine
metrics.csv          one line per update; tensorboard/ holds the same numbers
samples_before.jsonl, samples_after.jsonl, evaluation.json
plots/               reward and KL curves (PNG)
model/               the agent, at the last checkpoint; also a ``from_pretrained`` directory
merged/              of an adapter in model/ the whole model, where that was asked for
README.md            the model card
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_gym.atomic import verified_files, write_json

# What --overwrite deletes, and nothing else: a mistyped path must not cost anyone a home directory. Patterns: what a
# killed process has left goes too, or a new run could be resumed from the old agent.
OWN_NAMES = (
    "config.json",
    "metrics.csv",
    "tensorboard",
    "samples_before.jsonl",
    "samples_after.jsonl",
    "evaluation.json",
    "plots",
    "model",
    "merged",
    "README.md",
    "report.html",
    ".metrics.csv.new",
    ".model.previous",
    ".model.new-*",
    ".merged.previous",
    ".merged.new-*",
)
# Options that may differ between a run and its resumption.
FREE_ON_RESUME = frozenset(
    {"total_timesteps", "out", "overwrite", "resume", "progress_bar", "checkpoint_every", "fsdp"}
)


class RunDirectory:
    """A directory for one run, claimed by its ``config.json``.

    Args:
        path: The directory; made when missing.
        options: What the run was asked to do, JSON-able; kept in ``config.json``.
        verb: The command that it is a run of; a run of another is neither overwritten nor resumed.
        overwrite: Delete what an earlier run left there (the names in ``OWN_NAMES``).
        resume: Go on from the checkpoint of an earlier run with the same options; without a checkpoint, start anew.

    Attributes:
        has_checkpoint: Whether ``model/`` holds an agent to go on from. Only ever True with ``resume``.

    Raises:
        ValueError: If the directory is not empty and not a run, is a run and neither option says what to do with it, or
            the options to resume with differ from those of the run.
    """

    def __init__(
        self,
        path: str | Path,
        options: Mapping[str, Any],
        *,
        verb: str = "train",
        overwrite: bool = False,
        resume: bool = False,
    ):
        self.path, self.verb = Path(path).expanduser(), verb
        self.options = dict(options)
        if overwrite and resume:
            raise ValueError("--overwrite and --resume exclude each other: delete the run, or go on with it")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; a run needs a directory, choose another --out")
        earlier = self._earlier_options()
        self._is_new = earlier is None
        if earlier is not None and resume:
            self._check_same(earlier)
        elif earlier is not None and overwrite:
            for target in [found for name in OWN_NAMES for found in self.path.glob(name)]:
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        elif earlier is not None:
            raise ValueError(f"{self.path} holds a run already; choose another --out, or add --resume or --overwrite")
        self.has_checkpoint = resume and _holds_agent(self.model)
        self.path.mkdir(parents=True, exist_ok=True)
        self.plots.mkdir(exist_ok=True)
        config = {"rlhf_gym": _version("rlhf-gym"), "verb": verb, "options": self.options, **machine()}
        write_json(self.path / "config.json", config)

    @contextlib.contextmanager
    def nothing_done_yet(self) -> Iterator[None]:
        """Inside, an exception takes a new directory away again: the mended command finds its name free."""
        try:
            yield
        except BaseException:
            if self._is_new:
                (self.path / "config.json").unlink(missing_ok=True)
                for folder in (self.plots, self.path):
                    with contextlib.suppress(OSError):  # something is in it
                        folder.rmdir()
            raise

    def _earlier_options(self) -> dict[str, Any] | None:
        """Options of the run that is there, None when there is none."""
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return None
        try:
            config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            verb, options = config["verb"] if "rlhf_gym" in config else None, config["options"]
        except (OSError, ValueError, TypeError, KeyError):
            verb, options = None, None
        if verb is None:
            raise ValueError(
                f"{self.path} is not empty and holds no run of rlhf-gym; choose another --out or empty it yourself"
            )
        if verb != self.verb:
            raise ValueError(f"{self.path} holds a run of `rlhf-gym {verb}`; choose another --out or empty it yourself")
        return options

    def _check_same(self, earlier: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self.options))  # tuples become lists, as they did in the file
        for name in sorted((now.keys() | earlier.keys()) - FREE_ON_RESUME):
            if now.get(name) != earlier.get(name):
                raise ValueError(
                    f"cannot resume {self.path}: {name} was {earlier.get(name)!r} and is now {now.get(name)!r}; "
                    "give the same options, or choose another --out"
                )

    @property
    def model(self) -> Path:
        """Where the agent is saved."""
        return self.path / "model"

    @property
    def plots(self) -> Path:
        """Where pictures go."""
        return self.path / "plots"

    def write_samples(self, when: str, samples: Iterable[Mapping[str, Any]]) -> None:
        """Write ``samples_<when>.jsonl``, one JSON object per line; ``when`` is "before" or "after"."""
        lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
        (self.path / f"samples_{when}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def checkpoint(self, every: int) -> Callable[[Any, Mapping[str, float]], None]:
        """A callback that saves the agent to ``model/`` at each ``every``-th update, as `save` does."""
        return checkpoint(self.model, every)

    def save(self, agent: Any) -> None:
        """Save the agent to ``model/``, see `save_agent`."""
        save_agent(agent, self.model)


def checkpoint(directory: Path, every: int) -> Callable[[Any, Mapping[str, float]], None]:
    """A callback that saves an agent at each ``every``-th update, as `save_agent` does."""
    counter = itertools.count(1)

    def save(agent: Any, metrics: Mapping[str, float]) -> None:
        if next(counter) % every == 0:
            save_agent(agent, directory)

    return save


def save_agent(agent: Any, directory: Path) -> None:
    """Save an agent.

    Raises:
        ValueError: If the weights of its model are broken; what is there stays.
    """
    if not all(bool(weight.isfinite().all()) for weight in agent.policy_model.parameters()):
        kept = f"{directory} keeps the last checkpoint" if directory.exists() else "there is no checkpoint"
        raise ValueError(
            f"the model at {agent.num_timesteps} tokens has weights that are NaN or infinite and is not saved; {kept}"
        )
    agent.save(directory)


class MetricsWriter:
    """Writes metrics to ``metrics.csv`` and as TensorBoard events; an agent's callback.

    Each line is on its way to the disk when the call returns, so ``kill -9`` loses nothing. Columns may appear later;
    the file is then rewritten with the longer header, in one step.

    Args:
        directory: The run directory.
        resume_at: Timesteps of the checkpoint that the run goes on from: later lines are dropped, since those updates
            will be made again. None starts a new file.
    """

    def __init__(self, directory: str | Path, *, resume_at: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(directory) / "metrics.csv"
        rows = read_rows(self.path) if resume_at is not None and self.path.exists() else []
        rows = [row for row in rows if float(row["timesteps"]) <= float(resume_at or 0)]
        self._columns = list(dict.fromkeys(["timesteps", "seconds", *(name for row in rows for name in row)]))
        self._rewrite(rows)
        self._started = time.monotonic() - (float(rows[-1]["seconds"]) if rows else 0.0)
        self._events = SummaryWriter(
            str(Path(directory) / "tensorboard"), purge_step=None if resume_at is None else resume_at + 1
        )

    def __call__(self, agent: Any, metrics: Mapping[str, float]) -> None:
        """Write one update's metrics under the agent's ``num_timesteps``."""
        seconds = time.monotonic() - self._started
        row = {
            "timesteps": agent.num_timesteps,
            "seconds": f"{seconds:.3f}",
            **{k: float(v) for k, v in metrics.items()},
        }
        new = [name for name in row if name not in self._columns]
        if new:
            self._file.close()
            rows = read_rows(self.path)
            self._columns += new
            self._rewrite(rows)
        self._write(self._file, [row])
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, float(value), agent.num_timesteps)
        self._events.flush()

    def close(self) -> None:
        """Close both files; lines already written need no closing to be safe."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, file: Any, rows: Iterable[Mapping[str, Any]]) -> None:
        csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerows(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(self._columns)
        self._write(text, rows)
        # In one step: a kill in the middle of a rewrite must not cost the lines that were there.
        temporary = self.path.with_name(".metrics.csv.new")
        temporary.write_text(text.getvalue(), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8", newline="")


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Lines of a ``metrics.csv`` as written; a last line that was cut off in the middle is left out."""
    text = Path(path).read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines(keepends=True)))


def read_metrics(path: str | Path) -> dict[str, list[float]]:
    """Columns of a ``metrics.csv``; NaN where an update did not report the metric."""
    rows = read_rows(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [float(row[name]) if row[name] else float("nan") for row in rows] for name in names}


def machine() -> dict[str, Any]:
    """Versions and machine, as kept in ``config.json``."""
    packages = ("torch", "transformers", "gymnasium", "stable-baselines3", "sb3-contrib", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: _version(name) for name in packages},
    }


def _holds_agent(directory: Path) -> bool:
    try:
        verified_files(directory, "trainer_state.json")
    except FileNotFoundError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
