"""Device functions of the softmax kernels: what is added to a score, and the weights that follow from scores."""

import triton
import triton.language as tl

from kernels.softmax.visible import places

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# First number of the code of a score mod of `kernels.softmax.mods`.
ALIBI, TABLE, TABLE2D, ROWCOL, POLYLINE = (tl.constexpr(kind) for kind in range(1, 6))


@triton.jit
def _mod(i, j, in_i, in_j, b, h, x, size, MOD: tl.constexpr):
    """What the score mod adds, float32 [rows of i, rows of j]."""
    pi, pj = places(i, j, in_i, in_j, b, x, size)
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
def scores(s, phi_q, phi_k, i, j, in_i, in_j, b, h, x, size, C: tl.constexpr):
    """Scores times log2(e) from ``s = q k^T`` [BN, BM], hidden pairs included, and the slope of the soft cap."""
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


@triton.jit
def online(s, here, top, total):
    """A step of the running softmax over s with row maxima ``here``: weights in units of the new maximum, what earlier ones shrink by, new maximum and sum."""
    peak = tl.maximum(top, here)
    safe = tl.where(peak == float("-inf"), 0.0, peak)  # a row without a key so far
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    return p, shrink, peak, total * shrink + tl.sum(p, 1)


@triton.jit
def finished(acc, top, total):
    """Output and lse of rows; zeros and -inf for those without a key."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    return acc / total[:, None], tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)


@triton.jit
def weights(s, lse, seen):
    """``exp(S - lse)`` again, zero where not seen and in rows without a key."""
    seen = seen & (lse > float("-inf"))[:, None]
    lse = tl.where(lse > float("-inf"), lse, 0.0) * LOG2E
    return tl.exp2(tl.where(seen, s - lse[:, None], float("-inf")))
