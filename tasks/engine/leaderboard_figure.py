"""Quality against cost: one line of panels per task, the Pareto front drawn through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.engine.report import higher_is_better

COSTS = {"flops": ("MFLOPs a sample", 1e-6), "train_seconds": ("training time, s", 1.0)}


def pareto(points: list[tuple[float, float]], larger_is_better: bool) -> list[int]:
    """Indices of points (cost, quality) that no cheaper or equal point matches, by rising cost."""
    order = sorted(
        range(len(points)), key=lambda i: (points[i][0], -points[i][1] if larger_is_better else points[i][1])
    )
    front: list[int] = []
    for i in order:
        sign = 1 if larger_is_better else -1
        if not front or sign * points[i][1] > sign * points[front[-1]][1]:
            front.append(i)
    return front


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Per task its main metric with interval against FLOPs a sample and against training time; baselines are not drawn.

    Args:
        rows: Rows of `leaderboard.summarise`.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys((row["task"], row["data"], row["protocol"]) for row in rows))
    figure = Figure(figsize=(4.8 * len(COSTS), 3.6 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(COSTS), squeeze=False)
    for line, place in zip(panels, tasks, strict=True):
        of_task = [r for r in rows if (r["task"], r["data"], r["protocol"]) == place]
        for axes, (cost, (label, factor)) in zip(line, COSTS.items(), strict=True):
            _panel(
                axes, [r for r in of_task if r.get(r["monitor"]) is not None and r.get(cost)], cost, factor
            )
            axes.set_xlabel(label)
        line[0].set_title(" on ".join(place[:2]) + ("" if place[2] == "equal_steps" else f" ({place[2]})"))
    figure.savefig(path, dpi=110, format="png")


def _panel(axes: Any, rows: list[dict[str, Any]], cost: str, factor: float) -> None:
    if not rows:
        axes.axis("off")
        return
    metric = rows[0]["monitor"]
    points = [(r[cost] * factor, r[metric]) for r in rows]
    for row, (x, y) in zip(rows, points, strict=True):
        control = row["attention"] == "none"
        color, mark = ("0.5", "x") if control else ("C0", "o")
        axes.errorbar(x, y, yerr=row.get(f"{metric}_ci95"), fmt=mark, ms=5, capsize=2, lw=1, color=color)
        axes.annotate(row["attention"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    front = pareto(points, higher_is_better(metric))
    axes.plot([points[i][0] for i in front], [points[i][1] for i in front], color="C1", lw=1, zorder=0)
    if max(x for x, _ in points) > 5 * min(x for x, _ in points) > 0:
        axes.set_xscale("log")
    arrow = "higher is better" if higher_is_better(metric) else "lower is better"
    axes.set_ylabel(f"test {metric} ({arrow})")
    axes.margins(0.15)
    axes.grid(alpha=0.25)
