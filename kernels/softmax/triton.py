"""Triton kernels for softmax attention, forward and backward.

B batch, H heads, Hk key heads, N queries, M keys, D, E head sizes; grid axis 0 is always B * H (or the bias's own batch and heads).

- ``softmax_fwd_kernel``: one tile of queries against the key tiles of its band, list or split, running maximum and sum in base 2; writes O and lse.
- ``softmax_bwd_dkdv_kernel``: one tile of keys against the query tiles; gradients per query head, groups are summed outside.
- ``softmax_bwd_dq_kernel``: one tile of queries against the key tiles.
- ``softmax_bwd_dbias_kernel``: one tile of the bias, summed over every axis along which the bias was broadcast.

All recompute ``P = exp(S - lse)`` and use ``dS = P (w dP - delta)`` with ``delta = sum(dO O) - dlse`` and w the factor after the softmax: the last term
makes lse an output like any other. Factors of a low-rank bias get ``dS phi_k`` and ``dS^T phi_q`` beside the gradients of q and k. No atomics. Rows that
see no key have lse = -inf, O = 0 and no gradient. Products run in the input type with float32 sums; float32 inputs take three TF32 passes on
NVIDIA and float32 matrix instructions on AMD. With ``limit`` (BLASST) the forward drops tiles of keys that no row needs, before their values are read, and
marks in ``kept`` those that stay; the gradients visit the same ones. What is handed over and loaded is in ``operands.py``, who sees whom (block-sparse
rules too) in ``visible.py``, what shapes a score in ``scores.py``.
"""

import triton
import triton.language as tl

from kernels.softmax.operands import kept_at, key_tile, load_columns, load_rows, query_tile, rows_product
from kernels.softmax.scores import after, finished, online, scores, weights
from kernels.softmax.visible import visible

DOT_TYPES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}


@triton.jit
def _key_range(t, size, x, lists, C: tl.constexpr):
    """Entries of the loop over key tiles for query tile t."""
    if lists is not None:
        return tl.load(lists.ptr + t), tl.load(lists.ptr + t + 1)
    else:
        lo, hi = 0, size.m
        if C.band == 1:
            first = t * C.BN + (size.m - size.n)
            if x.left is not None:
                lo = tl.maximum(first - x.left, 0)
            if x.right is not None:
                hi = tl.minimum(first + C.BN + x.right, size.m)
        return lo // C.BM, tl.cdiv(hi, C.BM)


@triton.jit
def _query_range(t, size, x, lists, C: tl.constexpr):
    """Entries of the loop over query tiles for key tile t."""
    if lists is not None:
        return tl.load(lists.ptr + t), tl.load(lists.ptr + t + 1)
    else:
        lo, hi = 0, size.n
        if C.band == 1:
            first = t * C.BM - (size.m - size.n)
            if x.right is not None:
                lo = tl.maximum(first - x.right, 0)
            if x.left is not None:
                hi = tl.minimum(first + C.BM + x.left, size.n)
        return lo // C.BN, tl.cdiv(hi, C.BN)


@triton.jit
def _entry(at, lists):
    """Tile number of a loop entry, and whether the whole of it is visible."""
    if lists is not None:
        return tl.load(lists.col + at), tl.load(lists.full + at)
    else:
        return at, 0


@triton.jit
def softmax_fwd_kernel(
    Q, K, V, O, LSE, q_strides, k_strides, v_strides, size, x, lists, span, C: tl.constexpr,
):  # fmt: skip
    """``span``: key tiles per split, or None; each split writes its own O and LSE."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // size.h, bh % size.h
    hk = h // (size.h // size.hk)
    t = tl.program_id(1)
    i, in_i, q, phi_q = query_tile(Q, t, b, h, q_strides, x, size, lists, C)
    top = tl.full((C.BN,), float("-inf"), tl.float32)
    total = tl.zeros((C.BN,), tl.float32)
    acc = tl.zeros((C.BN, C.BE), tl.float32)
    lo, hi = _key_range(t, size, x, lists, C)
    out_row = bh
    if span is not None:
        split = tl.program_id(2)
        lo, hi = tl.maximum(lo, split * span), tl.minimum(hi, (split + 1) * span)
        out_row += split.to(tl.int64) * tl.num_programs(0)
    limit, highest = top, top
    if x.limit is not None:
        limit = tl.load(x.limit + b * x.limit_b + i, mask=in_i, other=0.0)
    for at in range(lo, hi):
        tile, whole = _entry(at, lists)
        j, in_j, k, phi_k = key_tile(K, tile, b, h, hk, k_strides, x, size, lists, C)
        s = tl.dot(q, k, input_precision=C.precision)
        s, _ = scores(s, phi_q, phi_k, i, j, in_i, in_j, b, h, x, size, C)
        s = tl.where(visible(i, j, in_i, in_j, b, x, size, lists, whole, C), s, float("-inf"))
        here = tl.max(s, 1)
        keep = True
        if x.limit is not None:
            highest = tl.maximum(highest, here)
            low = (here == float("-inf")) | (here < highest + limit)
            keep = tl.min(low.to(tl.int32), 0) == 0
            tl.store(kept_at(bh, t, tile, x, size, C), keep.to(tl.uint8))
        if keep:
            p, shrink, top, total = online(s, here, top, total)
            if x.post is not None:
                p = p * after(i, j, in_i, in_j, b, h, x)
            v = load_rows(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
            acc = tl.dot(p.to(C.dot), v, acc * shrink[:, None], input_precision=C.precision)
    out, lse = finished(acc, top, total)
    row = out_row * size.n + i.to(tl.int64)
    e = tl.arange(0, C.BE)
    out = out.to(O.dtype.element_ty)
    tl.store(O + row[:, None] * size.e + e[None, :], out, mask=in_i[:, None] & (e < size.e)[None, :])
    tl.store(LSE + row, lse, mask=in_i)


@triton.jit
def _kept(bh, tile_i, tile_j, x, size, C: tl.constexpr):
    """Whether the forward let these tiles meet, and whether to go in: float32 has no registers for the branch and masks instead."""
    keep = True
    if x.kept is not None:
        keep = tl.load(kept_at(bh, tile_i, tile_j, x, size, C)) != 0
    enter = keep
    if C.dot == tl.float32:
        enter = True
    return keep, enter


@triton.jit
def _weights(s, phi_q, phi_k, i, j, in_i, in_j, b, h, LSE, x, size, lists, whole, keep, C: tl.constexpr):
    """P [BN, BM] again, from ``s = q k^T`` and lse; and the slope of the soft cap."""
    s, slope = scores(s, phi_q, phi_k, i, j, in_i, in_j, b, h, x, size, C)
    seen = visible(i, j, in_i, in_j, b, x, size, lists, whole, C)
    if x.kept is not None:
        seen = seen & keep
    lse = tl.load(LSE + (b * size.h + h) * size.n + i, mask=in_i, other=float("-inf"))
    return weights(s, lse, seen), slope


@triton.jit
def _before(p, dp, i, j, in_i, in_j, b, h, x):
    """Weights that meet the values, and the gradient of those before the factor, from that of those that meet the values."""
    if x.post is not None:
        post = after(i, j, in_i, in_j, b, h, x)
        return p * post, dp * post
    else:
        return p, dp


@triton.jit
def softmax_bwd_dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, DPHI,
    q_strides, k_strides, v_strides, o_strides, size, x, lists, C: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // size.h, bh % size.h
    hk = h // (size.h // size.hk)
    t = tl.program_id(1)
    j, in_j, k, phi_k = key_tile(K, t, b, h, hk, k_strides, x, size, lists, C)
    v = load_columns(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
    dk = tl.zeros((C.BM, C.BD), tl.float32)
    dv = tl.zeros((C.BM, C.BE), tl.float32)
    dphi = 0.0
    if x.phi_k is not None:
        dphi = tl.zeros((C.BM, C.BR), tl.float32)
    lo, hi = _query_range(t, size, x, lists, C)
    for at in range(lo, hi):
        tile, whole = _entry(at, lists)
        keep, enter = _kept(bh, tile, t, x, size, C)
        if enter:
            i, in_i, q, phi_q = query_tile(Q, tile, b, h, q_strides, x, size, lists, C)
            s = rows_product(q, k, Q, K, h, hk, q_strides, k_strides, i, j, in_i, in_j, b, size.d, C)
            p, slope = _weights(s, phi_q, phi_k, i, j, in_i, in_j, b, h, LSE, x, size, lists, whole, keep, C)
            do = load_rows(DO, b, h, o_strides, i, in_i, size.e, C.BE, C.dot)
            dp = rows_product(do, v, DO, V, h, hk, o_strides, v_strides, i, j, in_i, in_j, b, size.e, C)
            used, dp = _before(p, dp, i, j, in_i, in_j, b, h, x)
            dv = tl.dot(tl.trans(used.to(C.dot)), do, dv, input_precision=C.precision)
            delta = tl.load(DELTA + bh * size.n + i, mask=in_i, other=0.0)
            ds = p * (dp - delta[:, None])
            if x.phi_q is not None:
                dphi = tl.dot(
                    tl.trans(ds), phi_q, dphi, input_precision="ieee" if C.precision == "ieee" else "tf32x3"
                )
            dk = tl.dot(tl.trans((ds * slope).to(C.dot)), q, dk, input_precision=C.precision)
    row = (bh * size.m + j.to(tl.int64))[:, None]
    d, e = tl.arange(0, C.BD), tl.arange(0, C.BE)
    dk = (dk * C.scale).to(DK.dtype.element_ty)
    tl.store(DK + row * size.d + d[None, :], dk, mask=in_j[:, None] & (d < size.d)[None, :])
    dv = dv.to(DV.dtype.element_ty)
    tl.store(DV + row * size.e + e[None, :], dv, mask=in_j[:, None] & (e < size.e)[None, :])
    if x.phi_k is not None:
        r = tl.arange(0, C.BR)
        tl.store(DPHI + row * size.r + r[None, :], dphi, mask=in_j[:, None] & (r < size.r)[None, :])


@triton.jit
def softmax_bwd_dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, DPHI,
    q_strides, k_strides, v_strides, o_strides, size, x, lists, C: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // size.h, bh % size.h
    hk = h // (size.h // size.hk)
    t = tl.program_id(1)
    i, in_i, q, phi_q = query_tile(Q, t, b, h, q_strides, x, size, lists, C)
    do = load_rows(DO, b, h, o_strides, i, in_i, size.e, C.BE, C.dot)
    delta = tl.load(DELTA + bh * size.n + i, mask=in_i, other=0.0)
    dq = tl.zeros((C.BN, C.BD), tl.float32)
    dphi = 0.0
    if x.phi_q is not None:
        dphi = tl.zeros((C.BN, C.BR), tl.float32)
    lo, hi = _key_range(t, size, x, lists, C)
    for at in range(lo, hi):
        tile, whole = _entry(at, lists)
        keep, enter = _kept(bh, t, tile, x, size, C)
        if enter:
            j, in_j, k, phi_k = key_tile(K, tile, b, h, hk, k_strides, x, size, lists, C)
            v = load_columns(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
            s = rows_product(q, k, Q, K, h, hk, q_strides, k_strides, i, j, in_i, in_j, b, size.d, C)
            p, slope = _weights(s, phi_q, phi_k, i, j, in_i, in_j, b, h, LSE, x, size, lists, whole, keep, C)
            dp = rows_product(do, v, DO, V, h, hk, o_strides, v_strides, i, j, in_i, in_j, b, size.e, C)
            _, dp = _before(p, dp, i, j, in_i, in_j, b, h, x)
            ds = p * (dp - delta[:, None])
            if x.phi_k is not None:
                dphi = tl.dot(
                    ds, tl.trans(phi_k), dphi, input_precision="ieee" if C.precision == "ieee" else "tf32x3"
                )
            dq = tl.dot((ds * slope).to(C.dot), tl.trans(k), dq, input_precision=C.precision)
    row = (bh * size.n + i.to(tl.int64))[:, None]
    d = tl.arange(0, C.BD)
    dq = (dq * C.scale).to(DQ.dtype.element_ty)
    tl.store(DQ + row * size.d + d[None, :], dq, mask=in_i[:, None] & (d < size.d)[None, :])
    if x.phi_q is not None:
        r = tl.arange(0, C.BR)
        tl.store(DPHI + row * size.r + r[None, :], dphi, mask=in_i[:, None] & (r < size.r)[None, :])


@triton.jit
def softmax_bwd_dbias_kernel(
    Q, K, V, DO, LSE, DELTA, DB,
    q_strides, k_strides, v_strides, o_strides, size, x, B, BB, BH, ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """DB [BB, BH, N, M] (ROWS) or [BB, BH, 1, M]; BB is B or 1, BH is H or 1. The grid's last axis runs over query tiles if ROWS."""
    own = tl.program_id(0).to(tl.int64)
    own_b, own_h = own // BH, own % BH
    acc = tl.zeros((C.BN, C.BM), tl.float32)
    lo, hi = 0, tl.cdiv(size.n, C.BN)
    if ROWS:
        lo = tl.program_id(2)
        hi = lo + 1
    heads = size.h // BH
    for item in range(0, (B // BB) * heads):
        b = own_b + (item // heads)
        h = own_h + (item % heads)
        hk = h // (size.h // size.hk)
        j, in_j, k, phi_k = key_tile(K, tl.program_id(1), b, h, hk, k_strides, x, size, None, C)
        v = load_columns(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
        for tile in range(lo, hi):
            i, in_i, q, phi_q = query_tile(Q, tile, b, h, q_strides, x, size, None, C)
            s = rows_product(q, k, Q, K, h, hk, q_strides, k_strides, i, j, in_i, in_j, b, size.d, C)
            p, _ = _weights(s, phi_q, phi_k, i, j, in_i, in_j, b, h, LSE, x, size, None, 0, True, C)
            do = load_rows(DO, b, h, o_strides, i, in_i, size.e, C.BE, C.dot)
            dp = rows_product(do, v, DO, V, h, hk, o_strides, v_strides, i, j, in_i, in_j, b, size.e, C)
            _, dp = _before(p, dp, i, j, in_i, in_j, b, h, x)
            delta = tl.load(DELTA + (b * size.h + h) * size.n + i, mask=in_i, other=0.0)
            acc += p * (dp - delta[:, None])
    j = tl.program_id(1) * C.BM + tl.arange(0, C.BM)
    in_j = j < size.m
    if ROWS:
        i = (tl.program_id(2) * C.BN + tl.arange(0, C.BN)).to(tl.int64)
        at = (own * size.n + i[:, None]) * size.m + j[None, :]
        tl.store(DB + at, acc, mask=(i < size.n)[:, None] & in_j[None, :])
    else:
        tl.store(DB + own * size.m + j, tl.sum(acc, 0), mask=in_j)
