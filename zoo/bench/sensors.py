"""How attention over sensors grows with their number: all pairs against random groups: `python -m zoo bench sensors`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zoo.attention.base import Pattern
from zoo.attention.slots import Slot, resolve_slots
from zoo.bench.ops import exponent
from zoo.bench.timing import Timing, take_turns
from zoo.layers.graph import GroupAttention, best_group_size

SENSORS = (100, 300, 1000, 3000)
BATCH, DIM, HEADS = 2, 64, 8


def contestants(sensors: int, attention: str) -> dict[str, Callable[[], None]]:
    """Forward and backward of one layer over [2, sensors, 64]."""
    factory = resolve_slots({"spatial": Slot(Pattern.SELF, ordered=False)}, {"name": attention})["spatial"]
    torch.manual_seed(0)
    x = torch.randn(BATCH, sensors, DIM)

    def step(layer: torch.nn.Module) -> Callable[[], None]:
        return lambda: layer(x).square().mean().backward()

    return {
        "all pairs": step(factory(DIM, HEADS)),
        "groups": step(GroupAttention(factory, DIM, HEADS, num_nodes=sensors)),
    }


def pairs(sensors: int) -> dict[str, int]:
    """Attended pairs of one layer."""
    group = best_group_size(sensors)
    groups = -(-sensors // group)
    return {"all pairs": sensors**2, "groups": groups * group**2 + groups**2}


def measure(attention: str, rounds: int) -> dict[int, dict[str, Timing]]:
    """Timings by number of sensors."""
    return {n: take_turns(contestants(n, attention), rounds=rounds, warmup=2, budget_s=30) for n in SENSORS}


def show(found: dict[int, dict[str, Timing]]) -> None:
    """Times, and the fitted exponents of pairs and of time."""
    sizes = list(found)
    for name in found[sizes[0]]:
        times = [found[n][name].p50 for n in sizes]
        line = ", ".join(f"{n}: {t:.1f} ms" for n, t in zip(sizes, times, strict=True))
        grown = exponent(sizes, [float(pairs(n)[name]) for n in sizes])
        print(f"{name}: {line}; grows as N^{exponent(sizes, times):.2f}, its attended pairs as N^{grown:.2f}")
