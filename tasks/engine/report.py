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
    table = Table(title=f"{result['task']} on {result['data']}: test metrics", title_justify="left")
    table.add_column("model")
    for metric in metrics:
        table.add_column(metric, justify="right")
    filled = f" ({result['attention']})" if result["slots"] else ""
    table.add_row(
        f"[bold]{result['model']}{filled}[/bold]",
        *(_number(result["test"][m]) for m in metrics),
    )
    for name, scores in result["baselines"].items():
        table.add_row(f"{name} (baseline)", *(_number(scores.get(m)) for m in metrics))
    out = console()
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
