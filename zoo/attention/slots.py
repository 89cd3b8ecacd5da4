"""Which variant fills which place of a model.

A model declares its places as `Slot`s; a task resolves the user's choice into one factory per slot. The chosen
variant fills every slot that it defines, softmax the rest; the table says so and travels with the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.attention.base import Attention, Capabilities, Pattern
from zoo.attention.registry import check_options, create_attention, get_attention, list_attention
from zoo.errors import CapabilityError, ConfigError, unknown

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
    """Builds one slot's attention: `factory(dim, num_heads, **geometry) -> Attention`.

    Attributes:
        slot: The place.
        name: The variant; of a stack, the first one.
        options: The variant's own.
        allow_order: Use the order of tokens that have none.
        note: How it came to fill the slot.
        stack: Variants and options of the first, second ... block, from the start again when they are used up; empty where
            all blocks have the same.
    """

    slot: Slot
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    allow_order: bool = False
    note: str = ""
    stack: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    _blocks: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    def __call__(self, dim: int, num_heads: int, **geometry: Any) -> Attention:
        name, options = self.name, self.options
        if self.stack:
            name, options = self.stack[next(self._blocks) % len(self.stack)]
        return create_attention(
            name,
            dim,
            num_heads,
            pattern=self.slot.pattern,
            ordered=self.slot.ordered or self.allow_order,
            higher_order=self.slot.double_backward,
            **{**options, **geometry},
        )

    @property
    def label(self) -> str:
        """The variant, or those of the stack."""
        return ", ".join(name for name, _ in self.stack) or self.name

    def card(self) -> dict[str, Any]:
        """What rebuilds it, see `from_card`."""
        stack = [{"name": name, "options": dict(options)} for name, options in self.stack]
        return {"name": self.name, "options": dict(self.options)} | ({"stack": stack} if stack else {})

    @classmethod
    def from_card(cls, slot: Slot, entry: Mapping[str, Any], allow_order: bool = False) -> AttentionFactory:
        stack = tuple((item["name"], item["options"]) for item in entry.get("stack", ()))
        return cls(slot, entry["name"], entry["options"], allow_order, stack=stack)


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
        attention: The variant wanted everywhere: `name` and its options; and `stack`, a list of the variants of the first,
            second ... block (names, or mappings of `name` and options), repeated over the depth. Blocks of the variant `name` have its
            options too.
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
        own = slot_name in overrides
        stack, notes = [], ["override" if own else "chosen"]
        for name, options in _blocks(wanted):
            check_options(name, options)
            reason = misfit(name, slot, allow_order, options)
            if reason is not None:
                reasons[slot_name] = reason
                if own or strict:
                    raise _refusal(name, slot_name, slot, reason, task)
                notes.append(f"{name} {reason}")
                name, options = FALLBACK, {}
            stack.append((name, options))
        note = "; ".join(dict.fromkeys(notes[1:])) or notes[0]
        chosen[slot_name] = AttentionFactory(
            slot, *stack[0], allow_order, note, stack=tuple(stack) if len(stack) > 1 else ()
        )
    found = {name for f in chosen.values() for name in (f.name, *(n for n, _ in f.stack))}
    if attention["name"] not in found and not set(slots) <= set(overrides):
        slot_name = next(iter(reasons))
        raise _refusal(attention["name"], slot_name, slots[slot_name], reasons[slot_name], task)
    return chosen


def _blocks(wanted: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Variant and options of each block of a stack; one entry where there is no `stack`."""
    options = {k: v for k, v in wanted.items() if k not in ("name", "stack")}
    stack = wanted.get("stack")
    if stack is None:
        return [(wanted["name"], options)]
    if isinstance(stack, str) or not isinstance(stack, Sequence) or not stack:
        raise ConfigError(
            f"attention.stack={stack!r}: list the variants of the blocks, such as [{wanted['name']},{wanted['name']},{FALLBACK}]"
        )
    blocks = []
    for entry in stack:
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise ConfigError(
                f"attention.stack: {entry!r} is neither a variant's name nor {{name: ..., option: ...}}"
            )
        common = options if entry["name"] == wanted["name"] else {}
        blocks.append((entry["name"], {**common, **{k: v for k, v in entry.items() if k != "name"}}))
    if wanted["name"] not in [name for name, _ in blocks]:
        raise ConfigError(
            f"attention.stack={list(stack)} leaves attention={wanted['name']} out, whose name the run carries; choose one of its own"
        )
    return blocks


def as_choice(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What `resolve_slots` takes for what `AttentionFactory.card` gave."""
    stack = [as_choice(block) for block in entry.get("stack", ())]
    return {"name": entry["name"], **entry["options"]} | ({"stack": stack} if stack else {})


def slot_table(factories: Mapping[str, AttentionFactory]) -> list[dict[str, str]]:
    """Rows for printing and for `result.json`: slot, pattern, attention, note."""
    return [
        {"slot": slot, "pattern": f.slot.pattern.value, "attention": f.label, "note": f.note}
        for slot, f in factories.items()
    ]


def _refusal(name: str, slot_name: str, slot: Slot, reason: str, task: str) -> CapabilityError:
    able = ", ".join(n for n in list_attention() if misfit(n, slot) is None)
    return CapabilityError(
        f"attention {name!r} {reason}; slot {slot_name!r} of task {task!r} needs it. Variants that fit: {able}; "
        f"try attention@{slot_name}_attention={FALLBACK}"
    )
