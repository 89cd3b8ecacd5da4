"""What a run prints: the slot table at the start, the result beside its baselines at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zoo.attention.slots import AttentionFactory, slot_table

# Metrics of which a larger value is better; the others are errors.
HIGHER_IS_BETTER = (
    "acc",
    "ap",
    "auc",
    "miou",
    "dice",
    "hr",
    "ndcg",
    "mrr",
    "recall",
    "f1",
    "r2",
    "gauc",
    "iou",
    "precision",
    "score",
    "gain",
)


def higher_is_better(metric: str) -> bool:
    return metric.startswith(HIGHER_IS_BETTER)


def console() -> Console:
    """Terminal width where there is one, wide lines in files and pipes."""
    out = Console()
    return out if out.is_terminal else Console(width=140)


def print_slots(task: str, factories: Mapping[str, AttentionFactory]) -> None:
    """What fills each place of the model that takes attention."""
    if not factories:
        console().print(f"the model of task {task} has no attention slots: attention= changes nothing")
        return
    table = Table(title=f"attention slots of task {task}", title_justify="left")
    for column in ("slot", "pattern", "attention", "note"):
        table.add_column(column)
    for row in slot_table(factories):
        table.add_row(*row.values())
    console().print(table)


def print_result(result: Mapping[str, Any], folder: Path) -> None:
    """Test metrics of the model and of every baseline, then cost and where things lie."""
    metrics = [m for m in result.get("headline") or result["test"] if m in result["test"]]
    filled = f" ({result['attention']})" if result["slots"] else ""
    columns = {f"[bold]{result['model']}{filled}[/bold]": result["test"]}
    columns |= {f"{name} (baseline)": scores for name, scores in result["baselines"].items()}
    grid = [["model", *metrics]]
    grid += [[name, *(_number(scores.get(m)) for m in metrics)] for name, scores in columns.items()]
    title, out = f"{result['task']} on {result['data']}: test metrics", console()
    table = _grid(title, grid)
    if out.measure(table, options=out.options.update(width=10_000)).maximum > out.width:
        grid[0][0] = "metric"
        table = _grid(title, [list(row) for row in zip(*grid, strict=True)])  # a metric a line
    out.print(table)
    cost = result["cost"]
    speed = f"{cost['samples_per_s']:,.0f} samples/s" if cost["samples_per_s"] else "speed not measured"
    out.print(
        f"{cost['parameters']:,} parameters, {cost['flops'] / 1e6:,.1f} MFLOPs a sample, {speed} in training, "
        f"{cost['train_seconds']:.0f} s, peak memory {cost['peak_memory_mib']:,.0f} MiB"
    )
    if result["skipped"]:
        out.print(
            f"skipped {len(result['skipped'])} bad items: " + ", ".join(list(map(str, result["skipped"]))[:5])
        )
    out.print(f"run folder: {folder}", soft_wrap=True)


def _grid(title: str, rows: list[list[str]]) -> Table:
    """A table whose first row is its head."""
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if place else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
