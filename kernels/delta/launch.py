"""Launches the delta rule's Triton kernels, and hands their cases to the compile gate."""

from collections.abc import Iterable
from dataclasses import dataclass

import triton
from torch import Tensor

from kernels._common import launching
from kernels._common.cost import Cost
from kernels._common.launching import on_device, pow2
from kernels._common.targets import GateCase, Target
from kernels.decay.launch import dot_type, products_of
from kernels.decay.triton import DOT_TYPES
from kernels.delta import triton as tk
from kernels.delta.ops import CHUNK


@dataclass(frozen=True)
class Tiles:
    """Rows of a chunk at a time, all key channels, value channels of the state that a program carries, and warps."""

    bt: int
    bd: int
    be: int
    warps: int


def tiles(dot: str, precision: str, d: int, e: int) -> Tiles:
    """The same table serves launches and the compile gate, which found its entries. The state stays in registers, and a second time as an
    operand of the products."""
    bd, be = pow2(d), pow2(e)
    if bd <= 64:
        few = bd == 64 and precision == "tf32x3"
        return Tiles(64 if bd == 32 and dot == "bfloat16" else 32, bd, 16 if few else min(be, 32), 4)
    return Tiles(16, bd, 16 if bd > 128 or precision == "tf32x3" else min(be, 32), 8)


def walk(
    u: Tensor,
    w: Tensor,
    k: Tensor,
    across: Tensor | None,
    extra: Tensor | None,
    initial: Tensor,
    adjoint: bool,
    dtype: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as in ``ops.delta_walk_fwd``."""
    (z, c, steps, e), d = u.shape, w.shape[-1]
    x, met, last = launching.new(u, *u.shape), launching.new(u, z, c, d, e), launching.new(u, z, d, e)
    if 0 in (z, c, d, e):
        return x.zero_(), met.zero_(), last.copy_(initial)
    dot, precision = products_of(dtype)
    t = tiles(dot, precision, d, e)
    gate = "none" if across is None else "scalar" if across.shape[2] == 1 else "keys"
    given = [initial if o is None else o.contiguous() for o in (across, extra)]
    with on_device(u):
        tk.delta_walk_fwd_kernel[(z, triton.cdiv(e, t.be))](
            *(o.contiguous() for o in (u, w, k)), *given, initial.contiguous(), x, met, last, c, steps, d, e,
            GATE=gate, HAS_EXTRA=extra is not None, ADJOINT=adjoint, BT=t.bt, BD=t.bd, BE=t.be,
            DOT=DOT_TYPES[dot], PRECISION=precision, num_warps=t.warps, num_stages=1,
        )  # fmt: skip
    return x, met, last


_SIDE, _DEPTH = 32, 32


def pairs(a: Tensor, b: Tensor, dtype: str) -> Tensor:
    """``a b^T``: a [L, R, W], b [L, S, W] -> [L, R, S]."""
    (count, r, width), s = a.shape, b.shape[1]
    out = launching.new(a, count, r, s)
    if 0 in (count, r, s, width):
        return out.zero_()
    dot, precision = products_of(dtype)
    with on_device(a):
        tk.delta_pairs_fwd_kernel[(count, triton.cdiv(r, _SIDE), triton.cdiv(s, _SIDE))](
            a, b, out, a.stride(), b.stride(), r, s, width,
            BR=_SIDE, BW=_DEPTH, DOT=DOT_TYPES[dot], PRECISION=precision, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


GATE_BATCH, GATE_HEADS, GATE_CHUNKS = 8, 16, 64


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """The walk with each kind of gate, forwards and backwards; products inside chunks and of their gradients."""
    dot, precision = dot_type(dtype, target.backend)
    t = tiles(dot, precision, dim, dim)
    rows = GATE_BATCH * GATE_HEADS * GATE_CHUNKS
    shape = f"B{GATE_BATCH} H{GATE_HEADS} C{GATE_CHUNKS} D{dim}"
    products = dict(DOT=DOT_TYPES[dot], PRECISION=precision)
    names = ("U", "W", "K", "ACROSS", "EXTRA", "START", "X", "MET", "LAST")
    work = Cost(4.0 * rows * CHUNK * dim**2, 4.0 * rows * (4 * CHUNK * dim + dim**2))
    for gate in ("none", "scalar", "keys"):
        for adjoint in (False, True):
            size = dict(GATE=gate, HAS_EXTRA=adjoint, ADJOINT=adjoint, BT=t.bt, BD=t.bd, BE=t.be)
            yield GateCase(
                tk.delta_walk_fwd_kernel, f"{gate} adjoint" if adjoint else gate, {n: "fp32" for n in names},
                size | products, t.warps, 1, True, work, shape, ("CHUNKS", "T"),
            )  # fmt: skip
    strides = ("i32",) * 3
    yield GateCase(
        tk.delta_pairs_fwd_kernel, "pairs", {"A": "fp32", "B": "fp32", "O": "fp32", "a_strides": strides, "b_strides": strides},
        dict(BR=_SIDE, BW=_DEPTH) | products, 4, 1, True,
        Cost(2.0 * rows * CHUNK**2 * dim, 4.0 * rows * CHUNK * (2 * dim + CHUNK)), shape, ("R", "S", "a_strides.2", "b_strides.2"),
    )  # fmt: skip
