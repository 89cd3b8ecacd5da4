"""Accuracy against state size, over the runs of a sweep.

    python train.py -m task=mqar attention=softmax,linear,gla,deltanet,gdn,kda,none
    python -m tasks.mqar_figures runs/sweeps/<sweep>

Reads every ``result.json`` below the given folders and writes ``recall_by_state.png`` and ``recall_by_state.md`` into the first of them,
or where ``--out`` says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

LEAST = 100.0  # where the axis begins; smaller states are drawn there


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
    """One mark per attention, mean over seeds; a key beside the axes, best first, since many lie together."""
    from matplotlib.figure import Figure

    mean = lambda values: sum(values) / len(values)
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, run) in enumerate(sorted(runs.items(), key=lambda item: -mean(item[1]["accuracy"]))):
        x, y = max(mean(run["state"]), LEAST), mean(run["accuracy"])
        style = {"marker": "osD^vP*X"[i % 8], "color": f"C{i % 10}", "linestyle": "", "alpha": 0.8}
        axes.plot(x, y, label=f"{name} {y:.3f}", **style)
    axes.set(
        xscale="log",
        xlabel=f"state after a sequence (numbers, all layers; {LEAST:.0f} or less at the left)",
        ylabel="accuracy",
        ylim=(-0.03, 1.05),
    )
    axes.grid(alpha=0.25)
    axes.set_title("Associative recall against state size, test split")
    figure.legend(loc="outside right upper", fontsize=7.5, frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    """Read, draw, print; 0 if there was something to draw."""
    parser = argparse.ArgumentParser(prog="python -m tasks.mqar_figures", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="sweeps, runs, or folders that hold some"
    )
    parser.add_argument(
        "--out", type=Path, help="where the figure and the table go (default: the first folder)"
    )
    args = parser.parse_args(argv)
    runs = read_runs(args.folders)
    if not runs:
        print(f"no result.json of task mqar below {', '.join(map(str, args.folders))}", file=sys.stderr)
        return 1
    out = args.out or args.folders[0]
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, out / "recall_by_state.png")
    (out / "recall_by_state.md").write_text(table(runs))
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
