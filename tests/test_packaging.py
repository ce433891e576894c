"""The wheel has one top-level name, nothing is forgotten in it, and imports point one way only."""

from __future__ import annotations

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def packages_on_disk() -> dict[str, Path]:
    """Every folder with Python files in it, by the name under which it must install."""
    found = {}
    for folder, name in (
        ("rlhf_gym", "rlhf_gym"),
        ("agents", "rlhf_gym.agents"),
        ("benchmarks", "rlhf_gym.benchmarks"),
    ):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.parent.relative_to(ROOT / folder).parts
            found[".".join((name, *parts))] = file.parent
    return found


def test_every_folder_is_a_listed_package():
    listed = set(setup_cfg()["options"]["packages"].split())
    assert listed == set(packages_on_disk())
    for name, folder in packages_on_disk().items():
        assert (folder / "__init__.py").is_file(), f"{name} has no __init__.py"


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    """Names in a wheel built from a copy: a build in the checkout would pick up an old build/ folder, and leave one."""
    source = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, source / file)
    for folder in ("rlhf_gym", "agents", "benchmarks"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_installs_one_top_level_name(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rlhf_gym"}


def test_wheel_holds_every_module_and_data_file(wheel_names):
    names = set(wheel_names)
    for package, folder in packages_on_disk().items():
        for file in folder.glob("*.py"):
            assert f"{package.replace('.', '/')}/{file.name}" in names
    data = [
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "rlhf_gym").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix not in (".py", ".pyc")
    ]
    assert set(data) <= names
    assert "rlhf_gym/tasks/tiny_reviews/model/model.safetensors" in names
    assert "rlhf_gym/templates/report.html" in names


def imports(file: Path):
    """(full module name, line, whether inside a function) of each import in the file; relative ones start with dots."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside.update(id(child) for child in ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:  # `from rlhf_gym import agents` names a module too
                yield f"{base}.{alias.name}" if base.strip(".") else base + alias.name, node.lineno, id(node) in inside


def under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def arrow_breaks(file: Path) -> list[str]:
    """The imports of a file that point against the arrows."""
    folder, *rest = file.relative_to(ROOT).parts
    broken = []
    for name, line, inside in imports(file):
        upward = False
        level = len(name) - len(name.lstrip("."))
        if folder == "rlhf_gym" and level:
            name = ".".join((folder, *rest[: len(rest) - level], name[level:]))
        if under(name, "agents", "benchmarks"):
            upward = True  # the installed names are rlhf_gym.agents and rlhf_gym.benchmarks
        elif folder == "rlhf_gym":
            upward = under(name, "rlhf_gym.agents", "rlhf_gym.benchmarks") and not (inside and rest[0] == "cli")
        elif folder == "agents":
            upward = under(name, "rlhf_gym.agents", "rlhf_gym.benchmarks")  # siblings are imported by relative name
        elif folder == "benchmarks":
            upward = under(name, "rlhf_gym.benchmarks")
        if upward or level > len(rest):  # more dots than folders would leave the package by its place on disk
            broken.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    return broken


def test_imports_follow_the_arrows():
    files = [file for folder in ("rlhf_gym", "agents", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    assert [line for file in files for line in arrow_breaks(file)] == []


@pytest.mark.parametrize(
    ("place", "line", "breaks"),
    [
        ("rlhf_gym/envs/x.py", "from rlhf_gym.agents import PPO", True),
        ("rlhf_gym/envs/x.py", "def f():\n    from rlhf_gym.agents import PPO", True),
        ("rlhf_gym/envs/x.py", "from ..agents import PPO", True),
        ("rlhf_gym/envs/x.py", "from ..kl import kl_terms", False),
        ("rlhf_gym/cli/x.py", "from rlhf_gym import agents", True),
        ("rlhf_gym/cli/x.py", "def f():\n    from rlhf_gym import agents", False),
        ("agents/x.py", "from rlhf_gym.agents.functional import gae", True),
        ("agents/x.py", "from .functional import gae\nfrom rlhf_gym.lm import generate", False),
        ("agents/x.py", "from ..envs import core", True),
        ("agents/sb3/x.py", "from ..functional import gae", False),
        ("agents/x.py", "import benchmarks", True),
        ("benchmarks/x.py", "from rlhf_gym.agents import PPO", False),
    ],
)
def test_the_arrow_check_sees_a_wrong_import(tmp_path, monkeypatch, place, line, breaks):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(line, encoding="utf-8")
    assert bool(arrow_breaks(file)) == breaks


def test_import_is_light():
    code = "import sys, rlhf_gym; print(*sorted({'torch', 'transformers', 'stable_baselines3', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_constraints_pin_torch_first_and_cover_every_dependency():
    lines = [
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"
    ]
    pinned = [line.split("==")[0] for line in lines]
    assert pinned[0] == "torch" and all("==" in line for line in lines)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for block in ("dependencies", "dev"):
        wanted = ast.literal_eval("[" + project.split(f"\n{block} = [", 1)[1].split("]", 1)[0] + "]")
        assert {name.split(">=")[0] for name in wanted} <= set(pinned)
