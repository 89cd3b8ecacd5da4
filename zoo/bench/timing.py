"""Fair timing in one process: contestants take turns, and ratios come from the same rounds.

A single absolute time says little on a shared machine. Turns make a slow moment hit every contestant; the median over
rounds drops outliers.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COLUMNS = [
    "what",
    "provider",
    "mode",
    "shape",
    "metric",
    "unit",
    "p20",
    "p50",
    "p80",
    "rounds",
    "device",
    "threads",
    "torch",
    "cpu",
]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call of one contestant."""

    times_ms: list[float]

    @property
    def p50(self) -> float:
        return statistics.median(self.times_ms)

    def quantile(self, share: float) -> float:
        ordered = sorted(self.times_ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def take_turns(
    contestants: dict[str, Callable[[], Any]], *, rounds: int = 30, warmup: int = 5, budget_s: float = 60.0
) -> dict[str, Timing]:
    """Time every contestant once per round.

    Args:
        contestants: Calls to time, by name.
        rounds: Rounds wanted; at least three are run whatever the budget.
        warmup: Rounds not counted.
        budget_s: Seconds after which no further round begins.
    """
    began = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, call in contestants.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
        enough = min(map(len, times.values())) >= 3
        if enough and time.perf_counter() - began > budget_s:
            break
        if not enough and turn < warmup and time.perf_counter() - began > budget_s / 3:
            warmup = turn + 1  # slow calls need less of it
    return {name: Timing(values) for name, values in times.items()}


def row(
    what: str,
    provider: str,
    mode: str,
    shape: str,
    timing: Timing,
    *,
    metric: str = "time",
    unit: str = "ms",
) -> dict[str, Any]:
    """One line of the long csv; with another `metric` the numbers of `timing` are of that one."""
    return {
        "what": what,
        "provider": provider,
        "mode": mode,
        "shape": shape,
        "metric": metric,
        "unit": unit,
        "p20": round(timing.quantile(0.2), 4),
        "p50": round(timing.p50, 4),
        "p80": round(timing.quantile(0.8), 4),
        "rounds": len(timing.times_ms),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def busy() -> float:
    """Runnable processes beside this one, averaged over a minute; timings on a busy machine mean little."""
    return max(0.0, os.getloadavg()[0] - 1)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
