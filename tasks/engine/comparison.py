"""One comparison out of many runs: which tasks, which variants, what every cell of their matrix holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tasks.engine.report import higher_is_better
from tasks.engine.statistics import Ranking, Scores, compositional_index, paired_bootstrap, rank

REFERENCE = "softmax"
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A place in the matrix: a score, or why there is none.

    Attributes:
        text: What to print.
        value: Mean of the task's main metric; None without result.
        best: Best of its task.
        why: Full reason without result, or which other variants fill slots.
    """

    text: str
    value: float | None = None
    best: bool = False
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """Everything of one protocol.

    Attributes:
        protocol: Its name.
        tasks: Labels of the columns.
        metrics: Main metric of each column.
        matrix: variant -> one cell per column.
        notes: Footnotes of the matrix, in the order of their marks.
        ranking: Ranks over the tasks; None where no two variants share all of them.
        index: Compositional index and number of tasks by variant.
        against: (task, variant) -> difference to softmax with interval, of those with 3 common seeds.
    """

    protocol: str
    tasks: list[str]
    metrics: list[str]
    matrix: dict[str, list[Cell]]
    notes: list[str]
    ranking: Ranking | None
    index: dict[str, tuple[float, int]]
    against: dict[tuple[str, str], tuple[float, float, float]]


def compare(rows: list[Row], results: list[Row], failures: list[Row]) -> list[Comparison]:
    """One comparison per protocol among `rows` (see `leaderboard.summarise`)."""
    names = dict.fromkeys([*(r["protocol"] for r in rows), *(f.get("protocol") or "?" for f in failures)])
    found = []
    for name in names:
        if any(r["protocol"] == name for r in rows):
            lost = [f for f in failures if f.get("protocol", name) == name]
            found.append(
                _compare(name, *([r for r in g if r["protocol"] == name] for g in (rows, results)), lost)
            )
    return found


def oriented(metric: str, value: float) -> float:
    return value if higher_is_better(metric) else -value


def _compare(protocol: str, rows: list[Row], results: list[Row], failures: list[Row]) -> Comparison:
    labels = _labels(rows)
    columns = list(dict.fromkeys(labels.values()))
    by_place = {(labels[_place(r)], r["attention"]): r for r in rows}
    metrics = {labels[_place(r)]: r["monitor"] for r in rows}
    scores: Scores = {}
    for (column, variant), row in by_place.items():
        if row.get(row["monitor"]) is not None:
            scores.setdefault(column, {})[variant] = oriented(row["monitor"], row[row["monitor"]])
    notes: list[str] = []
    variants = list(dict.fromkeys([*(r["attention"] for r in rows), *(f["attention"] for f in failures)]))
    matrix = {
        v: [_cell(by_place.get((c, v)), scores.get(c, {}), _reasons(failures, c, v), notes) for c in columns]
        for v in sorted(variants)
    }
    ranking = rank(scores)
    return Comparison(
        protocol,
        columns,
        [metrics[c] for c in columns],
        matrix,
        notes,
        ranking,
        compositional_index(_metrics(by_place, results)),
        _against(labels, results),
    )


def _place(row: Row) -> tuple[str, str, str]:
    return row["task"], row["data"], row["model"]


def _labels(rows: list[Row]) -> dict[tuple[str, str, str], str]:
    """A column's name: the task, with data and model where the task alone is ambiguous."""
    places = list(dict.fromkeys(_place(r) for r in rows))
    count = Counter(task for task, _, _ in places)
    return {p: p[0] if count[p[0]] == 1 else f"{p[0]} ({p[1]}, {p[2]})" for p in places}


def _reasons(failures: list[Row], column: str, variant: str) -> list[str]:
    task = column.split(" (")[0]
    return [f["reason"] for f in failures if (f["task"], f["attention"]) == (task, variant)]


def _cell(row: Row | None, scores: dict[str, float], reasons: list[str], notes: list[str]) -> Cell:
    def mark(note: str) -> str:
        if note not in notes:
            notes.append(note)
        return f"[{notes.index(note) + 1}]"

    if row is None or row.get(row["monitor"]) is None:
        if not reasons:
            return Cell("not run", why="no run and no failure is among these folders")
        return Cell(f"no result {mark(reasons[0])}", why=reasons[0])
    value, half = row[row["monitor"]], row.get(f"{row['monitor']}_ci95")
    text = f"{value:.4g}" + (f" ± {half:.2g}" if half is not None else "")
    own = row["attention"].split(" (")[0]
    others = [s for s in row["slots"].split("; ") if s and s.split("=")[-1] != own]
    why = f"other slots: {', '.join(others)}" if others else ""
    if reasons:
        why = "; ".join(filter(None, [why, f"{len(reasons)} seed(s) failed: {reasons[0]}"]))
    best = scores.get(row["attention"]) == max(scores.values())
    return Cell(text + (f" {mark(why)}" if why else ""), value, best, why)


def _metrics(by_place: dict[tuple[str, str], Row], results: list[Row]) -> dict[str, Scores]:
    """Oriented means of the metrics that a task names as its headline (its main metric where it names none)."""
    headline = {r["task"]: r.get("headline") or [r["monitor"]] for r in results}
    found: dict[str, Scores] = {}
    for (column, variant), row in by_place.items():
        for metric in headline.get(row["task"], [row["monitor"]]):
            if row.get(metric) is not None:
                scores = found.setdefault(column, {}).setdefault(metric, {})
                scores[variant] = oriented(metric, row[metric])
    return found


def _against(labels: dict[tuple[str, str, str], str], results: list[Row]) -> dict:
    seeds: dict[tuple[str, str], dict[int, float]] = {}
    for r in results:
        if r["monitor"] in r["test"]:
            key = labels[_place(r)], r["attention"]
            seeds.setdefault(key, {})[r["seed"]] = oriented(r["monitor"], r["test"][r["monitor"]])
    found = {}
    for (column, variant), values in seeds.items():
        theirs = seeds.get((column, REFERENCE))
        if variant != REFERENCE and theirs and (difference := paired_bootstrap(values, theirs)):
            found[column, variant] = difference
    return found
