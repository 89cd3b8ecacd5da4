"""The leaderboard as markdown."""

from __future__ import annotations

from typing import Any

from tasks.engine.comparison import Comparison
from tasks.engine.statistics import Ranking

Row = dict[str, Any]


def markdown(rows: list[Row], failures: list[Row], results: list[Row], comparisons: list[Comparison]) -> str:
    """The whole page.

    Args:
        rows: Rows of `leaderboard.summarise`.
        failures: Runs without result.
        results: The results behind the rows.
        comparisons: Of `comparison.compare`.
    """
    lines = ["# Leaderboard", ""]
    for comparison in comparisons:
        lines += [*matrix(comparison), *ranks(comparison), *differences(comparison)]
    for place in dict.fromkeys((r["task"], r["data"], r["protocol"]) for r in rows):
        task, data, protocol = place
        of_task, runs = (
            [r for r in g if (r["task"], r["data"], r["protocol"]) == place] for g in (rows, results)
        )
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
        lines += [
            f"## {task} on {data}, {protocol}",
            "",
            "| " + " | ".join(head) + " |",
            "|" + " --- |" * len(head),
        ]
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
            "Test split; mean ± half width of the 95 % interval over seeds; protocol and search by row:",
            "",
            *(
                f"- {r['attention']}: {'; '.join(filter(None, (r['protocol_detail'], r['search'])))}"
                for r in of_task
            ),
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
    lines += provenance(results)
    return "\n".join(lines)


def matrix(comparison: Comparison) -> list[str]:
    """Variants by tasks: a number or a reason in every cell."""
    heads = [f"{t}<br>{m}" for t, m in zip(comparison.tasks, comparison.metrics, strict=True)]
    lines = [f"## Protocol {comparison.protocol}", "", "| attention | " + " | ".join(heads) + " |"]
    lines.append("|" + " --- |" * (len(heads) + 1))
    for variant, cells in comparison.matrix.items():
        texts = [f"**{c.text}**" if c.best else c.text for c in cells]
        lines.append(f"| {variant} | " + " | ".join(texts) + " |")
    lines += [
        "",
        "Test split, mean ± half width of the 95 % interval over seeds; best mean of a task in bold.",
        "",
    ]
    lines += [f"[{i}] {note}  " for i, note in enumerate(comparison.notes, 1)]
    return [*lines, ""] if comparison.notes else lines


def ranks(comparison: Comparison) -> list[str]:
    """Mean ranks with critical difference, and the compositional index."""
    ranking = comparison.ranking
    lines = [
        "| attention | mean rank | not told from the best | compositional index | tasks |",
        "|" + " --- |" * 5,
    ]
    for variant, (index, tasks) in comparison.index.items():
        rank = ranking.ranks.get(variant) if ranking else None
        tied = tie(ranking, variant)
        lines.append(
            f"| {variant} | {'-' if rank is None else f'{rank:.2f}'} | {tied} | {index:+.2f} | {tasks} |"
        )
    return [*lines, "", ranking_note(comparison), ""]


def tie(ranking: Ranking | None, variant: str) -> str:
    """Whether the test tells a variant from the best one."""
    if ranking is None or variant not in ranking.ranks:
        return ""
    if ranking.critical is None:
        return "not tested"
    return "yes" if variant in ranking.tied_with_best else "no"


def ranking_note(comparison: Comparison) -> str:
    """What the ranks and the index are, and what they cannot say."""
    ranking = comparison.ranking
    index = (
        "Compositional index after CAB (arXiv:2210.07661): z-scores across the variants here, mean over a task's headline "
        "metrics, then over tasks; it moves with the set of variants."
    )
    if ranking is None:
        return f"No two variants have a result in every task, so there are no ranks. {index}"
    if ranking.critical is None:
        return f"Ranks over {ranking.blocks} task(s): too few tasks or variants for a test. {index}"
    return (
        f"Ranks over {ranking.blocks} tasks among variants with a result in all of them: Friedman p = {ranking.p:.3g}, Nemenyi "
        f"critical difference {ranking.critical:.2f} at 5 %. {index}"
    )


def differences(comparison: Comparison) -> list[str]:
    """Paired differences to softmax."""
    if not comparison.against:
        return ["No variant shares three seeds with softmax in a task: no paired differences.", ""]
    lines = ["| task | attention | better than softmax by | 95 % interval |", "|" + " --- |" * 4]
    for (task, variant), (mean, low, high) in comparison.against.items():
        lines.append(f"| {task} | {variant} | {mean:+.4g} | {low:+.4g} to {high:+.4g} |")
    return [
        *lines,
        "",
        "Paired over seeds, 10,000 bootstrap draws; positive is better, whatever the metric.",
        "",
    ]


def provenance(results: list[Row]) -> list[str]:
    """Versions and commands."""
    versions = {", ".join(f"{k} {v}" for k, v in r.get("versions", {}).items()) for r in results}
    commands = dict.fromkeys(r["command"] for r in results)
    return ["## How it was made", "", *sorted(versions), "", *(f"    {c}" for c in commands), ""]


def _with_interval(row: dict[str, Any], metric: str) -> str:
    value, half = row.get(metric), row.get(f"{metric}_ci95")
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {half:.4f}" if half is not None else "")
