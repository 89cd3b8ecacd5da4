"""Launches the Triton kernels: tile sizes, scratch memory, grids."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels._common import launching
from kernels._common.choice import interpreting
from kernels._common.launching import on_device, platform, pow2, row_dense
from kernels.linear import triton as tk

# Programs aimed at in a split sum: a few waves on the largest GPUs.
SPLIT_PROGRAMS = 512


@dataclass(frozen=True)
class Tiles:
    """Tokens, features and value channels of a program's tiles, and how it runs."""

    rows: int
    bf: int
    be: int
    warps: int
    stages: int


def tiles(kernel: str, backend: str, dot: str, f: int, e: int) -> Tiles:
    """The same table serves launches and the compile gate.

    Products in float32 split their operands into two TF32 halves held in registers: smaller tiles, one stage. All kernels but
    ``read_bwd`` loop over features in blocks, so their registers do not depend on the head size; that one needs whole rows of features.
    """
    hip, wide = backend == "hip", f > 64
    if kernel == "read_bwd":
        if f > 128:
            return Tiles(16 if dot == "float32" else 32, pow2(f), min(32, pow2(e)), 8, 1)
        if dot == "float32":
            return Tiles(16 if hip and wide else 32, pow2(f), min(32, pow2(e)), 8 if wide else 4, 1)
        return Tiles(64, pow2(f), min(64, pow2(e)), 8 if wide else 4, 2)
    if dot == "float32":
        return Tiles(32 if kernel == "state_fwd" else 64, min(32, pow2(f)), min(32, pow2(e)), 4, 1)
    if kernel == "state_fwd":
        # Eight warps, one stage: with four, ptxas puts a few masked or rotated cases on the stack.
        return Tiles(64, min(64, pow2(f)), min(64, pow2(e)), 8, 1)
    return Tiles(64, min(64, pow2(f)), min(64, pow2(e)), 4, 1)


def dot_types(dtype: str, feature: str, backend: str) -> tuple[str, str, str, str]:
    """Product type and precision of the forward and of the backward; see the module docstring of ``triton.py``."""
    exact = "ieee" if backend == "hip" else "tf32x3"
    if dtype == "float32":
        return "float32", exact, "float32", exact
    one = "ieee" if backend == "hip" else "tf32"
    if dtype == "float16":
        wide = feature in ("exp", "sqrelu")
        return "float32" if wide else "float16", one, "float32", one
    return "bfloat16", one, "bfloat16", one


def _types(t: Tensor, feature: str) -> tuple[str, str, str, str]:
    if interpreting():
        # bf16 products are wrong in the interpreter (triton issue 11584).
        return "float32" if t.dtype == torch.bfloat16 else str(t.dtype)[6:], "ieee", "float32", "ieee"
    return dot_types(str(t.dtype)[6:], feature, platform())


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else row_dense(t)


def _strides(t: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else t.stride()[:3]


def _token_sums(
    x, y, rot, key_mask, weights, feature, dot, precision
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, m, f = x.shape
    e = y.shape[-1]
    t = tiles("state_fwd", platform(), dot, f, e)
    bf, be = t.bf, t.be
    tiles_fe = triton.cdiv(f, bf) * triton.cdiv(e, be)
    blocks = triton.cdiv(m, t.rows)
    splits = max(1, min(blocks, SPLIT_PROGRAMS // max(1, b * h * tiles_fe), 1024))
    length = triton.cdiv(blocks, splits) * t.rows
    splits = max(1, triton.cdiv(m, length))
    s, a, c = (
        launching.new(x, b, h, splits, f, e),
        launching.new(x, b, h, splits, f),
        launching.new(x, b, h, splits, e),
    )
    br = launching.new(x, b, h, splits, f) if rot is not None else launching.new(x, 0)
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    with on_device(x):
        tk.linear_state_fwd_kernel[(b * h, splits, tiles_fe)](
            x, x if rot is None else rot, y, x if mask is None else mask, *weights, s, a, br, c,
            *_strides(x), *_strides(rot), *_strides(y), m,
            h, m, f, e, length,
            FEATURE=feature, HAS_ROT=rot is not None, HAS_MASK=mask is not None,
            WEIGHTS=sum(w is not x for w in weights),
            BF=bf, BE=be, BM=t.rows, DOT=tk.DOT_TYPES[dot], PRECISION=precision, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return s.sum(2), a.sum(2), br.sum(2) if rot is not None else br, c.sum(2)


def state_fwd(x, y, rot, key_mask, weight, feature) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, rot = _rows(x), _rows(y), _rows(rot)
    b, h, m, f = x.shape
    e = y.shape[-1]
    if 0 in (b, h, m, f, e):
        zero = lambda *s: launching.new(x, *s).zero_()  # noqa: E731
        return zero(b, h, f, e), zero(b, h, f), zero(b, h, f) if rot is not None else zero(0), zero(b, h, e)
    dot, precision, _, _ = _types(x, feature)
    weights = (x if weight is None else weight.contiguous(), x, x, x)
    return _token_sums(x, y, rot, key_mask, weights, feature, dot, precision)


def state_bwd(x, y, rot, key_mask, weight, ds, da, db, dc, feature) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y, rot = _rows(x), _rows(y), _rows(rot)
    b, h, m, f = x.shape
    e = y.shape[-1]
    dx, dy = launching.new(x, *x.shape, dtype=x.dtype), launching.new(x, *y.shape, dtype=y.dtype)
    drot = launching.new(x, 0) if rot is None else launching.new(x, *rot.shape, dtype=rot.dtype)
    dw = launching.new(x, 0) if weight is None else launching.new(x, *weight.shape)
    if 0 in (b, h, m, f, e):
        return dx.zero_(), dy.zero_(), drot.zero_(), dw.zero_()
    _, _, dot, precision = _types(x, feature)
    t = tiles("state_bwd", platform(), dot, f, e)
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    with on_device(x):
        tk.linear_state_bwd_kernel[(b * h, triton.cdiv(m, t.rows))](
            x, x if rot is None else rot, y, x if mask is None else mask, x if weight is None else weight.contiguous(),
            ds.contiguous(), da.contiguous(), db.contiguous(), dc.contiguous(), dx, drot, dy, dw,
            *_strides(x), *_strides(rot), *_strides(y), m,
            h, m, f, e,
            FEATURE=feature, HAS_ROT=rot is not None, HAS_MASK=mask is not None, HAS_W=weight is not None,
            BF=t.bf, BE=t.be, BM=t.rows, DOT=tk.DOT_TYPES[dot], PRECISION=precision,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return dx, dy, drot, dw


def read_fwd(q, rot, state, kbar, kbar_rot, vbar, gain, eps, mode, feature) -> Tensor:
    q, rot = _rows(q), _rows(rot)
    b, h, n, f = q.shape
    e = state.shape[-1]
    out = launching.new(q, b, h, n, e, dtype=q.dtype)
    if 0 in (b, h, n, f, e):
        return out.zero_()
    dot, precision, _, _ = _types(q, feature)
    t = tiles("read_fwd", platform(), dot, f, e)
    with on_device(q):
        tk.linear_read_fwd_kernel[(b * h, triton.cdiv(n, t.rows))](
            q, q if rot is None else rot, *_small(state, kbar, kbar_rot, vbar, gain, eps), out,
            *_strides(q), *_strides(rot),
            h, n, f, e,
            FEATURE=feature, HAS_ROT=rot is not None, MODE=mode,
            BF=t.bf, BE=t.be, BN=t.rows, DOT=tk.DOT_TYPES[dot], PRECISION=precision,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out


def read_bwd(q, rot, state, kbar, kbar_rot, vbar, gain, eps, do, mode, feature):
    q, rot, do = _rows(q), _rows(rot), _rows(do)
    b, h, n, f = q.shape
    e = state.shape[-1]
    dq = launching.new(q, *q.shape, dtype=q.dtype)
    drot = launching.new(q, 0) if rot is None else launching.new(q, *rot.shape, dtype=rot.dtype)
    if 0 in (b, h, n, f, e):
        zero = lambda *s: launching.new(q, *s).zero_()  # noqa: E731
        return dq.zero_(), drot.zero_(), zero(b, h, f, e), zero(b, h, f), zero(b, h, f) if rot is not None else zero(0), zero(b, h, e)  # fmt: skip
    fwd_dot, _, dot, precision = _types(q, feature)
    t = tiles("read_bwd", platform(), dot, f, e)
    weights = tuple(launching.new(q, b, h, n) for _ in range(4))
    with on_device(q):
        tk.linear_read_bwd_q_kernel[(b * h, triton.cdiv(n, t.rows))](
            q, q if rot is None else rot, *_small(state, kbar, kbar_rot, vbar, gain, eps), do, dq, drot, *weights,
            *_strides(q), *_strides(rot), *_strides(do),
            h, n, f, e,
            FEATURE=feature, HAS_ROT=rot is not None, MODE=mode,
            BF=t.bf, BE=t.be, BN=t.rows, DOT=tk.DOT_TYPES[dot], PRECISION=precision,
            FWD_DOT=tk.DOT_TYPES[fwd_dot], num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return dq, drot, *_token_sums(q, do, rot, None, weights, feature, dot, precision)


def _small(state, kbar, kbar_rot, vbar, gain, eps) -> list[Tensor]:
    present = [state, kbar, kbar if kbar_rot is None else kbar_rot, kbar if vbar is None else vbar, gain, eps]
    return [t.contiguous() for t in present]
