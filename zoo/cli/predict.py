"""python -m zoo predict WEIGHTS INPUT...: use trained weights; bad inputs are named and skipped."""

from __future__ import annotations

import argparse
import json
import sys

from zoo.errors import DataError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zoo predict", description="Use trained weights on files."
    )
    parser.add_argument("weights", help="weights name, .safetensors file or run folder")
    parser.add_argument("inputs", nargs="*", help="files or folders of what the task takes")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    argv, options = split_options(argv)
    args = parser.parse_args(argv)
    from zoo.pretrained import load

    predictor = load(args.weights)
    inputs = [*args.inputs, *predictor.options(options)]
    if not inputs:
        parser.error("give at least one input")
    bad = 0
    for raw in predictor.inputs(inputs):
        try:
            prediction = predictor.predict(raw)
        except DataError as error:
            bad += 1
            print(f"skipped: {error}", file=sys.stderr)
            continue
        print(json.dumps({"input": raw, **prediction}) if args.json else predictor.format(raw, prediction))
    if bad:
        print(f"{bad} input(s) skipped", file=sys.stderr)
    return 1 if bad else 0


def split_options(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--name value` and `--name=value` out of the arguments: options of the task's own predictor."""
    rest: list[str] = []
    options: dict[str, str] = {}
    items = iter(argv)
    for item in items:
        if not item.startswith("--") or item in ("--json", "--help"):
            rest.append(item)
            continue
        name, equals, value = item[2:].partition("=")
        options[name] = value if equals else next(items, "")
    return rest, options
