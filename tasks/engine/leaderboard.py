"""The table of a sweep, written anew as each job ends, so that a sweep that dies still leaves one."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scipy.stats import t as student

from tasks.engine.comparison import compare
from tasks.engine.folder import write_atomic, write_json
from tasks.engine.leaderboard_figure import draw
from tasks.engine.leaderboard_page import page
from tasks.engine.leaderboard_text import markdown
from tasks.engine.protocol import describe
from tasks.engine.report import higher_is_better
from zoo.settings import differences

ROW = ("task", "data", "model", "attention", "protocol")  # what makes one row of the table
COST = ("parameters", "flops", "state_size", "peak_memory_mib", "samples_per_s", "train_seconds")


def record_failure(sweep: Path, folder: Path, cfg: DictConfig, error: BaseException) -> None:
    """Leave why a job has no result, and a table that says so; where even that finds no room, the error itself has to do."""
    known = {
        k: OmegaConf.select(cfg, f"{k}.name", default="?") for k in ("task", "data", "model", "attention")
    }
    reason = " ".join(str(error).split()) or type(error).__name__
    try:
        write_json(
            folder / "failure.json",
            known
            | {
                "protocol": OmegaConf.select(cfg, "protocol.name", default="?"),
                "seed": OmegaConf.select(cfg, "seed"),
                "kind": type(error).__name__,
                "reason": reason,
            },
        )
        write_leaderboard(sweep)
    except OSError as second:
        warnings.warn(f"the failure of {folder.name} could not be recorded: {second}", stacklevel=2)


def collect(folders: list[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results and failures of all run folders below `folders`; a later result replaces its folder's failure."""
    results, failures = [], []
    for root in folders:
        results += [_read(path) for path in sorted(root.rglob("result.json"))]
        for path in sorted(root.rglob("failure.json")):
            if not (path.parent / "result.json").exists():
                failures.append(_read(path))
    tell_apart([*results, *failures])
    return results, failures


def _read(path: Path) -> dict[str, Any]:
    settings = path.parent / "config.yaml"
    config = OmegaConf.to_container(OmegaConf.load(settings)) if settings.exists() else {}
    known = {"folder": str(path.parent), "config": config, "written": path.stat().st_mtime}
    return json.loads(path.read_text()) | known


def newest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One run per row and seed: a repetition says nothing about the spread over seeds."""
    found: dict[tuple, dict[str, Any]] = {}
    for run in results:
        key = (*(run.get(k) for k in ROW), run.get("seed"))
        if key not in found or run["written"] >= found[key]["written"]:
            found[key] = run
    return list(found.values())


def tell_apart(runs: list[dict[str, Any]]) -> None:
    """Runs of one row are seeds of one configuration, and rows of one table differ in their attention: all else is written behind the name.

    Options of the attention count among runs with one variant, everything else among all runs that are ranked together.
    """
    settings: dict[int, list[str]] = defaultdict(list)
    for shared, of_attention in ((("task", "data", "model", "protocol"), False), (ROW, True)):
        groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
        for run in runs:
            groups[tuple(run.get(k) for k in shared)].append(run)
        for group in groups.values():
            found = differences([run.get("config", {}) for run in group])
            if any(run.get("search") for run in group):
                found.pop("task.lr", None)  # the search chose it, for each seed anew
            for key, values in found.items():
                if _is_of_attention(key) is of_attention:
                    for run, value in zip(group, values, strict=True):
                        settings[id(run)].append(f"{key.removeprefix('attention.')}={value}")
    for run in runs:
        if named := settings[id(run)]:
            run["attention"] += f" ({', '.join(named)})"


def _is_of_attention(key: str) -> bool:
    """Options of the variant, and what fills single places: `attention.qk_norm`, `cross_attention`."""
    return key.split(".")[0].endswith("attention")


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task, data, model, attention (see `tell_apart`) and protocol: mean and 95 % interval over seeds, and cost."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[tuple(result.get(k) for k in ROW)].append(result)
    rows = []
    for (task, data, model, attention, protocol), runs in groups.items():
        row: dict[str, Any] = {
            "task": task,
            "data": data,
            "model": model,
            "attention": attention,
            "protocol": protocol,
            "seeds": len(runs),
            "protocol_detail": describe(runs[0].get("protocol_detail") or {"name": protocol}),
            "search": _search(runs),
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
    with _one_at_a_time(place):
        results, failures = collect(folders or [place])
        results = newest(results)
        rows = summarise(results)
        comparisons = compare(rows, results, failures)
        write_atomic(place / "leaderboard.csv", lambda p: p.write_text(_csv(rows)))
        text = markdown(rows, failures, results, comparisons)
        write_atomic(place / "leaderboard.md", lambda p: p.write_text(text))
        figure = place / "leaderboard.png"
        if rows:
            write_atomic(figure, lambda p: draw(rows, p))
        text = page(rows, failures, results, comparisons, figure if rows else None)
        write_atomic(place / "leaderboard.html", lambda p: p.write_text(text))
    return rows


@contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    """Jobs that end together write one after the other, so that the last table holds them all."""
    with open(place / ".leaderboard.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _search(runs: list[dict[str, Any]]) -> str:
    found = runs[0].get("search")
    if not found:
        return ""
    rates = ", ".join(f"{run['search']['best']:.3g}" for run in runs if run.get("search"))
    return f"{found['name']}: {found['trials']} trials of {found['epochs']:g} of the epochs in [{found['low']:.2g}, {found['high']:.2g}], chose {rates}"


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
