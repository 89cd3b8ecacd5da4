"""Triton kernel of the element-wise recurrence; the prefix softmax is such a recurrence too (see ``ops.py``).

Time is walked in tiles of BT steps with an associative scan inside each; channels and sequences run in parallel. The gradient is the same
recurrence backwards, so this kernel serves all derivatives. All in float32.
"""

import triton
import triton.language as tl


@triton.jit
def _after(a, x, b, y):
    """Composition of ``h -> a h + x`` and ``h -> b h + y``."""
    return a * b, b * x + y


@triton.jit
def diag_scan_fwd_kernel(
    A, X, START, H,
    N, C, WA,
    HAS_START: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """h_t = a_t h_{t-1} + x_t; X, H [L, N, C], A [L, N, WA] with WA = C or 1, START [L, C], contiguous."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    h = tl.zeros((BC,), tl.float32)
    if HAS_START:
        h = tl.load(START + row * C + c, mask=c < C, other=0.0)
    step = tl.arange(0, BT)
    for n0 in range(0, N, BT):
        t = n0 + step
        at = row * N + t
        inside = (t < N)[:, None] & (c < C)[None, :]
        # One factor for all channels (WA = 1) is read at channel 0.
        a = tl.load(A + at[:, None] * WA + tl.minimum(c, WA - 1)[None, :], mask=inside, other=1.0)
        x = tl.load(X + at[:, None] * C + c[None, :], mask=inside, other=0.0)
        factor, local = tl.associative_scan((a, x), 0, _after)
        out = local + factor * h[None, :]
        tl.store(H + at[:, None] * C + c[None, :], out, mask=inside)
        h = tl.sum(tl.where((step == BT - 1)[:, None], out, 0.0), 0)
