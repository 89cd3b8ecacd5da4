"""Models that take their attention from outside."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import nn

from zoo.attention.slots import as_choice, resolve_slots
from zoo.errors import ConfigError
from zoo.models.registry import build_model, get_model, list_models, model_slots, split_name, task_of

Choice = str | Mapping[str, Any]

__all__ = ["build_model", "create_model", "get_model", "list_models", "model_slots", "task_of"]


def _choice(attention: Choice) -> dict[str, Any]:
    if isinstance(attention, str):
        return {"name": attention}
    if "name" not in attention:
        raise ConfigError(f"attention={dict(attention)!r} names no variant; give {{'name': ..., options}}")
    return dict(attention)


def create_model(
    name: str,
    *,
    attention: Choice | None = None,
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
            and the variant's options; left out, that of the weights, or softmax.
        slots: Variants for single slots.
        strict: Refuse instead of filling with softmax.
        allow_order: Let order-dependent variants use the order in which unordered tokens are given.
        pretrained: Weights to load: a path, a run folder, a name that `zoo.list_models(pretrained=True)` lists,
            "hf-hub:owner/name", or True for the only ones of this model and attention. Their card gives the options
            that are not overridden.
        overrides: The model's own options, e.g. `depth=6`. Parts that these give another shape than the weights have
            (a head for other classes) start afresh; `model.load_report` names them.

    Returns:
        The model, in training mode.

    Raises:
        WeightsError: No such weights, or weights of another model or attention.
    """
    stored: Mapping[str, Any] = {}
    if pretrained:
        from zoo.pretrained import pick_weights

        pretrained, card = pick_weights(name, attention, pretrained)
        if card is not None:
            stored = card["model"]["options"]
            overrides = {**stored, **split_name(name)[1], **overrides}
            name = card["model"]["name"]
            if attention is None and slots is None:
                slots = {slot: as_choice(entry) for slot, entry in card["slots"].items()}
            attention = attention or card["attention"]
    attention = attention or "softmax"
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
    if pretrained:
        from zoo.pretrained import load_weights

        changed = any(key in stored and stored[key] != value for key, value in overrides.items())
        options = {"strict": "names"} if changed else {}
        model.load_report = load_weights(model, pretrained, **options)
    return model
