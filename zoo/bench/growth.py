"""Time and memory by length: contestants climb from short to long until one more rung would cost too much."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.bench.timing import Timing, row, take_turns

# A call that would take longer, or hold more, at the next length is not made; predicted as if it grew with the square.
LONGEST_MS, LARGEST_MIB = 20_000.0, 6_000.0


@dataclass(frozen=True)
class Contestant:
    """What is timed: `forward()`, and its gradients by `inputs`."""

    forward: Callable[[], Tensor]
    inputs: list[Tensor]


@dataclass
class Growth:
    """One contestant's medians by length.

    Attributes:
        times: mode -> length -> timing.
        memory: length -> MiB held at most during forward and backward, beyond what was there before.
    """

    times: dict[str, dict[int, Timing]] = field(default_factory=dict)
    memory: dict[int, float] = field(default_factory=dict)

    def rows(self, what: str, provider: str, shape: Callable[[int], str]) -> list[dict[str, Any]]:
        """Lines of the long csv."""
        timed = [
            row(what, provider, mode, shape(n), t) for mode, by in self.times.items() for n, t in by.items()
        ]
        held = (
            row(what, provider, BOTH, shape(n), Timing([m]), metric="peak memory", unit="MiB")
            for n, m in self.memory.items()
        )
        return [*timed, *held]


BOTH = "forward+backward"


def both(c: Contestant) -> Callable[[], Any]:
    upstream = torch.randn_like(c.forward())
    return lambda: torch.autograd.grad(c.forward(), c.inputs, upstream, allow_unused=True)


def forward(c: Contestant) -> Callable[[], Any]:
    return c.forward


def backward(c: Contestant) -> Callable[[], Any]:
    """Gradients alone, of a graph that is kept."""
    out = c.forward()
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, c.inputs, upstream, retain_graph=True, allow_unused=True)


MODES = {"forward": forward, "backward": backward, BOTH: both}


def climb(
    build: Callable[[int], dict[str, Contestant]],
    lengths: Iterable[int],
    modes: tuple[str, ...],
    *,
    rounds: int,
    budget_s: float,
) -> dict[str, Growth]:
    """Measure what `build` returns at every length.

    Args:
        build: Contestants at a length, by name.
        lengths: Ascending.
        modes: Of `MODES`.
        rounds: Of timing, at least three whatever the budget.
        budget_s: Seconds of timing a length.
    """
    lengths, found, stopped = sorted(lengths), {}, set()
    for n, longer in zip(lengths, [*lengths[1:], lengths[-1]], strict=True):
        contestants = {name: c for name, c in build(n).items() if name not in stopped}
        if not contestants:
            break
        for name, c in contestants.items():
            found.setdefault(name, Growth()).memory[n] = peak_mib(both(c))
        calls = {(name, m): MODES[m](c) for name, c in contestants.items() for m in modes}
        for (name, mode), timing in take_turns(calls, rounds=rounds, warmup=1, budget_s=budget_s).items():
            found[name].times.setdefault(mode, {})[n] = timing
        for name in contestants:
            slowest = max(by[n].p50 for by in found[name].times.values())
            if (longer / n) ** 2 * slowest > LONGEST_MS or (longer / n) ** 2 * found[name].memory[
                n
            ] > LARGEST_MIB:
                stopped.add(name)
    return found


def peak_mib(call: Callable[[], Any]) -> float:
    """Most that `call` holds at a time beyond what was there before, by the allocator's own record."""
    call()  # what is built once and kept does not count
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _silent(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler's library writes lines of its own to standard error."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nothing)


def crossover(mine: dict[int, float], theirs: dict[int, float]) -> float:
    """Length from which `mine` stays the smaller one, between measured lengths on a straight line in logarithms.

    The first length if it is the smaller one everywhere; infinite if it is not so at the longest length of both.
    """
    lengths = sorted(mine.keys() & theirs.keys())
    gaps = [math.log(mine[n] / theirs[n]) for n in lengths]
    if not gaps or gaps[-1] >= 0:
        return math.inf
    last = max((i for i, gap in enumerate(gaps) if gap >= 0), default=None)
    if last is None:
        return float(lengths[0])
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** share
