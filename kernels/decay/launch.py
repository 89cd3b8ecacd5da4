"""Launches the Triton kernels of the decay scan: tile sizes, scratch memory, and the cases for the compile gate."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels._common.choice import interpreting
from kernels._common.cost import Cost
from kernels._common.targets import GateCase, Target
from kernels.decay import triton as tk


@dataclass(frozen=True)
class Tiles:
    """Steps per chunk, channels of a program's tiles, and how it runs."""

    bt: int
    bd: int
    be: int
    warps: int
    stages: int


def tiles(dtype: str, d: int, e: int) -> Tiles:
    """The same table serves launches and the compile gate; TF32 products take smaller tiles and one stage."""
    widest = 64 if dtype == "bfloat16" else 32
    # Eight warps for the wide tiles: with four, ptxas puts a case on the stack (sm_100, D 128).
    if dtype == "bfloat16":
        return Tiles(widest, min(widest, _pow2(d)), min(widest, _pow2(e)), 8, 1)
    return Tiles(widest, min(widest, _pow2(d)), min(widest, _pow2(e)), 4, 1)


def _pow2(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def dot_type(dtype: str, backend: str) -> tuple[str, str]:
    """Product type and precision; see the module docstring of ``triton.py``."""
    if dtype == "bfloat16":
        return "bfloat16", "ieee" if backend == "hip" else "tf32"
    if backend == "hip":
        return "float32", "ieee"
    return "float32", "tf32x3" if dtype == "float32" else "tf32"


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=dtype)


def scan(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, inclusive: bool) -> Tensor:
    """q, k [B, H, N, D], v [B, H, N, E], log_g [B, H, N] float32 or None -> [B, H, N, E] in the dtype of ``v``."""
    b, h, n, d = q.shape
    e = v.shape[-1]
    out = _new(v, b, h, n, e, dtype=v.dtype)
    if 0 in (b, h, n, d, e):
        return out.zero_()
    dtype = str(q.dtype)[6:]
    t = tiles(dtype, d, e)
    dot, precision = dot_type(dtype, "hip" if torch.version.hip else "cuda")
    if interpreting():
        # bf16 products are wrong in the interpreter (triton issue 11584).
        dot, precision = "float32", "ieee"
    chunks = triton.cdiv(n, t.bt)
    if log_g is None:
        cum = torch.zeros(b, h, chunks, t.bt, device=q.device, dtype=torch.float32)
    else:
        cum = F.pad(log_g, (0, chunks * t.bt - n)).unflatten(-1, (chunks, t.bt)).cumsum(-1).contiguous()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    states = _new(q, b * h, chunks, d, e)
    sizes = (n, d, e, chunks)
    common = dict(BT=t.bt, BD=t.bd, BE=t.be, DOT=tk.DOT_TYPES[dot], PRECISION=precision)
    run = dict(num_warps=t.warps, num_stages=t.stages)
    where = torch.cuda.device(q.device) if q.device.type == "cuda" else contextlib.nullcontext()
    tiles_d, tiles_e = triton.cdiv(d, t.bd), triton.cdiv(e, t.be)
    with where:
        tk.decay_state_fwd_kernel[(b * h, tiles_d, tiles_e)](k, v, cum, states, *sizes, **common, **run)
        tk.decay_out_fwd_kernel[(b * h, chunks, tiles_e)](
            q, k, v, cum, states, out, *sizes, INCLUSIVE=inclusive, **common, **run
        )
    return out


GATE_BATCH, GATE_HEADS, GATE_LENGTH = 8, 16, 4096
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """Both kernels; the outputs in their inclusive and exclusive form."""
    t = tiles(dtype, dim, dim)
    dot, precision = dot_type(dtype, target.backend)
    item, rows = 4 if dtype == "float32" else 2, GATE_BATCH * GATE_HEADS * GATE_LENGTH
    shape = f"B{GATE_BATCH} H{GATE_HEADS} N{GATE_LENGTH} D{dim}"
    states = rows // t.bt * dim * dim * 4
    consts = dict(BT=t.bt, BD=t.bd, BE=t.be, DOT=tk.DOT_TYPES[dot], PRECISION=precision)
    data = {name: _SHORT[dtype] for name in ("Q", "K", "V", "O")} | {"CUM": "fp32", "S": "fp32"}
    only = lambda kernel: {n: kind for n, kind in data.items() if n in kernel.arg_names}
    state = Cost(2.0 * rows * dim * dim, float(rows * dim * item * 2 + states))
    out = Cost(rows * (2.0 * dim * dim + 4.0 * t.bt * dim), float(rows * dim * item * 4 + states))
    rest = (t.warps, t.stages, True)
    unaligned = ("N", "CHUNKS")
    kernel = tk.decay_state_fwd_kernel
    yield GateCase(kernel, "state", only(kernel), consts, *rest, state, shape, unaligned)
    kernel = tk.decay_out_fwd_kernel
    for inclusive in (True, False):
        variant = "inclusive" if inclusive else "exclusive"
        yield GateCase(
            kernel, variant, only(kernel), consts | {"INCLUSIVE": inclusive}, *rest, out, shape, unaligned
        )
