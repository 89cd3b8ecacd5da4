"""How the cost of every variant grows with the sequence, by pattern: `python -m zoo bench efficiency`.

After CAB (arXiv:2210.07661): time and memory by length, the slope of their logarithms, and the length from which a variant is faster
than softmax. Differs from CAB in: a whole attention module with its projections, forward and backward, and the crossover is read
off the measured lengths and not off the fitted lines, which cross where nobody measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from zoo.attention import Grid, Pattern, create_attention, get_attention, list_attention
from zoo.bench.growth import BOTH, Contestant, Growth, climb, crossover
from zoo.bench.ops import exponent
from zoo.bench.timing import Timing, row
from zoo.errors import ConfigError, unknown

DIM, HEADS = 256, 4
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
REFERENCE = "softmax"
Found = dict[str, dict[str, Growth]]  # pattern -> variant -> growth


def contestant(name: str, pattern: Pattern, tokens: int) -> Contestant:
    """One module over [1, tokens, 256], as many keys as queries."""
    can = get_attention(name).capabilities
    geometry: dict[str, Any] = {"length": tokens} if can.fixed_length else {}
    if can.needs_grid:
        geometry["grid"] = _grid(can.grid_dims, tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    module = create_attention(name, DIM, HEADS, pattern=pattern, **geometry).to(device)
    tensors = [
        torch.randn(1, tokens, DIM, device=device, requires_grad=True) for _ in range(1 + pattern.cross)
    ]
    return Contestant(
        lambda: module(*tensors), [*tensors, *(p for p in module.parameters() if p.requires_grad)]
    )


def _grid(axes: tuple[int, ...], tokens: int) -> Grid:
    if 1 in axes:
        return Grid((tokens,))
    rows = max(r for r in range(1, int(tokens**0.5) + 1) if tokens % r == 0)
    return Grid((rows, tokens // rows) if 2 in axes else (1, rows, tokens // rows))


def measure(
    variants: list[str] | None,
    patterns: list[str] | None,
    lengths: list[int],
    *,
    rounds: int,
    budget_s: float = 60.0,
) -> Found:
    """Climb the lengths with every variant in each pattern that it defines.

    Raises:
        ConfigError: An unknown variant or pattern.
    """
    known = [p.value for p in Pattern]
    for pattern in patterns or []:
        if pattern not in known:
            raise unknown("pattern", pattern, known)
    names = sorted({REFERENCE, *(variants or list_attention())})
    found: Found = {}
    for pattern in map(Pattern, patterns or known):
        able = [n for n in names if pattern in get_attention(n).capabilities.patterns]
        build = lambda n, p=pattern, able=able: {name: contestant(name, p, n) for name in able}
        found[pattern.value] = climb(build, lengths, (BOTH,), rounds=rounds, budget_s=budget_s)
    return found


def summary(growth: Growth, reference: Growth) -> dict[str, float]:
    """Exponents of time and memory, and crossovers with softmax, of what has been measured at two lengths at least."""
    times, theirs = ({n: t.p50 for n, t in g.times[BOTH].items()} for g in (growth, reference))
    out = {}
    if len(times) > 1:
        out["exponent of time"] = exponent(list(times), list(times.values()))
        out["exponent of memory"] = exponent(list(growth.memory), list(growth.memory.values()))
    if growth is not reference:
        out["crossover of time"] = crossover(times, theirs)
        out["crossover of memory"] = crossover(growth.memory, reference.memory)
    return out


def rows(found: Found) -> list[dict[str, Any]]:
    """The long csv: times, memory, and one line for every number of the summary."""
    lines = []
    for pattern, by in found.items():
        for name, growth in by.items():
            lines += growth.rows("efficiency", name, lambda n, p=pattern: f"{p} 1x{n}x{DIM}")
            for metric, value in summary(growth, by[REFERENCE]).items():
                unit = "tokens" if "crossover" in metric else "1"
                shape = f"{pattern} {min(growth.memory)}..{max(growth.memory)}"
                lines.append(row("efficiency", name, BOTH, shape, Timing([value]), metric=metric, unit=unit))
    return lines


def show(found: Found) -> None:
    """One table a pattern."""
    from rich.console import Console
    from rich.table import Table

    out = Console()
    out = out if out.is_terminal else Console(width=140)
    for pattern, by in found.items():
        lengths = sorted({n for growth in by.values() for n in growth.memory})
        heads = (
            f"{pattern}, ms",
            *map(str, lengths),
            "MiB at its longest",
            "N^ time",
            "N^ memory",
            "faster from",
        )
        table = Table(*heads)
        for name, growth in by.items():
            times, numbers = growth.times[BOTH], summary(growth, by[REFERENCE])
            table.add_row(
                name,
                *(f"{times[n].p50:.1f}" if n in times else "-" for n in lengths),
                f"{growth.memory[max(growth.memory)]:.0f}",
                *(
                    f"{numbers[k]:.2f}" if k in numbers else "-"
                    for k in ("exponent of time", "exponent of memory")
                ),
                f"{numbers['crossover of time']:.0f}" if "crossover of time" in numbers else "-",
            )
        out.print(table)
    print(
        f"B 1, {HEADS} heads, width {DIM}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}; inf: not up to the "
        "longest common length"
    )


def draw(found: Found, path: Path) -> None:
    """Time above, memory below, a column a pattern; softmax in black."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = sorted({name for by in found.values() for name in by} - {REFERENCE})
    colours = dict(
        zip(
            names, plt.get_cmap("turbo")([i / max(1, len(names) - 1) for i in range(len(names))]), strict=True
        )
    )
    styles = dict(zip(names, (("-", "--", ":")[i % 3] for i in range(len(names))), strict=True))
    figure, axes = plt.subplots(
        2,
        len(found),
        figsize=(4.2 * len(found) + 2.2, 7.5),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for column, (pattern, by) in zip(axes.T, found.items(), strict=True):
        for name, growth in by.items():
            style = (
                {"color": "black", "lw": 2.5}
                if name == REFERENCE
                else {"color": colours[name], "ls": styles[name]}
            )
            times = growth.times[BOTH]
            column[0].plot(list(times), [t.p50 for t in times.values()], marker=".", label=name, **style)
            column[1].plot(list(growth.memory), list(growth.memory.values()), marker=".", **style)
        column[0].set(title=pattern, ylabel="ms, forward + backward")
        column[1].set(xlabel="tokens", ylabel="MiB, largest at a time")
        for ax in column:
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.grid(alpha=0.3)
    labels = {
        label: line for ax in axes[0] for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The command."""
    found = measure(args.only, args.patterns, args.lengths or LENGTHS, rounds=args.rounds)
    if not any(found.values()):
        raise ConfigError("no variant among those named defines any of these patterns")
    show(found)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        draw(found, args.csv.with_suffix(".png"))
    return rows(found)
