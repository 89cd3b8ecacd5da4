"""Launches the recurrence kernel, and hands its cases to the compile gate."""

from collections.abc import Iterable

import triton
from torch import Tensor

from kernels._common import launching
from kernels._common.cost import Cost
from kernels._common.launching import on_device, pow2
from kernels._common.targets import GateCase, Target
from kernels.prefix import triton as tk

GATE_DTYPES = ("float32",)
STEPS = 32
WARPS = 4


def _channels(c: int) -> int:
    """Channels of a program: few, since time is sequential and channels are all the parallel work there is."""
    return min(32, pow2(c))


def scan(a: Tensor, x: Tensor, start: Tensor | None) -> Tensor:
    """a [L, N, C] or [L, N, 1], x [L, N, C], start [L, C] or None, float32 -> [L, N, C]."""
    length, n, c = x.shape
    out = launching.new(x, length, n, c)
    if 0 in (length, n, c):
        return out
    x, a = x.contiguous(), a.contiguous()
    with on_device(x):
        tk.diag_scan_fwd_kernel[(length, triton.cdiv(c, _channels(c)))](
            a, x, x if start is None else start.contiguous(), out, n, c, a.shape[2],
            HAS_START=start is not None, BT=STEPS, BC=_channels(c), num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return out


GATE_ROWS, GATE_LENGTH = 128, 4096


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """The kernel with and without a start value."""
    elements = GATE_ROWS * GATE_LENGTH * dim
    for start in (False, True):
        yield GateCase(
            tk.diag_scan_fwd_kernel,
            "start" if start else "empty",
            {name: "fp32" for name in ("A", "X", "START", "H")},
            {"HAS_START": start, "BT": STEPS, "BC": _channels(dim)},
            WARPS,
            1,
            False,
            Cost(3.0 * elements, 12.0 * elements),
            f"L{GATE_ROWS} N{GATE_LENGTH} C{dim}",
            ("N", "C", "WA"),
        )
