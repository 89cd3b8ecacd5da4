"""Triton kernels for selected-block attention, block scores and the choice of blocks.

B batch, H heads, Hk key heads, G = H / Hk heads of a group, N queries, M keys, S chosen blocks of ``SIZE`` keys, D, E head sizes; grid axis 0 is B * Hk,
times N where a program has one query.

- ``selected_fwd_kernel`` and ``selected_bwd_dq_kernel``: one query with the heads of its group as the rows of the products, against the tiles of its blocks.
- ``selected_bwd_dkdv_kernel``: one tile of keys against the (query, head) rows that chose its block, from inverted lists; no atomics.
- ``selected_scores_kernel``: probabilities of compressed attention again from its log-sum-exp, summed over the group and through the overlap stencil.
- ``selected_topn_kernel``: the n best of a row, lowest index first among equals, in ascending order.

Rows that see no key have lse = -inf, O = 0 and no gradient, as in ``kernels/softmax/triton.py``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.softmax.operands import load_rows, rows_product
from kernels.softmax.scores import LOG2E, finished, online, weights
from kernels.softmax.visible import visible


class Sizes(NamedTuple):
    """As above; ``nb`` selection blocks."""

    hk: Any
    g: Any
    n: Any
    m: Any
    s: Any
    nb: Any
    d: Any
    e: Any


class Config(NamedTuple):
    """``SIZE`` keys of a block, ``BM`` of them in a tile; ``BN`` rows of queries and heads; ``band`` and ``piece`` as in ``kernels.softmax.operands.Config``."""

    scale: float
    band: int
    SIZE: int
    BN: int
    BM: int
    BD: int
    BE: int
    dot: Any
    precision: str
    piece: int | None = None


@triton.jit
def _query(size):
    """Key head and query of a program. One axis for both: the others end at 65,535 programs, and neither may be bounded so."""
    at = tl.program_id(0).to(tl.int64)
    return at // size.n, (at % size.n).to(tl.int32)


@triton.jit
def _tile(step, INDEX, row, size, C: tl.constexpr):
    """Keys of one step of the loop over chosen blocks, and which of them exist."""
    parts: tl.constexpr = (C.SIZE + C.BM - 1) // C.BM
    block = tl.load(INDEX + row * size.s + step // parts)
    within = (step % parts) * C.BM + tl.arange(0, C.BM)
    j = tl.maximum(block, 0) * C.SIZE + within
    return j, (block >= 0) & (within < C.SIZE) & (j < size.m)


@triton.jit
def _weights(s, i, j, in_i, in_j, lse, b, x, size, C: tl.constexpr):
    """Weights again, from ``s = q k^T`` and lse."""
    return weights(s * (C.scale * LOG2E), lse, visible(i, j, in_i, in_j, b, x, size, None, 0, C))


@triton.jit
def selected_fwd_kernel(Q, K, V, INDEX, O, LSE, q_strides, k_strides, v_strides, size, x, C: tl.constexpr):
    bh, n = _query(size)
    b, hk = bh // size.hk, bh % size.hk
    g = tl.arange(0, C.BN)
    in_g = g < size.g
    head, token = hk * size.g + g, tl.zeros((C.BN,), tl.int32) + n
    q = load_rows(Q, b, head, q_strides, token, in_g, size.d, C.BD, C.dot)
    top = tl.full((C.BN,), float("-inf"), tl.float32)
    total = tl.zeros((C.BN,), tl.float32)
    acc = tl.zeros((C.BN, C.BE), tl.float32)
    for step in range(0, size.s * ((C.SIZE + C.BM - 1) // C.BM)):
        j, in_j = _tile(step, INDEX, bh * size.n + n, size, C)
        k = load_rows(K, b, hk, k_strides, j, in_j, size.d, C.BD, C.dot)
        s = tl.dot(q, tl.trans(k), input_precision=C.precision) * (C.scale * LOG2E)
        s = tl.where(visible(token, j, in_g, in_j, b, x, size, None, 0, C), s, float("-inf"))
        p, shrink, top, total = online(s, tl.max(s, 1), top, total)
        v = load_rows(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
        acc = tl.dot(p.to(C.dot), v, acc * shrink[:, None], input_precision=C.precision)
    out, lse = finished(acc, top, total)
    row = (b * size.hk * size.g + head) * size.n + n
    e = tl.arange(0, C.BE)
    out = out.to(O.dtype.element_ty)
    tl.store(O + row[:, None] * size.e + e[None, :], out, mask=in_g[:, None] & (e < size.e)[None, :])
    tl.store(LSE + row, lse, mask=in_g)


@triton.jit
def selected_bwd_dq_kernel(
    Q, K, V, INDEX, DO, LSE, DELTA, DQ, q_strides, k_strides, v_strides, o_strides, size, x, C: tl.constexpr
):  # fmt: skip
    bh, n = _query(size)
    b, hk = bh // size.hk, bh % size.hk
    g = tl.arange(0, C.BN)
    in_g = g < size.g
    head, token = hk * size.g + g, tl.zeros((C.BN,), tl.int32) + n
    row = (b * size.hk * size.g + head) * size.n + n
    q = load_rows(Q, b, head, q_strides, token, in_g, size.d, C.BD, C.dot)
    do = load_rows(DO, b, head, o_strides, token, in_g, size.e, C.BE, C.dot)
    lse = tl.load(LSE + row, mask=in_g, other=float("-inf"))
    delta = tl.load(DELTA + row, mask=in_g, other=0.0)
    dq = tl.zeros((C.BN, C.BD), tl.float32)
    for step in range(0, size.s * ((C.SIZE + C.BM - 1) // C.BM)):
        j, in_j = _tile(step, INDEX, bh * size.n + n, size, C)
        k = load_rows(K, b, hk, k_strides, j, in_j, size.d, C.BD, C.dot)
        v = load_rows(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
        s = tl.dot(q, tl.trans(k), input_precision=C.precision)
        p = _weights(s, token, j, in_g, in_j, lse, b, x, size, C)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=C.precision) - delta[:, None])
        dq = tl.dot(ds.to(C.dot), k, dq, input_precision=C.precision)
    d = tl.arange(0, C.BD)
    dq = (dq * C.scale).to(DQ.dtype.element_ty)
    tl.store(DQ + row[:, None] * size.d + d[None, :], dq, mask=in_g[:, None] & (d < size.d)[None, :])


@triton.jit
def selected_bwd_dkdv_kernel(
    Q, K, V, PTR, QUERIES, DO, LSE, DELTA, DK, DV, q_strides, k_strides, v_strides, o_strides, size, x, C: tl.constexpr
):  # fmt: skip
    """Queries of block j: ``QUERIES[b, hk, PTR[b, hk, j]:PTR[b, hk, j + 1]]``."""
    bh = tl.program_id(0).to(tl.int64)
    b, hk = bh // size.hk, bh % size.hk
    parts: tl.constexpr = (C.SIZE + C.BM - 1) // C.BM
    block = tl.program_id(1) // parts
    within = (tl.program_id(1) % parts) * C.BM + tl.arange(0, C.BM)
    j = block * C.SIZE + within
    in_j = (within < C.SIZE) & (j < size.m)
    k = load_rows(K, b, hk, k_strides, j, in_j, size.d, C.BD, C.dot)
    v = load_rows(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
    dk = tl.zeros((C.BM, C.BD), tl.float32)
    dv = tl.zeros((C.BM, C.BE), tl.float32)
    first = tl.load(PTR + bh * (size.nb + 1) + block)
    rows = (tl.load(PTR + bh * (size.nb + 1) + block + 1) - first) * size.g
    for r0 in range(0, rows, C.BN):
        r = r0 + tl.arange(0, C.BN)
        inside = r < rows
        at = bh * size.n * size.s + first + r // size.g
        i = tl.load(QUERIES + at, mask=inside, other=0)
        head = hk * size.g + r % size.g
        row = (b * size.hk * size.g + head) * size.n + i
        q = load_rows(Q, b, head, q_strides, i, inside, size.d, C.BD, C.dot)
        do = load_rows(DO, b, head, o_strides, i, inside, size.e, C.BE, C.dot)
        lse = tl.load(LSE + row, mask=inside, other=float("-inf"))
        delta = tl.load(DELTA + row, mask=inside, other=0.0)
        s = rows_product(
            q, tl.trans(k), Q, K, head, hk, q_strides, k_strides, i, j, inside, in_j, b, size.d, C
        )
        p = _weights(s, i, j, inside, in_j, lse, b, x, size, C)
        dv = tl.dot(tl.trans(p.to(C.dot)), do, dv, input_precision=C.precision)
        dp = rows_product(
            do, tl.trans(v), DO, V, head, hk, o_strides, v_strides, i, j, inside, in_j, b, size.e, C
        )
        ds = p * (dp - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(C.dot)), q, dk, input_precision=C.precision)
    row = (bh * size.m + j)[:, None]
    d, e = tl.arange(0, C.BD), tl.arange(0, C.BE)
    dk = (dk * C.scale).to(DK.dtype.element_ty)
    tl.store(DK + row * size.d + d[None, :], dk, mask=in_j[:, None] & (d < size.d)[None, :])
    dv = dv.to(DV.dtype.element_ty)
    tl.store(DV + row * size.e + e[None, :], dv, mask=in_j[:, None] & (e < size.e)[None, :])


@triton.jit
def selected_scores_kernel(
    Q, K, STENCIL, SPAN, VISIBLE, LSE, SCORES, q_strides, k_strides, visible_strides, size, C: tl.constexpr
):  # fmt: skip
    """K holds ``size.m`` compressed keys; tile t of the ``size.nb`` selection blocks overlaps those from ``SPAN[t, 0]`` to ``SPAN[t, 1]``."""
    bh = tl.program_id(0).to(tl.int64)
    b, hk = bh // size.hk, bh % size.hk
    i = tl.program_id(1) * C.BN + tl.arange(0, C.BN)
    in_i = i < size.n
    block = tl.program_id(2) * C.BM + tl.arange(0, C.BM)
    acc = tl.zeros((C.BN, C.BM), tl.float32)
    first = tl.load(SPAN + 2 * tl.program_id(2))
    last = tl.load(SPAN + 2 * tl.program_id(2) + 1)
    for j0 in range(first // C.BM * C.BM, last, C.BM):
        j = j0 + tl.arange(0, C.BM)
        in_j = j < size.m
        k = load_rows(K, b, hk, k_strides, j, in_j, size.d, C.BD, C.dot)
        seen = in_i[:, None] & in_j[None, :]
        if VISIBLE is not None:
            at = VISIBLE + b * visible_strides[0] + i.to(tl.int64)[:, None] * visible_strides[1] + j[None, :]
            seen = seen & (tl.load(at, mask=seen, other=0) != 0)
        together = tl.zeros((C.BN, C.BM), tl.float32)
        for g in range(0, size.g):
            head = hk * size.g + g
            q = load_rows(Q, b, head, q_strides, i, in_i, size.d, C.BD, C.dot)
            row = (b * size.hk * size.g + head) * size.n + i
            lse = tl.load(LSE + row, mask=in_i, other=float("-inf"))
            s = rows_product(
                q, tl.trans(k), Q, K, head, hk, q_strides, k_strides, i, j, in_i, in_j, b, size.d, C
            )
            together += weights(s * (C.scale * LOG2E), lse, seen)
        at = STENCIL + j.to(tl.int64)[:, None] * size.nb + block[None, :]
        overlap = tl.load(at, mask=in_j[:, None] & (block < size.nb)[None, :], other=0.0)
        acc = tl.dot(together, overlap, acc, input_precision="ieee" if C.precision == "ieee" else "tf32x3")
    at = SCORES + (bh * size.n + i)[:, None] * size.nb + block[None, :]
    tl.store(at, acc, mask=in_i[:, None] & (block < size.nb)[None, :])


@triton.jit
def selected_topn_kernel(SCORES, INDEX, nb, count, W: tl.constexpr):
    """INDEX arrives filled with -1."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, W)
    left = tl.load(SCORES + row * nb + at, mask=at < nb, other=float("-inf"))
    taken = at < 0
    for _ in range(0, count):
        best = tl.max(left, 0)
        lowest = tl.min(tl.where(left == best, at, W), 0)
        now = (at == lowest) & (left > float("-inf"))
        taken = taken | now
        left = tl.where(now, float("-inf"), left)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(INDEX + row * count + place, at, mask=taken)
