"""Launches the kernels of Taylor features, and hands their cases to the compile gate."""

from collections.abc import Iterable
from dataclasses import dataclass

import triton
from torch import Tensor

from kernels._common import launching
from kernels._common.choice import interpreting
from kernels._common.cost import Cost
from kernels._common.launching import on_device, platform, pow2
from kernels._common.targets import GateCase, Target
from kernels._common.widths import largest
from kernels.linear import taylor_triton as tk


@dataclass(frozen=True)
class Tiles:
    """Tokens and value channels of a program's tiles, and its warps; the channels of x are never split."""

    bl: int
    be: int
    warps: int


def tiles(dtype: str, e: int) -> Tiles:
    """The same table serves launches and the compile gate. 33 and 65 value channels, one of them a sum of weights, make tiles of 32."""
    wide = dtype == "bfloat16" and -e % 64 < 31
    return Tiles(64, min(64 if wide else 32, pow2(e)), 4)


def dot_type(dtype: str, backend: str) -> tuple[str, str]:
    if dtype == "bfloat16":
        return "bfloat16", "ieee" if backend == "hip" else "tf32"
    if backend == "hip":
        return "float32", "ieee"
    return "float32", "tf32x3" if dtype == "float32" else "tf32"


def _types(dtype: str) -> tuple[str, str]:
    if interpreting():
        # bf16 products are wrong in the interpreter (triton issue 11584).
        return "float32", "ieee"
    return dot_type(dtype, platform())


def _run(
    kernel, grid: tuple[int, ...], tensors: list[Tensor], sizes: tuple[int, int, int], **factors: float
) -> None:
    _, d, e = sizes
    dtype = str(tensors[0].dtype)[6:]
    t, (dot, precision) = tiles(dtype, e), _types(dtype)
    with on_device(tensors[0]):
        kernel[grid](
            *tensors, *sizes, **factors,
            BD=pow2(d), BE=t.be, BL=t.bl, DOT=tk.DOT_TYPES[dot], PRECISION=precision, num_warps=t.warps, num_stages=1,
        )  # fmt: skip


def state(x: Tensor, y: Tensor) -> Tensor:
    """x [G, L, D], y [G, L, E] -> T [G, 1 + D + D D, E] in float32."""
    (g, length, d), e = x.shape, y.shape[2]
    out = launching.new(x, g, 1 + d + d * d, e)
    if 0 in (g, length, d, e):
        return out.zero_()
    t = tiles(str(x.dtype)[6:], e)
    tensors = [x.contiguous(), y.contiguous(), out]
    _run(tk.taylor_state_fwd_kernel, (g, d + 1, triton.cdiv(e, t.be)), tensors, (length, d, e))
    return out


def read(x: Tensor, t: Tensor, coefficients: list[float]) -> Tensor:
    """x [G, L, D], T -> [G, L, E] in float32."""
    (g, length, d), e = x.shape, t.shape[2]
    out = launching.new(x, g, length, e)
    if 0 in (g, length, d, e):
        return out.zero_()
    size = tiles(str(x.dtype)[6:], e)
    grid = (g, triton.cdiv(length, size.bl), triton.cdiv(e, size.be))
    c0, c1, c2 = coefficients
    tensors = [x.contiguous(), t.contiguous(), out]
    _run(tk.taylor_read_fwd_kernel, grid, tensors, (length, d, e), C0=c0, C1=c1, C2=c2)
    return out


def slope(x: Tensor, up: Tensor, t: Tensor, coefficients: list[float]) -> Tensor:
    """x [G, L, D], up [G, L, E], T -> [G, L, D] in float32."""
    (g, length, d), e = x.shape, t.shape[2]
    out = launching.new(x, g, length, d)
    if 0 in (g, length, d, e):
        return out.zero_()
    size = tiles(str(x.dtype)[6:], e)
    tensors = [x.contiguous(), up.contiguous(), t.contiguous(), out]
    grid = (g, triton.cdiv(length, size.bl))
    c1, c2 = coefficients
    _run(tk.taylor_read_bwd_x_kernel, grid, tensors, (length, d, e), C1=c1, C2=c2)
    return out


GATE_GROUPS, GATE_LENGTH = 4096, 128


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """The three kernels for ``dim`` value channels and their sum of weights, gradients in float32: 16 channels, once the widest."""
    for d in {16, largest("taylor2", dtype)} if dim == 64 else {16}:
        yield from _gate_cases(target, dtype, dim, d)


def _gate_cases(target: Target, dtype: str, dim: int, d: int) -> Iterable[GateCase]:
    e = dim + 1
    dot, precision = dot_type(dtype, target.backend)
    data = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[dtype]
    t = tiles(dtype, e)
    shape = f"G{GATE_GROUPS} L{GATE_LENGTH} D{d} E{dim}"
    tokens, rows = float(GATE_GROUPS * GATE_LENGTH), 1 + d + d * d
    moved = tokens * (d + e) * (4 if dtype == "float32" else 2) + 4.0 * GATE_GROUPS * rows * e
    consts = {"BD": pow2(d), "BE": t.be, "BL": t.bl, "DOT": tk.DOT_TYPES[dot], "PRECISION": precision}
    single = {"T": "fp32", "O": "fp32", "DX": "fp32"}
    kinds = [(tk.taylor_state_fwd_kernel, "values", {"X": data, "Y": data})]
    kinds += (
        [(tk.taylor_state_fwd_kernel, "gradients", {"X": data, "Y": "fp32"})] if dtype != "float32" else []
    )
    kinds += [
        (tk.taylor_read_fwd_kernel, "read", {"X": data}),
        (tk.taylor_read_bwd_x_kernel, "gradients", {"X": data, "G": "fp32"}),
    ]
    for kernel, variant, own in kinds:
        pointers = {name: kind for name, kind in {**single, **own}.items() if name in kernel.arg_names}
        fixed = {name: 1.0 for name in ("C0", "C1", "C2") if name in kernel.arg_names}
        yield GateCase(
            kernel, f"taylor {d} {variant}", pointers, {**consts, **fixed}, t.warps, 1, True,
            Cost(2.0 * tokens * rows * e, moved), shape, unaligned=("L", "D", "E"),
        )  # fmt: skip
