"""Tile sizes and types of the products, per target: one small table for launches and the compile gate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels._common.choice import interpreting
from kernels._common.launching import platform, pow2


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a program's tiles, how it runs, and channels of a piece (``Config.piece``)."""

    queries: int
    keys: int
    warps: int
    stages: int
    piece: int | None = None


def table(
    kernel: str, backend: str, dot: str, d: int, e: int, arch: int = 90, scores: str = "plain"
) -> Tiles:
    """The same table serves launches and the compile gate, which found its entries; the wider head size decides.

    The gradient of keys and values holds four tiles and two sums at once, and float32 products split their operands in two: both take
    smaller tiles, float32 gradients on NVIDIA take rows in pieces besides. So do "rich" ``scores``, with more than a band and a key mask, and "factors" above all.
    AMD runs out of scalar registers first. ``arch`` is the compute capability times ten on NVIDIA.
    """
    width = max(pow2(d), pow2(e))
    wide = width > 64
    if dot == "float32" and backend == "cuda" and kernel != "fwd":
        # Small tiles leave ptxas at 128 registers, a few bytes short for some narrow rows; larger ones get what they need.
        queries = 32 if width == 16 or (kernel == "bwd_dq" and width <= 64) else 16
        keys = 32 if width == 16 and kernel != "bwd_dkdv" else 16
        return Tiles(queries, keys, 8, 1, piece=min(32, width))
    if width > 128:  # half precision, see `kernels/_common/widths.py`
        if backend == "hip":
            return Tiles(16, 16, 4 if kernel == "fwd" else 8, 1)
        if kernel == "bwd_dbias" or (kernel == "bwd_dkdv" and scores == "factors"):
            return Tiles(32, 16, 8, 1)
        if kernel == "bwd_dq" and scores == "factors":
            return Tiles(16, 16, 8, 1)
        pieces = {"bwd_dkdv": 64, "bwd_dq": 128} if scores == "rich" else {}
        return Tiles(32, 32, 8, 1, pieces.get(kernel))
    if dot == "float32":
        side = 16 if wide or backend == "hip" else 32
        return Tiles(side, side, 8 if wide else 4, 1)
    if backend == "hip":
        return Tiles(32, 16, 4, 1)
    if kernel == "bwd_dbias" and width == 64 and arch >= 100:
        return Tiles(32, 32, 8, 1)
    if scores == "factors" and wide:
        return Tiles(32, 32, 8, 1)
    if kernel == "bwd_dkdv" and scores == "rich" and not wide and arch >= 100:
        return Tiles(64, 32, 8, 1)
    if kernel == "bwd_dkdv" and (scores != "plain" or (wide and arch < 90)):
        return Tiles(32, 32, 8 if scores == "rich" and not wide and arch < 90 else 4, 1)
    if scores != "plain":
        return Tiles(32, 64 if kernel == "bwd_dq" else 32, 8, 1) if wide else Tiles(64, 32, 8, 1)
    if kernel == "fwd":
        return Tiles(64, 32, 4, 1) if wide else Tiles(64, 64, 4, 2)
    if kernel == "bwd_dkdv" and not wide and (arch >= 100 or (width == 64 and arch < 90)):
        return Tiles(64, 32, 4, 1)
    return Tiles(64, 32 if wide else 64, 8, 1)


def skip_table(kernel: str, plain: Tiles, skip: Sequence[int], dot: str, d: int, e: int, arch: int) -> Tiles:
    """Skipping is decided for a whole tile, so the forward takes the caller's; the gradients stay within one."""
    width = max(pow2(d), pow2(e))
    wide = width > 64
    if wide and dot == "float32":
        return Tiles(16, 16, 8, 1, plain.piece)
    if kernel == "fwd":
        return Tiles(*skip, 8 if width > 128 or (wide and arch < 100) else 4, 1)
    keys = 32 if kernel == "bwd_dq" and arch >= 100 and dot != "float32" else plain.keys
    return replace(plain, queries=min(plain.queries, skip[0]), keys=min(keys, skip[1]))


def sparse_table(kernel: str, backend: str, dot: str, d: int, e: int, arch: int) -> Tiles:
    """For block-sparse calls: all kernels walk the same lists, hence the sides of tiles that the one with the least room takes.

    A rule of places takes other registers than a bias does: some kernels run with another number of warps than in ``table``.
    """
    least = table("bwd_dkdv", backend, dot, d, e, arch, "rich")
    t = replace(table(kernel, backend, dot, d, e, arch, "rich"), queries=least.queries, keys=least.keys)
    if backend == "hip":
        return t
    width, hopper, blackwell = max(pow2(d), pow2(e)), 90 <= arch < 100, arch >= 100
    if dot == "float32":
        if kernel == "fwd":
            return replace(t, warps=8) if width == 16 and blackwell else t
        return replace(t, warps=2 if blackwell else 4) if kernel == "bwd_dq" and width == 16 else t
    if kernel == "bwd_dq" and width <= 64 and arch >= 90:
        return replace(t, warps=4)
    if hopper and kernel == "bwd_dkdv" and width == 64:
        return replace(t, warps=8)
    return replace(t, warps=4) if hopper and kernel == "fwd" and width > 128 else t


def bias_kernel(where: str | None = None) -> bool:
    """Whether the kernel for the bias gradient fits: not in AMD's scalar registers."""
    return (where or platform()) == "cuda"


def dot_types(dtype: str, backend: str) -> tuple[str, str]:
    if dtype == "float32":
        return "float32", "ieee" if backend == "hip" else "tf32x3"
    return dtype, "ieee" if backend == "hip" else "tf32"


def compute_capability() -> int:
    """Times ten; 90 where there is none."""
    if torch.version.hip or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def types_of(t: Tensor) -> tuple[str, str]:
    """Operand type and precision of the products."""
    if interpreting():
        # bf16 products are wrong in the interpreter (triton issue 11584).
        return "float32" if t.dtype == torch.bfloat16 else str(t.dtype)[6:], "ieee"
    return dot_types(str(t.dtype)[6:], platform())
