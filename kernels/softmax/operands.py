"""What the softmax kernels are handed, and how they load their tiles.

``Sizes``, ``Operands`` and ``Lists`` are tuples of run-time arguments in which None switches code off at compile time; ``Config`` is all compile-time.
Places are positions of a row in a tile, tokens its number in the tensor: they differ only where ``Lists.order`` says so.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Sizes(NamedTuple):
    """H heads, Hk key heads, N queries, M keys, D and E head sizes, R rank of the factors."""

    h: Any
    hk: Any
    n: Any
    m: Any
    d: Any
    e: Any
    r: Any = None


class Operands(NamedTuple):
    """Optional inputs, each followed by the strides it needs; the last axis is dense, a broadcast axis has stride 0."""

    bias: Any = None
    bias_b: Any = None
    bias_h: Any = None
    bias_n: Any = None
    post: Any = None
    post_b: Any = None
    post_h: Any = None
    post_n: Any = None
    mask: Any = None
    mask_b: Any = None
    pos_q: Any = None
    pos_q_b: Any = None
    pos_k: Any = None
    pos_k_b: Any = None
    left: Any = None
    right: Any = None
    phi_q: Any = None
    phi_q_b: Any = None
    phi_k: Any = None
    phi_k_b: Any = None
    table_a: Any = None
    table_b: Any = None
    limit: Any = None
    limit_b: Any = None
    kept: Any = None


class Lists(NamedTuple):
    """Tiles to visit: those of tile t are ``col[ptr[t]:ptr[t + 1]]``; ``full`` ones need no rule. ``order`` maps places to tokens."""

    ptr: Any
    col: Any
    full: Any
    order: Any
    ids: Any = None


class Config(NamedTuple):
    """``band``: 0 no positions in the mask, 1 query i at i + M - N, 2 from memory. ``mod`` and ``rule``: a kind and its integers, or None.

    ``skip``: queries and keys of the tiles that ``Operands.kept`` [B * H, ., .] marks, multiples of BN and BM, or None. ``piece``: channels that
    a product of wide rows takes at a time, or None.
    """

    scale: float
    softcap: float
    band: int
    mod: tuple | None
    rule: tuple | None
    BN: int
    BM: int
    BD: int
    BE: int
    BR: int
    dot: Any
    precision: str
    skip: tuple | None = None
    piece: int | None = None


@triton.jit
def tokens_of(place, size, lists):
    if lists is None:
        return place
    else:
        return tl.load(lists.order + place, mask=place < size, other=0)


@triton.jit
def kept_at(bh, tile_i, tile_j, x, size, C: tl.constexpr):
    """Where a pair of tiles is marked."""
    across = tl.cdiv(size.m, C.skip[1])
    down = bh * tl.cdiv(size.n, C.skip[0]) + tile_i * C.BN // C.skip[0]
    return x.kept + down * across + tile_j * C.BM // C.skip[1]


@triton.jit
def load_rows(P, b, h, strides, token, inside, width, W: tl.constexpr, DOT: tl.constexpr):
    """[rows, W] of a [B, H, rows, width] tensor; h is a number or one for each row."""
    c = tl.arange(0, W)
    row = h * strides[1] + token.to(tl.int64) * strides[2]
    at = P + b * strides[0] + row[:, None] + c[None, :]
    return tl.load(at, mask=inside[:, None] & (c < width)[None, :], other=0.0).to(DOT)


@triton.jit
def load_columns(P, b, h, strides, token, inside, width, W: tl.constexpr, DOT: tl.constexpr):
    """The same, transposed: [W, rows]."""
    c = tl.arange(0, W)
    at = P + b * strides[0] + h * strides[1] + token.to(tl.int64)[None, :] * strides[2] + c[:, None]
    return tl.load(at, mask=inside[None, :] & (c < width)[:, None], other=0.0).to(DOT)


@triton.jit
def load_factor(P, stride_b, b, h, heads, length, rank, token, inside, W: tl.constexpr, T: tl.constexpr):
    """Rows of a dense [B|1, H, length, rank] factor in float32, [rows, W], or [W, rows] if T."""
    base = P + b * stride_b + h * length * rank
    c = tl.arange(0, W)
    row = token.to(tl.int64) * rank
    if T:
        return tl.load(
            base + row[None, :] + c[:, None], mask=inside[None, :] & (c < rank)[:, None], other=0.0
        )
    else:
        return tl.load(
            base + row[:, None] + c[None, :], mask=inside[:, None] & (c < rank)[None, :], other=0.0
        )


@triton.jit
def query_tile(Q, tile, b, h, strides, x, size, lists, C: tl.constexpr):
    """Tokens of a tile of queries, which of them exist, q [BN, BD] and their factors."""
    place = tile * C.BN + tl.arange(0, C.BN)
    in_i = place < size.n
    i = tokens_of(place, size.n, lists)
    q = load_rows(Q, b, h, strides, i, in_i, size.d, C.BD, C.dot)
    phi = q
    if x.phi_q is not None:
        phi = load_factor(x.phi_q, x.phi_q_b, b, h, size.h, size.n, size.r, i, in_i, C.BR, False)
    return i, in_i, q, phi


@triton.jit
def key_tile(K, tile, b, h, hk, strides, x, size, lists, C: tl.constexpr):
    """Tokens of a tile of keys, which of them exist, k [BD, BM] and their factors."""
    place = tile * C.BM + tl.arange(0, C.BM)
    in_j = place < size.m
    j = tokens_of(place, size.m, lists)
    k = load_columns(K, b, hk, strides, j, in_j, size.d, C.BD, C.dot)
    phi = k
    if x.phi_k is not None:
        phi = load_factor(x.phi_k, x.phi_k_b, b, h, size.h, size.m, size.r, j, in_j, C.BR, True)
    return j, in_j, k, phi


@triton.jit
def rows_product(
    x, y, X, Y, head_x, head_y, x_strides, y_strides, i, j, in_i, in_j, b, width, C: tl.constexpr
):  # fmt: skip
    """``x y`` [BN, BM] of rows x [BN, W] and columns y [W, BM]: as they are, or read again piece by piece where registers cannot hold both."""
    if C.piece is None:
        return tl.dot(x, y, input_precision=C.precision)
    else:
        out = tl.zeros((C.BN, C.BM), tl.float32)
        for c in range(0, width, C.piece):
            rows = load_rows(X + c, b, head_x, x_strides, i, in_i, width - c, C.piece, C.dot)
            columns = load_columns(Y + c, b, head_y, y_strides, j, in_j, width - c, C.piece, C.dot)
            out = tl.dot(rows, columns, out, input_precision=C.precision)
        return out
