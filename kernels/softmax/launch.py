"""Launches the Triton kernels: operands, grids, splits."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels._common import launching
from kernels._common.launching import on_device, platform, pow2, row_dense
from kernels.softmax import tiles
from kernels.softmax import triton as tk
from kernels.softmax.combine import merge_lse
from kernels.softmax.operands import Config, Lists, Operands, Sizes
from kernels.softmax.tiles import Tiles, types_of

# Where the tiles of queries are fewer than half of this, the keys are split over so many programs.
SPLIT_PROGRAMS = 256


class Problem(NamedTuple):
    """One call, as the registered operators hand it over; see ``ops.py``."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    phi_q: Tensor | None = None
    phi_k: Tensor | None = None
    table_a: Tensor | None = None
    table_b: Tensor | None = None
    post: Tensor | None = None
    key_mask: Tensor | None = None
    pos_q: Tensor | None = None
    pos_k: Tensor | None = None
    limit: Tensor | None = None
    left: int = -1
    right: int = -1
    aligned: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    mod: tuple[int, ...] = ()
    skip: tuple[int, ...] = ()


class Sparse(NamedTuple):
    """Lists of tiles (of `tiles.sparse_table`) for a block-sparse call: of key tiles per query tile, of query tiles per key tile."""

    rows: Lists
    columns: Lists
    rule: tuple[int, ...]


def _steps(t: Tensor, axes: int) -> list[int]:
    """Strides of the leading axes, 0 where the tensor is broadcast."""
    return [0 if size == 1 else step for size, step in zip(t.shape[:axes], t.stride()[:axes], strict=True)]


def operands(p: Problem) -> Operands:
    """The optional inputs as the kernels take them."""
    given = {}
    for name, t in (("bias", p.bias), ("post", p.post)):
        if t is not None:
            t = row_dense(t)
            given |= dict(zip((name, *(f"{name}_{axis}" for axis in "bhn")), (t, *_steps(t, 3)), strict=True))
    if p.key_mask is not None:
        mask = p.key_mask.contiguous().view(torch.uint8)
        given |= dict(mask=mask, mask_b=mask.stride(0))
    if p.pos_q is not None and not p.aligned:
        for name, t in (("pos_q", p.pos_q), ("pos_k", p.pos_k)):
            t = t.to(torch.int32).contiguous()
            given |= {name: t, f"{name}_b": _steps(t, 1)[0]}
    for name, t in (("phi_q", p.phi_q), ("phi_k", p.phi_k)):
        if t is not None:
            t = t.float().contiguous()
            given |= {name: t, f"{name}_b": _steps(t, 1)[0]}
    for name, t in (("table_a", p.table_a), ("table_b", p.table_b)):
        if t is not None:
            given[name] = t.float().contiguous()
    if p.limit is not None:
        limit = p.limit.contiguous()
        given |= {"limit": limit, "limit_b": _steps(limit, 1)[0]}
    for name, side in (("left", p.left), ("right", p.right)):
        if side >= 0:
            given[name] = side
    return Operands(**given)


class Call:
    """What all kernels of a call share, made ready."""

    def __init__(self, p: Problem, sparse: Sparse | None = None) -> None:
        self.q, self.k, self.v = (row_dense(t) for t in (p.q, p.k, p.v))
        self.tensors = self.q, self.k, self.v
        self.strides = tuple(t.stride()[:3] for t in self.tensors)
        (b, h, n, d), (hk, m) = p.q.shape, p.k.shape[1:3]
        e, rank = p.v.shape[3], None if p.phi_q is None else p.phi_q.shape[3]
        self.batch, self.size = b, Sizes(h, hk, n, m, d, e, rank)
        self.operands, self.sparse = operands(p), sparse
        self.problem = p
        self.empty = 0 in (b, h, n, m)

    def mark(self, kept: Tensor | None) -> None:
        """Where the forward leaves, and the gradients find, which tiles meet."""
        if self.problem.skip:
            self.operands = self.operands._replace(kept=kept)

    def tiles(self, kernel: str) -> Tiles:
        dot, _ = types_of(self.q)
        p = self.problem
        where = platform(), dot, self.size.d, self.size.e, tiles.compute_capability()
        if self.sparse is not None:
            return tiles.sparse_table(kernel, *where)
        pairwise = any(t is not None for t in (p.bias, p.post, p.table_a))
        placed = p.pos_q is not None and not p.aligned
        rich = pairwise or placed or p.softcap > 0
        scores = "factors" if p.phi_q is not None else "rich" if rich else "plain"
        found = tiles.table(kernel, *where, scores)
        return tiles.skip_table(kernel, found, p.skip, *where[1:]) if p.skip else found

    def config(self, t: Tiles) -> Config:
        p, (dot, precision) = self.problem, types_of(self.q)
        band = 0 if p.left < 0 and p.right < 0 else 1 if p.aligned else 2
        return Config(
            p.scale, p.softcap, band, tuple(p.mod) or None, None if self.sparse is None else self.sparse.rule,
            t.queries, t.keys, pow2(self.size.d), pow2(self.size.e), pow2(self.size.r or 1), tk.DOT_TYPES[dot], precision,
            tuple(p.skip) or None, t.piece,
        )  # fmt: skip

    def splits(self, t: Tiles) -> int:
        """Over how many programs the keys of a tile of queries are spread."""
        programs = self.batch * self.size.h * triton.cdiv(self.size.n, t.queries)
        if self.sparse is not None or self.problem.skip or 2 * programs > SPLIT_PROGRAMS:
            return 1
        return max(1, min(SPLIT_PROGRAMS // programs, triton.cdiv(self.size.m, 4 * t.keys)))


def kept_shape(p: Problem) -> tuple[int, ...]:
    """Of the marks that the forward leaves, uint8."""
    if not p.skip:
        return (0,)
    rows, keys = p.skip
    return (p.q.shape[0] * p.q.shape[1], -(-p.q.shape[2] // rows), -(-p.k.shape[2] // keys))


def fwd(p: Problem, sparse: Sparse | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """O in the dtype of q, lse in float32, and which tiles were kept (empty where none may be dropped)."""
    call = Call(p, sparse)
    b, (h, _, n, m, _, e, _) = call.batch, call.size
    kept = torch.zeros(kept_shape(p), dtype=torch.uint8, device=p.q.device)
    if call.empty:
        return (
            launching.new(p.q, b, h, n, e, dtype=p.q.dtype).zero_(),
            launching.new(p.q, b, h, n).fill_(-torch.inf),
            kept,
        )
    call.mark(kept)
    t = call.tiles("fwd")
    splits = call.splits(t)
    parts = () if splits == 1 else (splits,)
    out = launching.new(p.q, *parts, b, h, n, e, dtype=p.q.dtype if splits == 1 else torch.float32)
    lse = launching.new(p.q, *parts, b, h, n)
    span = triton.cdiv(triton.cdiv(m, t.keys), splits) if parts else None
    lists = None if sparse is None else sparse.rows
    with on_device(p.q):
        tk.softmax_fwd_kernel[(b * h, triton.cdiv(n, t.queries), splits)](
            *call.tensors, out, lse, *call.strides, call.size, call.operands, lists, span,
            C=call.config(t), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    if parts:
        out, lse = merge_lse(list(zip(out.unbind(0), lse.unbind(0), strict=True)))
    return out.to(p.q.dtype), lse, kept


class Gradients(NamedTuple):
    """Of q, k, v, both factors (per sample and head) and the bias (float32); None where not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor | None
    phi_k: Tensor | None
    bias: Tensor | None


def bwd(
    p: Problem,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
    want_bias: bool,
    kept: Tensor | None = None,
    sparse: Sparse | None = None,
) -> Gradients:
    """``want_bias`` asks for the kernel of the bias gradient; ``kept`` is what the forward marked."""
    call = Call(p, sparse)
    call.mark(kept)
    b, (h, hk, n, m, d, e, r) = call.batch, call.size
    grouped = h != hk
    part = torch.float32 if grouped else p.q.dtype
    dq, dk, dv = (
        launching.new(p.q, b, h, n, d, dtype=p.q.dtype),
        launching.new(p.q, b, h, m, d, dtype=part),
        launching.new(p.q, b, h, m, e, dtype=part),
    )
    dphi = (None, None) if r is None else (launching.new(p.q, b, h, n, r), launching.new(p.q, b, h, m, r))
    db = launching.new(p.q, *p.bias.shape) if want_bias else None
    if call.empty:
        zeros = [None if t is None else t.zero_() for t in (dq, *dphi, db)]
        return Gradients(zeros[0], torch.zeros_like(p.k), torch.zeros_like(p.v), *zeros[1:])
    do = row_dense(do)
    shared = (do, lse.contiguous(), delta.contiguous())
    strides = (*call.strides, do.stride()[:3])
    lists = (None, None) if sparse is None else (sparse.rows, sparse.columns)
    with on_device(p.q):
        t = call.tiles("bwd_dkdv")
        tk.softmax_bwd_dkdv_kernel[(b * h, triton.cdiv(m, t.keys))](
            *call.tensors, *shared, dk, dv, dphi[1], *strides, call.size, call.operands, lists[1],
            C=call.config(t), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        t = call.tiles("bwd_dq")
        tk.softmax_bwd_dq_kernel[(b * h, triton.cdiv(n, t.queries))](
            *call.tensors, *shared, dq, dphi[0], *strides, call.size, call.operands, lists[0],
            C=call.config(t), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        if want_bias:
            t = call.tiles("bwd_dbias")
            rows = p.bias.shape[2] > 1 or n == 1
            own = p.bias.shape[:2]
            tk.softmax_bwd_dbias_kernel[(own.numel(), triton.cdiv(m, t.keys), triton.cdiv(n, t.queries) if rows else 1)](
                *call.tensors, *shared, db, *strides, call.size, call.operands, b, *own,
                ROWS=rows, C=call.config(t), num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip
    if grouped:
        dk, dv = (g.unflatten(1, (hk, h // hk)).sum(2) for g in (dk, dv))
    return Gradients(dq, dk.to(p.k.dtype), dv.to(p.v.dtype), *dphi, db)
