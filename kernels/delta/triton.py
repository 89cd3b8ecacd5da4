"""Triton kernel for the sequential part of the delta rule.

In chunks the rule is ``S_{c+1} = P_c S_c + R_c`` with one [D, D] matrix and one [D, E] matrix per chunk; everything else is products and a
triangular solve that run in parallel over chunks and that the vendor's libraries do best. ``delta_states_fwd_kernel`` walks over the chunks with
the state in registers, except where [D, D] does not fit there: then it multiplies blocks of BK columns with the rows of the state that it has just
written. Its gradient is the same recurrence with transposed matrices, backwards (see ``ops.py``), so it serves all derivatives.

All in float32: errors in P multiply along the sequence. Products run as three TF32 passes on NVIDIA and as float32 matrix instructions on AMD.
"""

import triton
import triton.language as tl


@triton.jit
def delta_states_fwd_kernel(
    P, R, START, S,
    CHUNKS, D, E,
    HAS_START: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S[0] = START, S[c + 1] = P[c] S[c] + R[c]; P [BH, C, D, D], R [BH, C, D, E], S [BH, C + 1, D, E], contiguous float32."""
    bh = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    d = tl.arange(0, BD)
    tile = d[:, None] * E + e[None, :]
    tile_in = (d < D)[:, None] & (e < E)[None, :]
    k = tl.arange(0, BK)
    state = tl.zeros((BD, BE), tl.float32)
    if HAS_START:
        state = tl.load(START + bh * D * E + tile, mask=tile_in, other=0.0)
    tl.store(S + bh * (CHUNKS + 1) * D * E + tile, state, mask=tile_in)
    for c in range(CHUNKS):
        at = bh * CHUNKS + c
        write = tl.load(R + at * D * E + tile, mask=tile_in, other=0.0)
        if BK == BD:
            keep_in = (d < D)[:, None] & (k < D)[None, :]
            keep = tl.load(P + at * D * D + d[:, None] * D + k[None, :], mask=keep_in, other=0.0)
            state = tl.dot(keep, state, write, input_precision=PRECISION)
        else:
            tl.debug_barrier()  # the whole tile of the state before this chunk is in memory now
            state = write
            for k0 in range(0, D, BK):
                row = k0 + k
                keep_in = (d < D)[:, None] & (row < D)[None, :]
                keep = tl.load(P + at * D * D + d[:, None] * D + row[None, :], mask=keep_in, other=0.0)
                past_in = (row < D)[:, None] & (e < E)[None, :]
                past = tl.load(S + (at + bh) * D * E + row[:, None] * E + e[None, :], mask=past_in, other=0.0)
                state = tl.dot(keep, past, state, input_precision=PRECISION)
        tl.store(S + (at + bh + 1) * D * E + tile, state, mask=tile_in)
