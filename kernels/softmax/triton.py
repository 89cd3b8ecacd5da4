"""Triton kernels for softmax attention, forward and backward.

B batch, H heads, Hk key heads, N queries, M keys, D, E head sizes; grid axis 0 is always B * H (or the bias's own batch and heads).

- ``softmax_fwd_kernel``: one tile of queries against the key tiles of its band, list or split, running maximum and sum in base 2; writes O and lse.
- ``softmax_bwd_dkdv_kernel``: one tile of keys against the query tiles; gradients per query head, groups are summed outside.
- ``softmax_bwd_dq_kernel``: one tile of queries against the key tiles.
- ``softmax_bwd_dbias_kernel``: one tile of the bias, summed over every axis along which the bias was broadcast.

All recompute ``P = exp(S - lse)`` and use ``dS = P (w dP - delta)`` with ``delta = sum(dO O) - dlse`` and w the factor after the softmax: the last term
makes lse an output like any other. Factors of a low-rank bias get ``dS phi_k`` and ``dS^T phi_q`` beside the gradients of q and k. No atomics. Rows that
see no key have lse = -inf, O = 0 and no gradient. Products run in the input type with float32 sums; float32 inputs take three TF32 passes on
NVIDIA and float32 matrix instructions on AMD. What shapes a score, and lists of tiles for block-sparse rules, are in ``scores.py``.
"""

import triton
import triton.language as tl

from kernels.softmax.scores import (
    LN2,
    LOG2E,
    after,
    load_columns,
    load_factor,
    load_rows,
    scores,
    tokens_of,
    visible,
)  # fmt: skip

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
    place = t * C.BN + tl.arange(0, C.BN)
    in_i = place < size.n
    i = tokens_of(place, size.n, lists)
    q = load_rows(Q, b, h, q_strides, i, in_i, size.d, C.BD, C.dot)
    phi_q = q
    if x.phi_q is not None:
        phi_q = load_factor(x.phi_q, x.phi_q_b, b, h, size.h, size.n, size.r, i, in_i, C.BR, False)
    top = tl.full((C.BN,), float("-inf"), tl.float32)
    total = tl.zeros((C.BN,), tl.float32)
    acc = tl.zeros((C.BN, C.BE), tl.float32)
    lo, hi = _key_range(t, size, x, lists, C)
    out_row = bh
    if span is not None:
        split = tl.program_id(2)
        lo, hi = tl.maximum(lo, split * span), tl.minimum(hi, (split + 1) * span)
        out_row += split.to(tl.int64) * tl.num_programs(0)
    for at in range(lo, hi):
        tile, whole = _entry(at, lists)
        j_place = tile * C.BM + tl.arange(0, C.BM)
        in_j = j_place < size.m
        j = tokens_of(j_place, size.m, lists)
        k = load_columns(K, b, hk, k_strides, j, in_j, size.d, C.BD, C.dot)
        phi_k = k
        if x.phi_k is not None:
            phi_k = load_factor(x.phi_k, x.phi_k_b, b, h, size.h, size.m, size.r, j, in_j, C.BR, True)
        s, _ = scores(q, k, phi_q, phi_k, i, j, in_i, in_j, b, h, x, size, C)
        s = tl.where(visible(i, j, in_i, in_j, b, x, size, lists, whole, C), s, float("-inf"))
        peak = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)  # a row without a key so far
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        if x.post is not None:
            p = p * after(i, j, in_i, in_j, b, h, x)
        v = load_rows(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
        acc = tl.dot(p.to(C.dot), v, acc * shrink[:, None], input_precision=C.precision)
        top = peak
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    row = out_row * size.n + i.to(tl.int64)
    e = tl.arange(0, C.BE)
    out = (acc / total[:, None]).to(O.dtype.element_ty)
    tl.store(O + row[:, None] * size.e + e[None, :], out, mask=in_i[:, None] & (e < size.e)[None, :])
    tl.store(LSE + row, tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2), mask=in_i)


@triton.jit
def _weights(q, k, phi_q, phi_k, i, j, in_i, in_j, b, h, LSE, x, size, lists, whole, C: tl.constexpr):
    """P [BN, BM] again, from q [BN, BD], k [BD, BM] and lse; and the slope of the soft cap."""
    s, slope = scores(q, k, phi_q, phi_k, i, j, in_i, in_j, b, h, x, size, C)
    lse = tl.load(LSE + (b * size.h + h) * size.n + i, mask=in_i, other=float("-inf"))
    seen = visible(i, j, in_i, in_j, b, x, size, lists, whole, C) & (lse > float("-inf"))[:, None]
    lse = tl.where(lse > float("-inf"), lse, 0.0) * LOG2E
    return tl.exp2(tl.where(seen, s - lse[:, None], float("-inf"))), slope


@triton.jit
def softmax_bwd_dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, DPHI,
    q_strides, k_strides, v_strides, o_strides, size, x, lists, C: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // size.h, bh % size.h
    hk = h // (size.h // size.hk)
    t = tl.program_id(1)
    j_place = t * C.BM + tl.arange(0, C.BM)
    in_j = j_place < size.m
    j = tokens_of(j_place, size.m, lists)
    k = load_columns(K, b, hk, k_strides, j, in_j, size.d, C.BD, C.dot)
    v = load_columns(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
    phi_k = k
    dk = tl.zeros((C.BM, C.BD), tl.float32)
    dv = tl.zeros((C.BM, C.BE), tl.float32)
    dphi = 0.0
    if x.phi_k is not None:
        phi_k = load_factor(x.phi_k, x.phi_k_b, b, h, size.h, size.m, size.r, j, in_j, C.BR, True)
        dphi = tl.zeros((C.BM, C.BR), tl.float32)
    lo, hi = _query_range(t, size, x, lists, C)
    for at in range(lo, hi):
        tile, whole = _entry(at, lists)
        place = tile * C.BN + tl.arange(0, C.BN)
        in_i = place < size.n
        i = tokens_of(place, size.n, lists)
        q = load_rows(Q, b, h, q_strides, i, in_i, size.d, C.BD, C.dot)
        phi_q = q
        if x.phi_q is not None:
            phi_q = load_factor(x.phi_q, x.phi_q_b, b, h, size.h, size.n, size.r, i, in_i, C.BR, False)
        p, slope = _weights(q, k, phi_q, phi_k, i, j, in_i, in_j, b, h, LSE, x, size, lists, whole, C)
        do = load_rows(DO, b, h, o_strides, i, in_i, size.e, C.BE, C.dot)
        dp = tl.dot(do, v, input_precision=C.precision)
        used = p
        if x.post is not None:
            post = after(i, j, in_i, in_j, b, h, x)
            used = p * post
            dp = dp * post
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
    place = t * C.BN + tl.arange(0, C.BN)
    in_i = place < size.n
    i = tokens_of(place, size.n, lists)
    q = load_rows(Q, b, h, q_strides, i, in_i, size.d, C.BD, C.dot)
    do = load_rows(DO, b, h, o_strides, i, in_i, size.e, C.BE, C.dot)
    delta = tl.load(DELTA + bh * size.n + i, mask=in_i, other=0.0)
    phi_q = q
    dq = tl.zeros((C.BN, C.BD), tl.float32)
    dphi = 0.0
    if x.phi_q is not None:
        phi_q = load_factor(x.phi_q, x.phi_q_b, b, h, size.h, size.n, size.r, i, in_i, C.BR, False)
        dphi = tl.zeros((C.BN, C.BR), tl.float32)
    lo, hi = _key_range(t, size, x, lists, C)
    for at in range(lo, hi):
        tile, whole = _entry(at, lists)
        j_place = tile * C.BM + tl.arange(0, C.BM)
        in_j = j_place < size.m
        j = tokens_of(j_place, size.m, lists)
        k = load_columns(K, b, hk, k_strides, j, in_j, size.d, C.BD, C.dot)
        v = load_columns(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
        phi_k = k
        if x.phi_k is not None:
            phi_k = load_factor(x.phi_k, x.phi_k_b, b, h, size.h, size.m, size.r, j, in_j, C.BR, True)
        p, slope = _weights(q, k, phi_q, phi_k, i, j, in_i, in_j, b, h, LSE, x, size, lists, whole, C)
        dp = tl.dot(do, v, input_precision=C.precision)
        if x.post is not None:
            dp = dp * after(i, j, in_i, in_j, b, h, x)
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
    j = tl.program_id(1) * C.BM + tl.arange(0, C.BM)
    in_j = j < size.m
    acc = tl.zeros((C.BN, C.BM), tl.float32)
    i_first = tl.program_id(2) * C.BN
    i_last = size.n
    if ROWS:
        i_last = tl.minimum(i_first + C.BN, size.n)
    heads = size.h // BH
    for item in range(0, (B // BB) * heads):
        b = own_b + (item // heads)
        h = own_h + (item % heads)
        hk = h // (size.h // size.hk)
        k = load_columns(K, b, hk, k_strides, j, in_j, size.d, C.BD, C.dot)
        v = load_columns(V, b, hk, v_strides, j, in_j, size.e, C.BE, C.dot)
        phi_k = k
        if x.phi_k is not None:
            phi_k = load_factor(x.phi_k, x.phi_k_b, b, h, size.h, size.m, size.r, j, in_j, C.BR, True)
        for i0 in range(i_first, i_last, C.BN):
            i = i0 + tl.arange(0, C.BN)
            in_i = i < size.n
            q = load_rows(Q, b, h, q_strides, i, in_i, size.d, C.BD, C.dot)
            phi_q = q
            if x.phi_q is not None:
                phi_q = load_factor(x.phi_q, x.phi_q_b, b, h, size.h, size.n, size.r, i, in_i, C.BR, False)
            p, _ = _weights(q, k, phi_q, phi_k, i, j, in_i, in_j, b, h, LSE, x, size, None, 0, C)
            do = load_rows(DO, b, h, o_strides, i, in_i, size.e, C.BE, C.dot)
            delta = tl.load(DELTA + (b * size.h + h) * size.n + i, mask=in_i, other=0.0)
            dp = tl.dot(do, v, input_precision=C.precision)
            if x.post is not None:
                dp = dp * after(i, j, in_i, in_j, b, h, x)
            acc += p * (dp - delta[:, None])
    if ROWS:
        i = (i_first + tl.arange(0, C.BN)).to(tl.int64)
        at = (own * size.n + i[:, None]) * size.m + j[None, :]
        tl.store(DB + at, acc, mask=(i < size.n)[:, None] & in_j[None, :])
    else:
        tl.store(DB + own * size.m + j, tl.sum(acc, 0), mask=in_j)
