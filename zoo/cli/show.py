"""python -m zoo show NAME: an attention variant, or the card of trained weights."""

from __future__ import annotations

import argparse
import importlib
import json
from dataclasses import asdict
from pathlib import Path

from zoo.attention.registry import get_attention, list_attention
from zoo.errors import WeightsError, unknown


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zoo show", description="A variant, or the card of weights."
    )
    parser.add_argument("name", help="attention variant, weights name, .safetensors file or run folder")
    args = parser.parse_args(argv)
    if args.name in list_attention():
        cls = get_attention(args.name)
        print((importlib.import_module(cls.__module__).__doc__ or "").strip(), "\n")
        print((cls.__doc__ or "").strip(), "\n")
        for key, value in asdict(cls.capabilities).items():
            if key == "note":
                continue
            if isinstance(value, frozenset):
                value = ", ".join(sorted(value))
            print(f"{key:16} {value}")
        print("\noptions:", json.dumps(cls.options()))
        return 0
    from zoo.pretrained.weights import list_weights, read_card, resolve

    try:
        card = read_card(resolve(args.name))
    except WeightsError:
        if Path(args.name).exists() or Path(args.name).suffix:
            raise
        raise unknown("name", args.name, [*list_attention(), *list_weights()]) from None
    card.pop("config", None)
    print(json.dumps(card, indent=2))
    return 0
