"""Linear attention with a global or prefix state, and MALA's read of that state.

B batch, H heads, N queries, M keys, D head size of queries and keys, F feature size, E head size of values.

The state of a set of keys is ``S = sum_j phi(k_j) v_j^T`` with ``sum_j phi(k_j)``, ``sum_j v_j`` and the key count; queries read it in
O(F E). Self and cross attention use one global state; causal calls give query i the state of its own prefix, key index <= p(i),
``p(i) = i + M - N`` (aligned at the end) or explicit ``positions``.

Implementations: ``reference`` builds the [N, M] matrix; ``torch`` is linear in N and differentiable any number of times; ``triton`` has
forward and backward kernels for the global state and both reads (see ``triton.py``); for causal calls it takes the products over prefixes from
the kernels of ``kernels.decay`` (a scan without decay), and the running sums, which are memory bound, from torch. Features "taylor2" have kernels
that never write them (``taylor.py``); other maps that are not pointwise are written.

Sources: arXiv 2006.16236 (linear attention), arXiv 2507.00698 (MALA; the default is the official code's form, where phi(k) is divided
by the number of keys: ``key_norm="mean"``; the paper's formula is ``"sum"``). Causal and cross forms of MALA are this project's: means run
over the keys that a query sees.
"""

from torch import Tensor

from kernels._common.checks import Positions, check_key_mask, check_qkv, work_dtype
from kernels._common.choice import choose
from kernels._common.cost import Cost
from kernels.linear import reference
from kernels.linear import torch as torch_path
from kernels.linear.features import (
    FEATURES,
    POINTWISE,
    Feature,
    apply_feature,
    check_feature,
    feature_size,
    taylor2,
)
from kernels.linear.options import (
    check_causal,
    check_key_bias,
    check_option,
    gap,
    key_weight,
    prefix,
    product,
    rounded,
    visible_keys,
)
from kernels.linear.torch import LinearState, add_states

__all__ = [
    "FEATURES",
    "LinearState",
    "add_states",
    "apply_feature",
    "cost",
    "feature_size",
    "global_state",
    "linear_attention",
    "linear_read",
    "mala",
    "mala_read",
    "taylor2",
]


def global_state(
    phi_k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    k_rot: Tensor | None = None,
    want_v: bool = True,
) -> LinearState:
    """Sum keys into a state; for one token at a time, ``add_states(state, global_state(phi_k_t, v_t))``.

    Args:
        phi_k: Key features, [B, H, M, F].
        v: Values, [B, H, M, E].
        key_mask: Keys to keep, bool [B, M].
        k_rot: Rotated key features for the matrix part, [B, H, M, F].
        want_v: Also sum the values (MALA needs that).

    Returns:
        Sums in float32 (float64 for float64 inputs).
    """
    check_key_mask("global_state", key_mask, v.shape[0], v.shape[2])
    dtype = work_dtype(v.dtype)
    k_rot = None if k_rot is None else k_rot.to(dtype)
    return torch_path.global_state(phi_k.to(dtype), v.to(dtype), key_mask, want_v, k_rot)


def linear_read(phi_q: Tensor, state: LinearState, *, normalize: str = "denom", eps: float = 1e-6) -> Tensor:
    """Read a state with query features [B, H, N, F]; returns [B, H, N, E] in the dtype of ``phi_q``."""
    check_option("linear_read", "normalize", normalize, ("denom", "none"))
    return torch_path.linear_read(phi_q.to(state.kv.dtype), state, normalize, eps).to(phi_q.dtype)


def mala_read(
    phi_q: Tensor,
    state: LinearState,
    *,
    q_rot: Tensor | None = None,
    key_norm: str = "mean",
    scale: float | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """MALA's read of a state that has ``vsum``; arguments as in ``mala``. Returns [B, H, N, E] in the dtype of ``phi_q``."""
    check_option("mala_read", "key_norm", key_norm, ("mean", "sum"))
    if state.vsum is None or (state.ksum_rot is None) != (q_rot is None):
        raise ValueError(
            "mala_read: the state needs vsum (want_v=True), and k_rot exactly when q_rot is given"
        )
    dtype = state.kv.dtype
    scale = phi_q.shape[-1] ** -0.5 if scale is None else scale
    q_rot = None if q_rot is None else q_rot.to(dtype)
    return torch_path.mala_read(phi_q.to(dtype), state, q_rot, key_norm, scale, eps).to(phi_q.dtype)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: Feature = "elu1",
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    causal: bool = False,
    positions: Positions | None = None,
    normalize: str = "denom",
    eps: float = 1e-6,
    initial_state: LinearState | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention with weights ``phi(q_i).phi(k_j)``.

    ``o_i = sum_j phi(q_i).phi(k_j) e^{b_j} v_j / (sum_j phi(q_i).phi(k_j) e^{b_j} + eps)``; without the denominator for
    ``normalize="none"``, and for ``feature="softmax"``, whose weights sum to one by themselves.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, M, D].
        v: Values, [B, H, M, E].
        feature: A name from ``FEATURES`` or a function [..., D] -> [..., F]; "identity" for tensors that are features already.
        key_mask: Keys to keep, bool [B, M]; rows without any kept key give zeros.
        key_bias: Log weight of each key, broadcastable to [B, H, M]; needs a feature map without negative values. Positive
            values beyond 30 are capped.
        causal: Query i reads keys up to position p(i) only.
        positions: For causal calls: p as integers [N] or [B, N] (index of the last key to read; below 0: none), or a pair of
            query and key positions. Left out: ``i + M - N``.
        normalize: "denom" or "none".
        eps: Added to the denominator.
        initial_state: State of keys that come before ``k`` and that every query sees.
        impl: "reference", "torch", "triton"; None chooses by context, environment and device.

    Returns:
        [B, H, N, E], dtype of ``v``.

    Raises:
        ValueError: Shapes or options that do not fit.
        NotImplementedError: An explicit implementation lacks what was asked.
    """
    op = "linear_attention"
    check_qkv(op, q, k, v)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    check_feature(op, feature)
    check_option(op, "normalize", normalize, ("denom", "none"))
    check_causal(op, feature, causal, positions)
    key_bias = check_key_bias(op, key_bias, feature, k)
    impl = choose(op, impl, q, k, v, triton_gap=gap(causal, initial_state, feature, q))
    if feature == "softmax":
        normalize = "none"
    dtype = v.dtype
    if impl == "triton" and feature == "taylor2" and initial_state is None:
        from kernels.linear import taylor

        side = [k, v] if key_bias is None else [k, v, key_weight(key_bias)[..., None]]
        before = None
        if causal:
            before, side, key_mask = prefix(op, positions, q, side, key_mask)
        return taylor.attention(
            q, *side, key_mask=key_mask, causal=causal, before=before, normalize=normalize, eps=eps
        ).to(dtype)
    if impl == "triton" and not causal:
        from kernels.linear import ops

        if not (isinstance(feature, str) and feature in POINTWISE):
            q = apply_feature(feature, q)
            k = apply_feature(feature, k, side="k", key_mask=key_mask)
            feature = "identity"
        return ops.linear_attention(q, k, v, key_mask, key_weight(key_bias), feature, normalize, eps)
    work = work_dtype(dtype)
    q, k, v = q.to(work), k.to(work), v.to(work)
    if impl == "reference":
        if initial_state is not None:
            raise NotImplementedError(f"{op}: the reference takes no initial_state; use impl='torch'")
        visible = visible_keys(op, causal, positions, q, k)
        return reference.linear_attention(
            q,
            k,
            v,
            feature=feature,
            key_mask=key_mask,
            key_bias=key_bias,
            visible=visible,
            normalize=normalize,
            eps=eps,
        ).to(dtype)
    (k,) = torch_path.drop_keys(key_mask, k)
    phi_q, phi_k = apply_feature(feature, q), apply_feature(feature, k, side="k", key_mask=key_mask)
    if key_bias is not None:
        phi_k = phi_k * key_weight(key_bias)[..., None]
    if not causal:
        state = add_states(
            initial_state, torch_path.global_state(phi_k, v, key_mask, initial_state is not None, None)
        )
        return torch_path.linear_read(phi_q, state, normalize, eps).to(dtype)
    before, (phi_k, v), key_mask = prefix(op, positions, phi_q, [phi_k, v], key_mask)
    if impl == "triton":
        phi_q, phi_k = (rounded(t, dtype) for t in (phi_q, phi_k))
    return torch_path.causal(
        phi_q,
        phi_k,
        v,
        key_mask=key_mask,
        before=before,
        initial=initial_state,
        read="linear",
        normalize=normalize,
        eps=eps,
        product=product(impl, dtype),
    ).to(dtype)


def mala(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature: Feature = "elu1",
    key_norm: str = "mean",
    key_mask: Tensor | None = None,
    causal: bool = False,
    positions: Positions | None = None,
    rotated: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: LinearState | None = None,
    impl: str | None = None,
) -> Tensor:
    """Magnitude-aware linear attention: linear attention plus a centred term that grows with the query's magnitude.

    ``o_i = (1 + 1/(z_i + eps)) sum_j s'_ij v_j - z_i mean_j v_j`` with ``s_ij = scale phi(q_i).phi(k_j) / M``, ``z_i = sum_j s_ij`` and s'
    the same product of rotated features; ``key_norm="sum"`` leaves out the division by the number of keys M. M counts kept, visible
    keys. Computed as linear attention plus centred term in float32.

    Args:
        q: Queries before the feature map, [B, H, N, D].
        k: Keys before the feature map, [B, H, M, D].
        v: Values, [B, H, M, E].
        feature: As in ``linear_attention``; "softmax" is not defined here.
        key_norm: "mean" (official code) or "sum" (paper).
        key_mask: Keys to keep, bool [B, M]; rows without any kept key give zeros.
        causal: Query i reads keys up to position p(i) only.
        positions: As in ``linear_attention``.
        rotated: Rotary-encoded ``phi(q)`` [B, H, N, F] and ``phi(k)`` [B, H, M, F]; z uses the features without rotation. Then
            weights no longer sum to one.
        scale: Factor of the scores; ``F ** -0.5`` if left out.
        eps: Added to z in the quotient.
        initial_state: State of earlier keys, with ``vsum`` (and ``ksum_rot`` when rotated).
        impl: As in ``linear_attention``.

    Returns:
        [B, H, N, E], dtype of ``v``.

    Raises:
        ValueError: Shapes or options that do not fit.
        NotImplementedError: An explicit implementation lacks what was asked.
    """
    op = "mala"
    check_qkv(op, q, k, v)
    check_key_mask(op, key_mask, k.shape[0], k.shape[2])
    check_feature(op, feature)
    check_option(op, "key_norm", key_norm, ("mean", "sum"))
    if feature == "softmax":
        raise ValueError(
            "mala: feature 'softmax' normalises keys over positions and leaves nothing to centre; use elu1, relu or exp"
        )
    check_causal(op, feature, causal, positions)
    if initial_state is not None and (
        initial_state.vsum is None or (initial_state.ksum_rot is None) != (rotated is None)
    ):
        raise ValueError("mala: initial_state needs vsum, and ksum_rot exactly when rotated= is given")
    impl = choose(op, impl, q, k, v, triton_gap=gap(causal, initial_state, feature, q))
    dtype, work = v.dtype, work_dtype(v.dtype)
    if impl == "triton" and not causal:
        from kernels.linear import ops

        if not (isinstance(feature, str) and feature in POINTWISE):
            q, k, feature = apply_feature(feature, q), apply_feature(feature, k), "identity"
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return ops.mala(q, k, v, rotated, key_mask, feature, key_norm, scale, eps)
    q, k, v = q.to(work), k.to(work), v.to(work)
    rotated = None if rotated is None else (rotated[0].to(work), rotated[1].to(work))
    if impl == "reference":
        if initial_state is not None:
            raise NotImplementedError(f"{op}: the reference takes no initial_state; use impl='torch'")
        size = apply_feature(feature, q[..., :0, :]).shape[-1]
        visible = visible_keys(op, causal, positions, q, k)
        return reference.mala(
            q,
            k,
            v,
            feature=feature,
            rotated=rotated,
            key_mask=key_mask,
            visible=visible,
            key_norm=key_norm,
            scale=size**-0.5 if scale is None else scale,
            eps=eps,
        ).to(dtype)
    (k,) = torch_path.drop_keys(key_mask, k)
    phi_q, phi_k = apply_feature(feature, q), apply_feature(feature, k)
    scale = phi_q.shape[-1] ** -0.5 if scale is None else scale
    if not causal:
        state = torch_path.global_state(phi_k, v, key_mask, True, None if rotated is None else rotated[1])
        state = add_states(initial_state, state)
        q_rot = None if rotated is None else rotated[0]
        return torch_path.mala_read(phi_q, state, q_rot, key_norm, scale, eps).to(dtype)
    if impl == "triton":
        phi_q, phi_k = (rounded(t, dtype) for t in (phi_q, phi_k))
    key_side = [phi_k, v] if rotated is None else [phi_k, v, rotated[1]]
    before, key_side, key_mask = prefix(op, positions, phi_q, key_side, key_mask)
    return torch_path.causal(
        phi_q,
        key_side[0],
        key_side[1],
        key_mask=key_mask,
        before=before,
        initial=initial_state,
        read="mala",
        key_norm=key_norm,
        scale=scale,
        eps=eps,
        rotated=None if rotated is None else (rotated[0], key_side[2]),
        product=product(impl, dtype),
    ).to(dtype)


def cost(
    op: str,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    value_dim: int | None = None,
    *,
    causal: bool = False,
    backward: bool = False,
    itemsize: int = 4,
    chunk: int = torch_path.CHUNK,
) -> Cost:
    """FLOPs and bytes of ``op`` = "linear" or "mala" for feature size ``dim``; the backward alone is 2.5 times the products.

    A read or a sum costs 2 F E per token; causal calls add the masked products inside chunks.
    """
    e = dim if value_dim is None else value_dim
    per_query = 2 * dim * e + 2 * dim + (8 * e if op == "mala" else 2 * e)
    per_key = 2 * dim * e + dim + (e if op == "mala" else 0)
    flops = batch * heads * (queries * per_query + keys * per_key)
    if causal:
        flops += batch * heads * queries * chunk * 2 * (dim + e)
    moved = batch * heads * itemsize * ((queries + keys) * dim + (queries + keys) * e)
    state = batch * heads * (dim * e + dim + (e + 1 if op == "mala" else 0))
    if backward:
        # dS, dphi(q), dphi(k), dv and the recomputed forward product of the read; q, k, v, dO in, dq, dk, dv out.
        return Cost(2.5 * flops, 2 * moved, state)
    return Cost(flops, moved, state)
