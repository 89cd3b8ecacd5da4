"""python -m zoo report RUNS...: a leaderboard over any set of run folders and sweeps."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.errors import DataError


def main(argv: list[str]) -> int:
    from tasks.engine.leaderboard import collect, write_leaderboard

    parser = argparse.ArgumentParser(prog="python -m zoo report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, sweeps, or folders that hold some")
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="folder for leaderboard.*; here by default"
    )
    args = parser.parse_args(argv)
    for folder in args.runs:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; give run folders or sweeps, e.g. runs/sweeps/*")
    if not collect(args.runs)[0]:
        raise DataError(f"no result.json below {', '.join(map(str, args.runs))}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = write_leaderboard(args.out, args.runs)
    print(f"{len(rows)} rows: {args.out / 'leaderboard.html'}")
    return 0
