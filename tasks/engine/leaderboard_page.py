"""The leaderboard as one self-contained page: sortable tables, a filter, the figure; works with keyboard and phone."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from tasks.engine.comparison import Comparison
from tasks.engine.leaderboard_figure import pareto
from tasks.engine.leaderboard_text import ranking_note, tie
from tasks.engine.report import higher_is_better

STYLE = """
:root { color-scheme: light dark; --line: #8884; --best: #2a7d4f22; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 78rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
td.line, th.text, td.text { text-align: left; } td.text { white-space: normal; min-width: min(17rem, 60vw); }
th button { font: inherit; font-weight: 600; background: none; border: 0; color: inherit; cursor: pointer; padding: 0; }
th button:focus-visible, input:focus-visible, select:focus-visible, .scroll:focus-visible { outline: 2px solid #2a6fd6; outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\25B2"; } th[aria-sort=descending] button::after { content: " \\25BC"; }
tr.baseline td { opacity: .7; font-style: italic; } td.best { background: var(--best); font-weight: 600; }
input[type=search], select { font: inherit; padding: .3rem .5rem; max-width: 100%; } form { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; }
.note { opacity: .8; max-width: 60rem; } ul.note { list-style: none; padding: 0; } td.none { opacity: .7; } code, li { overflow-wrap: anywhere; }
img { width: 100%; min-width: 40rem; max-width: 60rem; height: auto; background: #fff; }
"""

SCRIPT = r"""
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
const form = document.querySelector('form');
form.addEventListener('input', () => {
  const wanted = form.words.value.toLowerCase().split(/[ ,]+/).filter(Boolean);
  for (const row of document.querySelectorAll('tbody tr')) {
    const words = [...row.cells].map(cell => cell.textContent).join(' ').toLowerCase().split(/[^\w.]+/);
    const unwanted = wanted.length > 0 && !wanted.some(w => words.some(word => word.startsWith(w)));
    row.hidden = unwanted || (form.baselines.checked && row.classList.contains('baseline')) ||
      (form.front.checked && 'front' in row.dataset && !row.dataset.front);
  }
  for (const part of document.querySelectorAll('section[data-task]'))
    part.hidden = form.task.value !== '' && part.dataset.task !== form.task.value;
});
form.addEventListener('submit', event => event.preventDefault());
"""

LEFT = ("slots", "protocol", "reason")  # columns of words

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
    comparisons: list[Comparison],
    figure: Path | None,
) -> str:
    """The whole page as text.

    Args:
        rows: Rows of `leaderboard.summarise`, best first within a task.
        failures: Runs without a result.
        results: The results behind the rows; baselines, versions and commands come from them.
        comparisons: Of `comparison.compare`, one per protocol.
        figure: PNG to embed.
    """
    parts = [
        f"<p>{len(results)} runs, {len(failures)} without result. Test split; mean ± half width of the 95 % interval.</p>"
    ]
    parts.append(_filters(list(dict.fromkeys(row["task"] for row in rows))))
    for comparison in comparisons:
        parts.append(_comparison(comparison))
    for place in dict.fromkeys((row["task"], row["data"], row["protocol"]) for row in rows):
        of_table = [[r for r in g if (r["task"], r["data"], r["protocol"]) == place] for g in (rows, results)]
        parts.append(_task(place[0], *of_table))
    if figure is not None and figure.exists():
        data = base64.b64encode(figure.read_bytes()).decode()
        parts.append("<h2>Quality against cost</h2>")
        image = f'<img alt="Test metric against FLOPs for every task" src="data:image/png;base64,{data}">'
        parts.append(f'<div class="scroll" tabindex="0">{image}</div>')
    if failures:
        parts.append("<h2>Without result</h2>" + _failures(failures))
    if results:
        versions = dict.fromkeys(
            ", ".join(f"{k} {v}" for k, v in r.get("versions", {}).items()) for r in results
        )
        commands = "".join(
            f"<li><code>{escape(c)}</code></li>" for c in dict.fromkeys(r["command"] for r in results)
        )
        lines = "".join(f"<p>{escape(v)}</p>" for v in versions)
        parts.append(f"<h2>How it was made</h2>{lines}<ul>{commands}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><h1>Leaderboard</h1>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def _filters(tasks: list[str]) -> str:
    options = "".join(f'<option value="{escape(t)}">{escape(t)}</option>' for t in tasks)
    return (
        '<form><label>Show rows with <input name="words" type="search" placeholder="mala softmax"></label>'
        f'<label>Task <select name="task"><option value="">all</option>{options}</select></label>'
        '<label><input name="baselines" type="checkbox"> hide baselines</label>'
        '<label><input name="front" type="checkbox"> Pareto front only</label></form>'
    )


def _comparison(comparison: Comparison) -> str:
    """Matrix, ranks and paired differences of one protocol."""
    heads = ["attention", *(f"{t}: {m}" for t, m in zip(comparison.tasks, comparison.metrics, strict=True))]
    body = []
    for variant, cells in comparison.matrix.items():
        tds = [
            f'<td class="{"best" if c.best else "none" if c.value is None else ""}" title="{escape(c.why)}"'
            + (f' data-value="{c.value}"' if c.value is not None else "")
            + f">{escape(c.text)}</td>"
            for c in cells
        ]
        body.append(f"<tr>{_cell(variant)}{''.join(tds)}</tr>")
    notes = "".join(f"<li>[{i}] {escape(n)}</li>" for i, n in enumerate(comparison.notes, 1))
    parts = [
        f"<h2>Protocol {escape(comparison.protocol)}: every variant on every task</h2>",
        _table(heads, body),
        f"<ul class='note'>{notes}</ul>" if notes else "",
        "<h3>Ranks over tasks</h3>",
    ]
    ranking = comparison.ranking
    body = []
    for variant, (index, tasks) in comparison.index.items():
        rank = ranking.ranks.get(variant) if ranking else None
        shown = _number(rank, None, "")
        body.append(
            f"<tr>{_cell(variant)}{shown}{_cell(tie(ranking, variant))}{_number(index, None, '')}{_cell(tasks)}</tr>"
        )
    heads = ["attention", "mean rank", "not told from the best", "compositional index", "tasks"]
    parts += [_table(heads, body), f'<p class="note">{escape(ranking_note(comparison))}</p>']
    if comparison.against:
        body = [
            f"<tr>{_cell(variant)}{_cell(task)}{_number(mean, None, '')}{_cell(f'{low:+.4g} to {high:+.4g}')}</tr>"
            for (task, variant), (mean, low, high) in comparison.against.items()
        ]
        heads = ["attention", "task", "better than softmax by", "95 % interval"]
        parts += ["<h3>Paired differences over seeds</h3>", _table(heads, body)]
    return f"<section>{''.join(parts)}</section>"


def _table(heads: list[str], body: list[str]) -> str:
    head = "".join(
        f'<th scope="col"{" class=text" if h in LEFT else ""}><button type="button">{escape(h)}</button></th>'
        for h in heads
    )
    return (
        '<div class="scroll" tabindex="0"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _task(task: str, rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    monitor = rows[0]["monitor"]
    # What decides the order stands first, where a phone shows it.
    metrics = sorted(runs[0]["test"], key=lambda m: m != monitor)
    costs = [label for label, _, _ in COST.values()]
    heads = ["attention", *metrics, *costs, "front", "seeds", "model", *LEFT[:2]]
    cheap = _front(rows, monitor)
    body = []
    for place, row in enumerate(rows):
        cells = [_cell(row["attention"])]
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
        cells += [_cell("yes" if place in cheap else ""), _cell(row["seeds"]), _cell(row["model"])]
        cells.append(f'<td class="line">{escape(row["slots"])}</td>')
        detail = "; ".join(filter(None, (row["protocol_detail"], row["search"])))
        cells.append(f'<td class="line">{escape(detail)}</td>')
        body.append(f'<tr data-front="{"yes" if place in cheap else ""}">{"".join(cells)}</tr>')
    for name, scores in runs[0].get("baselines", {}).items():
        cells = [_cell(f"{name} (baseline)"), *(_number(scores.get(m), None, "") for m in metrics)]
        body.append(f'<tr class="baseline">{"".join(cells)}{"<td></td>" * (len(COST) + 5)}</tr>')
    direction = "higher" if higher_is_better(monitor) else "lower"
    note = f"Ordered by {escape(monitor)}, {direction} is better. Protocol: {escape(str(rows[0]['protocol']))}. Front: no row with fewer FLOPs is as good."
    return (
        f'<section data-task="{escape(task)}"><h2>{escape(task)} on {escape(str(rows[0]["data"]))}</h2><p>{note}</p>'
        f"{_table(heads, body)}</section>"
    )


def _front(rows: list[dict[str, Any]], monitor: str) -> set[int]:
    """Places of the rows that no cheaper one (in FLOPs a sample) matches."""
    known = [i for i, r in enumerate(rows) if r.get(monitor) is not None]
    points = [(rows[i]["flops"], rows[i][monitor]) for i in known]
    return {known[i] for i in pareto(points, higher_is_better(monitor))}


def _failures(failures: list[dict[str, Any]]) -> str:
    """One row for all seeds that failed alike."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for f in failures:
        seeds.setdefault((f["task"], f["attention"], f["reason"]), []).append(str(f["seed"]))
    body = [
        f"<tr>{_cell(task)}{_cell(attention)}{_cell(', '.join(dict.fromkeys(own)))}<td class='text'>{escape(reason)}</td></tr>"
        for (task, attention, reason), own in seeds.items()
    ]
    return _table(["task", "attention", "seeds", "reason"], body)


def _cell(value: Any) -> str:
    return f"<td>{escape(str(value))}</td>"


def _number(value: float | None, half: float | None, attributes: str) -> str:
    if value is None:
        return "<td>-</td>"
    text = f"{value:.4g}" + (f" ± {half:.2g}" if half is not None else "")
    return f'<td data-value="{value}"{attributes}>{text}</td>'
