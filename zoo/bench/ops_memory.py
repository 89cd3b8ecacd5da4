"""Memory of every operation by length: `python -m zoo bench ops-memory`. It does not depend on what else computes on the machine."""

from __future__ import annotations

import torch

from zoo.bench.growth import Contestant, both, peak_mib
from zoo.bench.ops import WIDTH, exponent, ours

LENGTHS = [4096, 16384, 65536]
# Memory that grows with the length alone: at most this exponent between the two longest lengths.
LINEAR = 1.05


def measure(names: list[str] | None = None, lengths: list[int] | None = None) -> dict[str, dict[int, float]]:
    """MiB held at most in forward and backward, beyond inputs, for one head of 64 channels.

    Args:
        names: Of `zoo.bench.ops.ours`; all but the recurrences step by step when left out.
        lengths: Ascending.
    """
    operations = ours()
    chosen = names or [name for name in operations if "step by step" not in name]
    found: dict[str, dict[int, float]] = {}
    for name in chosen:
        for tokens in lengths or LENGTHS:
            q, k, v = (torch.randn(1, 1, tokens, WIDTH, requires_grad=True) for _ in range(3))
            call = both(Contestant(lambda op=operations[name], t=(q, k, v): op(*t), [q, k, v]))
            found.setdefault(name, {})[tokens] = peak_mib(call)
    return found


def show(found: dict[str, dict[int, float]]) -> None:
    """One line an operation."""
    for name, by_length in found.items():
        *_, before, last = by_length.items() if len(by_length) > 1 else (None, *by_length.items())
        verdict = ""
        if before is not None:
            slope = exponent([before[0], last[0]], [before[1], last[1]])
            verdict = f", exponent {slope:.2f}: {'linear' if slope <= LINEAR else 'NOT linear'}"
        shown = ", ".join(f"{mib:.1f} at {tokens}" for tokens, mib in by_length.items())
        print(f"{name}: MiB {shown}{verdict}")
