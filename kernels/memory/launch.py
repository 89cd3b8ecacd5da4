"""Launches the walk of the linear memory, and hands its cases to the compile gate."""

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
from kernels.memory import triton as tk


@dataclass(frozen=True)
class Tiles:
    """Rows of a chunk at a time, all key channels, value channels of the states that a program carries, and warps."""

    bt: int
    bd: int
    be: int
    warps: int


def tiles(dot: str, precision: str, d: int) -> Tiles:
    """The same table serves launches and the compile gate, which found its entries. Both states stay in registers, and a second time as
    operands of the products."""
    bd, exact = pow2(d), precision == "tf32x3"
    wide = (exact and bd == 32) or (dot == "bfloat16" and precision == "tf32" and bd > 64)  # not on AMD
    return Tiles(16, bd, 32 if wide else 16, 8 if bd > 64 or (exact and bd > 32) else 4)


def walk(
    u: Tensor, w1: Tensor, w2: Tensor | None, k1: Tensor, k2: Tensor | None, gate: Tensor,
    extra1: Tensor | None, extra2: Tensor | None, start1: Tensor, start2: Tensor, adjoint: bool, dtype: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and results as in ``ops.memory_walk_fwd``."""
    (z, c, steps, e), d = u.shape, w1.shape[-1]
    x = launching.new(u, *u.shape)
    met = [launching.new(u, z, c, d, e) for _ in range(2)]
    last = [launching.new(u, z, d, e) for _ in range(2)]
    dot, precision = products_of(dtype)
    t = tiles(dot, precision, d)
    dense = [
        None if o is None else o.contiguous()
        for o in (u, w1, w2, k1, k2, gate, extra1, extra2, start1, start2)
    ]
    with on_device(u):
        tk.memory_walk_fwd_kernel[(z, triton.cdiv(e, t.be))](
            *dense, x, *met, *last, c, steps, d, e,
            ADJOINT=adjoint, BT=t.bt, BD=t.bd, BE=t.be, DOT=DOT_TYPES[dot], PRECISION=precision, num_warps=t.warps, num_stages=1,
        )  # fmt: skip
    return x, *met, *last


GATE_BATCH, GATE_HEADS, GATE_CHUNKS, GATE_CHUNK = 8, 16, 256, 16


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """Learning with and without momentum, and its gradient."""
    dot, precision = dot_type(dtype, target.backend)
    t = tiles(dot, precision, dim)
    rows = GATE_BATCH * GATE_HEADS * GATE_CHUNKS
    names = tk.memory_walk_fwd_kernel.arg_names
    names = names[: names.index("CHUNKS")]
    for variant, absent in (
        ("learn", ("W2", "EXTRA1", "EXTRA2")),
        ("learn without momentum", ("W2", "K2", "EXTRA1", "EXTRA2")),
        ("adjoint", ("K2",)),
        ("adjoint without momentum", ("W2", "K2")),
    ):
        products = 2 + sum(name not in absent for name in ("W2", "K2"))
        moved = 4.0 * rows * (4 * GATE_CHUNK * dim + 2 * dim**2)
        yield GateCase(
            tk.memory_walk_fwd_kernel, variant, {n: "fp32" for n in names if n not in absent},
            dict.fromkeys(absent) | dict(
                ADJOINT="adjoint" in variant, BT=t.bt, BD=t.bd, BE=t.be, DOT=DOT_TYPES[dot], PRECISION=precision
            ),
            t.warps, 1, True, Cost(2.0 * rows * GATE_CHUNK * dim**2 * products, moved),
            f"B{GATE_BATCH} H{GATE_HEADS} C{GATE_CHUNKS} D{dim}", ("CHUNKS", "T"),
        )  # fmt: skip
