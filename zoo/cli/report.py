"""python -m zoo report RUNS...: a leaderboard over any set of run folders and sweeps."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.errors import DataError


def main(argv: list[str]) -> int:
    from tasks.engine.leaderboard import write_leaderboard

    parser = argparse.ArgumentParser(prog="python -m zoo report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, sweeps, or folders that hold some")
    parser.add_argument("--out", type=Path, default=Path("."), help="where leaderboard.* go")
    args = parser.parse_args(argv)
    for folder in args.runs:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; give run folders or sweeps, e.g. runs/sweeps/*")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = write_leaderboard(args.out, args.runs)
    if not rows:
        raise DataError(f"no result.json below {', '.join(map(str, args.runs))}")
    print(f"{len(rows)} rows: {args.out / 'leaderboard.html'}")
    return 0
