"""Registered operators ``zoo::block_sparse_fwd`` and ``zoo::block_sparse_bwd``; torch only, Triton inside.

Opaque to torch.compile, which therefore never sees the lists: they are looked up by the rule's code when the operator runs. A backward under
``create_graph=True`` recomputes the attention through the dense mask.
"""

import torch
from torch import Tensor

from kernels.block_sparse import reference
from kernels.block_sparse.masks import Mask, decode


@torch.library.custom_op("zoo::block_sparse_fwd", mutates_args=())
def block_sparse_fwd(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, rule: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """O [B, H, N, E] in the dtype of q and lse [B, H, N] in float32."""
    from kernels.block_sparse import launch

    return launch.fwd(q, k, v, key_mask, rule, scale)


@block_sparse_fwd.register_fake
def _(q, k, v, key_mask, rule, scale):
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("zoo::block_sparse_bwd", mutates_args=())
def block_sparse_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    rule: list[int],
    scale: float,
    lse: Tensor,
    do: Tensor,
    delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from kernels.block_sparse import launch

    return launch.bwd(q, k, v, key_mask, rule, scale, lse, do, delta)


@block_sparse_bwd.register_fake
def _(q, k, v, *rest):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup(ctx, inputs, output):
    *tensors, rule, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = rule, scale


def _backward(ctx, do, dlse):
    q, k, v, key_mask, out, lse = ctx.saved_tensors
    rule, scale = ctx.options
    # Rows without a key have no gradient, whatever arrives for their lse.
    dlse = dlse.float().masked_fill(lse == -torch.inf, 0.0)
    if torch.is_grad_enabled():
        # Aliases cut paths between the inputs: k may itself be a function of q.
        alias = [t.view_as(t) for t in (q, k, v)]
        wanted = [i for i, t in enumerate(alias) if t.requires_grad]
        exact, row = reference.attention(
            *(t.float() for t in alias), decode(tuple(rule)), key_mask=key_mask, bias=None, scale=scale
        )
        found = torch.autograd.grad(
            (exact.to(q.dtype), row), [alias[i] for i in wanted], [do, dlse], create_graph=True, allow_unused=True
        )  # fmt: skip
        grads: list[Tensor | None] = [None] * 6
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        return tuple(grads)
    delta = (do.float() * out.float()).sum(-1) - dlse
    return *block_sparse_bwd(q, k, v, key_mask, rule, scale, lse, do, delta), None, None, None


block_sparse_fwd.register_autograd(_backward, setup_context=_setup)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Through the registered operators; see ``kernels.block_sparse.attention``."""
    if key_mask is not None:
        # NaN or infinity in a masked row would survive a weight of zero.
        drop = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(drop, 0.0), v.masked_fill(drop, 0.0)
    return block_sparse_fwd(q, k, v, key_mask, list(mask.code()), float(scale))
