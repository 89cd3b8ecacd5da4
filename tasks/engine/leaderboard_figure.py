"""Quality against cost: one panel per task, the Pareto front drawn through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.engine.report import higher_is_better


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
    """One panel per task: its main metric with interval against FLOPs a sample; baselines are not drawn.

    Args:
        rows: Rows of `leaderboard.summarise`.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys((row["task"], row["data"]) for row in rows))
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * lines), layout="constrained")
    for axes, task in zip(figure.subplots(lines, columns, squeeze=False).flat, tasks, strict=False):
        of_task = [r for r in rows if (r["task"], r["data"]) == task and r.get(r["monitor"]) is not None]
        metric = of_task[0]["monitor"] if of_task else ""
        points = [(r["flops"] / 1e6, r[metric]) for r in of_task]
        for row, (x, y) in zip(of_task, points, strict=True):
            control = row["attention"] == "none"
            axes.errorbar(
                x,
                y,
                yerr=row.get(f"{metric}_ci95"),
                fmt="x" if control else "o",
                ms=5,
                capsize=2,
                lw=1,
                color="0.5" if control else "C0",
            )
            axes.annotate(row["attention"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        front = pareto(points, higher_is_better(metric))
        axes.plot([points[i][0] for i in front], [points[i][1] for i in front], color="C1", lw=1, zorder=0)
        if points and max(x for x, _ in points) > 5 * min(x for x, _ in points) > 0:
            axes.set_xscale("log")
        arrow = "higher is better" if higher_is_better(metric) else "lower is better"
        axes.set(title=" on ".join(task), xlabel="MFLOPs a sample", ylabel=f"test {metric} ({arrow})")
        axes.margins(0.15)
    for axes in figure.axes[len(tasks) :]:
        axes.axis("off")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120, format="png")
