"""Finding a task's LightningModule, a data module and their options by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import unknown


def module_names(package: str) -> list[str]:
    """File stems of a package's modules, without importing them."""
    root = Path(__file__).parent.parent / package
    return sorted(p.stem for p in root.glob("*.py") if not p.stem.startswith("_"))


def _only_class(package: str, name: str, base: type, kind: str) -> type:
    if name not in module_names(package):
        raise unknown(kind, str(name), module_names(package))
    module = importlib.import_module(f"{package}.{name}")
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module.__name__
    ]
    public = [c for c in found if not c.__name__.startswith("_")]
    if len(public) != 1:
        raise TypeError(
            f"{package}/{name}.py must define one {base.__name__}, found {[c.__name__ for c in public]}"
        )
    return public[0]


def get_task(kind: str) -> type:
    """The LightningModule of tasks/<kind>.py."""
    from tasks.base import ZooTask

    return _only_class("tasks", kind, ZooTask, "task kind")


def get_data(name: str) -> type:
    """The data module registered under `name`."""
    from data import data_class

    return data_class(name)


def options_of(cls: type) -> dict[str, Any]:
    """Keyword-only arguments of a class and its bases, with defaults."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters
            found.update({n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY})
    return found


def check_options(kind: str, cls: type, options: Mapping[str, Any]) -> None:
    """Refuse options that `cls` does not take, naming the nearest ones."""
    known = options_of(cls)
    for key in options:
        if key not in known:
            raise unknown(f"option of {kind}:", key, known)
