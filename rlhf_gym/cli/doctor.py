"""``rlhf-gym doctor``: what this machine has, and what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rlhf_gym.cli.options import Doctor

# The security floors and the oldest versions that the code was written for; pyproject.toml says the same.
FLOORS = {"torch": "2.10", "transformers": "5.3", "gymnasium": "1.4", "stable-baselines3": "2.9", "sb3-contrib": "2.9"}
OTHERS = ("numpy", "safetensors", "tyro", "tensorboard", "matplotlib")
OPTIONAL = {
    "datasets": "prompts from a datasets.Dataset",
    "peft": "LoRA",
    "gguf": ".gguf models",
    "starlette": "the labelling page",
}


class Finding(NamedTuple):
    """One line of the report; ``problem`` says what is wrong and what to do, "" when all is well."""

    name: str
    value: str
    problem: str = ""


def run(options: Doctor) -> int:
    """Print all findings; returns 1 when something is wrong."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = [finding for check in CHECKS for finding in _safely(check)]
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark = "[red]wrong[/red]" if finding.problem else "[green]ok[/green]"
        table.add_row(mark, finding.name, escape(finding.value))
    console = Console()
    console.print(table)
    problems = [finding for finding in findings if finding.problem]
    for finding in problems:
        console.print(escape(f"\n{finding.name}: {finding.problem}"), soft_wrap=True)
    print(
        "\nnothing is wrong" if not problems else f"\n{len(problems)} of {len(findings)} checks found something wrong"
    )
    return 1 if problems else 0


def _safely(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that fails is a finding, not the end of the report."""
    try:
        yield from check()
    except Exception as error:  # whatever a broken installation raises
        name = check.__name__.strip("_").replace("_", " ")
        yield Finding(name, "failed", f"{type(error).__name__}: {error}")


def _versions() -> Iterator[Finding]:
    from importlib import metadata

    from rlhf_gym import __version__

    yield Finding("rlhf-gym", __version__)
    yield Finding("Python", platform.python_version())
    for name in (*FLOORS, *OTHERS):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "missing", f"pip install {name}")
            continue
        floor = FLOORS.get(name, "0")
        old = _numbers(version) < _numbers(floor)
        yield Finding(
            name,
            version,
            f"older than {floor}, the oldest that is safe to use; pip install --upgrade {name}" if old else "",
        )
    for name, use in OPTIONAL.items():
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, f"not installed (only for {use})")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _processor() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", str(cores))
    threads = torch.get_num_threads()
    many = f"more threads than cores slow each other down; set OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield Finding("torch threads", str(threads), many)
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("CPU instructions", capability)
    flags = set()
    if Path("/proc/cpuinfo").is_file():
        line = next((text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("flags")), "")
        flags = set(line.split())
    fast = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    yield Finding(
        "bfloat16 on the CPU",
        f"fast ({', '.join(fast)})" if fast else "slow: no AMX or AVX512-bf16; float32 is the default",
    )


def _memory() -> Iterator[Finding]:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        yield Finding("memory", f"{size:.0f} GiB", "2 GiB are too little for torch" if size < 2 else "")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding("free disk here", f"{free:.0f} GiB", "less than 1 GiB: checkpoints may not fit" if free < 1 else "")


def _graphics() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda} but finds no GPU"
            if torch.version.cuda
            else "torch is a CPU build"
        )
        yield Finding("GPU", f"none ({built})")
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield Finding(f"GPU {i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}")


def _hub() -> Iterator[Finding]:
    from rlhf_gym.lm.load import is_reachable

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("Hugging Face hub", "not asked: HF_HUB_OFFLINE is set")
        return
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    # No fault when it cannot: everything packaged works without it.
    offline = "cannot be reached; use packaged models, directories or what is in the cache"
    yield Finding("Hugging Face hub", f"{url} {'can be reached' if is_reachable(url) else offline}")


def _packaged_model() -> Iterator[Finding]:
    from rlhf_gym.lm import PACKAGED_MODELS

    for name, folder in PACKAGED_MODELS.items():
        recorded = _recorded_hash(folder)
        weights = folder / "model.safetensors"
        if not weights.is_file():
            yield Finding(f"model {name}", "missing", "the installation is damaged; install rlhf-gym again")
            continue
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        wrong = (
            f"{weights} is not the file that was shipped ({recorded}); install rlhf-gym again"
            if found != recorded
            else ""
        )
        yield Finding(f"model {name}", f"sha256 {found[:16]}...", wrong)


def _recorded_hash(folder: Path) -> str | None:
    """SHA-256 of the weights as recorded beside them when they were made."""
    record = folder / "provenance.json"
    return json.loads(record.read_text(encoding="utf-8")).get("sha256") if record.is_file() else None


def _training() -> Iterator[Finding]:
    import numpy as np
    import torch

    # numpy and torch built against each other, and a backward pass: what a broken installation fails at first.
    weight = torch.from_numpy(np.ones(3, dtype=np.float32)).requires_grad_()
    (weight.exp().sum()).backward()
    right = bool(torch.allclose(weight.grad, torch.full((3,), 2.7182817)))
    yield Finding(
        "a backward pass", "works" if right else "wrong", "" if right else "torch computes wrongly; install it again"
    )


CHECKS = (_versions, _processor, _memory, _graphics, _training, _hub, _packaged_model)
