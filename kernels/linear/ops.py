"""Registered operators ``zoo::linear_state_fwd``, ``zoo::linear_read_fwd`` and their backwards; torch only, Triton inside.

The operators are opaque to torch.compile. Small tensors (means, the centred state) are combined in plain torch between them, so that
autograd handles these. A backward that runs under ``create_graph=True`` recomputes the operator from differentiable torch functions:
second derivatives are exact, at the price of the torch path.
"""

import torch
from torch import Tensor

from kernels.linear.features import apply_feature

NONE = torch.Tensor


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("zoo::linear_state_fwd", mutates_args=())
def state_fwd(
    x: Tensor, y: Tensor, rot: Tensor | None, key_mask: Tensor | None, weight: Tensor | None, feature: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over keys: S [B,H,F,E], sum x [B,H,F], sum x' [B,H,F] (empty without rotation), sum y [B,H,E], float32."""
    from kernels.linear import launch

    return launch.state_fwd(x, y, rot, key_mask, weight, feature)


@state_fwd.register_fake
def _(x, y, rot, key_mask, weight, feature):
    b, h, _, f = x.shape
    new = lambda *s: x.new_empty(s, dtype=torch.float32)  # noqa: E731
    return (
        new(b, h, f, y.shape[-1]),
        new(b, h, f),
        new(b, h, f) if rot is not None else new(0),
        new(b, h, y.shape[-1]),
    )


@torch.library.custom_op("zoo::linear_state_bwd", mutates_args=())
def state_bwd(
    x: Tensor,
    y: Tensor,
    rot: Tensor | None,
    key_mask: Tensor | None,
    weight: Tensor | None,
    ds: Tensor,
    da: Tensor,
    db: Tensor,
    dc: Tensor,
    feature: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, rot and weight (the last two empty where the input is None)."""
    from kernels.linear import launch

    return launch.state_bwd(x, y, rot, key_mask, weight, ds, da, db, dc, feature)


@state_bwd.register_fake
def _(x, y, rot, key_mask, weight, ds, da, db, dc, feature):
    dense = lambda t: t.new_empty(t.shape)  # noqa: E731
    return (
        dense(x),
        dense(y),
        _empty(x) if rot is None else dense(rot),
        _empty(x) if weight is None else weight.new_empty(weight.shape, dtype=torch.float32),
    )


def _state_torch(x, y, rot, key_mask, weight, feature):
    """The same sums in differentiable operations."""
    from kernels.linear.torch import drop_keys

    x, y = drop_keys(key_mask, x.float(), y.float())
    (phi,) = drop_keys(key_mask, apply_feature(feature, x))
    left = phi if rot is None else drop_keys(key_mask, rot.float())[0]
    if weight is not None:
        phi, left = phi * weight[..., None], left * weight[..., None]
    return left.mT @ y, phi.sum(2), _empty(x) if rot is None else left.sum(2), y.sum(2)


def _differentiable(function, inputs: list, grads: list) -> list:
    """Gradients of ``function`` as differentiable expressions of its inputs and of the output gradients."""
    # Aliases cut paths between the inputs: k may itself be a function of q.
    alias = [t.view_as(t) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    wanted = [i for i, t in enumerate(alias) if isinstance(t, Tensor) and t.requires_grad]
    outputs = function(*alias)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [alias[i] for i in wanted],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    out: list = [None] * len(inputs)
    for i, g in zip(wanted, found, strict=True):
        out[i] = g
    return out


def _state_setup(ctx, inputs, output):
    x, y, rot, key_mask, weight, feature = inputs
    ctx.save_for_backward(x, y, rot, key_mask, weight)
    ctx.feature = feature


def _state_backward(ctx, ds, da, db, dc):
    x, y, rot, key_mask, weight = ctx.saved_tensors
    if torch.is_grad_enabled():

        def again(x, y, rot, weight):
            return _state_torch(x, y, rot, key_mask, weight, ctx.feature)

        gx, gy, grot, gw = _differentiable(
            again, [x, y, rot, weight], [ds, da, None if rot is None else db, dc]
        )
        return gx, gy, grot, None, gw, None
    gx, gy, grot, gw = state_bwd(x, y, rot, key_mask, weight, ds, da, db, dc, ctx.feature)
    return gx, gy, None if rot is None else grot, None, None if weight is None else gw, None


state_fwd.register_autograd(_state_backward, setup_context=_state_setup)


@torch.library.custom_op("zoo::linear_read_fwd", mutates_args=())
def read_fwd(
    q: Tensor,
    rot: Tensor | None,
    state: Tensor,
    kbar: Tensor,
    kbar_rot: Tensor | None,
    vbar: Tensor | None,
    gain: Tensor,
    eps: Tensor,
    mode: str,
    feature: str,
) -> Tensor:
    """Read ``state`` [B,H,F,E] (means, float32) with queries [B,H,N,F]; ``gain`` and ``eps`` are [B]. Modes: none, denom, mala."""
    from kernels.linear import launch

    return launch.read_fwd(q, rot, state, kbar, kbar_rot, vbar, gain, eps, mode, feature)


@read_fwd.register_fake
def _(q, rot, state, kbar, kbar_rot, vbar, gain, eps, mode, feature):
    return q.new_empty(*q.shape[:3], state.shape[-1])


@torch.library.custom_op("zoo::linear_read_bwd", mutates_args=())
def read_bwd(
    q: Tensor,
    rot: Tensor | None,
    state: Tensor,
    kbar: Tensor,
    kbar_rot: Tensor | None,
    vbar: Tensor | None,
    gain: Tensor,
    eps: Tensor,
    do: Tensor,
    mode: str,
    feature: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, rot, state, kbar, kbar_rot, vbar (rot and kbar_rot empty without rotation)."""
    from kernels.linear import launch

    return launch.read_bwd(q, rot, state, kbar, kbar_rot, vbar, gain, eps, do, mode, feature)


@read_bwd.register_fake
def _(q, rot, state, kbar, kbar_rot, vbar, gain, eps, do, mode, feature):
    dense = lambda t: t.new_empty(t.shape)  # noqa: E731
    none = _empty(q)
    b, h, _, e = state.shape
    return (
        dense(q),
        none if rot is None else dense(rot),
        dense(state),
        dense(kbar),
        _empty(q) if kbar_rot is None else dense(kbar_rot),
        state.new_empty(b, h, e),
    )


def _read_torch(q, rot, state, kbar, kbar_rot, vbar, gain, eps, mode, feature):
    phi = apply_feature(feature, q.float())
    left = phi if rot is None else rot.float()
    num, gain = left @ state, gain[:, None, None, None]
    if mode == "none":
        return (num * gain).to(q.dtype)
    z = phi @ kbar[..., None]
    inv = 1 / (z + eps[:, None, None, None])
    if mode == "denom":
        return (num * inv).to(q.dtype)
    r = z if rot is None else left @ kbar_rot[..., None]
    return (num * (inv + gain) + (r * inv + gain * (r - z)) * vbar[..., None, :]).to(q.dtype)


def _read_setup(ctx, inputs, output):
    *tensors, mode, feature = inputs
    ctx.save_for_backward(*tensors)
    ctx.mode, ctx.feature = mode, feature


def _read_backward(ctx, do):
    q, rot, state, kbar, kbar_rot, vbar, gain, eps = ctx.saved_tensors
    if torch.is_grad_enabled():

        def again(q, rot, state, kbar, kbar_rot, vbar):
            return _read_torch(q, rot, state, kbar, kbar_rot, vbar, gain, eps, ctx.mode, ctx.feature)

        grads = _differentiable(again, [q, rot, state, kbar, kbar_rot, vbar], [do])
        return (*grads, None, None, None, None)
    dq, drot, dstate, dkbar, dkrot, dvbar = read_bwd(
        q, rot, state, kbar, kbar_rot, vbar, gain, eps, do, ctx.mode, ctx.feature
    )
    no_rot = rot is None
    return (
        dq, None if no_rot else drot, dstate, dkbar, None if no_rot else dkrot, None if vbar is None else dvbar,
        None, None, None, None,
    )  # fmt: skip


read_fwd.register_autograd(_read_backward, setup_context=_read_setup)


def _count(key_mask: Tensor | None, v: Tensor) -> Tensor:
    """Kept keys per batch element, at least 1, float32 [B]."""
    if key_mask is None:
        return torch.full((v.shape[0],), float(max(v.shape[2], 1)), device=v.device)
    return key_mask.sum(-1).clamp(min=1).float()


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    weight: Tensor | None,
    feature: str,
    normalize: str,
    eps: float,
) -> Tensor:
    """Noncausal linear attention through the registered operators; see ``kernels.linear.linear_attention``."""
    if weight is not None:
        weight = weight.contiguous()
    state, ksum, _, _ = state_fwd(k, v, None, key_mask, weight, feature)
    # Means instead of sums: a float16 product of a sum over many keys would overflow.
    n = _count(key_mask, v)
    scale = (1 / n)[:, None, None]
    return read_fwd(
        q, None, state * scale[..., None], ksum * scale, None, None, n, eps / n, normalize, feature
    )


def mala(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotated: tuple[Tensor, Tensor] | None,
    key_mask: Tensor | None,
    feature: str,
    key_norm: str,
    scale: float,
    eps: float,
) -> Tensor:
    """Noncausal MALA through the registered operators; see ``kernels.linear.mala``."""
    q_rot, k_rot = (None, None) if rotated is None else (rotated[0].to(q.dtype), rotated[1].to(k.dtype))
    state, ksum, ksum_rot, vsum = state_fwd(k, v, k_rot, key_mask, None, feature)
    n = _count(key_mask, v)
    mean = (1 / n)[:, None, None]
    kbar, vbar = ksum * (mean * scale), vsum * mean
    kbar_rot = None if rotated is None else ksum_rot * (mean * scale)
    left = kbar if kbar_rot is None else kbar_rot
    centred = state * (mean * scale)[..., None] - left[..., None] * vbar[..., None, :]
    gain = n if key_norm == "sum" else torch.ones_like(n)
    eps_row = eps / n if key_norm == "sum" else torch.full_like(n, eps)
    return read_fwd(q, q_rot, centred, kbar, kbar_rot, vbar, gain, eps_row, "mala", feature)
