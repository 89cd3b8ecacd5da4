"""Which attention variants exist, what they define, and how to build one.

Names come from file names, so listing imports nothing. A variant is imported when it is created or when a listing
filters by capability.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from zoo.attention.base import Attention, Capabilities, Pattern
from zoo.errors import ConfigError, unknown

_NOT_VARIANTS = {"base", "registry", "slots", "types", "__init__"}
_ENTRY_POINTS = "attention_zoo.attention"
_registered: dict[str, type[Attention]] = {}


def register_attention(
    *, patterns: Iterable[str], **capabilities: Any
) -> Callable[[type[Attention]], type[Attention]]:
    """Class decorator: registers a variant under the name of its file, with what it defines.

    Args:
        patterns: Names of the patterns that the mechanism defines.
        capabilities: The other fields of `Capabilities`.
    """

    def decorate(cls: type[Attention]) -> type[Attention]:
        cls.name = cls.__module__.rsplit(".", 1)[-1]
        cls.capabilities = Capabilities(
            patterns=frozenset(Pattern(p) for p in patterns),
            **{k: tuple(v) if k == "grid_dims" else v for k, v in capabilities.items()},
        )
        _registered[cls.name] = cls
        return cls

    return decorate


@cache
def _third_party() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=_ENTRY_POINTS)}


def _names() -> list[str]:
    stems = {p.stem for p in Path(__file__).parent.glob("*.py")}
    return sorted({s for s in stems - _NOT_VARIANTS if not s.startswith("_")} | set(_third_party()))


def get_attention(name: str) -> type[Attention]:
    """The class of variant `name`.

    Raises:
        ConfigError: No such variant; the message names the nearest ones.
    """
    if name not in _registered:
        if name not in _names():
            raise unknown("attention", str(name), _names(), "see: python -m zoo list")
        if name in _third_party():
            cls = _third_party()[name].load()
            cls.name = name
            _registered[name] = cls
        else:
            importlib.import_module(f"zoo.attention.{name}")
    return _registered[name]


def list_attention(
    name: str = "*", *, pattern: Pattern | str | None = None, **capabilities: Any
) -> list[str]:
    """Names of variants that match.

    Args:
        name: Shell pattern on the name.
        pattern: Only variants that define this pattern.
        capabilities: Field of `Capabilities` and the value wanted. True asks for any value that is not empty.
    """
    names = [n for n in _names() if fnmatch(n, name)]
    if pattern is not None:
        names = [n for n in names if Pattern(pattern) in get_attention(n).capabilities.patterns]
    for field, wanted in capabilities.items():
        if field not in Capabilities.__dataclass_fields__:
            raise unknown("capability", field, Capabilities.__dataclass_fields__)
        value_of = {n: getattr(get_attention(n).capabilities, field) for n in names}
        names = [n for n in names if (bool(value_of[n]) if wanted is True else value_of[n] == wanted)]
    return names


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse option names that variant `name` does not have, naming the nearest ones."""
    schema = get_attention(name).options()
    for key in options:
        if key not in schema:
            raise unknown(f"option of attention {name!r}:", key, schema or {"(it has none)"})


def create_attention(
    name: str, dim: int, num_heads: int, *, pattern: Pattern | str, **arguments: Any
) -> Attention:
    """Build variant `name`.

    Args:
        name: Registry key, see `list_attention`.
        dim: Model width C.
        num_heads: Number of heads.
        pattern: Pattern that the module serves.
        arguments: Common arguments of `Attention` and the variant's own options.
    """
    cls = get_attention(name)
    common = set(Attention.__init__.__kwdefaults__ or ()) | {"pattern"}
    options = {k: v for k, v in arguments.items() if k not in common}
    check_options(name, options)
    if not isinstance(num_heads, int) or num_heads < 1:
        raise ConfigError(f"num_heads={num_heads} must be a positive whole number")
    module = cls(dim, num_heads, pattern=pattern, **arguments)
    module.capabilities = cls.capabilities_with(**options)
    return module


__all__ = ["check_options", "create_attention", "get_attention", "list_attention", "register_attention"]
