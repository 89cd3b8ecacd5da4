"""python -m zoo fetch all|NAME...: bring data sets into the cache."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    from data.carriers import SOURCES, fetch_all
    from zoo.errors import unknown

    parser = argparse.ArgumentParser(
        prog="python -m zoo fetch", description="Bring data sets into the cache."
    )
    parser.add_argument("names", nargs="+", help=f"all, or some of: {', '.join(SOURCES)}")
    args = parser.parse_args(argv)
    names = list(SOURCES) if args.names == ["all"] else args.names
    for name in names:
        if name not in SOURCES:
            raise unknown("data source", name, SOURCES)
    fetch_all(names)
    return 0
