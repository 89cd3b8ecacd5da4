"""Device functions: feature maps of linear attention and their slopes, elementwise in float32; names as in ``features.py``."""

import triton
import triton.language as tl


@triton.jit
def phi(x, FEATURE: tl.constexpr):
    if FEATURE == "elu1":
        return tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE == "relu":
        return tl.maximum(x, 0.0) + 1e-3
    elif FEATURE == "sqrelu":
        r = tl.maximum(x, 0.0)
        return r * r + 1e-3
    elif FEATURE == "exp":
        return tl.exp(tl.minimum(x, 30.0))
    elif FEATURE == "softplus":
        return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
    elif FEATURE == "silu":
        return x * tl.sigmoid(x)
    else:
        tl.static_assert(FEATURE == "identity", "unknown feature map")
        return x


@triton.jit
def dphi(x, FEATURE: tl.constexpr):
    if FEATURE == "elu1":
        return tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif FEATURE == "sqrelu":
        return 2.0 * tl.maximum(x, 0.0)
    elif FEATURE == "exp":
        return tl.where(x <= 30.0, tl.exp(tl.minimum(x, 30.0)), 0.0)
    elif FEATURE == "softplus":
        return tl.sigmoid(x)
    elif FEATURE == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    else:
        return tl.full(x.shape, 1.0, tl.float32)
