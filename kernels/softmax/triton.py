"""Triton kernels for softmax attention, forward and backward.

B batch, H heads, Hk key heads, N queries, M keys, D, E head sizes; grid axis 0 is always B * H (or the bias's own batch and heads).

- ``softmax_fwd_kernel``: one tile of queries against the key tiles of its band, running maximum and sum in base 2; writes O and lse.
- ``softmax_bwd_dkdv_kernel``: one tile of keys against the query tiles; gradients per query head, groups are summed outside.
- ``softmax_bwd_dq_kernel``: one tile of queries against the key tiles.
- ``softmax_bwd_dbias_kernel``: one tile of the bias, summed over every axis along which the bias was broadcast.

All recompute ``P = exp(S - lse)`` and use ``dS = P (dP - delta)`` with ``delta = sum(dO O) - dlse``: the last term makes lse an output like any
other. No atomics. Rows that see no key have lse = -inf, O = 0 and no gradient. Products run in the input type with float32 sums; float32
inputs take three TF32 passes on NVIDIA and float32 matrix instructions on AMD.
"""

import triton
import triton.language as tl

DOT_TYPES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _visible(
    i, j, b, POSQ, POSK, MASK, spq, spk, smb, N, M, left, right,
    HAS_MASK: tl.constexpr, BAND: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """bool [rows of i, rows of j]; BAND 0: no positions, 1: i + M - N against j, 2: from memory."""
    seen = (i < N)[:, None] & (j < M)[None, :]
    if HAS_MASK:
        seen = seen & (tl.load(MASK + b * smb + j, mask=j < M, other=0) != 0)[None, :]
    if BAND == 1:
        far = j[None, :] - (i + (M - N))[:, None]
        if HAS_LEFT:
            seen = seen & (far >= -left)
        if HAS_RIGHT:
            seen = seen & (far <= right)
    if BAND == 2:
        pq = tl.load(POSQ + b * spq + i, mask=i < N, other=0)
        pk = tl.load(POSK + b * spk + j, mask=j < M, other=0)
        far = pk[None, :] - pq[:, None]
        if HAS_LEFT:
            seen = seen & (far >= -left)
        if HAS_RIGHT:
            seen = seen & (far <= right)
    return seen


@triton.jit
def softmax_fwd_kernel(
    Q, K, V, BIAS, MASK, POSQ, POSK, O, LSE,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, sbn, smb, spq, spk,
    H, HK, N, M, D, E, left, right,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, BAND: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    hk = h // (H // HK)
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    i64 = i.to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    q_in = (i < N)[:, None] & (d < D)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + i64[:, None] * sqn + d[None, :], mask=q_in, other=0.0).to(DOT)
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    acc = tl.zeros((BN, BE), tl.float32)
    lo, hi = 0, M
    if BAND == 1:
        first = tl.program_id(1) * BN + (M - N)
        if HAS_LEFT:
            lo = tl.maximum(first - left, 0) // BM * BM
        if HAS_RIGHT:
            hi = tl.minimum(first + BN + right, M)
    for j0 in range(lo, hi, BM):
        j = j0 + tl.arange(0, BM)
        j64 = j.to(tl.int64)
        k_in = (j < M)[None, :] & (d < D)[:, None]
        k = tl.load(K + b * skb + hk * skh + j64[None, :] * skn + d[:, None], mask=k_in, other=0.0).to(DOT)
        s = tl.dot(q, k, input_precision=PRECISION) * (SCALE * LOG2E)
        if HAS_BIAS:
            at = BIAS + b * sbb + h * sbh + i64[:, None] * sbn + j64[None, :]
            s += tl.load(at, mask=(i < N)[:, None] & (j < M)[None, :], other=0.0).to(tl.float32) * LOG2E
        seen = _visible(
            i, j, b, POSQ, POSK, MASK, spq, spk, smb, N, M, left, right, HAS_MASK, BAND, HAS_LEFT, HAS_RIGHT
        )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))
        peak = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)  # a row without a key so far
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        v_in = (j < M)[:, None] & (e < E)[None, :]
        v = tl.load(V + b * svb + hk * svh + j64[:, None] * svn + e[None, :], mask=v_in, other=0.0).to(DOT)
        acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision=PRECISION)
        top = peak
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    o_in = (i < N)[:, None] & (e < E)[None, :]
    out = acc / total[:, None]
    tl.store(O + (bh * N + i64[:, None]) * E + e[None, :], out.to(O.dtype.element_ty), mask=o_in)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(LSE + bh * N + i64, lse, mask=i < N)


@triton.jit
def _weights(
    q, k, i, j, b, h, BIAS, MASK, POSQ, POSK, LSE, bh, sbb, sbh, sbn, smb, spq, spk, N, M, left, right,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, BAND: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P [BN, BM] again, from q [BN, BD], k [BD, BM] and lse."""
    s = tl.dot(q, k, input_precision=PRECISION) * (SCALE * LOG2E)
    if HAS_BIAS:
        at = BIAS + b * sbb + h * sbh + i.to(tl.int64)[:, None] * sbn + j.to(tl.int64)[None, :]
        s += tl.load(at, mask=(i < N)[:, None] & (j < M)[None, :], other=0.0).to(tl.float32) * LOG2E
    seen = _visible(
        i, j, b, POSQ, POSK, MASK, spq, spk, smb, N, M, left, right, HAS_MASK, BAND, HAS_LEFT, HAS_RIGHT
    )  # fmt: skip
    lse = tl.load(LSE + bh * N + i.to(tl.int64), mask=i < N, other=0.0)
    seen = seen & (lse > float("-inf"))[:, None]
    lse = tl.where(lse > float("-inf"), lse, 0.0) * LOG2E
    return tl.exp2(tl.where(seen, s - lse[:, None], float("-inf")))


@triton.jit
def softmax_bwd_dkdv_kernel(
    Q, K, V, BIAS, MASK, POSQ, POSK, DO, LSE, DELTA, DK, DV,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbn, smb, spq, spk,
    H, HK, N, M, D, E, left, right,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, BAND: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    hk = h // (H // HK)
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    j64 = j.to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    k_in = (j < M)[None, :] & (d < D)[:, None]
    k = tl.load(K + b * skb + hk * skh + j64[None, :] * skn + d[:, None], mask=k_in, other=0.0).to(DOT)
    v_in = (j < M)[None, :] & (e < E)[:, None]
    v = tl.load(V + b * svb + hk * svh + j64[None, :] * svn + e[:, None], mask=v_in, other=0.0).to(DOT)
    dk = tl.zeros((BM, BD), tl.float32)
    dv = tl.zeros((BM, BE), tl.float32)
    lo, hi = 0, N
    if BAND == 1:
        first = tl.program_id(1) * BM - (M - N)
        if HAS_RIGHT:
            lo = tl.maximum(first - right, 0) // BN * BN
        if HAS_LEFT:
            hi = tl.minimum(first + BM + left, N)
    for i0 in range(lo, hi, BN):
        i = i0 + tl.arange(0, BN)
        i64 = i.to(tl.int64)
        q_in = (i < N)[:, None] & (d < D)[None, :]
        q = tl.load(Q + b * sqb + h * sqh + i64[:, None] * sqn + d[None, :], mask=q_in, other=0.0).to(DOT)
        p = _weights(
            q, k, i, j, b, h, BIAS, MASK, POSQ, POSK, LSE, bh, sbb, sbh, sbn, smb, spq, spk, N, M, left, right,
            SCALE, HAS_BIAS, HAS_MASK, BAND, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        do_in = (i < N)[:, None] & (e < E)[None, :]
        do = tl.load(DO + b * sob + h * soh + i64[:, None] * son + e[None, :], mask=do_in, other=0.0).to(DOT)
        dv = tl.dot(tl.trans(p.to(DOT)), do, dv, input_precision=PRECISION)
        dp = tl.dot(do, v, input_precision=PRECISION)
        delta = tl.load(DELTA + bh * N + i64, mask=i < N, other=0.0)
        ds = p * (dp - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(DOT)), q, dk, input_precision=PRECISION)
    at = (bh * M + j64[:, None]) * D + d[None, :]
    tl.store(DK + at, (dk * SCALE).to(DK.dtype.element_ty), mask=(j < M)[:, None] & (d < D)[None, :])
    at = (bh * M + j64[:, None]) * E + e[None, :]
    tl.store(DV + at, dv.to(DV.dtype.element_ty), mask=(j < M)[:, None] & (e < E)[None, :])


@triton.jit
def softmax_bwd_dq_kernel(
    Q, K, V, BIAS, MASK, POSQ, POSK, DO, LSE, DELTA, DQ,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbn, smb, spq, spk,
    H, HK, N, M, D, E, left, right,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, BAND: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    hk = h // (H // HK)
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    i64 = i.to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    q_in = (i < N)[:, None] & (d < D)[None, :]
    q = tl.load(Q + b * sqb + h * sqh + i64[:, None] * sqn + d[None, :], mask=q_in, other=0.0).to(DOT)
    do_in = (i < N)[:, None] & (e < E)[None, :]
    do = tl.load(DO + b * sob + h * soh + i64[:, None] * son + e[None, :], mask=do_in, other=0.0).to(DOT)
    delta = tl.load(DELTA + bh * N + i64, mask=i < N, other=0.0)
    dq = tl.zeros((BN, BD), tl.float32)
    lo, hi = 0, M
    if BAND == 1:
        first = tl.program_id(1) * BN + (M - N)
        if HAS_LEFT:
            lo = tl.maximum(first - left, 0) // BM * BM
        if HAS_RIGHT:
            hi = tl.minimum(first + BN + right, M)
    for j0 in range(lo, hi, BM):
        j = j0 + tl.arange(0, BM)
        j64 = j.to(tl.int64)
        k_in = (j < M)[None, :] & (d < D)[:, None]
        k = tl.load(K + b * skb + hk * skh + j64[None, :] * skn + d[:, None], mask=k_in, other=0.0).to(DOT)
        v_in = (j < M)[None, :] & (e < E)[:, None]
        v = tl.load(V + b * svb + hk * svh + j64[None, :] * svn + e[:, None], mask=v_in, other=0.0).to(DOT)
        p = _weights(
            q, k, i, j, b, h, BIAS, MASK, POSQ, POSK, LSE, bh, sbb, sbh, sbn, smb, spq, spk, N, M, left, right,
            SCALE, HAS_BIAS, HAS_MASK, BAND, HAS_LEFT, HAS_RIGHT, PRECISION,
        )  # fmt: skip
        ds = p * (tl.dot(do, v, input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(DOT), tl.trans(k), dq, input_precision=PRECISION)
    at = (bh * N + i64[:, None]) * D + d[None, :]
    tl.store(DQ + at, (dq * SCALE).to(DQ.dtype.element_ty), mask=q_in)


@triton.jit
def softmax_bwd_dbias_kernel(
    Q, K, V, BIAS, MASK, POSQ, POSK, DO, LSE, DELTA, DB,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son, sbb, sbh, sbn, smb, spq, spk,
    B, H, HK, N, M, D, E, left, right, BB, BH,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, BAND: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DB [BB, BH, N, M] (ROWS) or [BB, BH, 1, M]; BB is B or 1, BH is H or 1. The grid's last axis runs over query tiles if ROWS."""
    own = tl.program_id(0).to(tl.int64)
    own_b, own_h = own // BH, own % BH
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    j64 = j.to(tl.int64)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    acc = tl.zeros((BN, BM), tl.float32)
    i_first = tl.program_id(2) * BN
    i_last = N
    if ROWS:
        i_last = tl.minimum(i_first + BN, N)
    heads = H // BH
    for item in range(0, (B // BB) * heads):
        b = own_b + (item // heads)
        h = own_h + (item % heads)
        bh = b * H + h
        hk = h // (H // HK)
        k_in = (j < M)[None, :] & (d < D)[:, None]
        k = tl.load(K + b * skb + hk * skh + j64[None, :] * skn + d[:, None], mask=k_in, other=0.0).to(DOT)
        v_in = (j < M)[None, :] & (e < E)[:, None]
        v = tl.load(V + b * svb + hk * svh + j64[None, :] * svn + e[:, None], mask=v_in, other=0.0).to(DOT)
        for i0 in range(i_first, i_last, BN):
            i = i0 + tl.arange(0, BN)
            i64 = i.to(tl.int64)
            q_in = (i < N)[:, None] & (d < D)[None, :]
            q = tl.load(Q + b * sqb + h * sqh + i64[:, None] * sqn + d[None, :], mask=q_in, other=0.0).to(DOT)
            p = _weights(
                q, k, i, j, b, h, BIAS, MASK, POSQ, POSK, LSE, bh, sbb, sbh, sbn, smb, spq, spk, N, M, left, right,
                SCALE, HAS_BIAS, HAS_MASK, BAND, HAS_LEFT, HAS_RIGHT, PRECISION,
            )  # fmt: skip
            do_in = (i < N)[:, None] & (e < E)[None, :]
            do = tl.load(DO + b * sob + h * soh + i64[:, None] * son + e[None, :], mask=do_in, other=0.0).to(
                DOT
            )
            delta = tl.load(DELTA + bh * N + i64, mask=i < N, other=0.0)
            acc += p * (tl.dot(do, v, input_precision=PRECISION) - delta[:, None])
    if ROWS:
        i64 = (i_first + tl.arange(0, BN)).to(tl.int64)
        at = (own * N + i64[:, None]) * M + j64[None, :]
        tl.store(DB + at, acc, mask=(i64 < N)[:, None] & (j < M)[None, :])
    else:
        tl.store(DB + own * M + j64, tl.sum(acc, 0), mask=j < M)
