"""Launches the Triton kernels of the decay scan: tile sizes, scratch memory, and the cases for the compile gate."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels._common import launching
from kernels._common.choice import interpreting
from kernels._common.cost import Cost
from kernels._common.launching import on_device, platform, pow2
from kernels._common.targets import GateCase, Target
from kernels.decay import triton as tk
from kernels.decay.ops import BLOCK


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
    be = min(widest, pow2(e))
    if be > 32 and -e % be >= be // 2:
        be //= 2  # 65 value channels (one of them a sum of weights) fill three tiles of 32, not two of 64
    # Eight warps for the wide tiles: with four, ptxas puts a case on the stack (sm_100, D 128).
    return Tiles(widest, min(widest, pow2(d)), be, 8 if dtype == "bfloat16" else 4, 1)


def state_channels(t: Tiles, gate: str) -> int:
    """Value channels of a tile of the running state: without gates ptxas puts the wide one on the stack (sm_100)."""
    return min(32, t.be) if gate == "none" else t.be


def dot_type(dtype: str, backend: str) -> tuple[str, str]:
    """Product type and precision; see the module docstring of ``triton.py``."""
    if dtype == "bfloat16":
        return "bfloat16", "ieee" if backend == "hip" else "tf32"
    if backend == "hip":
        return "float32", "ieee"
    return "float32", "tf32x3" if dtype == "float32" else "tf32"


def _lowest(*tensors: Tensor) -> str:
    """The least exact type among the inputs: gradients may come in float32 beside half-precision inputs."""
    have = {str(t.dtype)[6:] for t in tensors}
    return next(name for name in ("bfloat16", "float16", "float32") if name in have)


def products_of(dtype: str) -> tuple[str, str]:
    """``dot_type`` on this machine."""
    if interpreting():
        # bf16 products are wrong in the interpreter (triton issue 11584).
        return "float32", "ieee"
    return dot_type(dtype, platform())


def _cumulative(log_g: Tensor, chunks: int, bt: int) -> Tensor:
    """[B, H, N] or [B, H, N, W] to running sums inside each chunk of ``bt`` steps, filled up with zeros."""
    pad = (0, 0) * (log_g.dim() - 3) + (0, chunks * bt - log_g.shape[2])
    return F.pad(log_g, pad).unflatten(2, (chunks, bt)).cumsum(3).contiguous()


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    initial: Tensor | None,
    inclusive: bool,
    values: bool,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, N, E] and the last state [B, H, D, E]; arguments as in ``ops.decay_scan_fwd``."""
    b, h, n, d = q.shape
    e = v.shape[-1]
    out = launching.new(v, b, h, n, e, dtype=torch.float32 if wide else v.dtype)
    if 0 in (b, h, n, d, e):
        last = launching.new(v, b, h, d, e)
        return out.zero_(), last.zero_() if initial is None else last.copy_(initial)
    dtype = _lowest(q, k, v)
    t = tiles(dtype, d, e)
    dot, precision = products_of(dtype)
    chunks = triton.cdiv(n, t.bt)
    gate = "none" if log_g is None else "scalar" if log_g.dim() == 3 else "values" if values else "keys"
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    cum = q if log_g is None else _cumulative(log_g, chunks, t.bt)
    states = launching.new(q, b * h, chunks + 1, d, e)
    sizes = (n, d, e, chunks)
    products = dict(DOT=tk.DOT_TYPES[dot], PRECISION=precision)
    run = dict(num_warps=t.warps, num_stages=t.stages)
    tiles_d, tiles_e, blocks = triton.cdiv(d, t.bd), triton.cdiv(e, t.be), t.bt // BLOCK
    with on_device(q):
        be = state_channels(t, gate)
        tk.decay_state_fwd_kernel[(b * h, tiles_d, triton.cdiv(e, be))](
            k, v, cum, q if initial is None else initial.contiguous(), states, *sizes,
            GATE=gate, HAS_START=initial is not None, BT=t.bt, BD=t.bd, BE=be, **products, **run,
        )  # fmt: skip
        if gate == "values":
            tk.decay_values_fwd_kernel[(b * h, chunks * blocks, tiles_e)](
                q, k, v, cum, q, states, out, *sizes,
                INCLUSIVE=inclusive, HAS_A=False, BT=t.bt, BB=BLOCK, BD=t.bd, BE=t.be, **products, num_warps=4, num_stages=1,
            )  # fmt: skip
        else:
            weights = q
            if gate == "keys":
                weights = launching.new(q, b * h, chunks, t.bt, t.bt, dtype=getattr(torch, dot))
                tk.decay_scores_fwd_kernel[(b * h, chunks, blocks)](
                    q, k, cum, weights, n, d, chunks,
                    INCLUSIVE=inclusive, BT=t.bt, BB=BLOCK, BD=min(32, t.bd), **products, num_warps=4, num_stages=1,
                )  # fmt: skip
            tk.decay_out_fwd_kernel[(b * h, chunks, tiles_e)](
                q, k, v, cum, weights, states, out, *sizes,
                GATE=gate, INCLUSIVE=inclusive, BT=t.bt, BD=t.bd, BE=t.be, **products, **run,
            )  # fmt: skip
    return out, states[:, -1].view(b, h, d, e).clone()


def scores(q: Tensor, k: Tensor, cum: Tensor, inclusive: bool, dtype: str) -> Tensor:
    """Weights inside chunks: q, k, cum [L, T, D] float32, T a power of two from 16 on -> [L, T, T]; products as for inputs of ``dtype``."""
    length, t, d = q.shape
    out = launching.new(q, length, t, t)
    if 0 in (length, d):
        return out.zero_()
    dot, precision = products_of(dtype)
    with on_device(q):
        tk.decay_scores_fwd_kernel[(length, 1, t // BLOCK)](
            q.contiguous(), k.contiguous(), cum.contiguous(), out, t, d, 1,
            INCLUSIVE=inclusive, BT=t, BB=BLOCK, BD=min(32, pow2(d)),
            DOT=tk.DOT_TYPES[dot], PRECISION=precision, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


def mix(weights: Tensor, v: Tensor, cum: Tensor, inclusive: bool, dtype: str) -> Tensor:
    """``o_re = sum_{i <= r} w_ri v_ie e^{cum_re - cum_ie}``: weights [L, T, T], v, cum [L, T, E] float32 -> [L, T, E]."""
    length, t, e = v.shape
    out = launching.new(v, length, t, e)
    if 0 in (length, e):
        return out.zero_()
    dot, precision = products_of(dtype)
    v = v.contiguous()
    be = tiles("float32", e, e).be
    with on_device(v):
        tk.decay_values_fwd_kernel[(length, t // BLOCK, triton.cdiv(e, be))](
            v, v, v, cum.contiguous(), weights.contiguous(), v, out, t, 1, e, 1,
            INCLUSIVE=inclusive, HAS_A=True, BT=t, BB=BLOCK, BD=16, BE=be,
            DOT=tk.DOT_TYPES[dot], PRECISION=precision, num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


GATE_BATCH, GATE_HEADS, GATE_LENGTH = 8, 16, 4096
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """Every kernel for each kind of gate; "grad" is a launch of the backward of a wide output: a float32 gradient among the inputs."""
    t = tiles(dtype, dim, dim)
    dot, precision = dot_type(dtype, target.backend)
    item, rows = 4 if dtype == "float32" else 2, GATE_BATCH * GATE_HEADS * GATE_LENGTH
    shape = f"B{GATE_BATCH} H{GATE_HEADS} N{GATE_LENGTH} D{dim}"
    data = {name: _SHORT[dtype] for name in ("Q", "K", "V", "O")} | {
        "CUM": "fp32",
        "S": "fp32",
        "START": "fp32",
    }
    data["A"] = _SHORT[dot]
    size = dict(BT=t.bt, BD=t.bd, BE=t.be, BB=BLOCK, DOT=tk.DOT_TYPES[dot], PRECISION=precision)
    states = float(rows // t.bt * dim * dim * 4)
    inside, dense, tensor = 2.0 * rows * t.bt * dim, 2.0 * rows * dim * dim, float(rows * dim * item)

    def case(kernel, variant: str, work: Cost, pointers: dict = {}, **consts) -> GateCase:  # noqa: B006
        small = kernel in (tk.decay_scores_fwd_kernel, tk.decay_values_fwd_kernel)
        names = kernel.arg_names
        consts = {n: v for n, v in (size | consts).items() if n in names}
        types = {n: kind for n, kind in (data | pointers).items() if n in names}
        return GateCase(
            kernel, variant, types, consts, 4 if small else t.warps, t.stages, True, work, shape, ("N", "CHUNKS")
        )  # fmt: skip

    for gate in ("none", "scalar", "keys", "values"):
        work = Cost(dense, 2 * tensor + states)
        yield case(
            tk.decay_state_fwd_kernel,
            gate,
            work,
            GATE=gate,
            HAS_START=gate == "keys",
            BE=state_channels(t, gate),
        )
    for inclusive in (True, False):
        variant = "inclusive" if inclusive else "exclusive"
        work = Cost(inside, 3 * tensor)
        yield case(tk.decay_scores_fwd_kernel, variant, work, INCLUSIVE=inclusive, BD=min(32, t.bd))
        for gate in ("none", "scalar", "keys"):
            work = Cost(dense + 2 * inside, 4 * tensor + states)
            yield case(
                tk.decay_out_fwd_kernel, f"{gate} {variant}", work, GATE=gate, INCLUSIVE=inclusive
            )  # fmt: skip
        work = Cost(dense + 2 * inside, 5 * tensor + states)
        yield case(tk.decay_values_fwd_kernel, variant, work, INCLUSIVE=inclusive, HAS_A=False)
    # Inside the delta rule everything in memory is float32, whatever the type of the products.
    single = {name: "fp32" for name in ("Q", "K", "V", "A", "O")}
    work = Cost(inside, 3 * tensor)
    yield case(
        tk.decay_values_fwd_kernel, "given", work, single, INCLUSIVE=True, HAS_A=True, BT=32, BE=min(32, t.be)
    )
    yield case(tk.decay_scores_fwd_kernel, "given", work, single, INCLUSIVE=False, BT=32, BD=min(32, t.bd))
    if dtype != "float32":
        wide = {"K": "fp32", "O": "fp32"}
        work = Cost(dense + 2 * inside, 5 * tensor + states)
        yield case(tk.decay_out_fwd_kernel, "grad", work, wide, GATE="scalar", INCLUSIVE=True)
