"""Which variant fills which place of a model.

A model declares its places as `Slot`s; a task resolves the user's choice into one factory per slot. The chosen
variant fills every slot that it defines, softmax the rest; the table says so and travels with the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.attention.base import Attention, Capabilities, Pattern
from zoo.attention.registry import check_options, create_attention, get_attention, list_attention
from zoo.errors import CapabilityError, unknown

FALLBACK = "softmax"


@dataclass(frozen=True)
class Slot:
    """A place in a model that takes any fitting attention variant.

    Attributes:
        pattern: Pattern that the place needs.
        key_mask: Padded keys are passed.
        bias: Least bias support that the place needs: None, "key", "factors" or "full".
        ordered: The tokens have an order (a sequence, a grid); False for sets.
        grid_dims: Number of grid axes that the model passes; 0 for none.
        length_known: The model passes `length` at construction and keeps to it.
        double_backward: Second derivatives are taken through this place.
        streaming: The model decodes step by step through this place.
    """

    pattern: Pattern
    key_mask: bool = False
    bias: str | None = None
    ordered: bool = True
    grid_dims: int = 0
    length_known: bool = False
    double_backward: bool = False
    streaming: bool = False


@dataclass(frozen=True)
class AttentionFactory:
    """Builds one slot's attention: `factory(dim, num_heads, **geometry) -> Attention`."""

    slot: Slot
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_order: bool = False
    note: str = ""

    def __call__(self, dim: int, num_heads: int, **geometry: Any) -> Attention:
        return create_attention(
            self.name,
            dim,
            num_heads,
            pattern=self.slot.pattern,
            ordered=self.slot.ordered or self.allow_order,
            higher_order=self.slot.double_backward,
            **{**self.options, **geometry},
        )


def misfit(
    name: str, slot: Slot, allow_order: bool = False, options: Mapping[str, Any] | None = None
) -> str | None:
    """Why variant `name`, with these options of its own, cannot fill `slot`, or None when it can."""
    cls = get_attention(name)
    can = cls.capabilities_with(**options or {})
    reason = _lacking(can, slot, allow_order)
    if reason and _lacking(cls.capabilities, slot, allow_order) is None:
        return f"{reason} ({can.note})"
    return reason


def _lacking(can: Capabilities, slot: Slot, allow_order: bool) -> str | None:
    if slot.pattern not in can.patterns:
        return f"does not define pattern {slot.pattern.value!r}"
    if slot.key_mask and not can.key_mask:
        return "takes no key mask"
    if not can.takes_bias(slot.bias):
        return f"takes no {slot.bias} bias"
    if not slot.ordered and can.needs_order(slot.pattern) and not allow_order:
        return "depends on the order of its tokens, which these do not have (attention.allow_order=true overrides)"
    if can.needs_grid and slot.grid_dims not in can.grid_dims:
        return f"needs a grid of {' or '.join(map(str, can.grid_dims))} axes"
    if can.fixed_length and not slot.length_known:
        return "needs a fixed length"
    if slot.double_backward and not can.double_backward:
        return "has no second derivative"
    if slot.streaming and not can.streaming:
        return "has no step-by-step form"
    return None


def resolve_slots(
    slots: Mapping[str, Slot],
    attention: Mapping[str, Any],
    overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
    *,
    strict: bool = False,
    allow_order: bool = False,
    task: str = "",
) -> dict[str, AttentionFactory]:
    """One factory per slot.

    Args:
        slots: The model's places by name.
        attention: The variant wanted everywhere: `name` and its options.
        overrides: Variants wanted in particular slots, by slot name; these must fit.
        strict: Refuse instead of filling slots that the variant does not define with softmax.
        allow_order: Let order-dependent variants use the order in which unordered tokens are given.
        task: Name of the task, for messages.

    Raises:
        CapabilityError: An override that does not fit, a variant that fits no slot, or any misfit when `strict`.
        ConfigError: Unknown variant, option or slot.
    """
    overrides = {k: v for k, v in (overrides or {}).items() if v is not None}
    for name in overrides:
        if name not in slots:
            raise unknown(f"attention slot of task {task!r}:", name, slots)
    chosen: dict[str, AttentionFactory] = {}
    reasons: dict[str, str] = {}
    for slot_name, slot in slots.items():
        wanted = dict(overrides.get(slot_name) or attention)
        name = wanted.pop("name")
        check_options(name, wanted)
        reason = misfit(name, slot, allow_order, wanted)
        note = "override" if slot_name in overrides else "chosen"
        if reason is not None:
            reasons[slot_name] = reason
            if slot_name in overrides or strict:
                raise _refusal(name, slot_name, slot, reason, task)
            name, wanted, note = FALLBACK, {}, f"{name} {reason}"
        chosen[slot_name] = AttentionFactory(slot, name, wanted, allow_order, note)
    if all(f.name != attention["name"] for f in chosen.values()) and not set(slots) <= set(overrides):
        slot_name = next(iter(reasons))
        raise _refusal(attention["name"], slot_name, slots[slot_name], reasons[slot_name], task)
    return chosen


def slot_table(factories: Mapping[str, AttentionFactory]) -> list[dict[str, str]]:
    """Rows for printing and for `result.json`: slot, pattern, attention, note."""
    return [
        {"slot": slot, "pattern": f.slot.pattern.value, "attention": f.name, "note": f.note}
        for slot, f in factories.items()
    ]


def _refusal(name: str, slot_name: str, slot: Slot, reason: str, task: str) -> CapabilityError:
    able = ", ".join(n for n in list_attention() if misfit(n, slot) is None)
    return CapabilityError(
        f"attention {name!r} {reason}; slot {slot_name!r} of task {task!r} needs it. Variants that fit: {able}; "
        f"try attention@{slot_name}_attention={FALLBACK}"
    )
