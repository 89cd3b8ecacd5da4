"""Triton kernels for the global state and its reads, forward and backward. Noncausal.

B batch, H heads, N queries, M keys, F feature size, E head size of values; grid axis 0 is always B * H.

- ``linear_state_fwd_kernel`` sums ``w_j x_j y_j^T`` and three weighted row sums over tokens, split over the token axis; the partial sums
  are added in a fixed order outside, so results do not depend on scheduling. It serves the state (x features of keys, y values) and the
  token sums in the backward of a read (x features of queries, y output gradients).
- ``linear_read_fwd_kernel`` / ``linear_read_bwd_q_kernel``: plain, divided, and MALA's read, all from a mean state in float32.
- ``linear_state_bwd_kernel``: gradients of keys, values, and key weights.

Precision: sums in float32. Products of float16 and bfloat16 inputs use these types in the forward; float16 gradients and ``exp`` and
``sqrelu`` features of float16 inputs can leave its range, so those products run in TF32 (same mantissa, float32 range). Products of
float32 inputs use three TF32 passes on NVIDIA (error near float32) and float32 matrix instructions on AMD: always the matrix unit.
"""

import triton
import triton.language as tl

from kernels.linear.features_triton import dphi, phi

DOT_TYPES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}


@triton.jit
def linear_state_fwd_kernel(
    X, XR, Y, MASK, WS, WA, WB, WC, S, A, BR, C,
    sxb, sxh, sxn, srb, srh, srn, syb, syh, syn, smb,
    H, M, F, E, SPLIT,
    FEATURE: tl.constexpr, HAS_ROT: tl.constexpr, HAS_MASK: tl.constexpr, WEIGHTS: tl.constexpr,
    BF: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S = sum_j ws_j x'_j y_j^T, A = sum_j wa_j x_j, BR = sum_j wb_j x'_j, C = sum_j wc_j y_j over one split of the tokens.

    WEIGHTS: 0 none, 1 the weight WS for S, A and BR, 4 one vector each. x = phi(X), x' = XR if HAS_ROT else x.
    """
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    tiles_e = tl.cdiv(E, BE)
    f = (tl.program_id(2) // tiles_e) * BF + tl.arange(0, BF)
    e = (tl.program_id(2) % tiles_e) * BE + tl.arange(0, BE)
    b, h = bh // H, bh % H
    x_base, r_base, y_base = X + b * sxb + h * sxh, XR + b * srb + h * srh, Y + b * syb + h * syh
    acc = tl.zeros((BF, BE), tl.float32)
    sum_a = tl.zeros((BF,), tl.float32)
    sum_b = tl.zeros((BF,), tl.float32)
    sum_c = tl.zeros((BE,), tl.float32)
    start = split * SPLIT
    for j0 in range(start, tl.minimum(start + SPLIT, M), BM):
        j = j0 + tl.arange(0, BM)
        j64 = j.to(tl.int64)
        keep = j < M
        if HAS_MASK:
            keep = keep & (tl.load(MASK + b * smb + j64, mask=keep, other=0) != 0)
        x_in = keep[None, :] & (f < F)[:, None]
        y = tl.load(
            y_base + j64[:, None] * syn + e[None, :], mask=keep[:, None] & (e < E)[None, :], other=0.0
        )
        x = tl.load(x_base + j64[None, :] * sxn + f[:, None], mask=x_in, other=0.0).to(tl.float32)
        x = tl.where(x_in, phi(x, FEATURE), 0.0)  # [BF, BM]
        rot = x
        if HAS_ROT:
            rot = tl.load(r_base + j64[None, :] * srn + f[:, None], mask=x_in, other=0.0).to(tl.float32)
        if WEIGHTS == 4:
            w_at = bh * M + j64
            left = (rot * tl.load(WS + w_at, mask=keep, other=0.0)[None, :]).to(DOT)
            sum_a += tl.sum(x * tl.load(WA + w_at, mask=keep, other=0.0)[None, :], 1)
            if HAS_ROT:
                sum_b += tl.sum(rot * tl.load(WB + w_at, mask=keep, other=0.0)[None, :], 1)
            sum_c += tl.sum(y.to(tl.float32) * tl.load(WC + w_at, mask=keep, other=0.0)[:, None], 0)
        else:
            if WEIGHTS == 1:
                w = tl.load(WS + bh * M + j64, mask=keep, other=0.0)
                x, rot = x * w[None, :], rot * w[None, :]
            left = rot.to(DOT)
            # Sums take the rounded numbers that the product takes: the centred state is then an exact covariance of these.
            if HAS_ROT:
                sum_a += tl.sum(x, 1)
                sum_b += tl.sum(left.to(tl.float32), 1)
            else:
                sum_a += tl.sum(left.to(tl.float32), 1)
            sum_c += tl.sum(y.to(tl.float32), 0)
        acc = tl.dot(left, y.to(DOT), acc, input_precision=PRECISION)
    part = bh * tl.num_programs(1) + split
    tl.store(
        S + part * F * E + f.to(tl.int64)[:, None] * E + e[None, :],
        acc,
        mask=(f < F)[:, None] & (e < E)[None, :],
    )
    if tl.program_id(2) % tiles_e == 0:
        tl.store(A + part * F + f, sum_a, mask=f < F)
        if HAS_ROT:
            tl.store(BR + part * F + f, sum_b, mask=f < F)
    if tl.program_id(2) // tiles_e == 0:
        tl.store(C + part * E + e, sum_c, mask=e < E)


@triton.jit
def linear_read_fwd_kernel(
    Q, QR, CM, KB, KR, VB, GAIN, EPS, O,
    sqb, sqh, sqn, srb, srh, srn,
    H, N, F, E,
    FEATURE: tl.constexpr, HAS_ROT: tl.constexpr, MODE: tl.constexpr,
    BF: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries. MODE "none": gain q C; "denom": q C / (z + eps); "mala": q'C (1/(z+eps) + g) + (r/(z+eps) + g (r-z)) vbar."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    i64 = i.to(tl.int64)
    q_base = Q + b * sqb + h * sqh + i64[:, None] * sqn
    r_base = QR + b * srb + h * srh + i64[:, None] * srn
    gain = tl.load(GAIN + b)
    row = tl.zeros((BN,), tl.float32) + gain
    coef = tl.zeros((BN,), tl.float32)
    if MODE != "none":
        z = tl.zeros((BN,), tl.float32)
        r = tl.zeros((BN,), tl.float32)
        for f0 in range(0, F, BF):
            f = f0 + tl.arange(0, BF)
            q_in = (i < N)[:, None] & (f < F)[None, :]
            x = tl.load(q_base + f[None, :], mask=q_in, other=0.0).to(tl.float32)
            x = tl.where(q_in, phi(x, FEATURE), 0.0)
            if HAS_ROT:
                rot = tl.load(r_base + f[None, :], mask=q_in, other=0.0).to(DOT).to(tl.float32)
                r += tl.sum(rot * tl.load(KR + bh * F + f, mask=f < F, other=0.0)[None, :], 1)
            else:
                x = x.to(DOT).to(
                    tl.float32
                )  # the numbers that the product takes: rows then sum to one exactly
            z += tl.sum(x * tl.load(KB + bh * F + f, mask=f < F, other=0.0)[None, :], 1)
        inv = 1.0 / (z + tl.load(EPS + b))
        row = inv
        if MODE == "mala":
            if not HAS_ROT:
                r = z
            row = inv + gain
            coef = r * inv + gain * (r - z)
    for e0 in range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        acc = tl.zeros((BN, BE), tl.float32)
        for f0 in range(0, F, BF):
            f = f0 + tl.arange(0, BF)
            q_in = (i < N)[:, None] & (f < F)[None, :]
            if HAS_ROT:
                left = tl.load(r_base + f[None, :], mask=q_in, other=0.0).to(DOT)
            else:
                x = tl.load(q_base + f[None, :], mask=q_in, other=0.0).to(tl.float32)
                left = tl.where(q_in, phi(x, FEATURE), 0.0).to(DOT)
            c_in = (f < F)[:, None] & (e < E)[None, :]
            c = tl.load(CM + bh * F * E + f[:, None] * E + e[None, :], mask=c_in, other=0.0)
            acc = tl.dot(left, c.to(DOT), acc, input_precision=PRECISION)
        out = acc * row[:, None]
        if MODE == "mala":
            out += coef[:, None] * tl.load(VB + bh * E + e, mask=e < E, other=0.0)[None, :]
        o_in = (i < N)[:, None] & (e < E)[None, :]
        tl.store(O + (bh * N + i64[:, None]) * E + e[None, :], out.to(O.dtype.element_ty), mask=o_in)


@triton.jit
def linear_read_bwd_q_kernel(
    Q, QR, CM, KB, KR, VB, GAIN, EPS, DO, DQ, DQR, WS, WA, WB, WC,
    sqb, sqh, sqn, srb, srh, srn, sob, soh, son,
    H, N, F, E,
    FEATURE: tl.constexpr, HAS_ROT: tl.constexpr, MODE: tl.constexpr,
    BF: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, FWD_DOT: tl.constexpr,
):  # fmt: skip
    """Query gradients of one tile, and per query the weights with which the token sums of the state gradients are taken."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    i64 = i.to(tl.int64)
    f = tl.arange(0, BF)
    acc = tl.zeros((BN, BF), tl.float32)
    along_v = tl.zeros((BN,), tl.float32)
    for e0 in range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        o_in = (i < N)[:, None] & (e < E)[None, :]
        do = tl.load(DO + b * sob + h * soh + i64[:, None] * son + e[None, :], mask=o_in, other=0.0)
        c_in = (e < E)[:, None] & (f < F)[None, :]
        c = tl.load(CM + bh * F * E + f[None, :] * E + e[:, None], mask=c_in, other=0.0)  # [BE, BF]
        acc = tl.dot(do.to(DOT), c.to(DOT), acc, input_precision=PRECISION)
        if MODE == "mala":
            along_v += tl.sum(do.to(tl.float32) * tl.load(VB + bh * E + e, mask=e < E, other=0.0)[None, :], 1)
    q_in = (i < N)[:, None] & (f < F)[None, :]
    raw = tl.load(Q + b * sqb + h * sqh + i64[:, None] * sqn + f[None, :], mask=q_in, other=0.0).to(
        tl.float32
    )
    x = tl.where(q_in, phi(raw, FEATURE), 0.0)
    rot = x
    if HAS_ROT:
        rot = tl.load(QR + b * srb + h * srh + i64[:, None] * srn + f[None, :], mask=q_in, other=0.0).to(
            tl.float32
        )
    else:
        x = x.to(FWD_DOT).to(tl.float32)  # as the forward rounded it
        rot = x
    gain = tl.load(GAIN + b)
    row = tl.zeros((BN,), tl.float32) + gain
    dz = tl.zeros((BN,), tl.float32)
    dr = tl.zeros((BN,), tl.float32)
    coef = tl.zeros((BN,), tl.float32)
    kb = tl.load(KB + bh * F + f, mask=f < F, other=0.0)
    kr = kb
    if MODE != "none":
        z = tl.sum(x * kb[None, :], 1)
        inv = 1.0 / (z + tl.load(EPS + b))
        along = tl.sum(rot * acc, 1)  # dO . (q'C) without ever forming q'C
        row = inv
        dz = -inv * inv * along
        if MODE == "mala":
            r = z
            if HAS_ROT:
                kr = tl.load(KR + bh * F + f, mask=f < F, other=0.0)
                r = tl.sum(rot * kr[None, :], 1)
            row = inv + gain
            coef = r * inv + gain * (r - z)
            dr = along_v * row
            dz = -inv * inv * (along + r * along_v) - gain * along_v
    grad = acc * row[:, None]
    if HAS_ROT:
        grad += dr[:, None] * kr[None, :]
        r_at = (bh * N + i64[:, None]) * F + f[None, :]
        tl.store(DQR + r_at, grad.to(DQR.dtype.element_ty), mask=q_in)
        grad = dz[:, None] * kb[None, :]
    else:
        dz += dr
        grad += dz[:, None] * kb[None, :]
    grad = grad * dphi(raw, FEATURE)
    tl.store(DQ + (bh * N + i64[:, None]) * F + f[None, :], grad.to(DQ.dtype.element_ty), mask=q_in)
    at = bh * N + i64
    tl.store(WS + at, row, mask=i < N)
    tl.store(WA + at, dz, mask=i < N)
    tl.store(WB + at, dr, mask=i < N)
    tl.store(WC + at, coef, mask=i < N)


@triton.jit
def linear_state_bwd_kernel(
    X, XR, Y, MASK, W, DS, DA, DB, DC, DX, DXR, DY, DW,
    sxb, sxh, sxn, srb, srh, srn, syb, syh, syn, smb,
    H, M, F, E,
    FEATURE: tl.constexpr, HAS_ROT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_W: tl.constexpr,
    BF: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, and of the key weights."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    j = tl.program_id(1) * BM + tl.arange(0, BM)
    j64 = j.to(tl.int64)
    keep = j < M
    if HAS_MASK:
        keep = keep & (tl.load(MASK + b * smb + j64, mask=keep, other=0) != 0)
    x_base = X + b * sxb + h * sxh + j64[:, None] * sxn
    r_base = XR + b * srb + h * srh + j64[:, None] * srn
    y_base = Y + b * syb + h * syh + j64[:, None] * syn
    w = tl.full((BM,), 1.0, tl.float32)
    if HAS_W:
        w = tl.load(W + bh * M + j64, mask=keep, other=0.0)
    dw = tl.zeros((BM,), tl.float32)
    # Masked rows are written as zeros; rows past the end are not written.
    for f0 in range(0, F, BF):
        f = f0 + tl.arange(0, BF)
        acc = tl.zeros((BM, BF), tl.float32)
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            y = tl.load(y_base + e[None, :], mask=keep[:, None] & (e < E)[None, :], other=0.0)
            ds_in = (e < E)[:, None] & (f < F)[None, :]
            ds = tl.load(DS + bh * F * E + f[None, :] * E + e[:, None], mask=ds_in, other=0.0)  # [BE, BF]
            acc = tl.dot(y.to(DOT), ds.to(DOT), acc, input_precision=PRECISION)
        x_in = keep[:, None] & (f < F)[None, :]
        raw = tl.load(x_base + f[None, :], mask=x_in, other=0.0).to(tl.float32)
        da = tl.load(DA + bh * F + f, mask=f < F, other=0.0)
        out_in = (j < M)[:, None] & (f < F)[None, :]
        at = (bh * M + j64[:, None]) * F + f[None, :]
        if HAS_ROT:
            acc += tl.load(DB + bh * F + f, mask=f < F, other=0.0)[None, :]
            if HAS_W:
                rot = tl.load(r_base + f[None, :], mask=x_in, other=0.0).to(tl.float32)
                dw += tl.sum(rot * acc, 1)
            tl.store(DXR + at, tl.where(x_in, acc * w[:, None], 0.0).to(DXR.dtype.element_ty), mask=out_in)
            grad = tl.zeros((BM, BF), tl.float32) + da[None, :]
        else:
            grad = acc + da[None, :]
        if HAS_W:
            weighed = grad
            dw += tl.sum(tl.where(x_in, phi(raw, FEATURE), 0.0) * weighed, 1)
        grad = tl.where(x_in, grad * w[:, None] * dphi(raw, FEATURE), 0.0)
        tl.store(DX + at, grad.to(DX.dtype.element_ty), mask=out_in)
    if HAS_W:
        tl.store(DW + bh * M + j64, tl.where(keep, dw, 0.0), mask=j < M)
    for e0 in range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        acc = tl.zeros((BM, BE), tl.float32)
        for f0 in range(0, F, BF):
            f = f0 + tl.arange(0, BF)
            x_in = keep[:, None] & (f < F)[None, :]
            if HAS_ROT:
                left = tl.load(r_base + f[None, :], mask=x_in, other=0.0).to(tl.float32)
            else:
                left = tl.load(x_base + f[None, :], mask=x_in, other=0.0).to(tl.float32)
                left = tl.where(x_in, phi(left, FEATURE), 0.0)
            ds_in = (f < F)[:, None] & (e < E)[None, :]
            ds = tl.load(DS + bh * F * E + f[:, None] * E + e[None, :], mask=ds_in, other=0.0)  # [BF, BE]
            acc = tl.dot((left * w[:, None]).to(DOT), ds.to(DOT), acc, input_precision=PRECISION)
        acc += tl.load(DC + bh * E + e, mask=e < E, other=0.0)[None, :]
        acc = tl.where(keep[:, None], acc, 0.0)
        out_in = (j < M)[:, None] & (e < E)[None, :]
        tl.store(DY + (bh * M + j64[:, None]) * E + e[None, :], acc.to(DY.dtype.element_ty), mask=out_in)
