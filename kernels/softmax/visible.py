"""Device functions of the softmax kernels: which keys a query sees."""

import triton
import triton.language as tl

# First number of a rule of `kernels.block_sparse.masks`.
GRID, DISC, SEGMENTS, PREFIX, WINDOW = (tl.constexpr(kind) for kind in range(1, 6))


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
def places(i, j, in_i, in_j, b, x, size):
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
        pi, pj = places(i, j, in_i, in_j, b, x, size)
        far = pj[None, :] - pi[:, None]
        if x.left is not None:
            seen = seen & (far >= -x.left)
        if x.right is not None:
            seen = seen & (far <= x.right)
    if lists is not None:
        if whole == 0:
            seen = seen & rule_visible(i, j, lists.ids, C.rule)
    return seen
