"""Finding a task's LightningModule, a data module and their options by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, unknown


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


def data_of_kind(kind: str) -> list[str]:
    """Names of the data modules that hold `kind`; imports all of them."""
    from data import list_data

    return [name for name in list_data() if get_data(name).kind == kind]


# Words of annotations, and what a configuration has for them.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "None": type(None),
    "bool": bool,
    "int": int,
    "float": (int, float),
    "str": str,
    **dict.fromkeys(("list", "tuple", "Sequence"), list),
    **dict.fromkeys(("dict", "Mapping"), dict),
}


def options_of(cls: type) -> dict[str, Any]:
    """Keyword-only arguments of a class and its bases, with defaults."""
    return {name: parameter.default for name, parameter in _parameters(cls).items()}


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters
            found.update({n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY})
    return found


def check_options(kind: str, cls: type, options: Mapping[str, Any]) -> None:
    """Refuse options that `cls` does not take, naming the nearest ones."""
    known = options_of(cls)
    for key in options:
        if key not in known:
            raise unknown(f"option of {kind}:", key, known)


def check_types(place: str, cls: type, options: Mapping[str, Any]) -> None:
    """Refuse values of another kind than the annotations of a class's arguments; what has another kind of annotation passes.

    Args:
        place: Where the options stand in the configuration, such as "data".
        cls: Takes them.
        options: Plain values.

    Raises:
        ConfigError: A word for a number, a number for a list ...
    """
    for name, parameter in _parameters(cls).items():
        kinds = [word.split("[")[0] for word in str(parameter.annotation).split(" | ")]
        if name in options and all(kind in _KINDS for kind in kinds):
            value = options[name]
            if not any(_is(value, kind) for kind in kinds):
                raise ConfigError(f"{place}.{name}={value!r} must be of type {parameter.annotation}")


def _is(value: Any, kind: str) -> bool:
    truth = isinstance(value, bool)
    return truth if kind == "bool" else isinstance(value, _KINDS[kind]) and not truth
