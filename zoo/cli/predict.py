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
    parser.add_argument("inputs", nargs="+", help="files or folders of what the task takes")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    args = parser.parse_args(argv)
    from zoo.pretrained import load

    predictor = load(args.weights)
    bad = 0
    for raw in predictor.inputs(args.inputs):
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
