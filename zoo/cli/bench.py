"""python -m zoo bench ops|ops-memory|efficiency|masks|sensors|memory|--task NAME: timings in one run, refused while the tests of what is timed fail."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import torch

from zoo.errors import ConfigError, unknown

ROOT = Path(__file__).parents[2]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m zoo bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "what",
        nargs="?",
        choices=["ops", "ops-memory", "efficiency", "masks", "sensors", "memory"],
        help="operations by length, their memory, variants by pattern and length, kinds of masks, attention over ever more sensors, or peak "
        "memory of heavy cases",
    )
    parser.add_argument(
        "--task", help="training step of this task beside its peer; asr_decode, asr_decode_batch: decoding"
    )
    parser.add_argument("--attention", default="softmax", help="variant in our model")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; each benchmark has its own")
    parser.add_argument("--only", nargs="+", help="names of operations, variants, masks or memory cases")
    parser.add_argument("--patterns", nargs="+", help="of efficiency: self, causal_self, cross, causal_cross")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the streamed table (memory)")
    parser.add_argument("--csv", type=Path, help="write all rows here, one long format")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests of what is timed first")
    args = parser.parse_args(argv)
    if (args.what is None) == (args.task is None):
        raise ConfigError(
            "say what to time: `bench ops`, `ops-memory`, `efficiency`, `masks`, `sensors`, `memory` or `bench --task vit`"
        )
    check_names(args.what, args.only or [])
    if args.what == "memory":
        from zoo.bench.memory import measure, show

        show(measure(args.only, rows=args.rows))
        return 0
    if args.what == "ops-memory":
        from zoo.bench.ops_memory import measure, show

        show(measure(args.only, args.lengths))
        return 0
    if not args.no_tests:
        require_green(
            ["tests/kernels", "-k", "not interpreter and not gate"]
            if args.what in ("ops", "masks")
            else ["tests/attention"]
        )
    from zoo.bench.timing import busy

    if busy() > 0.7:
        print(f"note: about {busy():.1f} other processes are computing; ratios are noisy", file=sys.stderr)
    if args.what in ("efficiency", "masks"):
        rows = importlib.import_module(f"zoo.bench.{args.what}").run(args)
    else:
        rows = {"ops": time_ops, "sensors": time_sensors, None: time_task}[args.what](args)
    if args.csv:
        from zoo.bench.timing import write_csv

        write_csv(args.csv, rows)
    return 0


def check_names(what: str | None, names: list[str]) -> None:
    """Refuse names that are not there, before anything runs.

    Raises:
        ConfigError: An unknown name, or a benchmark that has no choice of names.
    """
    from zoo.attention import list_attention
    from zoo.bench import masks, memory, ops

    choices = {
        "ops": ("operation", ops.names),
        "ops-memory": ("operation", ops.ours),
        "efficiency": ("attention", list_attention),
        "masks": ("mask", lambda: masks.KINDS),
        "memory": ("memory case", lambda: memory.CASES),
    }
    if names and what not in choices:
        raise ConfigError(
            f"--only {names[0]!r}: `bench {what or '--task'}` has no names to choose from; leave --only out, or use it with {', '.join(choices)}"
        )
    for name in names:
        kind, known = choices[what]
        if name not in known():
            raise unknown(kind, name, known())


def require_green(selection: list[str]) -> None:
    """Refuse to time what does not work."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", *selection],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-3:])
        raise ConfigError(f"no timing while tests fail (pytest {' '.join(selection)}):\n{tail}")


def time_task(args: argparse.Namespace) -> list[dict]:
    from zoo.bench.tasks import contestants, mode
    from zoo.bench.timing import row, take_turns

    timings = take_turns(contestants(args.task, args.attention), rounds=args.rounds)
    (mine, first), *others = timings.items()
    print(
        f"{mine}: {first.p50:.1f} ms a {mode(args.task)} (p20 {first.quantile(0.2):.1f}, p80 {first.quantile(0.8):.1f})"
    )
    for name, timing in others:
        print(f"{name}: {timing.p50:.1f} ms; ratio ours / theirs {first.p50 / timing.p50:.3f}")
    print(
        f"{len(first.times_ms)} rounds in turns, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    return [row(args.task, n, mode(args.task), args.attention, t) for n, t in timings.items()]


def time_sensors(args: argparse.Namespace) -> list[dict]:
    from zoo.bench.sensors import measure, show
    from zoo.bench.timing import row

    found = measure(args.attention, args.rounds)
    show(found)
    return [
        row("sensors", name, "forward+backward", f"2x{n}x64", timing)
        for n, timings in found.items()
        for name, timing in timings.items()
    ]


def time_ops(args: argparse.Namespace) -> list[dict]:
    from rich.console import Console
    from rich.table import Table

    from zoo.bench.ops import compare_at, exponent, ours
    from zoo.bench.ops_targets import absent, verdicts
    from zoo.bench.timing import row

    lengths = args.lengths or [256, 1024, 4096, 16384]
    by_length = {n: compare_at(n, args.only) for n in lengths}
    if not any(by_length.values()):
        raise ConfigError(f"--only {' '.join(args.only)}: not timed at {lengths}; ask for shorter --lengths")
    table = Table("operation (fwd + bwd, ms)", *map(str, lengths), "SDPA / ours at the longest", "exponent")
    last = by_length[lengths[-1]]
    # Some contestants stop at a shorter length.
    for name in dict.fromkeys(name for n in lengths for name in by_length[n]):
        times = {n: by_length[n][name].p50 for n in lengths if name in by_length[n]}
        ratio = f"{last['torch.SDPA'].p50 / last[name].p50:.1f}" if {"torch.SDPA", name} <= set(last) else "-"
        slope = f"{exponent(list(times), list(times.values())):.2f}" if len(times) > 1 else "-"
        shown = (f"{times[n]:.2f}" if n in times else "-" for n in lengths)
        table.add_row(name, *shown, ratio, slope)
    out = Console()
    (out if out.is_terminal else Console(width=120)).print(table)
    print(f"B 1, H 4, D 64, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    grows_linearly = [n for n in ours() if n not in ("softmax", "softmax causal") and "step by step" not in n]
    for what, measured, limit, met in verdicts(by_length, grows_linearly):
        print(f"{what}: {measured:.2f} ({limit}{'' if met else ', MISSED'})")
    for line in absent():
        print(line)
    return [
        row("ops", name, "forward+backward", f"1x4x{n}x64", timing)
        for n, timings in by_length.items()
        for name, timing in timings.items()
    ]
