"""Triton kernels for second-order Taylor features ``[1, x, x_i x_c]``, which exist in registers only.

G groups (batch, heads, chunks), L tokens, D channels, E value channels; contiguous tensors. A state T [G, 1 + D + D D, E] holds the sums of y, ``x y^T`` and
``x_i x y^T`` (row ``1 + D + i D + c``), so its square part is symmetric in (i, c).

- ``taylor_state_fwd_kernel``: T from x [G, L, D] and y [G, L, E]; one program per i, one more for the lower orders.
- ``taylor_read_fwd_kernel``: ``c0 T_0 + c1 x T_1 + c2 sum_i x_i (x T_2i)``, [G, L, E].
- ``taylor_read_bwd_x_kernel``: ``c1 g T_1^T + c2 sum_i x_i (g T_2i^T)``, [G, L, D]: by the symmetry half the gradient of a read for equal coefficients.

The gradients of a state are a read and the third kernel, those of a read a state and the third kernel. Sums and states in float32; bfloat16 inputs are
multiplied as such, float16 ones in TF32, because squares of sums leave float16's range, float32 ones in three TF32 passes.
"""

import triton
import triton.language as tl

DOT_TYPES = {"bfloat16": tl.bfloat16, "float32": tl.float32}


@triton.jit
def taylor_state_fwd_kernel(
    X, Y, T,
    L, D, E,
    BD: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    c = tl.arange(0, BD)
    square = i < D
    acc = tl.zeros((BD, BE), tl.float32)
    total = tl.zeros((BE,), tl.float32)
    for start in range(0, L, BL):
        j = start + tl.arange(0, BL)
        row = g * L + j
        x = tl.load(X + row[None, :] * D + c[:, None], mask=(c < D)[:, None] & (j < L)[None, :], other=0.0)
        w = tl.load(X + row * D + i, mask=(j < L) & square, other=0.0).to(tl.float32)
        x = x.to(tl.float32) * tl.where(square, w, 1.0)[None, :]
        y = tl.load(Y + row[:, None] * E + e[None, :], mask=(j < L)[:, None] & (e < E)[None, :], other=0.0)
        acc = tl.dot(x.to(DOT), y.to(DOT), acc, input_precision=PRECISION)
        total += tl.sum(y.to(tl.float32), 0)
    base = T + g * (1 + D + D * D) * E
    first = tl.where(square, 1 + D + i * D, 1)
    tl.store(base + (first + c)[:, None] * E + e[None, :], acc, mask=(c < D)[:, None] & (e < E)[None, :])
    tl.store(base + e, total, mask=(e < E) & (i == D))


@triton.jit
def taylor_read_fwd_kernel(
    X, T, O,
    L, D, E,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BL + tl.arange(0, BL)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    c = tl.arange(0, BD)
    row = g * L + j
    x = tl.load(X + row[:, None] * D + c[None, :], mask=(j < L)[:, None] & (c < D)[None, :], other=0.0)
    base = T + g * (1 + D + D * D) * E
    tile = c[:, None] * E + e[None, :]
    tile_in = (c < D)[:, None] & (e < E)[None, :]
    low = tl.load(base + E + tile, mask=tile_in, other=0.0)
    acc = tl.dot(x.to(DOT), low.to(DOT), input_precision=PRECISION) * C1
    acc += C0 * tl.load(base + e, mask=e < E, other=0.0)[None, :]
    for i in range(D):
        w = tl.load(X + row * D + i, mask=j < L, other=0.0).to(tl.float32) * C2
        high = tl.load(base + (1 + D + i * D) * E + tile, mask=tile_in, other=0.0)
        left = x.to(tl.float32) * w[:, None]
        acc = tl.dot(left.to(DOT), high.to(DOT), acc, input_precision=PRECISION)
    tl.store(O + row[:, None] * E + e[None, :], acc, mask=(j < L)[:, None] & (e < E)[None, :])


@triton.jit
def taylor_read_bwd_x_kernel(
    X, G, T, DX,
    L, D, E,
    C1: tl.constexpr, C2: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BL + tl.arange(0, BL)
    c = tl.arange(0, BD)
    row = g * L + j
    base = T + g * (1 + D + D * D) * E
    acc = tl.zeros((BL, BD), tl.float32)
    for e0 in range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        up = tl.load(G + row[:, None] * E + e[None, :], mask=(j < L)[:, None] & (e < E)[None, :], other=0.0)
        tile = c[None, :] * E + e[:, None]
        tile_in = (c < D)[None, :] & (e < E)[:, None]
        for i in range(D + 1):
            square = i < D
            w = tl.load(X + row * D + i, mask=(j < L) & square, other=0.0).to(tl.float32) * C2
            first = tl.where(square, 1 + D + i * D, 1)
            state = tl.load(base + first * E + tile, mask=tile_in, other=0.0)
            part = tl.dot(up.to(DOT), state.to(DOT), input_precision=PRECISION)
            acc += part * tl.where(square, w, C1)[:, None]
    tl.store(DX + row[:, None] * D + c[None, :], acc, mask=(j < L)[:, None] & (c < D)[None, :])
