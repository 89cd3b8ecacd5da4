"""Launches the delta rule's Triton kernel, and hands its cases to the compile gate."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels._common.choice import interpreting
from kernels._common.cost import Cost
from kernels._common.targets import GateCase, Target
from kernels.delta import triton as tk

GATE_DTYPES = ("float32",)


@dataclass(frozen=True)
class Tiles:
    """Rows, columns of the matrix at a time, and value channels of the state that a program carries, and how it runs."""

    bd: int
    bk: int
    be: int
    warps: int


def tiles(d: int, e: int) -> Tiles:
    """The same table serves launches and the compile gate; up to 64 channels the whole [D, D] matrix passes through registers."""
    bd, be = (max(16, triton.next_power_of_2(n)) for n in (d, e))
    return Tiles(bd, 32 if bd > 64 else bd, min(32, be), 8 if bd > 64 else 4)


def _precision(backend: str) -> str:
    return "ieee" if backend == "hip" else "tf32x3"


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=torch.float32)


def states(keeps: Tensor, writes: Tensor, initial: Tensor | None) -> Tensor:
    """keeps [B, H, C, D, D], writes [B, H, C, D, E], initial [B, H, D, E] or None, float32 -> [B, H, C + 1, D, E]."""
    b, h, c, d, e = writes.shape
    out = _new(writes, b, h, c + 1, d, e)
    if 0 in (b, h, d, e):
        return out.zero_()
    t = tiles(d, e)
    precision = "ieee" if interpreting() else _precision("hip" if torch.version.hip else "cuda")
    start = writes if initial is None else initial.contiguous()
    where = torch.cuda.device(writes.device) if writes.device.type == "cuda" else contextlib.nullcontext()
    with where:
        tk.delta_states_fwd_kernel[(b * h, triton.cdiv(e, t.be))](
            keeps.contiguous(), writes.contiguous(), start, out, c, d, e,
            HAS_START=initial is not None, BD=t.bd, BK=t.bk, BE=t.be, PRECISION=precision, num_warps=t.warps, num_stages=1,
        )  # fmt: skip
    return out


GATE_BATCH, GATE_HEADS, GATE_CHUNKS = 8, 16, 64


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """The kernel with and without a state coming in."""
    t = tiles(dim, dim)
    rows = GATE_BATCH * GATE_HEADS * GATE_CHUNKS
    work = Cost(2.0 * rows * dim**3, 12.0 * rows * dim**2)
    for start in (False, True):
        yield GateCase(
            tk.delta_states_fwd_kernel,
            "start" if start else "empty",
            {name: "fp32" for name in ("P", "R", "START", "S")},
            {
                "HAS_START": start,
                "BD": t.bd,
                "BK": t.bk,
                "BE": t.be,
                "PRECISION": _precision(target.backend),
            },
            t.warps,
            1,
            True,
            work,
            f"B{GATE_BATCH} H{GATE_HEADS} C{GATE_CHUNKS} D{dim}",
            ("CHUNKS",),
        )
