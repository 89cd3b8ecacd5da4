"""Registered operators ``zoo::selected_fwd``, ``zoo::selected_bwd``, ``zoo::selected_scores`` and ``zoo::selected_top``; torch only, Triton inside.

The first two also run in plain torch (``impl`` "torch": ``streamed.py``). Opaque to torch.compile. A backward under ``create_graph=True`` recomputes the attention through the dense mask. Scores and choice have no gradient.
"""

import torch
from torch import Tensor

from kernels._common.checks import work_dtype
from kernels.selected import reference


def _path(impl: str):
    if impl == "torch":
        from kernels.selected import streamed

        return streamed
    from kernels.selected import launch

    return launch


@torch.library.custom_op("zoo::selected_fwd", mutates_args=())
def selected_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    key_mask: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """O [B, H, N, E] in the dtype of q and lse [B, H, N] in float32 (float64 for such inputs)."""
    return _path(impl).fwd(q, k, v, index, key_mask, pos_q, pos_k, block_size, causal, scale)


@selected_fwd.register_fake
def _(q, k, v, *rest):
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=work_dtype(q.dtype))


@torch.library.custom_op("zoo::selected_bwd", mutates_args=())
def selected_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    key_mask: Tensor | None,
    pos_q: Tensor | None,
    pos_k: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    impl: str,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    call = q, k, v, index, key_mask, pos_q, pos_k, block_size, causal, scale
    return _path(impl).bwd(*call, lse, do, delta)


@selected_bwd.register_fake
def _(q, k, v, *rest):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


@torch.library.custom_op("zoo::selected_scores", mutates_args=())
def selected_scores(
    q: Tensor, k_cmp: Tensor, stencil: Tensor, visible: Tensor | None, lse: Tensor, scale: float
) -> Tensor:
    """Block scores [B, Hk, N, Nb] from the log-sum-exp of compressed attention."""
    from kernels.selected import launch

    return launch.scores(q, k_cmp, stencil, visible, lse, scale)


@selected_scores.register_fake
def _(q, k_cmp, stencil, *rest):
    return q.new_empty(q.shape[0], k_cmp.shape[1], q.shape[2], stencil.shape[1], dtype=torch.float32)


@torch.library.custom_op("zoo::selected_top", mutates_args=())
def selected_top(scores: Tensor, count: int) -> Tensor:
    """Numbers of the best entries of each row, ascending, int64; missing ones are -1."""
    from kernels.selected import launch

    return launch.top(scores, count)


@selected_top.register_fake
def _(scores, count):
    return scores.new_empty(*scores.shape[:-1], min(count, scores.shape[-1]), dtype=torch.int64)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]


def _backward(ctx, do, dlse):
    *call, out, lse = ctx.saved_tensors
    q, k, v, index, key_mask, pos_q, pos_k = call
    rest = (None,) * 8
    work = lse.dtype
    # Rows without a key have no gradient, whatever arrives for their lse.
    dlse = dlse.to(work).masked_fill(lse == -torch.inf, 0.0)
    if torch.is_grad_enabled():
        block_size, causal, scale, _ = ctx.options
        if causal and pos_q is None:
            m, n = k.shape[2], q.shape[2]
            pos_k = torch.arange(m, device=q.device)[None]
            pos_q = torch.arange(n, device=q.device)[None] + m - n
        # Aliases cut paths between the inputs: k may itself be a function of q.
        alias = [t.view_as(t) for t in (q, k, v)]
        wanted = [i for i, t in enumerate(alias) if t.requires_grad]
        exact, row = reference.attention(
            *(t.to(work) for t in alias),
            index,
            block_size,
            key_mask=key_mask,
            pos_q=pos_q,
            pos_k=pos_k,
            scale=scale,
        )
        found = torch.autograd.grad(
            (exact.to(q.dtype), row), [alias[i] for i in wanted], [do, dlse], create_graph=True, allow_unused=True
        )  # fmt: skip
        grads: list[Tensor | None] = [None] * 3
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        return *grads, *rest
    delta = (do.to(work) * out.to(work)).sum(-1) - dlse
    return *selected_bwd(*call, *ctx.options, lse, do, delta), *rest


selected_fwd.register_autograd(_backward, setup_context=_setup)
