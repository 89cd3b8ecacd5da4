"""Triton kernels for the delta rule: the walk from chunk to chunk, and the products of all pairs of a chunk.

Per chunk the walk is ``x = u - w S``, then ``S' = a S + k^T x + g`` (see ``walk.py``; here the triangular system is already solved into u and w). Its
gradient is the same walk in the other direction with w and k in each other's place and both signs turned, so one kernel serves derivatives of
every order. What is parallel over chunks are products ``a b^T`` of small matrices; those of such products are of the same form.

Everything in memory and all sums are float32. bfloat16 inputs are multiplied as such; float16 and float32 products run in TF32 (three passes for
float32), because gradients of states leave float16's range.
"""

import triton
import triton.language as tl


@triton.jit
def delta_walk_fwd_kernel(
    U, W, K, ACROSS, EXTRA, START, X, MET, LAST,
    CHUNKS, T, D, E,
    GATE: tl.constexpr, HAS_EXTRA: tl.constexpr, ADJOINT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All contiguous float32: U, X [Z, C, T, E], W, K [Z, C, T, D], ACROSS [Z, C] or [Z, C, D], EXTRA, MET [Z, C, D, E], START, LAST [Z, D, E].

    MET is the state that each chunk meets; BT rows of a chunk at a time, BE columns of the state per program.
    """
    z = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    d = tl.arange(0, BD)
    t = tl.arange(0, BT)
    tile = d[:, None] * E + e[None, :]
    tile_in = (d < D)[:, None] & (e < E)[None, :]
    state = tl.load(START + z * D * E + tile, mask=tile_in, other=0.0)
    for step in range(CHUNKS):
        c = step
        if ADJOINT:
            c = CHUNKS - 1 - step
        at = z * CHUNKS + c
        tl.store(MET + at * D * E + tile, state, mask=tile_in)
        past = state.to(DOT)
        if GATE == "scalar":
            state = state * tl.load(ACROSS + at)
        elif GATE == "keys":
            state = state * tl.load(ACROSS + at * D + d, mask=d < D, other=0.0)[:, None]
        if HAS_EXTRA:
            state += tl.load(EXTRA + at * D * E + tile, mask=tile_in, other=0.0)
        for t0 in range(0, T, BT):
            row = at * T + t0 + t
            in_t = t0 + t < T
            w_in = in_t[:, None] & (d < D)[None, :]
            w = tl.load(W + row[:, None] * D + d[None, :], mask=w_in, other=0.0).to(DOT)
            x_in = in_t[:, None] & (e < E)[None, :]
            u = tl.load(U + row[:, None] * E + e[None, :], mask=x_in, other=0.0)
            read = tl.dot(w, past, input_precision=PRECISION)
            if ADJOINT:
                x = u + read
                write = -x
            else:
                x = u - read
                write = x
            tl.store(X + row[:, None] * E + e[None, :], x, mask=x_in)
            k_in = (d < D)[:, None] & in_t[None, :]
            k = tl.load(K + row[None, :] * D + d[:, None], mask=k_in, other=0.0).to(DOT)  # [BD, BT]
            state = tl.dot(k, write.to(DOT), state, input_precision=PRECISION)
    tl.store(LAST + z * D * E + tile, state, mask=tile_in)


@triton.jit
def delta_pairs_fwd_kernel(
    A, B, O,
    a_strides, b_strides, R, S, W,
    BR: tl.constexpr, BW: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O [L, R, S] = A [L, R, W] B [L, S, W]^T, float32; A and B with any strides."""
    at = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    s = tl.program_id(2) * BR + tl.arange(0, BR)
    acc = tl.zeros((BR, BR), tl.float32)
    for w0 in range(0, W, BW):
        w = w0 + tl.arange(0, BW)
        a_at = A + at * a_strides[0] + r[:, None] * a_strides[1] + w[None, :] * a_strides[2]
        a = tl.load(a_at, mask=(r < R)[:, None] & (w < W)[None, :], other=0.0).to(DOT)
        b_at = B + at * b_strides[0] + s[None, :] * b_strides[1] + w[:, None] * b_strides[2]
        b = tl.load(b_at, mask=(s < S)[None, :] & (w < W)[:, None], other=0.0).to(DOT)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(O + at * R * S + r[:, None] * S + s[None, :], acc, mask=(r < R)[:, None] & (s < S)[None, :])
