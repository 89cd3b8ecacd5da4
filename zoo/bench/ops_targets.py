"""What the operations' timings have to show: ratios within one run, against what a user would pick instead and against themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from zoo.bench.scans import STEPWISE
from zoo.bench.timing import Timing

ByLength = dict[int, dict[str, Timing]]
GROWTH_LENGTHS, GROWTH = (4096, 16384), 4.6
# Modules that bring rows of their own, and their packages.
OPTIONAL = {"fla": "fla-core", "local_attention": "local-attention"}


@dataclass(frozen=True)
class Target:
    """``mine`` at least ``times`` as fast as ``theirs`` at a length."""

    mine: str
    theirs: str
    tokens: int
    times: float


TARGETS = (
    Target("linear", "torch.SDPA", 4096, 12.0),
    Target("linear", "torch.SDPA", 16384, 40.0),
    Target("mala", "linear", 4096, 0.8),
    Target("mala", "linear", 16384, 0.8),
    Target("linear causal", "fla linear", 1024, 1.0),
    Target("linear causal", "fla linear", 4096, 1.0),
    Target("linear causal", "fla linear", 16384, 1.0),
    Target("decay", "fla simple gla", 4096, 4.0),
    Target("decay", "fla simple gla", 16384, 25.0),
    Target("delta", "fla gated delta", 4096, 3.5),
    Target("delta", "fla gated delta", 16384, 10.0),
    Target("kda", "fla kda", 1024, 8.0),
    Target("softmax window 129", "local-attention window", 4096, 1.0),
    Target("softmax window 129", "local-attention window", 16384, 1.0),
    Target("block_sparse 13x13", "torch.SDPA neighbourhood mask", 4096, 3.0),
    *(Target(name, f"{name} step by step", 1024, 20.0) for name in STEPWISE),
)


def verdicts(found: ByLength, linear: list[str]) -> Iterator[tuple[str, float, str, bool]]:
    """What was measured, the number, the limit as text, and whether it is met.

    Args:
        found: Timings by length and name.
        linear: Names of operations whose time has to grow with the length alone.
    """
    for t in TARGETS:
        here = found.get(t.tokens, {})
        if t.mine in here and t.theirs in here:
            ratio = here[t.theirs].p50 / here[t.mine].p50
            yield f"{t.theirs} / {t.mine} at {t.tokens}", ratio, f">= {t.times:g}", ratio >= t.times
    short, long = (found.get(n, {}) for n in GROWTH_LENGTHS)
    for name in linear:
        if name in short and name in long:
            ratio = long[name].p50 / short[name].p50
            yield f"{name}: time at 16384 / at 4096", ratio, f"<= {GROWTH:g}", ratio <= GROWTH


def absent() -> list[str]:
    """A line for each optional package whose rows are left out."""
    return [
        f"no rows of {package}: it is not installed (pip install --no-deps {package})"
        for module, package in OPTIONAL.items()
        if importlib.util.find_spec(module) is None
    ]
