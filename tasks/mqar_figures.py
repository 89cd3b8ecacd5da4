"""Accuracy against state size, over the runs of a sweep.

    python train.py -m task=mqar attention=softmax,linear,gla,deltanet,gdn,kda,none
    python -m tasks.mqar_figures runs/sweeps/<sweep>

Reads every ``result.json`` below the given folders and writes ``recall_by_state.png`` and ``recall_by_state.md`` into the first.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def read_runs(folders: list[Path]) -> dict[str, dict[str, list[float]]]:
    """Per attention: state sizes and test accuracies of its finished mqar runs."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"state": [], "accuracy": []})
    for folder in folders:
        for file in sorted(folder.rglob("result.json")):
            result: dict[str, Any] = json.loads(file.read_text())
            if result.get("task") == "mqar":
                found[result["attention"]]["state"].append(float(result["cost"]["state_size"]))
                found[result["attention"]]["accuracy"].append(float(result["test"]["accuracy"]))
    return dict(found)


def table(runs: dict[str, dict[str, list[float]]]) -> str:
    """Markdown rows, best first."""
    rows = ["| attention | state (numbers) | accuracy | seeds |", "| --- | ---: | ---: | ---: |"]
    mean = lambda values: sum(values) / len(values)
    for name, run in sorted(runs.items(), key=lambda item: -mean(item[1]["accuracy"])):
        rows.append(
            f"| {name} | {mean(run['state']):,.0f} | {mean(run['accuracy']):.3f} | {len(run['state'])} |"
        )
    return "\n".join(rows) + "\n"


def draw(runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One point per attention, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        x = sum(run["state"]) / len(run["state"])
        y = sum(run["accuracy"]) / len(run["accuracy"])
        axes.plot(max(x, 1.0), y, "o")
        axes.annotate(name, (max(x, 1.0), y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set(
        xscale="log", xlabel="state after a sequence (numbers, all layers)", ylabel="accuracy", ylim=(0, 1.05)
    )
    axes.set_title("Associative recall against state size, test split")
    figure.savefig(path, dpi=130)


def main(arguments: list[str]) -> int:
    """Read, draw, print; 0 if there was something to draw."""
    folders = [Path(a) for a in arguments]
    runs = read_runs(folders) if folders else {}
    if not runs:
        print(
            "mqar_figures: no result.json of task mqar below " + (", ".join(arguments) or "(give a folder)")
        )
        return 1
    draw(runs, folders[0] / "recall_by_state.png")
    (folders[0] / "recall_by_state.md").write_text(table(runs))
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
