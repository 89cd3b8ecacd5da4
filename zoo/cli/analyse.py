"""python -m zoo analyse NAME: attention sinks of trained weights, and the heads that they need."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.analysis import LayerSinks, head_ablation, head_importance, sinks
from zoo.analysis.modules import attention_modules
from zoo.analysis.sinks import THRESHOLD
from zoo.cli._trained import trained
from zoo.errors import ConfigError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo analyse", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="weights name, .safetensors file or run folder")
    parser.add_argument("--batches", type=int, default=2, help="validation batches to look at")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="mean weight that makes a sink")
    parser.add_argument(
        "--ablate", action="store_true", help="also remove the heads one by one (a pass each)"
    )
    parser.add_argument("--out", type=Path, help="folder for analysis.json and heads.png")
    args = parser.parse_args(argv)
    if args.batches < 1 or not 0 < args.threshold < 1:
        raise ConfigError(
            f"--batches {args.batches} must be at least 1 and --threshold {args.threshold} between 0 and 1"
        )
    task, batches, split = _task_and_batches(args.name, args.batches)

    def loss(batch: Any) -> Tensor:
        return sum(task.losses(batch).values())

    layers = sinks(task.model, batches, loss, threshold=args.threshold)
    importance = head_importance(task.model, batches, loss)
    ablation = head_ablation(task.model, batches, loss) if args.ablate else {}
    kinds = {name: module.name for name, module in attention_modules(task.model).items()}
    _show(layers, importance, ablation, kinds, f"{len(batches)} {split} batches")
    if args.out:
        _write(args.out, layers, importance, ablation)
        print(f"written: {args.out / 'analysis.json'}, {args.out / 'heads.png'}")
    return 0


def _task_and_batches(name: str, count: int) -> tuple[Any, list[Any], str]:
    """The trained task, batches that its loss takes, and where they come from."""
    task, data, cfg, _ = trained(name)
    if task.loss_split is None:
        raise ConfigError(
            f"task {cfg.task.name} trains on no batches of data; call zoo.analysis.sinks and head_importance from Python with a loss "
            "of your own"
        )
    loader = data.val_dataloader() if task.loss_split == "validation" else data.train_dataloader()
    return task, list(itertools.islice(loader, count)), task.loss_split


def _show(
    layers: list[LayerSinks],
    importance: dict[str, Tensor],
    ablation: dict[str, Tensor],
    kinds: dict[str, str],
    where: str,
) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    table = Table(title=f"Attention sinks and rows, {where}")
    head = (
        "layer",
        "attention",
        "with a sink",
        "first token",
        "others",
        "value norm",
        "alignment",
        "entropy",
        "rank",
    )
    for column in head:
        table.add_column(column, justify="left" if column in head[:2] else "right")
    for item in layers:
        rate = sum(item.rate) / len(item.rate)
        numbers = item.value_norm, item.alignment, item.entropy, item.effective_rank
        table.add_row(
            *(item.layer, item.attention, f"{rate:.0%}", f"{item.first:.0%}", f"{item.others:.2f}"),
            *("-" if math.isnan(number) else f"{number:.2f}" for number in numbers),
        )
    if layers:
        console.print(table)
    else:
        console.print("no sinks to look for: no attention with an unsigned map was called")
    table = Table(
        title=f"Heads, {where}: share of the largest importance"
        + (", rise of the loss without it" if ablation else "")
    )
    for column in ("layer", "attention", "heads"):
        table.add_column(column)
    largest = max(float(value.max()) for value in importance.values()) or 1.0
    for name, value in importance.items():
        cells = [f"{float(share) / largest:.2f}" for share in value]
        if ablation:
            cells = [f"{cell} ({float(rise):+.3g})" for cell, rise in zip(cells, ablation[name], strict=True)]
        table.add_row(name, kinds[name], "  ".join(cells))
    console.print(table)


def _write(
    folder: Path, layers: list[LayerSinks], importance: dict[str, Tensor], ablation: dict[str, Tensor]
) -> None:
    from matplotlib.figure import Figure

    from zoo.files import write_whole

    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "sinks": [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(item).items()}
            for item in layers
        ],
        "importance": {name: value.tolist() for name, value in importance.items()},
        "ablation": {name: value.tolist() for name, value in ablation.items()},
    }
    write_whole(folder / "analysis.json", lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    rates = {item.layer: item.rate for item in layers}
    panels = [("importance", {name: value.tolist() for name, value in importance.items()})]
    panels += [("share of samples with a sink", rates)] if rates else []
    figure = Figure(figsize=(5.0 * len(panels), 1.2 + 0.3 * len(importance)), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        width = max(len(row) for row in rows.values())
        cells = [[*row, *[math.nan] * (width - len(row))] for row in rows.values()]
        image = axes.imshow(cells, aspect="auto", vmin=0.0, cmap="viridis")
        axes.set(
            title=title, xlabel="head", yticks=range(len(rows)), yticklabels=list(rows), xticks=range(width)
        )
        figure.colorbar(image, ax=axes)
    write_whole(folder / "heads.png", lambda path: figure.savefig(path, dpi=130, format="png"))
