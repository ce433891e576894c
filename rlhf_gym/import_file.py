"""A Python file that the user names, run as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_file(path: Path, name: str) -> ModuleType:
    """Runs a file as the module `name`, once in a process.

    Its directory comes last on the import path, so that it finds its neighbours as under ``python file.py`` and hides
    nothing. Where the file raises, both are as they were.

    Args:
        path: An existing ``.py`` file.
        name: No other file's and no other module's name.

    Raises:
        Exception: Whatever the file raises.
    """
    if name in sys.modules:
        return sys.modules[name]
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look themselves up there
    added = str(path.parent) not in sys.path
    if added:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if added:
            sys.path.remove(str(path.parent))
        raise
    return module
