"""The table of a sweep, written anew as each job ends, so that a sweep that dies still leaves one."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scipy.stats import t as student

from tasks.engine.folder import write_atomic, write_json
from tasks.engine.leaderboard_figure import draw
from tasks.engine.leaderboard_page import page
from tasks.engine.report import higher_is_better

COST = ("parameters", "flops", "state_size", "peak_memory_mib", "samples_per_s", "train_seconds")


def record_failure(folder: Path, cfg: DictConfig, error: BaseException) -> None:
    """Leave why a job has no result."""
    folder.mkdir(parents=True, exist_ok=True)
    name = OmegaConf.select(cfg, "attention.name", default="?")
    write_json(
        folder / "failure.json",
        {
            "task": OmegaConf.select(cfg, "task.name", default="?"),
            "attention": name,
            "seed": OmegaConf.select(cfg, "seed"),
            "kind": type(error).__name__,
            "reason": " ".join(str(error).split()) or type(error).__name__,
        },
    )


def collect(folders: list[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results and failures of all run folders below `folders`; a later result replaces its folder's failure."""
    results, failures = [], []
    for root in folders:
        for path in sorted(root.rglob("result.json")):
            results.append(json.loads(path.read_text()) | {"folder": str(path.parent)})
        for path in sorted(root.rglob("failure.json")):
            if not (path.parent / "result.json").exists():
                failures.append(json.loads(path.read_text()) | {"folder": str(path.parent)})
    return results, failures


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task, data, model, attention and protocol: mean and 95 % interval over seeds, and cost."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        key = tuple(result.get(k) for k in ("task", "data", "model", "attention", "protocol"))
        groups[key].append(result)
    rows = []
    for (task, data, model, attention, protocol), runs in groups.items():
        row: dict[str, Any] = {
            "task": task,
            "data": data,
            "model": model,
            "attention": attention,
            "protocol": protocol,
            "seeds": len(runs),
            "monitor": runs[0]["monitor"],
        }
        for metric in runs[0]["test"]:
            values = [run["test"][metric] for run in runs if metric in run["test"]]
            row[metric], row[f"{metric}_ci95"] = mean_interval(values)
        for item in COST:
            values = [run["cost"][item] for run in runs if run["cost"].get(item) is not None]
            row[item] = sum(values) / len(values) if values else None
        row["slots"] = "; ".join(f"{s['slot']}={s['attention']}" for s in runs[0]["slots"])
        rows.append(row)
    return sorted(rows, key=_rank)


def mean_interval(values: list[float]) -> tuple[float, float | None]:
    """Mean and half width of the 95 % Student interval; None for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, float(student.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values)))


def write_leaderboard(place: Path, folders: list[Path] | None = None) -> list[dict[str, Any]]:
    """Write leaderboard.csv, .md, .png and .html into `place`; returns the rows.

    Args:
        place: Folder of the sweep.
        folders: Where to look for runs; `place` when left out.
    """
    results, failures = collect(folders or [place])
    rows = summarise(results)
    write_atomic(place / "leaderboard.csv", lambda p: p.write_text(_csv(rows)))
    write_atomic(place / "leaderboard.md", lambda p: p.write_text(markdown(rows, failures, results)))
    figure = place / "leaderboard.png"
    if rows:
        write_atomic(figure, lambda p: draw(rows, p))
    write_atomic(
        place / "leaderboard.html",
        lambda p: p.write_text(page(rows, failures, results, figure if rows else None)),
    )
    return rows


def markdown(
    rows: list[dict[str, Any]], failures: list[dict[str, Any]], results: list[dict[str, Any]]
) -> str:
    lines = ["# Leaderboard", ""]
    for task, data in dict.fromkeys((r["task"], r["data"]) for r in rows):
        of_task = [r for r in rows if (r["task"], r["data"]) == (task, data)]
        runs = [r for r in results if (r["task"], r["data"]) == (task, data)]
        metrics = list(runs[0]["test"])
        head = [
            "attention",
            "model",
            "seeds",
            *metrics,
            "parameters",
            "MFLOPs",
            "state",
            "peak MiB",
            "samples/s",
            "train s",
        ]
        lines += [f"## {task} on {data}", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for r in of_task:
            cells = [r["attention"], r["model"], r["seeds"], *(_with_interval(r, m) for m in metrics)]
            cells += [f"{r['parameters']:,.0f}", f"{r['flops'] / 1e6:,.2f}"]
            cells += ["-" if r["state_size"] is None else f"{r['state_size']:,.0f}"]
            cells += [
                "-" if r[k] is None else f"{r[k]:,.0f}"
                for k in ("peak_memory_mib", "samples_per_s", "train_seconds")
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        for name, scores in runs[0].get("baselines", {}).items():
            cells = [
                f"*{name}*",
                "baseline",
                "",
                *(f"{scores[m]:.4f}" if m in scores else "-" for m in metrics),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |" + "  |" * 6)
        slots = sorted({f"{r['attention']}: {r['slots']}" for r in of_task})
        lines += [
            "",
            f"Test split; mean ± half width of the 95 % interval over seeds; protocol {of_task[0]['protocol']}.",
            "",
        ]
        lines += ["Slots: " + " · ".join(slots) + ".", ""]
    if failures:
        lines += [
            "## Without result",
            "",
            "| task | attention | seed | reason |",
            "| --- | --- | --- | --- |",
        ]
        lines += [f"| {f['task']} | {f['attention']} | {f['seed']} | {f['reason']} |" for f in failures]
        lines.append("")
    return "\n".join(lines)


def _with_interval(row: dict[str, Any], metric: str) -> str:
    value, half = row.get(metric), row.get(f"{metric}_ci95")
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {half:.4f}" if half is not None else "")


def _rank(row: dict[str, Any]) -> tuple:
    value = row.get(row["monitor"])
    if value is None:
        return row["task"], row["data"], 0.0, row["attention"]
    return row["task"], row["data"], -value if higher_is_better(row["monitor"]) else value, row["attention"]


def _csv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
