"""What sets runs apart: settings that differ beyond the seed and the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Neither changes what is compared. A search chooses its own rate; references of a gain belong to one seed each.
_FREE = (
    "seed",
    "resume",
    "sweep",
    "out_of_memory",
    "logger.",
    "callbacks.progress",
    "data.num_workers",
    "task.reference",
    "trainer.threads",
)


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Settings with more than one value among resolved configurations, with the value in each (None where absent).

    A setting that only some have is no difference: an older run was made before there was a choice.
    """
    flat = [_flat(config) for config in configs]
    found = {}
    for key in dict.fromkeys(key for settings in flat for key in settings):
        of_slot = key.endswith("_attention")  # absent means: as the other slots
        values = [settings.get(key) for settings in flat if of_slot or key in settings]
        if not key.startswith(_FREE) and any(value != values[0] for value in values):
            found[key] = [settings.get(key) for settings in flat]
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name; a slot's variant stands under the slot's own name too."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if not isinstance(value, Mapping):
            found[name] = value
            continue
        if name.endswith("_attention"):
            found[name] = value.get("name")
        found |= _flat(value, f"{name}.")
    return found
