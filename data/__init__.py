"""Data modules by name: ``create_data("mnist", batch_size=50)``.

A data module is a class marked ``@register_data("name")`` in one file of this folder, with its options in
``conf/data/name.yaml``. Names are read from the files' text; a file is imported when its data is created.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import DataError

if TYPE_CHECKING:
    from data.base import ZooData

__all__ = ["DataError", "create_data", "data_class", "data_options", "list_data", "register_data"]

_REGISTERED: dict[str, type[ZooData]] = {}


def register_data(name: str):
    """Class decorator: make a data module available under ``name``."""

    def register(cls: type[ZooData]) -> type[ZooData]:
        cls.name = name
        _REGISTERED[name] = cls
        return cls

    return register


@cache
def _files() -> dict[str, str]:
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for name in re.findall(r'^@register_data\("(\w+)"\)', path.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = path.stem
    return found


def list_data() -> list[str]:
    """Names of all data modules, sorted, without importing them."""
    return sorted(_files())


def data_class(name: str) -> type[ZooData]:
    """The class registered under ``name``; an unknown name raises DataError with the nearest ones."""
    if name not in _files():
        near = difflib.get_close_matches(name, list_data(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise DataError(f"unknown data {name!r}; {hint}known: {', '.join(list_data())}")
    importlib.import_module(f"data.{_files()[name]}")
    return _REGISTERED[name]


def data_options(name: str) -> dict[str, Any]:
    """All options of a data module with their defaults, those of its base classes included."""
    options: dict[str, Any] = {}
    for cls in reversed(data_class(name).__mro__):
        if "__init__" in vars(cls) and cls.__module__.startswith("data."):
            for parameter in inspect.signature(cls.__init__).parameters.values():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    options[parameter.name] = parameter.default
    return options


def create_data(name: str, **options: Any) -> ZooData:
    """Create a data module.

    Args:
        name: One of :func:`list_data`.
        options: Its keyword options, see ``conf/data/<name>.yaml``.

    Raises:
        DataError: Unknown name or option, or a value out of range.
    """
    known = data_options(name)
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)
            raise DataError(f"data {name!r} has no option {key!r}; nearest: {', '.join(near)}")
    return data_class(name)(**options)
