"""Triton kernels for scans with decay, in chunks of BT steps: without decay, one gate per step, or one gate per channel.

B batch, H heads, N steps, D, E head sizes; grid axis 0 is always B * H. All tensors are contiguous. CUM holds the cumulative log decay inside
each chunk: [B * H, chunks * BT] for GATE "scalar", [..., D] for "keys" (a gate per key channel), [..., E] for "values" (a gate per value channel:
``o_re = sum_i (q_r.k_i) v_ie e^{c_re - c_ie}``), padded.

- ``decay_state_fwd_kernel`` walks over the chunks and writes the state before each of them and the last one, one [BD, BE] tile per program.
- ``decay_out_fwd_kernel`` computes the outputs of one chunk from its state and its own keys.
- ``decay_scores_fwd_kernel`` computes the weights inside a chunk for gates per key channel, which ``decay_out_fwd_kernel`` then reads.
- ``decay_values_fwd_kernel`` computes the outputs for gates per value channel.

There are no backward kernels: each gradient of a scan with decay is itself such a scan (see ``ops.py``; the roles of keys and values change
places, hence the gates on either), so these serve all derivatives. Only differences of cumulative log decays that are at most zero are
exponentiated: two steps in different blocks of BB rows are both taken relative to the row before the later block, two steps of one block directly.
Sums, states and decays are float32. bfloat16 inputs are multiplied as such; float16 and float32 products run in TF32 (three passes for float32),
because states leave float16's range.
"""

import triton
import triton.language as tl

DOT_TYPES = {"bfloat16": tl.bfloat16, "float32": tl.float32}


@triton.jit
def decay_state_fwd_kernel(
    K, V, CUM, START, S,
    N, D, E, CHUNKS,
    GATE: tl.constexpr, HAS_START: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S[c] = state before chunk c: S[c + 1] = e^{total} S[c] + sum_j e^{total - cum_j} k_j v_j^T."""
    bh = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    t = tl.arange(0, BT)
    tile = d[:, None] * E + e[None, :]
    tile_in = (d < D)[:, None] & (e < E)[None, :]
    state = tl.zeros((BD, BE), tl.float32)
    if HAS_START:
        state = tl.load(START + bh * D * E + tile, mask=tile_in, other=0.0)
    for c in range(CHUNKS):
        tl.store(S + (bh * (CHUNKS + 1) + c) * D * E + tile, state, mask=tile_in)
        j = c * BT + t
        row = bh * N + j
        step = (bh * CHUNKS + c) * BT + t
        end = (bh * CHUNKS + c) * BT + BT - 1
        k = tl.load(K + row[None, :] * D + d[:, None], mask=(d < D)[:, None] & (j < N)[None, :], other=0.0)
        v = tl.load(V + row[:, None] * E + e[None, :], mask=(j < N)[:, None] & (e < E)[None, :], other=0.0)
        if GATE == "scalar":
            total = tl.load(CUM + end)
            k = k.to(tl.float32) * tl.exp(total - tl.load(CUM + step))[None, :]  # [BD, BT]
            state = state * tl.exp(total)
        elif GATE == "keys":
            total = tl.load(CUM + end * D + d, mask=d < D, other=0.0)
            cum = tl.load(CUM + step[None, :] * D + d[:, None], mask=(d < D)[:, None], other=0.0)
            k = k.to(tl.float32) * tl.exp(total[:, None] - cum)
            state = state * tl.exp(total)[:, None]
        elif GATE == "values":
            total = tl.load(CUM + end * E + e, mask=e < E, other=0.0)
            cum = tl.load(CUM + step[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0.0)
            v = v.to(tl.float32) * tl.exp(total[None, :] - cum)
            state = state * tl.exp(total)[None, :]
        state = tl.dot(k.to(DOT), v.to(DOT), state, input_precision=PRECISION)
    tl.store(S + (bh * (CHUNKS + 1) + CHUNKS) * D * E + tile, state, mask=tile_in)


@triton.jit
def decay_scores_fwd_kernel(
    Q, K, CUM, A,
    N, D, CHUNKS,
    INCLUSIVE: tl.constexpr,
    BT: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A[r, i] = sum_d q_rd k_id e^{cum_rd - cum_id} for i <= r (i < r unless INCLUSIVE), BB rows of a chunk."""
    bh = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    first = tl.program_id(2) * BB
    r = first + tl.arange(0, BB)
    t = tl.arange(0, BT)
    step = (bh * CHUNKS + c) * BT
    row = bh * N + c * BT
    left = N - c * BT  # steps from here to the end
    if first >= left:
        return
    acc = tl.zeros((BB, BT), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        q_in = (r < left)[:, None] & (d < D)[None, :]
        q = tl.load(Q + (row + r)[:, None] * D + d[None, :], mask=q_in, other=0.0).to(tl.float32)
        cq = tl.load(CUM + (step + r)[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
        anchor = tl.load(CUM + (step + tl.maximum(first - 1, 0)) * D + d, mask=d < D, other=0.0)
        k_in = (d < D)[:, None] & (t < tl.minimum(first, left))[None, :]
        k = tl.load(K + (row + t)[None, :] * D + d[:, None], mask=k_in, other=0.0).to(tl.float32)
        ck = tl.load(CUM + (step + t)[None, :] * D + d[:, None], mask=k_in, other=0.0)
        earlier = k * tl.exp(tl.where(k_in, anchor[:, None] - ck, 0.0))  # [BD, BT]
        later = q * tl.exp(cq - anchor[None, :])
        acc = tl.dot(later.to(DOT), earlier.to(DOT), acc, input_precision=PRECISION)
        for i in range(BB):
            here = first + i
            ki = tl.load(K + (row + here) * D + d, mask=(d < D) & (here < left), other=0.0).to(tl.float32)
            ci = tl.load(CUM + (step + here) * D + d, mask=d < D, other=0.0)
            gap = tl.where((r >= here)[:, None], cq - ci[None, :], 0.0)
            column = tl.sum(q * ki[None, :] * tl.exp(gap), 1)
            acc += tl.where((t == here)[None, :], column[:, None], 0.0)
    if INCLUSIVE:
        seen = r[:, None] >= t[None, :]
    else:
        seen = r[:, None] > t[None, :]
    acc = tl.where(seen, acc, 0.0)
    tl.store(A + (step + r)[:, None] * BT + t[None, :], acc.to(A.dtype.element_ty))


@triton.jit
def decay_out_fwd_kernel(
    Q, K, V, CUM, A, S, O,
    N, D, E, CHUNKS,
    GATE: tl.constexpr, INCLUSIVE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk and one tile of values: e^{cum_r} q_r S + sum_{j <= r} e^{cum_r - cum_j} (q_r.k_j) v_j."""
    bh = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    t = tl.arange(0, BT)
    j = c * BT + t
    row = bh * N + j
    step = (bh * CHUNKS + c) * BT + t
    scores = tl.zeros((BT, BT), tl.float32)
    past = tl.zeros((BT, BE), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        q_in = (j < N)[:, None] & (d < D)[None, :]
        q = tl.load(Q + row[:, None] * D + d[None, :], mask=q_in, other=0.0)
        if GATE == "keys":
            q = q.to(tl.float32) * tl.exp(tl.load(CUM + step[:, None] * D + d[None, :], mask=q_in, other=0.0))
        else:
            k_in = (d < D)[:, None] & (j < N)[None, :]
            k = tl.load(K + row[None, :] * D + d[:, None], mask=k_in, other=0.0)
            scores = tl.dot(q.to(DOT), k.to(DOT), scores, input_precision=PRECISION)
        at = (bh * (CHUNKS + 1) + c) * D * E + d[:, None] * E + e[None, :]
        state = tl.load(S + at, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
        past = tl.dot(q.to(DOT), state.to(DOT), past, input_precision=PRECISION)
    if GATE == "keys":
        scores = tl.load(A + step[:, None] * BT + t[None, :])
    else:
        if INCLUSIVE:
            seen = t[:, None] >= t[None, :]
        else:
            seen = t[:, None] > t[None, :]
        scores = tl.where(seen, scores, 0.0)
        if GATE == "scalar":
            cum = tl.load(CUM + step)
            # Masked before exp: above the diagonal the difference may be large.
            scores = scores * tl.exp(tl.where(seen, cum[:, None] - cum[None, :], 0.0))
            past = past * tl.exp(cum)[:, None]
    o_in = (j < N)[:, None] & (e < E)[None, :]
    v = tl.load(V + row[:, None] * E + e[None, :], mask=o_in, other=0.0)
    out = tl.dot(scores.to(DOT), v.to(DOT), past, input_precision=PRECISION)
    tl.store(O + row[:, None] * E + e[None, :], out.to(O.dtype.element_ty), mask=o_in)


@triton.jit
def decay_values_fwd_kernel(
    Q, K, V, CUM, A, S, O,
    N, D, E, CHUNKS,
    INCLUSIVE: tl.constexpr, HAS_A: tl.constexpr,
    BT: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``o_re = e^{cum_re} (q_r S)_e + sum_{i <= r} (q_r.k_i) v_ie e^{cum_re - cum_ie}`` for BB rows of a chunk.

    With HAS_A the weights come from A instead of ``q.k`` and there is no state.
    """
    bh = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = BT // BB
    c = tl.program_id(1) // blocks
    first = tl.program_id(1) % blocks * BB
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    r = first + tl.arange(0, BB)
    t = tl.arange(0, BT)
    step = (bh * CHUNKS + c) * BT
    row = bh * N + c * BT
    left = N - c * BT  # steps from here to the end
    if first >= left:
        return
    cr = tl.load(CUM + (step + r)[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0.0)
    out = tl.zeros((BB, BE), tl.float32)
    if HAS_A:
        scores = tl.load(A + (step + r)[:, None] * BT + t[None, :]).to(tl.float32)
    else:
        scores = tl.zeros((BB, BT), tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            q_in = (r < left)[:, None] & (d < D)[None, :]
            q = tl.load(Q + (row + r)[:, None] * D + d[None, :], mask=q_in, other=0.0).to(DOT)
            k_in = (d < D)[:, None] & (t < left)[None, :]
            k = tl.load(K + (row + t)[None, :] * D + d[:, None], mask=k_in, other=0.0).to(DOT)
            scores = tl.dot(q, k, scores, input_precision=PRECISION)
            at = (bh * (CHUNKS + 1) + c) * D * E + d[:, None] * E + e[None, :]
            state = tl.load(S + at, mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
            out = tl.dot(q, state.to(DOT), out, input_precision=PRECISION)
        out = out * tl.exp(cr)
    if INCLUSIVE:
        seen = r[:, None] >= t[None, :]
    else:
        seen = r[:, None] > t[None, :]
    scores = tl.where(seen, scores, 0.0)
    anchor = tl.load(CUM + (step + tl.maximum(first - 1, 0)) * E + e, mask=e < E, other=0.0)
    v_in = (t < tl.minimum(first, left))[:, None] & (e < E)[None, :]
    v = tl.load(V + (row + t)[:, None] * E + e[None, :], mask=v_in, other=0.0).to(tl.float32)
    cv = tl.load(CUM + (step + t)[:, None] * E + e[None, :], mask=v_in, other=0.0)
    earlier = v * tl.exp(tl.where(v_in, anchor[None, :] - cv, 0.0))  # [BT, BE]
    mixed = tl.dot(scores.to(DOT), earlier.to(DOT), input_precision=PRECISION)
    out += mixed * tl.exp(cr - anchor[None, :])
    for i in range(BB):
        here = first + i
        vi = tl.load(V + (row + here) * E + e, mask=(e < E) & (here < left), other=0.0).to(tl.float32)
        ci = tl.load(CUM + (step + here) * E + e, mask=e < E, other=0.0)
        gap = tl.where((r >= here)[:, None], cr - ci[None, :], 0.0)
        weight = tl.sum(tl.where((t == here)[None, :], scores, 0.0), 1)
        out += weight[:, None] * vi[None, :] * tl.exp(gap)
    o_in = (r < left)[:, None] & (e < E)[None, :]
    tl.store(O + (row + r)[:, None] * E + e[None, :], out.to(O.dtype.element_ty), mask=o_in)
