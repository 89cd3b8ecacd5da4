"""Launches the Triton kernels: tile sizes, grids, and the cases for the compile gate."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels._common.choice import interpreting
from kernels._common.cost import Cost
from kernels._common.targets import GateCase, Target
from kernels.softmax import triton as tk


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a program's tiles, and how it runs."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(kernel: str, backend: str, dot: str, d: int, e: int, arch: int = 90) -> Tiles:
    """The same table serves launches and the compile gate; the wider head size decides.

    The gradient of keys and values holds four tiles and two sums at once, and float32 products split their operands in two: both take
    smaller tiles. AMD runs out of scalar registers first. ``arch`` is the compute capability times ten on NVIDIA.
    """
    wide = max(_pow2(d), _pow2(e)) > 64
    if dot == "float32":
        side = 16 if wide or backend == "hip" else 32
        few = not wide or (kernel == "bwd_dq" and backend == "cuda" and arch < 90)
        return Tiles(side, side, 4 if few else 8, 1)
    if backend == "hip":
        return Tiles(32, 16, 4, 1)
    if kernel == "fwd":
        return Tiles(64, 32, 4, 1) if wide else Tiles(64, 64, 4, 2)
    if kernel == "bwd_dkdv" and ((wide and arch < 90) or (not wide and arch >= 100)):
        return Tiles(64, 32, 4, 1)
    return Tiles(64, 32 if wide else 64, 8, 1)


def _pow2(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def dot_types(dtype: str, backend: str) -> tuple[str, str]:
    if dtype == "float32":
        return "float32", "ieee" if backend == "hip" else "tf32x3"
    return dtype, "ieee" if backend == "hip" else "tf32"


def _backend() -> str:
    return "hip" if torch.version.hip else "cuda"


def _arch() -> int:
    if torch.version.hip or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _types(t: Tensor) -> tuple[str, str]:
    if interpreting():
        # bf16 products are wrong in the interpreter (triton issue 11584).
        return "float32" if t.dtype == torch.bfloat16 else str(t.dtype)[6:], "ieee"
    return dot_types(str(t.dtype)[6:], _backend())


def _rows(t: Tensor) -> Tensor:
    """Kernels take any strides but the last."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _device(t: Tensor):
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=dtype)


@dataclass
class Call:
    """Arguments that all kernels share, made ready."""

    tensors: list
    strides: list
    sizes: list
    constants: dict

    @classmethod
    def of(cls, q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale) -> "Call":
        mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
        band = 0 if left < 0 and right < 0 else 1 if aligned else 2
        places = [None, None] if band != 2 else [p.to(torch.int32).contiguous() for p in (pos_q, pos_k)]
        steps = [0 if p is None or p.shape[0] == 1 else p.stride(0) for p in places]
        bias_steps = [0, 0, 0]
        if bias is not None:
            bias_steps = [
                0 if size == 1 else step for size, step in zip(bias.shape[:3], bias.stride()[:3], strict=True)
            ]
        dot, precision = _types(q)
        return cls(
            [q if t is None else t for t in (bias, mask, *places)],
            [*bias_steps, 0 if mask is None else mask.stride(0), *steps],
            [q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], left, right],
            dict(
                SCALE=scale, HAS_BIAS=bias is not None, HAS_MASK=mask is not None, BAND=band,
                HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, BD=_pow2(q.shape[3]), BE=_pow2(v.shape[3]),
                DOT=tk.DOT_TYPES[dot], PRECISION=precision,
            ),
        )  # fmt: skip

    def tiles(self, kernel: str) -> Tiles:
        dot = next(n for n, t in tk.DOT_TYPES.items() if t is self.constants["DOT"])
        return tiles(kernel, _backend(), dot, self.sizes[4], self.sizes[5], _arch())


def _options(t: Tiles) -> dict:
    return dict(BN=t.queries, BM=t.keys, num_warps=t.warps, num_stages=t.stages)


def fwd(q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    bias = None if bias is None else _rows(bias)
    b, h, n, _ = q.shape
    m, e = k.shape[2], v.shape[3]
    out, lse = _new(q, b, h, n, e, dtype=q.dtype), _new(q, b, h, n)
    if 0 in (b, h, n, m):
        return out.zero_(), lse.fill_(-torch.inf)
    call = Call.of(q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale)
    t = call.tiles("fwd")
    with _device(q):
        tk.softmax_fwd_kernel[(b * h, triton.cdiv(n, t.queries))](
            q, k, v, *call.tensors, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *call.strides,
            *call.sizes, **call.constants, **_options(t),
        )  # fmt: skip
    return out, lse


def bwd(
    q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale, lse, do, delta, want_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
    bias = None if bias is None else _rows(bias)
    (b, h, n, d), hk, m, e = q.shape, k.shape[1], k.shape[2], v.shape[3]
    grouped = h != hk
    part = torch.float32 if grouped else q.dtype
    dq, dk, dv = (
        _new(q, b, h, n, d, dtype=q.dtype),
        _new(q, b, h, m, d, dtype=part),
        _new(q, b, h, m, e, dtype=part),
    )
    db = _new(q, *bias.shape) if want_bias else _new(q, 0)
    if 0 in (b, h, n, m):
        return dq.zero_(), k.new_zeros(k.shape), v.new_zeros(v.shape), db.zero_()
    call = Call.of(q, k, v, bias, key_mask, pos_q, pos_k, left, right, aligned, scale)
    shared = (do, lse.contiguous(), delta.contiguous())
    steps = [s for t in (q, k, v, do) for s in t.stride()[:3]]
    with _device(q):
        t = call.tiles("bwd_dkdv")
        tk.softmax_bwd_dkdv_kernel[(b * h, triton.cdiv(m, t.keys))](
            q, k, v, *call.tensors, *shared, dk, dv, *steps, *call.strides, *call.sizes, **call.constants, **_options(t),
        )  # fmt: skip
        t = call.tiles("bwd_dq")
        tk.softmax_bwd_dq_kernel[(b * h, triton.cdiv(n, t.queries))](
            q, k, v, *call.tensors, *shared, dq, *steps, *call.strides, *call.sizes, **call.constants, **_options(t),
        )  # fmt: skip
        if want_bias:
            t = call.tiles("bwd_dbias")
            rows = bias.shape[2] > 1 or n == 1
            grid = (
                bias.shape[0] * bias.shape[1],
                triton.cdiv(m, t.keys),
                triton.cdiv(n, t.queries) if rows else 1,
            )
            tk.softmax_bwd_dbias_kernel[grid](
                q, k, v, *call.tensors, *shared, db, *steps, *call.strides, b, *call.sizes, *bias.shape[:2],
                ROWS=rows, **call.constants, **_options(t),
            )  # fmt: skip
    if grouped:
        dk, dv = (g.unflatten(1, (hk, h // hk)).sum(2) for g in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype), db


def bias_kernel(dtype: str, d: int, e: int, backend: str | None = None) -> bool:
    """Whether the kernel for the bias gradient fits: not with wide float32 heads, nor in AMD's scalar registers."""
    return (backend or _backend()) == "cuda" and (dtype != "float32" or max(d, e) <= 64)


GATE_BATCH, GATE_HEADS, GATE_LENGTH = 8, 16, 4096
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """Each kernel plain, causal with key mask, and with a bias and given positions."""
    dot, precision = dot_types(dtype, target.backend)
    data, item = _SHORT[dtype], 4 if dtype == "float32" else 2
    pairs = float(GATE_BATCH * GATE_HEADS * GATE_LENGTH * GATE_LENGTH)
    moved = float(GATE_BATCH * GATE_HEADS * GATE_LENGTH * dim * item)
    shape = f"B{GATE_BATCH} H{GATE_HEADS} N{GATE_LENGTH} D{dim}"
    variants = (
        ("plain", dict(HAS_BIAS=False, HAS_MASK=False, BAND=0, HAS_LEFT=False, HAS_RIGHT=False), 1.0),
        ("causal+mask", dict(HAS_BIAS=False, HAS_MASK=True, BAND=1, HAS_LEFT=False, HAS_RIGHT=True), 0.5),
        ("bias+positions", dict(HAS_BIAS=True, HAS_MASK=True, BAND=2, HAS_LEFT=True, HAS_RIGHT=True), 1.0),
    )
    kernels = (
        (tk.softmax_fwd_kernel, "fwd", {"O": data}, 2),
        (tk.softmax_bwd_dkdv_kernel, "bwd_dkdv", {"DK": data, "DV": data}, 4),
        (tk.softmax_bwd_dq_kernel, "bwd_dq", {"DQ": data}, 3),
        (tk.softmax_bwd_dbias_kernel, "bwd_dbias", {"DB": "fp32"}, 2),
    )
    for kernel, name, outputs, products in kernels:
        for variant, flags, share in variants:
            if name == "bwd_dbias" and not (flags["HAS_BIAS"] and bias_kernel(dot, dim, dim, target.backend)):
                continue
            arch = target.arch if isinstance(target.arch, int) else 90
            t = tiles(name, target.backend, dot, dim, dim, arch)
            consts = dict(
                flags, SCALE=dim**-0.5, BN=t.queries, BM=t.keys, BD=_pow2(dim), BE=_pow2(dim),
                DOT=tk.DOT_TYPES[dot], PRECISION=precision,
            )  # fmt: skip
            pointers = {n: data for n in ("Q", "K", "V", "DO")} | {n: "fp32" for n in ("LSE", "DELTA")}
            pointers |= {"BIAS": data, "MASK": "u8", "POSQ": "i32", "POSK": "i32", **outputs}
            pointers = {n: t for n, t in pointers.items() if n in kernel.arg_names}
            for rows in (True, False) if name == "bwd_dbias" else (None,):
                yield GateCase(
                    kernel,
                    variant if rows is None else f"{variant} {'rows' if rows else 'keys'}",
                    pointers,
                    consts if rows is None else {**consts, "ROWS": rows},
                    t.warps,
                    t.stages,
                    True,
                    Cost(2.0 * pairs * dim * products * share, moved * 4),
                    shape,
                    unaligned=(
                        "N",
                        "M",
                        "H",
                        "HK",
                        "B",
                        "BB",
                        "BH",
                        "left",
                        "right",
                        "smb",
                        "spq",
                        "spk",
                        "sbn",
                    ),
                )
