"""Errors that a user can act on: each names the value, the rule and the way out.

`train.py` and `python -m zoo` print them as one line; anything else is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class ConfigError(ZooError, ValueError):
    """A configuration value that breaks a rule."""


class CapabilityError(ZooError, NotImplementedError):
    """A request that the chosen mechanism does not define."""


class DataError(ZooError, ValueError):
    """Data that is missing, malformed or not what the task expects."""


class WeightsError(ZooError, ValueError):
    """Weights that are missing, corrupt, unsafe or do not fit the model."""


def closest(name: str, choices: Iterable[str]) -> list[str]:
    """Up to three of `choices` that look like `name`, nearest first."""
    return difflib.get_close_matches(name, list(choices), n=3, cutoff=0.5)


def unknown(kind: str, name: str, choices: Iterable[str], see: str = "") -> ConfigError:
    """The error for a misspelt `kind`: nearest names first, every name where none is near."""
    choices = sorted(choices)
    near = closest(name, choices)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose from: {', '.join(choices)}"
    return ConfigError(f"unknown {kind} {name!r}; {hint}" + (f" {see}" if see else ""))
