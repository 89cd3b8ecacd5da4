"""GPU targets of the compile gate, and what an operation hands to it. Imports neither triton nor torch."""

from dataclasses import dataclass, field
from typing import Any

from kernels._common.cost import Cost


@dataclass(frozen=True)
class Target:
    """One GPU architecture; peaks are dense vendor figures.

    Attributes:
        name: As typed on the command line.
        backend: "cuda" or "hip".
        arch: What Triton's GPUTarget takes.
        warp_size: Threads per warp.
        shared_bytes: Most shared memory one program may use.
        flops_per_s: Matrix peak by input type; float32 counts three TF32 passes on NVIDIA.
        bytes_per_s: Memory bandwidth.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    flops_per_s: dict[str, float] = field(hash=False)
    bytes_per_s: float = 1e12


def _peaks(half: float, single: float) -> dict[str, float]:
    return {"float16": half, "bfloat16": half, "float32": single}


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 166_912, _peaks(312e12, 52e12), 2.0e12),
        Target("sm_90", "cuda", 90, 32, 232_448, _peaks(989e12, 165e12), 3.35e12),
        Target("sm_100", "cuda", 100, 32, 232_448, _peaks(2250e12, 375e12), 8.0e12),
        Target("gfx942", "hip", "gfx942", 64, 65_536, _peaks(1307e12, 163e12), 5.3e12),
    )
}


@dataclass
class GateCase:
    """One compilation of one kernel.

    Attributes:
        kernel: The function under ``@triton.jit``.
        variant: Short text that tells this case from others of the same kernel, target, dtype and head size.
        pointers: Element type of each pointer argument ("fp32", "u8" ...); every other argument that is no constexpr is an i32. A tuple
            argument is given as a tuple of full types ("*fp32", "i32"; None where the call passes None).
        constexprs: Values of all ``tl.constexpr`` arguments.
        num_warps: As at launch.
        num_stages: As at launch.
        has_dot: Whether the kernel contains a matrix product (then tensor-core instructions must appear).
        cost: Work of one launch at ``shape``, for the roofline column.
        shape: The shape that ``cost`` is for, as text.
        unaligned: Arguments that are not multiples of 16 at the shapes the kernel is meant for (lengths); "argument.field" in a tuple.
    """

    kernel: Any
    variant: str
    pointers: dict[str, str | tuple]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    has_dot: bool = True
    cost: Cost | None = None
    shape: str = ""
    unaligned: tuple[str, ...] = ()
