"""python -m zoo package RUN_FOLDER: move a run's best weights into the zoo under `model_size_attention.dataset`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from zoo.errors import WeightsError


def main(argv: list[str]) -> int:
    from zoo.cli.verify import reproduce
    from zoo.files import write_whole
    from zoo.pretrained.package import intervals, package
    from zoo.pretrained.storage import STORAGES
    from zoo.pretrained.weights import local_folder, packaged_folder, read_card, update_card

    parser = argparse.ArgumentParser(prog="python -m zoo package", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="finished run folder")
    parser.add_argument(
        "--seeds", type=Path, nargs="+", default=(), help="runs with other seeds, for intervals"
    )
    parser.add_argument("--storage", default="full", choices=STORAGES, help="precision in the file")
    parser.add_argument("--name", help="other than model_size_attention.dataset")
    parser.add_argument("--licence", help="where the data name none")
    parser.add_argument("--local", action="store_true", help="into your own folder instead of the package's")
    args = parser.parse_args(argv)
    folder = local_folder() if args.local else packaged_folder()
    earlier = {p: p.read_bytes() for p in folder.glob("*") if p.suffix in (".safetensors", ".json")}
    path = package(
        args.run, folder, name=args.name, storage=args.storage, licence=args.licence, seeds=args.seeds
    )
    if args.storage != "full":
        # The card states what the rounded weights reach.
        try:
            before, now = reproduce(str(path))
            if lost := [
                k for k, v in before.items() if math.isfinite(v) and not math.isfinite(now.get(k, math.nan))
            ]:
                raise WeightsError(f"storage {args.storage} ruins {', '.join(lost)}; use a finer one")
        except BaseException:
            for file in (path, path.with_suffix(".json")):
                if file in earlier:  # weights of the same name that were fine
                    write_whole(file, lambda draft, file=file: draft.write_bytes(earlier[file]))
                else:
                    file.unlink()
            raise
        metrics = {k: now[k] for k in before if k in now}
        update_card(path, metrics=metrics, metrics_before_rounding=before)
        if not args.seeds:  # an interval over runs stays that of their own weights
            update_card(path, interval=intervals(read_card(path)))
        for metric, value in before.items():
            print(f"{metric}: {value:.5g} before rounding, {now.get(metric, float('nan')):.5g} after")
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")
    return 0
