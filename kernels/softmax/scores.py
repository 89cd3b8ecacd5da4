"""Device functions of the softmax kernels: who sees whom, and what is added to a score.

``Sizes``, ``Operands`` and ``Lists`` are tuples of run-time arguments in which None switches code off at compile time; ``Config`` is all compile-time.
Places are positions of a row in a tile, tokens its number in the tensor: they differ only where ``Lists.order`` says so.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# First number of a rule of `kernels.block_sparse.masks` and of a score mod of `kernels.softmax.mods`.
GRID, DISC, SEGMENTS, PREFIX, WINDOW = (tl.constexpr(kind) for kind in range(1, 6))
ALIBI, TABLE, TABLE2D, ROWCOL, POLYLINE = (tl.constexpr(kind) for kind in range(1, 6))


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

    ``skip``: queries and keys of the tiles that ``Operands.kept`` [B * H, ., .] marks, multiples of BN and BM, or None.
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
    """[rows, W] of a [B, H, rows, width] tensor."""
    c = tl.arange(0, W)
    at = P + b * strides[0] + h * strides[1] + token.to(tl.int64)[:, None] * strides[2] + c[None, :]
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
def _axis(p, key, S: tl.constexpr, W: tl.constexpr, D: tl.constexpr, T: tl.constexpr, CAUSAL: tl.constexpr):
    """NATTEN's rule on one axis, as `kernels.block_sparse.masks.axis_visible` has it."""
    group, own = p % D, p // D
    count = (S - group + D - 1) // D
    first = own // T * T
    if CAUSAL:
        low = tl.minimum(first + T - 1, count - 1) - W + 1
        high = own
    else:
        leader = tl.minimum(first + T // 2, count - 1)
        low = tl.minimum(tl.maximum(leader, W // 2), count - 1 - (W - 1 - W // 2)) - W // 2
        high = low + W - 1
    near = ((key // D)[None, :] >= low[:, None]) & ((key // D)[None, :] <= high[:, None])
    if D > 1:
        near = near & (group[:, None] == (key % D)[None, :])
    return near


@triton.jit
def _last_axis(a, b, RULE: tl.constexpr, AT: tl.constexpr):
    """The rule on the axis that stands at ``RULE[AT]``, and the places without it."""
    near = _axis(a % RULE[AT], b % RULE[AT], RULE[AT], RULE[AT + 1], RULE[AT + 2], RULE[AT + 3], RULE[AT + 4])
    return near, a // RULE[AT], b // RULE[AT]


@triton.jit
def rule_visible(i, j, ids, RULE: tl.constexpr):
    """bool [rows of i, rows of j] for tokens i and j."""
    if RULE[0] == GRID:
        # prefix, number of axes, then length, window, dilation, stride, causal of each
        near = (i >= 0)[:, None] & (j >= 0)[None, :]
        a, b = tl.maximum(i - RULE[1], 0), tl.maximum(j - RULE[1], 0)
        for step in tl.static_range(RULE[2]):
            here, a, b = _last_axis(a, b, RULE, 3 + 5 * (RULE[2] - 1 - step))
            near = near & here
        return near | (i < RULE[1])[:, None] | (j < RULE[1])[None, :]
    elif RULE[0] == DISC:
        # prefix, columns of the grid, largest squared distance
        a, b = tl.maximum(i - RULE[1], 0), tl.maximum(j - RULE[1], 0)
        down = (a // RULE[2])[:, None] - (b // RULE[2])[None, :]
        across = (a % RULE[2])[:, None] - (b % RULE[2])[None, :]
        near = down * down + across * across <= RULE[3]
        return near | (i < RULE[1])[:, None] | (j < RULE[1])[None, :]
    elif RULE[0] == SEGMENTS:
        same = tl.load(ids + i)[:, None] == tl.load(ids + j)[None, :]
        if RULE[1]:
            same = same & (j[None, :] <= i[:, None])
        return same
    elif RULE[0] == PREFIX:
        return (j[None, :] <= i[:, None]) | (j < RULE[1])[None, :]
    else:
        far = i[:, None] - j[None, :]
        near = (far <= RULE[1]) & (far >= -RULE[1])
        return near | (i < RULE[2])[:, None] | (j < RULE[2])[None, :]


@triton.jit
def _places(i, j, in_i, in_j, b, x, size):
    """Positions of queries and keys on the key axis."""
    if x.pos_q is not None:
        return (
            tl.load(x.pos_q + b * x.pos_q_b + i, mask=in_i, other=0),
            tl.load(x.pos_k + b * x.pos_k_b + j, mask=in_j, other=0),
        )
    else:
        return i + (size.m - size.n), j


@triton.jit
def visible(i, j, in_i, in_j, b, x, size, lists, whole, C: tl.constexpr):
    """bool [rows of i, rows of j]."""
    seen = in_i[:, None] & in_j[None, :]
    if x.mask is not None:
        seen = seen & (tl.load(x.mask + b * x.mask_b + j, mask=in_j, other=0) != 0)[None, :]
    if C.band > 0:
        pi, pj = _places(i, j, in_i, in_j, b, x, size)
        far = pj[None, :] - pi[:, None]
        if x.left is not None:
            seen = seen & (far >= -x.left)
        if x.right is not None:
            seen = seen & (far <= x.right)
    if lists is not None:
        if whole == 0:
            seen = seen & rule_visible(i, j, lists.ids, C.rule)
    return seen


@triton.jit
def _mod(i, j, in_i, in_j, b, h, x, size, MOD: tl.constexpr):
    """What the score mod adds, float32 [rows of i, rows of j]."""
    pi, pj = _places(i, j, in_i, in_j, b, x, size)
    pair = in_i[:, None] & in_j[None, :]
    if MOD[0] == ALIBI:
        far = (pj[None, :] - pi[:, None]).to(tl.float32)
        return -tl.load(x.table_a + h) * tl.abs(far)
    elif MOD[0] == TABLE:
        # largest distance
        far = tl.minimum(tl.maximum(pj[None, :] - pi[:, None], -MOD[1]), MOD[1]) + MOD[1]
        return tl.load(x.table_a + h * (2 * MOD[1] + 1) + far, mask=pair, other=0.0)
    elif MOD[0] == TABLE2D:
        # prefix, rows and columns of the grid
        a, c = tl.maximum(pi - MOD[1], 0), tl.maximum(pj - MOD[1], 0)
        down = (c // MOD[3])[None, :] - (a // MOD[3])[:, None] + MOD[2] - 1
        across = (c % MOD[3])[None, :] - (a % MOD[3])[:, None] + MOD[3] - 1
        at = h * ((2 * MOD[2] - 1) * (2 * MOD[3] - 1)) + down * (2 * MOD[3] - 1) + across
        placed = pair & (pi >= MOD[1])[:, None] & (pj >= MOD[1])[None, :]
        return tl.load(x.table_a + at, mask=placed, other=0.0)
    elif MOD[0] == ROWCOL:
        # rows and columns of the grid of keys
        row = ((b * size.h + h) * size.n + i)[:, None]
        out = tl.load(x.table_a + row * MOD[1] + (pj // MOD[2])[None, :], mask=pair, other=0.0)
        return out + tl.load(x.table_b + row * MOD[2] + (pj % MOD[2])[None, :], mask=pair, other=0.0)
    else:
        # prefix, columns of the grid, tokens of the grid, whether the path starts along the column
        a, c = tl.maximum(pi - MOD[1], 0), tl.maximum(pj - MOD[1], 0)
        if MOD[4]:
            corner = (c // MOD[2])[None, :] * MOD[2] + (a % MOD[2])[:, None]
        else:
            corner = (a // MOD[2])[:, None] * MOD[2] + (c % MOD[2])[None, :]
        base = (b * size.h + h) * MOD[3]
        placed = pair & (pi >= MOD[1])[:, None] & (pj >= MOD[1])[None, :]
        ends_i, ends_j = in_i & (pi >= MOD[1]), in_j & (pj >= MOD[1])
        if MOD[4]:
            along = tl.load(x.table_a + base + c, mask=ends_j, other=0.0)[None, :]
            down = tl.load(x.table_b + base + a, mask=ends_i, other=0.0)[:, None]
        else:
            along = tl.load(x.table_a + base + a, mask=ends_i, other=0.0)[:, None]
            down = tl.load(x.table_b + base + c, mask=ends_j, other=0.0)[None, :]
        along = tl.abs(along - tl.load(x.table_a + base + corner, mask=placed, other=0.0))
        down = tl.abs(down - tl.load(x.table_b + base + corner, mask=placed, other=0.0))
        return tl.where(placed, -(along + down), 0.0)


@triton.jit
def scores(q, k, phi_q, phi_k, i, j, in_i, in_j, b, h, x, size, C: tl.constexpr):
    """Scores times log2(e) of q [BN, BD] and k [BD, BM], hidden pairs included, and the slope of the soft cap."""
    s = tl.dot(q, k, input_precision=C.precision)
    slope = 1.0
    if C.softcap > 0:
        t = 2.0 / (1.0 + tl.exp2(s * (-2.0 * C.scale / C.softcap * LOG2E))) - 1.0  # tanh
        slope = 1.0 - t * t
        s = t * (C.softcap * LOG2E)
    else:
        s = s * (C.scale * LOG2E)
    if x.phi_q is not None:
        # float32 on purpose: positions as factors lose their units digit in half precision.
        s += tl.dot(phi_q, phi_k, input_precision="ieee" if C.precision == "ieee" else "tf32x3") * LOG2E
    if x.bias is not None:
        at = x.bias + b * x.bias_b + h * x.bias_h + i.to(tl.int64)[:, None] * x.bias_n + j[None, :]
        s += tl.load(at, mask=in_i[:, None] & in_j[None, :], other=0.0).to(tl.float32) * LOG2E
    if C.mod is not None:
        s += _mod(i, j, in_i, in_j, b, h, x, size, C.mod) * LOG2E
    return s, slope


@triton.jit
def after(i, j, in_i, in_j, b, h, x):
    """The factor of the weights after the softmax, float32 [rows of i, rows of j]."""
    at = x.post + b * x.post_b + h * x.post_h + i.to(tl.int64)[:, None] * x.post_n + j[None, :]
    return tl.load(at, mask=in_i[:, None] & in_j[None, :], other=0.0).to(tl.float32)
