"""What linear attention and MALA check, and how a causal call says which keys a query sees."""

# Not "import torch": the submodule torch.py owns that name in this package.
from torch import Tensor, searchsorted

from kernels._common.checks import Positions, check_shape, query_key_positions, work_dtype
from kernels._common.choice import interpreting
from kernels._common.widths import width_gap
from kernels.linear import torch as torch_path
from kernels.linear.features import Feature, apply_feature, feature_size
from kernels.linear.torch import LinearState


def check_option(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name}={value!r} is unknown; choose from {', '.join(allowed)}")


def check_causal(op: str, feature: Feature, causal: bool, positions: Positions | None) -> None:
    if positions is not None and not causal:
        raise ValueError(f"{op}: positions only matter for causal=True; leave them out or set causal=True")
    if causal and feature == "softmax":
        raise ValueError(
            f"{op}: feature 'softmax' normalises keys over all positions and cannot be causal; use elu1, relu or exp"
        )


def check_key_bias(op: str, key_bias: Tensor | None, feature: Feature, k: Tensor) -> Tensor | None:
    if key_bias is None:
        return None
    if isinstance(feature, str) and feature in ("silu", "softmax"):
        raise ValueError(
            f"{op}: key_bias needs a feature map without negative values, got {feature!r}; use elu1, relu or exp"
        )
    if key_bias.dim() != 3:
        raise ValueError(
            f"{op}: key_bias must be broadcastable to [batch, heads, keys], got shape {tuple(key_bias.shape)}"
        )
    if key_bias.dtype != k.dtype:
        key_bias = key_bias.to(k.dtype)
    return key_bias.expand(k.shape[:3]).clamp(max=30.0)


def check_initial(op: str, state: LinearState | None, phi_k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless an initial state fits features [B, H, M, F] and values [B, H, M, E]."""
    if state is not None:
        (b, h, _, f), e = phi_k.shape, v.shape[3]
        check_shape(op, "initial_state.kv", state.kv, b, h, f, e)
        for name, size in (("ksum", f), ("ksum_rot", f), ("vsum", e)):
            check_shape(op, f"initial_state.{name}", getattr(state, name), b, h, size)


def check_rotated(
    op: str, rotated: tuple[Tensor, Tensor] | None, feature: Feature, q: Tensor, k: Tensor
) -> None:
    """Raise ValueError unless rotated features fit those that they replace."""
    if rotated is not None:
        size = apply_feature(feature, q[..., :0, :]).shape[-1]
        for name, t, like in (("rotated queries", rotated[0], q), ("rotated keys", rotated[1], k)):
            check_shape(op, name, t, *like.shape[:3], size)


def key_weight(key_bias: Tensor | None) -> Tensor | None:
    return None if key_bias is None else key_bias.to(work_dtype(key_bias.dtype)).exp()


def gap(op: str, causal: bool, initial_state: LinearState | None, feature: Feature, q: Tensor) -> str | None:
    """What the Triton kernels lack for this call."""
    if op == "linear_attention" and feature == "taylor2" and initial_state is None:
        return width_gap("taylor2", "channels", q.shape[-1], q.dtype)
    if causal:
        return None
    if initial_state is not None:
        return "an initial_state without causal=True"
    if isinstance(feature, str):
        return width_gap("linear", "features", feature_size(feature, q.shape[-1]), q.dtype)
    if not (q.is_cuda or interpreting()):
        return None  # spares the others a call of the function
    return width_gap("linear", "features", feature(q[..., :0, :]).shape[-1], q.dtype)


def rounded(t: Tensor, dtype) -> Tensor:
    """Features as the kernels' products see them: normalisers then belong to the same weights, and rows sum to one."""
    return t.to(dtype).to(t.dtype)


def product(impl: str, dtype):
    """What sums over prefixes: the torch path's own chunks, or the scan kernels on inputs of ``dtype``."""
    if impl != "triton":
        return torch_path.prefix_product

    def product(q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
        from kernels.decay import ops

        q, k, v = (t.to(dtype) for t in (q, k, v))
        return ops.scan(q, k, v, None, initial, True, True)

    return product


def visible_keys(op: str, causal: bool, positions: Positions | None, q: Tensor, k: Tensor) -> Tensor | None:
    if not causal:
        return None
    pos_q, pos_k = query_key_positions(op, positions, q.shape[0], q.shape[2], k.shape[2], q.device)
    return (pos_k[:, None, :] <= pos_q[:, :, None])[:, None]


def prefix(
    op: str, positions: Positions | None, q: Tensor, key_side: list[Tensor], key_mask: Tensor | None
) -> tuple[Tensor | None, list[Tensor], Tensor | None]:
    """How many keys each query reads (None: aligned at the end), with the keys sorted by position if they were given one."""
    if positions is None:
        return None, key_side, key_mask
    batch, keys = key_side[0].shape[0], key_side[0].shape[2]
    pos_q, pos_k = query_key_positions(op, positions, batch, q.shape[2], keys, q.device)
    if isinstance(positions, (tuple, list)):
        pos_k, order = pos_k.expand(batch, keys).sort(dim=1, stable=True)
        key_side = [
            t.gather(2, order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])) for t in key_side
        ]
        key_mask = None if key_mask is None else key_mask.gather(1, order)
    rows = max(pos_q.shape[0], pos_k.shape[0])
    pos_q, pos_k = pos_q.expand(rows, -1).contiguous(), pos_k.expand(rows, -1).contiguous()
    return searchsorted(pos_k, pos_q, right=True), key_side, key_mask
