"""Equations for physics-informed networks, one file each: residuals, conditions and a reference made on the spot."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.problems.base import Condition, Problem
from zoo.errors import closest

__all__ = ["Condition", "Problem", "create_problem", "list_problems"]


def list_problems() -> list[str]:
    """Names of all problems, from file names."""
    return sorted(
        p.stem
        for p in Path(__file__).parent.glob("*.py")
        if p.stem not in ("__init__", "base", "baselines", "solvers", "weak")
    )


def create_problem(name: str, options: dict[str, Any] | None = None) -> Problem:
    """The problem called `name` with its physical options.

    Raises:
        DataError: Unknown name or option, or a value out of range.
    """
    if name not in list_problems():
        near = closest(str(name), list_problems())
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise DataError(f"unknown problem {name!r}; {hint}known: {', '.join(list_problems())}")
    module = importlib.import_module(f"data.problems.{name}")
    (cls,) = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Problem) and c.__module__ == module.__name__
    ]
    known = [p.name for p in inspect.signature(cls.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in options or {}:
        if key not in known:
            near = closest(key, known) or known
            raise DataError(
                f"problem {name!r} has no option {key!r}; nearest: {', '.join(near) or 'it has none'}"
            )
    return cls(**(options or {}))
