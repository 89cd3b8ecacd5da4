"""python -m zoo export WEIGHTS...: write models as ONNX or torch.export programs, compared with the originals."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.errors import ConfigError


def main(argv: list[str]) -> int:
    from zoo.programs import SUFFIXES, TOLERANCE, export

    parser = argparse.ArgumentParser(prog="python -m zoo export", description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="weights names, .safetensors files or run folders")
    parser.add_argument("--format", default="onnx", choices=sorted(SUFFIXES))
    parser.add_argument("--output", type=Path, help="file, or a folder for several weights; here by default")
    parser.add_argument("--batch", type=int, help="fixed batch size; free when left out")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest difference from the model"
    )
    args = parser.parse_args(argv)
    output, suffix = args.output or Path("."), SUFFIXES[args.format]
    to_folder = output.is_dir() or output.suffix != suffix
    if not to_folder and len(args.weights) > 1:
        raise ConfigError(
            f"--output {output} is one file, but there are {len(args.weights)} weights; give a folder"
        )
    for name in args.weights:
        path = output / f"{export_name(name)}{suffix}" if to_folder else output
        for item in export(name, path, format=args.format, batch=args.batch, tolerance=args.tolerance):
            fixed = f", {' and '.join(item.fixed)} fixed" if item.fixed else ""
            print(f"{item.path}: largest difference from the model {item.difference:.2e}{fixed}")
    return 0


def export_name(weights: str) -> str:
    """Stem of the exported file: of a name or file its own, of a run folder the folder's."""
    path = Path(weights)
    return path.resolve().name if path.is_dir() else path.name.removesuffix(".safetensors")
