"""The leaderboard as one self-contained page: sortable tables, a filter, the figure; works with keyboard and phone."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from tasks.engine.report import higher_is_better

STYLE = """
:root { color-scheme: light dark; --line: #8884; --best: #2a7d4f22; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 78rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
td.text, th.text { text-align: left; white-space: normal; min-width: 12rem; }
th button { font: inherit; font-weight: 600; background: none; border: 0; color: inherit; cursor: pointer; padding: 0; }
th button:focus-visible, input:focus-visible { outline: 2px solid #2a6fd6; outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; } th[aria-sort=descending] button::after { content: " \\25BC"; }
tr.baseline td { opacity: .7; font-style: italic; } td.best { background: var(--best); font-weight: 600; }
input { font: inherit; padding: .3rem .5rem; width: 16rem; max-width: 100%; } img { max-width: 100%; height: auto; background: #fff; }
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  table.tHead.addEventListener('click', event => {
    const head = event.target.closest('th');
    if (!head) return;
    const falling = head.ariaSort === 'ascending';
    for (const other of head.parentNode.children) other.removeAttribute('aria-sort');
    head.ariaSort = falling ? 'descending' : 'ascending';
    const value = row => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)], [p, q] = [parseFloat(x), parseFloat(y)];
      if (isNaN(p) !== isNaN(q)) return isNaN(p) ? 1 : -1;
      const order = isNaN(p) ? x.localeCompare(y) : p - q;
      return falling ? -order : order;
    });
    table.tBodies[0].append(...rows);
  });
}
document.getElementById('filter').addEventListener('input', event => {
  const wanted = event.target.value.toLowerCase().split(/[ ,]+/).filter(Boolean);
  for (const row of document.querySelectorAll('tbody tr'))
    row.hidden = wanted.length > 0 && !wanted.some(w => row.textContent.toLowerCase().includes(w));
});
"""

COST = {
    "parameters": ("parameters", 1, 0),
    "flops": ("MFLOPs", 1e-6, 2),
    "state_size": ("state", 1, 0),
    "peak_memory_mib": ("peak MiB", 1, 0),
    "samples_per_s": ("samples/s", 1, 0),
    "train_seconds": ("train s", 1, 0),
}


def page(
    rows: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    results: list[dict[str, Any]],
    figure: Path | None,
) -> str:
    """The whole page as text.

    Args:
        rows: Rows of `leaderboard.summarise`, best first within a task.
        failures: Runs without a result.
        results: The results behind the rows; baselines, versions and commands come from them.
        figure: PNG to embed.
    """
    parts = [
        f"<p>{len(results)} runs, {len(failures)} without result. Test split; mean ± half width of the 95 % interval.</p>"
    ]
    parts.append(
        '<p><label>Show rows with <input id="filter" type="search" placeholder="mala softmax"></label></p>'
    )
    for task, data in dict.fromkeys((row["task"], row["data"]) for row in rows):
        of_table = [[r for r in group if (r["task"], r["data"]) == (task, data)] for group in (rows, results)]
        parts.append(_task(task, *of_table))
    if figure is not None and figure.exists():
        data = base64.b64encode(figure.read_bytes()).decode()
        parts.append("<h2>Quality against cost</h2>")
        parts.append(
            f'<img alt="Test metric against FLOPs for every task" src="data:image/png;base64,{data}">'
        )
    if failures:
        parts.append("<h2>Without result</h2>" + _failures(failures))
    if results:
        versions = ", ".join(f"{k} {v}" for k, v in results[0].get("versions", {}).items())
        commands = "".join(
            f"<li><code>{escape(c)}</code></li>" for c in dict.fromkeys(r["command"] for r in results)
        )
        parts.append(f"<h2>How it was made</h2><p>{escape(versions)}</p><ul>{commands}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>Leaderboard</h1>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def _task(task: str, rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    metrics = list(runs[0]["test"])
    monitor = rows[0]["monitor"]
    heads = ["attention", "model", "seeds", *metrics, *(label for label, _, _ in COST.values()), "slots"]
    body = []
    for place, row in enumerate(rows):
        cells = [_cell(row["attention"]), _cell(row["model"]), _cell(row["seeds"])]
        for metric in metrics:
            best = ' class="best"' if place == 0 and metric == monitor else ""
            cells.append(_number(row.get(metric), row.get(f"{metric}_ci95"), best))
        for key, (_, factor, digits) in COST.items():
            value = row.get(key)
            cells.append(
                "<td>-</td>"
                if value is None
                else f'<td data-value="{value}">{value * factor:,.{digits}f}</td>'
            )
        cells.append(f'<td class="text">{escape(row["slots"])}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    for name, scores in runs[0].get("baselines", {}).items():
        cells = [
            _cell(name),
            _cell("baseline"),
            "<td></td>",
            *(_number(scores.get(m), None, "") for m in metrics),
        ]
        body.append(f'<tr class="baseline">{"".join(cells)}{"<td></td>" * (len(COST) + 1)}</tr>')
    direction = "higher" if higher_is_better(monitor) else "lower"
    note = f"Ordered by {escape(monitor)}, {direction} is better. Protocol: {escape(str(rows[0]['protocol']))}. Data: {escape(str(rows[0]['data']))}."
    head = "".join(f'<th scope="col"><button type="button">{escape(h)}</button></th>' for h in heads)
    return (
        f'<h2>{escape(task)} on {escape(str(rows[0]["data"]))}</h2><p>{note}</p><div class="scroll" tabindex="0"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _failures(failures: list[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr>{_cell(f['task'])}{_cell(f['attention'])}{_cell(f['seed'])}<td class='text'>{escape(f['reason'])}</td></tr>"
        for f in failures
    )
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("task", "attention", "seed", "reason"))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(value: Any) -> str:
    return f"<td>{escape(str(value))}</td>"


def _number(value: float | None, half: float | None, attributes: str) -> str:
    if value is None:
        return "<td>-</td>"
    text = f"{value:.4g}" + (f" ± {half:.2g}" if half is not None else "")
    return f'<td data-value="{value}"{attributes}>{text}</td>'
