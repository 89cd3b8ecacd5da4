"""python -m zoo list [attention|models|tasks|data|weights] [--markdown]"""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from zoo.attention.base import Attention, Grid, Pattern
from zoo.attention.registry import create_attention, get_attention, list_attention
from zoo.errors import unknown

CONF = Path(__file__).parents[2] / "conf"
HEAD = [
    "attention",
    "self",
    "causal",
    "cross",
    "causal cross",
    "mask",
    "bias",
    "grid",
    "sets",
    "step",
    "2nd derivative",
    "map",
    "state",
    "MFLOPs",
    "paper",
]
WIDTH, HEADS, SIDE = 64, 4, 32  # of the module whose state and cost are listed; it gets SIDE^2 tokens


def capability_rows() -> list[list[str]]:
    """One row per variant, in the order of `HEAD`."""
    rows = []
    for name in list_attention():
        cls = get_attention(name)
        can = cls.capabilities
        patterns = ["yes" if p in can.patterns else "" for p in Pattern]
        if not can.strict_causal:
            patterns = [p and ("yes" if i % 2 == 0 else "masked") for i, p in enumerate(patterns)]
        rows.append(
            [
                name,
                *patterns,
                "yes" if can.key_mask else "",
                can.bias or "",
                ", ".join(f"{d}-D" for d in can.grid_dims) + (" (needed)" if can.needs_grid else ""),
                "" if can.order_sensitive else "yes",
                "yes" if can.streaming else "",
                "yes" if can.double_backward else "",
                ("signed" if can.signed_map else "yes") if can.has_map else "",
                decoding_state(name) if can.streaming else "",
                f"{_module(name, Pattern.SELF).cost(SIDE**2).flops / 1e6:.1f}",
                paper(name),
            ]
        )
    return rows


def _module(name: str, pattern: Pattern) -> Attention:
    can = get_attention(name).capabilities
    geometry: dict[str, Any] = {"length": SIDE**2} if can.fixed_length else {}
    geometry |= {"grid": Grid((SIDE, SIDE))} if can.needs_grid else {}
    return create_attention(name, WIDTH, HEADS, pattern=pattern, **geometry)


def decoding_state(name: str) -> str:
    """Numbers kept after all tokens, and whether twice as many tokens need more."""
    module = _module(name, Pattern.CAUSAL_SELF)
    size, twice = (module.state_size(n * SIDE**2) for n in (1, 2))
    return f"{size:,}, {'constant' if size == twice else 'grows'}"


def paper(name: str) -> str:
    """First arXiv number in the variant's docstring."""
    text = importlib.import_module(get_attention(name).__module__).__doc__ or ""
    found = re.search(r"arXiv:(\d{4}\.\d{4,5})", text)
    return f"arXiv:{found[1]}" if found else ""


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def first_comment(file: Path) -> str:
    """What a configuration file says about itself."""
    lines = file.read_text().splitlines()
    return next((x[2:].strip() for x in lines if x.startswith("# ") and "@package" not in x), "")


def weights_rows(task: str | None, attention: str | None) -> list[str]:
    """One line per named weights: task, and the test metrics that its card names first."""
    from zoo.pretrained.weights import list_weights, read_card, resolve

    rows = []
    for name in list_weights(task=task, attention=attention):
        card = read_card(resolve(name))
        metrics = ", ".join(f"{k} {v:.4g}" for k, v in list(card.get("metrics", {}).items())[:3])
        rows.append(f"{name:44} {card['task']:18} {metrics}")
    return rows or ["no such weights; every run writes some into its folder"]


def data_files(task: str) -> list[Path]:
    """Configuration files of the data that a task can take."""
    from tasks.registry import data_of_kind, get_task

    kind = get_task(OmegaConf.load(CONF / "task" / f"{task}.yaml").task.kind).data_kind
    files = (CONF / "data" / f"{name}.yaml" for name in data_of_kind(kind))
    return [file for file in files if file.exists()]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo list", description="What the zoo holds.")
    kinds = ("attention", "models", "tasks", "data", "weights")
    parser.add_argument("kind", nargs="?", default="attention", choices=kinds)
    parser.add_argument("--markdown", action="store_true", help="the table of README")
    parser.add_argument("--task", help="models, data or weights of this task alone")
    parser.add_argument("--attention", help="models with a place for this variant, or weights with it")
    args = parser.parse_args(argv)
    for option, fits in (("task", ("models", "data", "weights")), ("attention", ("models", "weights"))):
        if getattr(args, option) is not None and args.kind not in fits:
            parser.error(f"--{option} chooses among {', '.join(fits)}, not {args.kind}")
    tasks = [file.stem for file in (CONF / "task").glob("*.yaml")]
    if args.task is not None and args.task not in tasks:
        raise unknown("task", args.task, tasks)
    if args.kind == "attention":
        rows = capability_rows()
        if args.markdown:
            print(markdown_table(HEAD, rows))
            return 0
        from rich.console import Console
        from rich.table import Table

        table = Table(*HEAD)
        for row in rows:
            table.add_row(*row)
        out = Console()
        (out if out.is_terminal else Console(width=170)).print(table)
    elif args.kind == "models":
        from zoo.models.registry import list_models

        print("\n".join(list_models(sizes=True, task=args.task, attention=args.attention)))
    elif args.kind == "weights":
        print("\n".join(weights_rows(args.task, args.attention)))
    else:
        group = {"tasks": "task"}.get(args.kind, args.kind)
        for file in data_files(args.task) if args.task else sorted((CONF / group).glob("*.yaml")):
            print(f"{file.stem:22} {first_comment(file)}")
    return 0
