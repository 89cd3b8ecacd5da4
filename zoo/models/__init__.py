"""Models that take their attention from outside."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from zoo.attention.slots import resolve_slots
from zoo.errors import ConfigError
from zoo.models.registry import build_model, get_model, list_models, model_slots

Choice = str | Mapping[str, Any]

__all__ = ["build_model", "create_model", "get_model", "list_models", "model_slots"]


def _choice(attention: Choice) -> dict[str, Any]:
    if isinstance(attention, str):
        return {"name": attention}
    if "name" not in attention:
        raise ConfigError(f"attention={dict(attention)!r} names no variant; give {{'name': ..., options}}")
    return dict(attention)


def create_model(
    name: str,
    *,
    attention: Choice = "softmax",
    slots: Mapping[str, Choice] | None = None,
    strict: bool = False,
    allow_order: bool = False,
    pretrained: str | PathLike[str] | bool = False,
    **overrides: Any,
) -> nn.Module:
    """Build a model by name, as in `create_model("vit_micro", attention="mala", num_classes=10)`.

    Args:
        name: Model, or model and size: "vit", "vit_tiny".
        attention: Variant for every slot that it defines; softmax fills the rest. A name, or a mapping with `name`
            and the variant's options.
        slots: Variants for single slots.
        strict: Refuse instead of filling with softmax.
        allow_order: Let order-dependent variants use the order in which unordered tokens are given.
        pretrained: Weights to load: a path, or a name that `zoo.pretrained` knows.
        overrides: The model's own options, e.g. `depth=6`.

    Returns:
        The model, in training mode.
    """
    places = model_slots(name, **overrides)
    factories = resolve_slots(
        places,
        _choice(attention),
        {slot: _choice(c) for slot, c in (slots or {}).items()},
        strict=strict,
        allow_order=allow_order,
        task=name,
    )
    model = build_model(name, factories, **overrides)
    if pretrained is True:
        raise ConfigError("pretrained=True does not say which weights; give pretrained=PATH_OR_NAME")
    if pretrained:
        from zoo.pretrained import load_weights

        load_weights(model, pretrained)
    return model
