"""Triton kernel of the linear memory: the walk from chunk to chunk with its weights and its momentum.

Per chunk and for two states, ``x = u - w1 S1 - w2 S2``, then ``S1' = a S1 + f S2 + k1^T x + g1`` and ``S2' = l S1 + s S2 + k2^T x + g2``, all read before the chunk.
Learning is the case S1 = weights, S2 = momentum, w2 = 0, l = 0: x is what the weights at the chunk's start miss of the values. Its gradient is the same
walk in the other direction with w and k, and f and l, in each other's place and all signs of the products turned: one kernel serves derivatives of every
order. What is absent (None) costs nothing.

Everything in memory and all sums are float32; products as in ``kernels/delta/triton.py``.
"""

import triton
import triton.language as tl


@triton.jit
def memory_walk_fwd_kernel(
    U, W1, W2, K1, K2, GATE, EXTRA1, EXTRA2, START1, START2, X, MET1, MET2, LAST1, LAST2,
    CHUNKS, T, D, E,
    ADJOINT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All contiguous float32: U, X [Z, C, T, E], W, K [Z, C, T, D], GATE [Z, C, 4] = a, f, l, s, EXTRA, MET [Z, C, D, E], START, LAST [Z, D, E].

    MET are the states that each chunk meets; BT rows of a chunk at a time, BE columns of both states per program.
    """
    z = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    d = tl.arange(0, BD)
    t = tl.arange(0, BT)
    tile = d[:, None] * E + e[None, :]
    tile_in = (d < D)[:, None] & (e < E)[None, :]
    first = tl.load(START1 + z * D * E + tile, mask=tile_in, other=0.0)
    second = tl.load(START2 + z * D * E + tile, mask=tile_in, other=0.0)
    for step in range(CHUNKS):
        c = step
        if ADJOINT:
            c = CHUNKS - 1 - step
        at = z * CHUNKS + c
        tl.store(MET1 + at * D * E + tile, first, mask=tile_in)
        tl.store(MET2 + at * D * E + tile, second, mask=tile_in)
        past1 = first.to(DOT)
        past2 = second.to(DOT)
        mixed = first * tl.load(GATE + at * 4) + second * tl.load(GATE + at * 4 + 1)
        second = first * tl.load(GATE + at * 4 + 2) + second * tl.load(GATE + at * 4 + 3)
        first = mixed
        if EXTRA1 is not None:
            first += tl.load(EXTRA1 + at * D * E + tile, mask=tile_in, other=0.0)
        if EXTRA2 is not None:
            second += tl.load(EXTRA2 + at * D * E + tile, mask=tile_in, other=0.0)
        for t0 in range(0, T, BT):
            row = at * T + t0 + t
            in_t = t0 + t < T
            by_row = row[:, None] * D + d[None, :]
            row_in = in_t[:, None] & (d < D)[None, :]
            by_column = row[None, :] * D + d[:, None]
            column_in = (d < D)[:, None] & in_t[None, :]
            x_in = in_t[:, None] & (e < E)[None, :]
            read = tl.zeros((BT, BE), tl.float32)
            w = tl.load(W1 + by_row, mask=row_in, other=0.0).to(DOT)
            read = tl.dot(w, past1, read, input_precision=PRECISION)
            if W2 is not None:
                w = tl.load(W2 + by_row, mask=row_in, other=0.0).to(DOT)
                read = tl.dot(w, past2, read, input_precision=PRECISION)
            u = tl.load(U + row[:, None] * E + e[None, :], mask=x_in, other=0.0)
            if ADJOINT:
                x = u + read
                write = (-x).to(DOT)
            else:
                x = u - read
                write = x.to(DOT)
            tl.store(X + row[:, None] * E + e[None, :], x, mask=x_in)
            k = tl.load(K1 + by_column, mask=column_in, other=0.0).to(DOT)  # [BD, BT]
            first = tl.dot(k, write, first, input_precision=PRECISION)
            if K2 is not None:
                k = tl.load(K2 + by_column, mask=column_in, other=0.0).to(DOT)
                second = tl.dot(k, write, second, input_precision=PRECISION)
    tl.store(LAST1 + z * D * E + tile, first, mask=tile_in)
    tl.store(LAST2 + z * D * E + tile, second, mask=tile_in)
