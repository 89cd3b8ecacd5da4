"""Feature maps of linear attention, all in one place.

A map takes [..., D] to [..., F]. Maps in ``POINTWISE`` act on each number alone (F = D) and are fused into the Triton kernels.

``relu`` and ``sqrelu`` add 1e-3 so that a token whose features are all cut off still has weights that sum to one.
``exp`` caps its argument at 30 (float32 products of two features then stay below 1e27): no gradient flows beyond the cap.
``elu1`` has a continuous first and a discontinuous second derivative at 0: where a loss contains second derivatives of the
inputs, prefer ``exp`` or ``softplus``.
``softmax`` is Efficient Attention (arXiv 1812.01243): queries are normalised over channels, keys over positions, which makes the
weights sum to one without a denominator and excludes causal use. ``dpfp`` is arXiv 2102.11174 (one shift; ``dpfp2``, ``dpfp3``
use more). ``taylor2`` is Based's (arXiv 2402.18668), whose products are positive although some features are not. ``t2r`` is relu(Wx + b) of arXiv 2103.13076: the caller projects, the map is the same as ``relu``.
"""

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

RELU_FLOOR = 1e-3
EXP_CAP = 30.0

Feature = str | Callable[[Tensor], Tensor]


def _dpfp(x: Tensor, shifts: int) -> Tensor:
    r = torch.cat((x, -x), -1).relu()
    return torch.cat([r * r.roll(i, -1) for i in range(1, shifts + 1)], -1)


def taylor2(x: Tensor) -> Tensor:
    """[..., D] to [..., 1 + D + D (D + 1) / 2] with ``phi(x).phi(y) = 1 + x.y + (x.y)^2 / 2``."""
    dim = x.shape[-1]
    row, column = torch.triu_indices(dim, dim, device=x.device)
    # Off the diagonal each product stands for two of the sum: x_i x_j y_i y_j * 2 / 2.
    factor = torch.ones(len(row), dtype=x.dtype, device=x.device).masked_fill(row == column, 0.5**0.5)
    return torch.cat((torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * factor), -1)


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "elu1": lambda x: F.elu(x) + 1,
    "relu": lambda x: x.relu() + RELU_FLOOR,
    "sqrelu": lambda x: x.relu().square() + RELU_FLOOR,
    "exp": lambda x: x.clamp(max=EXP_CAP).exp(),
    "softplus": lambda x: F.softplus(x),
    "silu": lambda x: F.silu(x),
    "identity": lambda x: x,
}
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    **POINTWISE,
    "t2r": POINTWISE["relu"],
    "dpfp": lambda x: _dpfp(x, 1),
    "dpfp2": lambda x: _dpfp(x, 2),
    "dpfp3": lambda x: _dpfp(x, 3),
    "taylor2": taylor2,
}
FEATURES = (*MAPS, "softmax")
SIGNED = frozenset({"silu", "identity"})


def check_feature(op: str, feature: Feature) -> None:
    """Raise ValueError for an unknown name."""
    if callable(feature) or feature in FEATURES:
        return
    close = difflib.get_close_matches(str(feature), FEATURES, n=3)
    hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"{op}: unknown feature {feature!r}{hint} choose from {', '.join(FEATURES)}, or pass a function"
    )


def feature_size(feature: str, dim: int) -> int:
    """F for head size D."""
    if feature == "taylor2":
        return 1 + dim + dim * (dim + 1) // 2
    return dim * {"dpfp": 2, "dpfp2": 4, "dpfp3": 6}.get(feature, 1)


def apply_feature(feature: Feature, x: Tensor, *, side: str = "q", key_mask: Tensor | None = None) -> Tensor:
    """Map [B, H, N, D] to [B, H, N, F].

    Args:
        feature: Name or function.
        x: Queries or keys.
        side: "q" or "k"; only ``softmax`` treats them differently.
        key_mask: bool [B, M]; only the key side of ``softmax`` needs it.
    """
    if callable(feature):
        return feature(x)
    if feature != "softmax":
        return MAPS[feature](x)
    if side == "q":
        return x.softmax(-1)
    if key_mask is None:
        return x.softmax(-2) if x.shape[-2] else x
    # The large finite floor instead of -inf keeps a batch element without any key free of NaN in value and gradient.
    drop = ~key_mask[:, None, :, None]
    return x.masked_fill(drop, torch.finfo(x.dtype).min).softmax(-2).masked_fill(drop, 0.0)
