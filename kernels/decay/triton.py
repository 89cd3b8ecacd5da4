"""Triton kernels for the scan with scalar decay, in chunks of BT steps.

B batch, H heads, N steps, D, E head sizes; grid axis 0 is always B * H. All tensors are contiguous; CUM holds the cumulative log decay inside
each chunk, [B * H, chunks * BT], padded.

- ``decay_state_fwd_kernel`` walks over the chunks and writes the state before each of them, one [BD, BE] tile per program.
- ``decay_out_fwd_kernel`` computes the outputs of one chunk from its state and its own keys.

There are no backward kernels: each gradient of a scan with scalar decay is itself such a scan (see ``ops.py``), so these two serve all
derivatives. Only differences of cumulative log decays that are at most zero are exponentiated. Sums, states and decays are float32.
bfloat16 inputs are multiplied as such; float16 and float32 products run in TF32 (three passes for float32), because states leave float16's
range.
"""

import triton
import triton.language as tl

DOT_TYPES = {"bfloat16": tl.bfloat16, "float32": tl.float32}


@triton.jit
def decay_state_fwd_kernel(
    K, V, CUM, S,
    N, D, E, CHUNKS,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S[c] = state before chunk c: S[c + 1] = e^{total} S[c] + sum_j e^{total - cum_j} k_j v_j^T."""
    bh = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    t = tl.arange(0, BT)
    state = tl.zeros((BD, BE), tl.float32)
    s_in = (d < D)[:, None] & (e < E)[None, :]
    for c in range(CHUNKS):
        at = (bh * CHUNKS + c) * D * E + d[:, None] * E + e[None, :]
        tl.store(S + at, state, mask=s_in)
        j = c * BT + t
        row = bh * N + j
        k = tl.load(K + row[None, :] * D + d[:, None], mask=(d < D)[:, None] & (j < N)[None, :], other=0.0)
        v = tl.load(V + row[:, None] * E + e[None, :], mask=(j < N)[:, None] & (e < E)[None, :], other=0.0)
        cum = tl.load(CUM + (bh * CHUNKS + c) * BT + t)
        total = tl.load(CUM + (bh * CHUNKS + c) * BT + BT - 1)
        k = k.to(tl.float32) * tl.exp(total - cum)[None, :]  # [BD, BT]
        state = tl.dot(k.to(DOT), v.to(DOT), state * tl.exp(total), input_precision=PRECISION)


@triton.jit
def decay_out_fwd_kernel(
    Q, K, V, CUM, S, O,
    N, D, E, CHUNKS,
    INCLUSIVE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and one tile of values: e^{cum_r} q_r S + sum_{j <= r} e^{cum_r - cum_j} (q_r.k_j) v_j."""
    bh = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    t = tl.arange(0, BT)
    j = c * BT + t
    row = bh * N + j
    cum = tl.load(CUM + (bh * CHUNKS + c) * BT + t)
    scores = tl.zeros((BT, BT), tl.float32)
    past = tl.zeros((BT, BE), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        q_in = (j < N)[:, None] & (d < D)[None, :]
        q = tl.load(Q + row[:, None] * D + d[None, :], mask=q_in, other=0.0).to(DOT)
        k = tl.load(
            K + row[None, :] * D + d[:, None], mask=(d < D)[:, None] & (j < N)[None, :], other=0.0
        ).to(DOT)
        scores = tl.dot(q, k, scores, input_precision=PRECISION)
        at = (bh * CHUNKS + c) * D * E + d[:, None] * E + e[None, :]
        state = tl.load(S + at, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
        past = tl.dot(q, state.to(DOT), past, input_precision=PRECISION)
    if INCLUSIVE:
        seen = t[:, None] >= t[None, :]
    else:
        seen = t[:, None] > t[None, :]
    # Masked before exp: above the diagonal the difference may be large.
    gap = tl.where(seen, cum[:, None] - cum[None, :], 0.0)
    scores = tl.where(seen, scores * tl.exp(gap), 0.0)
    o_in = (j < N)[:, None] & (e < E)[None, :]
    v = tl.load(V + row[:, None] * E + e[None, :], mask=o_in, other=0.0)
    out = tl.dot(scores.to(DOT), v.to(DOT), past * tl.exp(cum)[:, None], input_precision=PRECISION)
    tl.store(O + row[:, None] * E + e[None, :], out.to(O.dtype.element_ty), mask=o_in)
