"""Compile gate: every Triton kernel is compiled ahead of time for every GPU target, no GPU needed.

    python -m kernels.gate                      # a covering subset
    python -m kernels.gate --full               # every case
    python -m kernels.gate --ops linear --targets sm_90,gfx942

It reads registers, spills, shared memory and tensor-core instructions from the compiled code and prints one table with the roofline
time of each launch. It fails (exit code 1) on register spills or stack use, on more shared memory than the target has, and on a
matrix product that does not run on tensor cores. float32 products must run there too: as three TF32 passes ("tf32x3") on NVIDIA, as
float32 matrix instructions on AMD.

**To put an operation under the gate**, define in ``kernels/<op>/triton.py`` (or ``launch.py`` or ``cases.py`` beside it)

    def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]

which yields one ``GateCase`` (``kernels/_common/targets.py``) per kernel and variant for "float16", "bfloat16" or "float32" and one head size.
Take tile sizes from the same function that the launch uses; yield nothing for what the operation does not claim. An optional module
constant ``GATE_DTYPES`` replaces the list below; head sizes are those of ``kernels/_common/widths.py``, where the operation has a line.

Results are cached by the hash of source, types, options and Triton version under ``ZOO_KERNEL_CACHE`` (default
``~/.cache/attention-zoo/kernels``). Several cases may give the same code (a head size cut into the same tiles, a type that a kernel does not
see): such code is compiled once and counted for each. The whole product is some 5,700 cases or 4,500 compilations, about two hours of one core,
half of them softmax.
"""

import argparse
import concurrent.futures
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels._common import compiling
from kernels._common.compiling import Result, compile_case
from kernels._common.targets import TARGETS, GateCase
from kernels._common.widths import sizes

DTYPES = ("float16", "bfloat16", "float32")
_STEMS = ("cases", "launch", "triton")


@dataclass(frozen=True)
class Key:
    """Which case: plain values, so that worker processes can rebuild it."""

    op: str
    target: str
    dtype: str
    dim: int
    kernel: str
    variant: str


def operations() -> list[str]:
    """Names of the folders under ``kernels`` that define ``gate_cases``."""
    root = Path(__file__).parent
    names = sorted({p.parent.name for stem in _STEMS for p in root.glob(f"*/{stem}.py")})
    return [name for name in names if _gate_module(name) is not None]


def _gate_module(op: str):
    for stem in _STEMS:
        if importlib.util.find_spec(f"kernels.{op}.{stem}") is not None:
            module = importlib.import_module(f"kernels.{op}.{stem}")
            if hasattr(module, "gate_cases"):
                return module
    return None


def keys_of(op: str, targets: list[str], dtypes: list[str] | None = None) -> list[Key]:
    """Every case of an operation."""
    module = _gate_module(op)
    out = []
    for name in targets:
        for dtype in dtypes or getattr(module, "GATE_DTYPES", DTYPES):
            for dim in sizes(op, dtype):
                for case in module.gate_cases(TARGETS[name], dtype, dim):
                    out.append(Key(op, name, dtype, dim, case.kernel.__name__, case.variant))
    doubles = [key for key, count in Counter(out).items() if count > 1]
    if doubles:
        raise ValueError(
            f"gate_cases of {op!r} yields two cases with one name: {doubles[0]}; give them different variants"
        )
    return out


def covering(keys: list[Key]) -> list[Key]:
    """A small subset in which each kernel meets, on each target, every variant, dtype, head size, and its largest head size per dtype."""
    largest: dict[tuple, int] = {}
    for k in keys:
        own = k.op, k.kernel, k.dtype
        largest[own] = max(k.dim, largest.get(own, 0))

    def wants(k: Key) -> set:
        base = (k.op, k.kernel, k.target)
        out = {(*base, "variant", k.variant), (*base, "dtype", k.dtype), (*base, "dim", k.dim)}
        if k.dim == largest[k.op, k.kernel, k.dtype]:
            out |= {(*base, "largest", k.dtype), (*base, "largest", k.variant)}
        return out

    missing = set().union(*(wants(k) for k in keys)) if keys else set()
    chosen = []
    pool = [(k, wants(k)) for k in keys]
    while missing:
        best, gain = max(pool, key=lambda item: len(item[1] & missing))
        chosen.append(best)
        missing -= gain
    order = {k: i for i, k in enumerate(keys)}
    return sorted(chosen, key=order.__getitem__)


def find_case(key: Key) -> GateCase:
    for case in _gate_module(key.op).gate_cases(TARGETS[key.target], key.dtype, key.dim):
        if case.kernel.__name__ == key.kernel and case.variant == key.variant:
            return case
    raise LookupError(f"no case {key}")


def cache_folder() -> Path:
    return Path(os.environ.get("ZOO_KERNEL_CACHE") or Path.home() / ".cache" / "attention-zoo" / "kernels")


def _cache_file(case: GateCase, target: str) -> Path:
    """Named by all that the compiled code depends on, and nothing else: cases that give one code share one result."""
    import triton

    described = json.dumps(
        [
            triton.__version__,
            Path(compiling.__file__).read_text(),
            case.kernel.cache_key,
            target,
            case.pointers,
            {k: str(v) for k, v in case.constexprs.items()},
            case.num_warps,
            case.num_stages,
            case.unaligned,
            case.has_dot,
        ],
        sort_keys=True,
    )
    return cache_folder() / "gate" / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.json"


def run_case(key: Key, use_cache: bool = True) -> Result:
    """Check one case, from the cache if nothing it depends on has changed."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))
    case = find_case(key)
    file = _cache_file(case, key.target)
    if use_cache and file.exists():
        return Result(**{**json.loads(file.read_text()), "cached": True})
    try:
        result = compile_case(case, TARGETS[key.target])
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[-1]
        return Result(0, 0, 0, 0, 0.0, [f"does not compile: {type(error).__name__}: {text[:200]}"])
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(result)))
    draft.replace(file)
    return result


def _row(key: Key, result: Result) -> list[str]:
    case, target = find_case(key), TARGETS[key.target]
    roofline = ""
    if case.cost is not None:
        roofline = f"{case.cost.time_s(target.flops_per_s[key.dtype], target.bytes_per_s) * 1e6:.1f}"
    verdict = "; ".join(result.problems) or "ok"
    numbers = (result.registers, result.spills, result.shared, result.tensor)
    return [
        f"{key.op}/{key.kernel}", key.variant, key.target, key.dtype, str(key.dim), *map(str, numbers), roofline, case.shape, verdict,
    ]  # fmt: skip


def table(rows: list[list[str]]) -> str:
    head = "kernel variant target dtype D regs spills shared tensor roofline_us shape verdict".split()
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    """Run the gate; 0 if every case passes."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.gate", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--ops", help="comma-separated operations (default: all)")
    parser.add_argument(
        "--targets", default=",".join(TARGETS), help="comma-separated targets (default: %(default)s)"
    )
    parser.add_argument("--full", action="store_true", help="every case instead of a covering subset")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--no-cache", action="store_true", help="compile again")
    parser.add_argument("--failures", action="store_true", help="print failing cases only")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        print("kernels.gate: triton is not installed; pip install triton", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("kernels.gate: TRITON_INTERPRET is set, which replaces the compiler; unset it", file=sys.stderr)
        return 2
    known = operations()
    ops = args.ops.split(",") if args.ops else known
    targets = args.targets.split(",")
    for given, allowed, what in ((ops, known, "operation"), (targets, list(TARGETS), "target")):
        wrong = [name for name in given if name not in allowed]
        if wrong:
            print(
                f"kernels.gate: unknown {what} {wrong[0]!r}; choose from {', '.join(allowed)}",
                file=sys.stderr,
            )
            return 2
    keys = [key for op in ops for key in keys_of(op, targets)]
    total = len(keys)
    keys = keys if args.full else covering(keys)
    start = time.perf_counter()
    if args.jobs > 1 and len(keys) > 1:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            results = list(pool.map(run_case, keys, [not args.no_cache] * len(keys), chunksize=4))
    else:
        results = [run_case(key, not args.no_cache) for key in keys]
    rows = [_row(k, r) for k, r in zip(keys, results, strict=True) if r.problems or not args.failures]
    print(table(rows))
    failed = sum(bool(r.problems) for r in results)
    cached = sum(r.cached for r in results)
    print(
        f"{len(keys)} of {total} cases, {failed} failed, {cached} from the cache, {time.perf_counter() - start:.0f} s"
        + ("" if args.full else "; --full compiles all")
    )
    return 1 if failed or not keys else 0


if __name__ == "__main__":
    sys.exit(main())
