"""python -m zoo predict WEIGHTS INPUT...: use trained weights; bad inputs are named and skipped."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from zoo.errors import DataError
from zoo.files import write_whole

VALUE_OPTIONS, FLAGS = ("--format", "--output", "--figures"), ("--json", "--quiet", "--help", "-h")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zoo predict",
        description="Use trained weights on files. Tasks have options of their own, such as --top-k or --at.",
    )
    parser.add_argument("weights", help="weights name, .safetensors file or run folder")
    parser.add_argument("inputs", nargs="*", help="files or folders of what the task takes")
    parser.add_argument(
        "--format", default="text", choices=("text", "json", "csv"), help="json: one object a line"
    )
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="as --format json")
    parser.add_argument("--output", type=Path, help="file for the predictions instead of the screen")
    parser.add_argument("--figures", type=Path, help="folder for one picture per input")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    argv, options = split_options(argv)
    args = parser.parse_args(argv)
    from zoo.pretrained import load

    predictor = load(args.weights)
    inputs = [*args.inputs, *predictor.options(options)]
    if not inputs or "" in inputs:  # an empty path would be the folder that one is in
        parser.error("give at least one input, none of them empty")
    if args.output:  # before the work, not after it
        if args.output.is_dir():
            parser.error(f"--output {args.output} is a folder; name a file")
        args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
    raws = list(predictor.inputs(inputs))
    if not raws:
        raise DataError(
            f"{', '.join(inputs)}: nothing there that weights of task {predictor.card['task']!r} read"
        )
    lines: list[str] = []
    table: list[dict[str, Any]] = []
    bad = 0
    for number, raw in enumerate(_progress(raws, args.quiet)):
        try:
            prediction = predictor.predict(raw)
        except DataError as error:
            bad += 1
            print(f"skipped {raw}: {error}", file=sys.stderr)
            continue
        if args.figures:
            _draw(predictor, raw, prediction, args.figures / f"{number:04d}_{Path(str(raw)).stem[:40]}.png")
        if args.format == "csv":
            table += [{"input": raw, **row} for row in predictor.rows(prediction)]
            continue
        text = predictor.format(raw, prediction)
        lines.append(json.dumps({"input": raw, **prediction}) if args.format == "json" else text)
        if args.output is None:
            print(lines.pop(), flush=True)
    if args.format == "csv":
        lines = as_csv(table).splitlines()
        if args.output is None:
            print("\n".join(lines))
    if args.output is not None:
        text = "\n".join(lines) + "\n"
        write_whole(args.output, lambda p: p.write_text(text, encoding="utf-8"))
        print(f"{args.output}: {len(raws) - bad} predictions", file=sys.stderr)
    if bad:
        print(f"{bad} of {len(raws)} inputs skipped", file=sys.stderr)
    return 1 if bad else 0


def split_options(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--name value` and `--name=value` out of the arguments: options of the task's own predictor."""
    rest: list[str] = []
    options: dict[str, str] = {}
    items = iter(argv)
    for item in items:
        name, equals, value = item.partition("=")
        if name in VALUE_OPTIONS:
            rest += [name, value if equals else next(items, "")]
        elif not item.startswith("--") or item in FLAGS:
            rest.append(item)
        else:
            options[name[2:]] = value if equals else next(items, "")
    return rest, options


def as_csv(table: list[dict[str, Any]]) -> str:
    """Rows with the columns of all of them, in order of appearance."""
    stream = io.StringIO()
    columns = dict.fromkeys(name for row in table for name in row)
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return stream.getvalue()


def _progress(items: list[Any], quiet: bool) -> Any:
    """A bar on the terminal's error stream where there is something to wait for."""
    if quiet or len(items) < 2 or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, "predicting", console=Console(stderr=True), transient=True)


def _draw(predictor: Any, raw: Any, prediction: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    from zoo.predict.figures import draw

    figure = Figure(figsize=(6, 4), layout="constrained")
    draw(predictor, raw, prediction, figure)
    figure.savefig(path, dpi=120)
