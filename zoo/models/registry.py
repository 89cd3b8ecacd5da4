"""Which models exist and how to build one.

A model is one file in this folder with one class, registered under the name of the file. Names come from file
names, so listing imports nothing. Packages may add models through the entry-point group `attention_zoo.models`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from torch import nn

from zoo.attention.slots import AttentionFactory, misfit
from zoo.errors import ConfigError, unknown

_NOT_MODELS = {"registry", "__init__"}
_ENTRY_POINTS = "attention_zoo.models"
_TASK_OF_INPUT = {
    "audio": "asr",
    "history": "traffic",
    "numerical": "tabular",
    "item": "ctr",
    "items": "recommendation",
    "points": "pinn",
    "u": "operator",
    "tokens": "mqar",
    "covariates": "treatment_effect",
}
_registered: dict[str, type[nn.Module]] = {}


def register_model(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: registers a model under the name of its file.

    The class takes `attention: dict[str, AttentionFactory]` first and everything else keyword-only, has a classmethod
    `slots(**options) -> dict[str, Slot]`, and may have `sizes: dict[str, dict]`, whose keys become name suffixes.
    """
    if not callable(getattr(cls, "slots", None)):
        raise TypeError(f"model class {cls.__name__} has no classmethod slots(**options) -> dict[str, Slot]")
    cls.name = cls.__module__.rsplit(".", 1)[-1]
    _registered[cls.name] = cls
    return cls


@cache
def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=_ENTRY_POINTS)}


def _names() -> list[str]:
    stems = {p.stem for p in Path(__file__).parent.glob("*.py")}
    names = {s for s in stems - _NOT_MODELS if not s.startswith("_")}
    return sorted(names | set(_third_party()) | set(_registered))


def list_models(
    name: str = "*",
    *,
    task: str | None = None,
    attention: str | None = None,
    pretrained: bool = False,
    sizes: bool = False,
) -> list[str]:
    """Names of models that match the shell pattern `name`.

    Args:
        name: Shell pattern.
        task: Only models of this task; imports them.
        attention: Only models with a place for this variant; imports them.
        pretrained: List trained weights (`model_size_attention.dataset`) instead; `task` and `attention` are then
            those of their cards.
        sizes: List each size as `<model>_<size>` instead of the models alone; imports them.
    """
    if pretrained:
        from zoo.pretrained.weights import list_weights

        return list_weights(name, task=task, attention=attention)
    names = _names()
    if task is not None:
        names = [n for n in names if task_of(n) == task]
    if attention is not None:
        names = [n for n in names if any(misfit(attention, s) is None for s in model_slots(n).values())]
    if sizes:
        names = [n for m in names for n in ([f"{m}_{s}" for s in getattr(get_model(m), "sizes", ())] or [m])]
    return [n for n in names if fnmatch(n, name)]


def task_of(name: str) -> str:
    """The task that a model is for: its class attribute `task`, or told by what its `forward` takes.

    Raises:
        ConfigError: Neither says it.
    """
    cls = get_model(name)
    if getattr(cls, "task", None):
        return cls.task
    first = next((p for p in inspect.signature(cls.forward).parameters if p != "self"), "")
    if first == "images":
        options = model_options(name)
        return "detr" if "queries" in options else "segmentation" if "head" in options else "vit"
    if first not in _TASK_OF_INPUT:
        raise ConfigError(f"model {name!r} does not say its task; give its class an attribute task")
    return _TASK_OF_INPUT[first]


def split_name(name: str) -> tuple[str, dict[str, Any]]:
    """`vit_micro` -> ("vit", {"size": "micro"}); a plain model name has no options.

    Raises:
        ConfigError: No such model or size; the message names the nearest ones.
    """
    names = _names()
    if name in names:
        return name, {}
    for stem in sorted((n for n in names if name.startswith(n + "_")), key=len, reverse=True):
        suffix = name[len(stem) + 1 :]
        sizes = getattr(get_model(stem), "sizes", {})
        if suffix in sizes:
            return stem, {"size": suffix}
        if sizes:
            raise unknown(f"size of model {stem!r}:", suffix, sizes)
    raise unknown(
        "model",
        str(name),
        [*names, *list_models(sizes=True)],
        "see: python -m zoo list models",
    )


def get_model(name: str) -> type[nn.Module]:
    """The class of model `name`, a size suffix allowed."""
    if name not in _registered:
        if name not in _names():
            name = split_name(name)[0]
        elif name in _third_party():
            cls = _third_party()[name].load()
            cls.name = name
            _registered[name] = cls
        else:
            importlib.import_module(f"zoo.models.{name}")
    return _registered[name]


def model_options(name: str) -> dict[str, Any]:
    """The model's keyword-only arguments and their defaults, inherited ones included: the schema of its yaml."""
    options: dict[str, Any] = {}
    for cls in get_model(name).__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()
        options = {**{p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}, **options}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return options


def check_model_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse option names that model `name` does not have, naming the nearest ones."""
    schema = model_options(name)
    for key in options:
        if key not in schema:
            raise unknown(f"option of model {name!r}:", key, schema)


def _options(name: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    stem, preset = split_name(name)
    if "size" in preset and options.get("size", preset["size"]) != preset["size"]:
        raise ConfigError(
            f"model {name!r} already names a size; drop size={options['size']!r} or use {stem!r}"
        )
    options = {**options, **preset}
    check_model_options(stem, options)
    return stem, options


def model_slots(name: str, **options: Any) -> dict[str, Any]:
    """The attention slots that model `name` has with these options, by slot name."""
    stem, options = _options(name, options)
    return get_model(stem).slots(**options)


def build_model(name: str, attention: Mapping[str, AttentionFactory], **options: Any) -> nn.Module:
    """Build a model.

    Args:
        name: Registry key, a size suffix allowed.
        attention: One factory per slot, see `zoo.attention.slots.resolve_slots`.
        options: The model's keyword-only arguments.

    Raises:
        ConfigError: Unknown model, size or option, a slot without a factory, or a value out of range.
    """
    stem, options = _options(name, options)
    cls = get_model(stem)
    missing = sorted(set(cls.slots(**options)) - set(attention))
    if missing:
        raise ConfigError(f"model {stem!r} needs an attention factory for slot {', '.join(missing)}")
    fresh = {
        slot: replace(factory) for slot, factory in attention.items()
    }  # stacks begin with their first block
    return cls(fresh, **options)
