"""Launches the Triton kernels of selected attention: tiles, inverted lists, and the cases for the compile gate."""

from collections.abc import Iterable

import torch
import triton
from torch import Tensor

from kernels._common import launching
from kernels._common.cost import Cost
from kernels._common.launching import on_device, platform, pow2, row_dense
from kernels._common.targets import GateCase, Target
from kernels.selected import triton as tk
from kernels.softmax import cases
from kernels.softmax.launch import Problem
from kernels.softmax.launch import operands as shared_operands
from kernels.softmax.operands import Operands
from kernels.softmax.tiles import Tiles, dot_types, types_of
from kernels.softmax.triton import DOT_TYPES


def tiles(kernel: str, where: str, dot: str, width: int) -> Tiles:
    """Rows and keys, as the compile gate found them; the forward and dq kernels have the heads of one group as rows, whose number is given elsewhere."""
    if where == "hip":
        return Tiles(16, 16, 4, 1)
    by_rows = kernel in ("scores", "bwd_dkdv")
    if dot == "float32":
        if width > 64:
            return Tiles(16, 16, 8, 1, piece=32)
        return Tiles(16, 32 if kernel == "bwd_dkdv" or (kernel == "bwd_dq" and width <= 16) else 16, 4, 1)
    if width > 128 and by_rows:
        return Tiles(32, 32, 8, 1)
    if not by_rows:
        return Tiles(16, 64 if kernel == "fwd" and width <= 16 else 32, 4, 1)
    return Tiles(32 if kernel == "bwd_dkdv" and width == 64 else 64, 32, 4, 1)


def _plan(
    kernel: str, q: Tensor, e: int, group: int, block_size: int, scale: float, band: int
) -> tuple[tk.Config, dict]:
    dot, precision = types_of(q)
    d = q.shape[3]
    t = tiles(kernel, platform(), dot, max(d, e))
    rows = t.queries if kernel in ("bwd_dkdv", "scores") else pow2(group)
    config = tk.Config(
        scale, band, block_size, rows, t.keys, pow2(d), pow2(e), DOT_TYPES[dot], precision, t.piece
    )
    return config, dict(num_warps=t.warps, num_stages=t.stages)


def _seen(q, k, v, key_mask, pos_q, pos_k, causal: bool) -> tuple[Operands, int]:
    """What hides keys: the operands, and where positions come from (``Config.band``)."""
    aligned = pos_q is None
    call = Problem(
        q, k, v, key_mask=key_mask, pos_q=pos_q, pos_k=pos_k, aligned=aligned, right=0 if causal else -1
    )
    return shared_operands(call), 0 if not causal else 1 if aligned else 2


def _sizes(q: Tensor, k: Tensor, e: int, chosen: int, block_size: int) -> tk.Sizes:
    h, n, d = q.shape[1:]
    hk, m = k.shape[1:3]
    return tk.Sizes(hk, h // hk, n, m, chosen, triton.cdiv(m, block_size), d, e)


def invert(index: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """For each block the queries that chose it, ascending: offsets [B, Hk, blocks + 1] and queries [B, Hk, N S], int32."""
    flat, order = index.where(index >= 0, blocks).flatten(2).sort(stable=True)
    edges = torch.arange(blocks + 1, device=index.device).expand(*index.shape[:2], -1)
    ptr = torch.searchsorted(flat.contiguous(), edges.contiguous())
    return ptr.to(torch.int32), (order // max(1, index.shape[3])).to(torch.int32)


def fwd(q, k, v, index, key_mask, pos_q, pos_k, block_size, causal, scale) -> tuple[Tensor, Tensor]:
    """O in the dtype of q and lse in float32."""
    q, k, v = row_dense(q), row_dense(k), row_dense(v)
    b, h, n, _ = q.shape
    e = v.shape[3]
    out, lse = launching.new(q, b, h, n, e, dtype=q.dtype), launching.new(q, b, h, n)
    if 0 in (b, h, n, k.shape[2], index.shape[3]):
        return out.zero_(), lse.fill_(-torch.inf)
    size = _sizes(q, k, e, index.shape[3], block_size)
    operands, band = _seen(q, k, v, key_mask, pos_q, pos_k, causal)
    config, options = _plan("fwd", q, e, size.g, block_size, scale, band)
    with on_device(q):
        tk.selected_fwd_kernel[(b * size.hk * n,)](
            q, k, v, index.to(torch.int32).contiguous(), out, lse, *(t.stride()[:3] for t in (q, k, v)), size,
            operands, C=config, **options,
        )  # fmt: skip
    return out, lse


def bwd(
    q, k, v, index, key_mask, pos_q, pos_k, block_size, causal, scale, lse, do, delta
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, do = row_dense(q), row_dense(k), row_dense(v), row_dense(do)
    b, n, e = q.shape[0], q.shape[2], v.shape[3]
    dq, dk, dv = (launching.new(q, *t.shape, dtype=t.dtype) for t in (q, k, v))
    if 0 in (b, q.shape[1], n, k.shape[2], index.shape[3]):
        return dq.zero_(), dk.zero_(), dv.zero_()
    size = _sizes(q, k, e, index.shape[3], block_size)
    shared = (do, lse.contiguous(), delta.contiguous())
    strides = [t.stride()[:3] for t in (q, k, v, do)]
    operands, band = _seen(q, k, v, key_mask, pos_q, pos_k, causal)
    with on_device(q):
        config, options = _plan("bwd_dq", q, e, size.g, block_size, scale, band)
        tk.selected_bwd_dq_kernel[(b * size.hk * n,)](
            q,
            k,
            v,
            index.to(torch.int32).contiguous(),
            *shared,
            dq,
            *strides,
            size,
            operands,
            C=config,
            **options,
        )
        config, options = _plan("bwd_dkdv", q, e, size.g, block_size, scale, band)
        tk.selected_bwd_dkdv_kernel[(b * size.hk, size.nb * triton.cdiv(block_size, config.BM))](
            q, k, v, *invert(index, size.nb), *shared, dk, dv, *strides, size, operands, C=config, **options
        )
    return dq, dk, dv


def scores(
    q: Tensor, k_cmp: Tensor, stencil: Tensor, visible: Tensor | None, lse: Tensor, scale: float
) -> Tensor:
    """[B, Hk, N, Nb] float32 from the log-sum-exp [B, H, N] of compressed attention."""
    q, k_cmp, stencil = row_dense(q), row_dense(k_cmp), stencil.contiguous()
    b, hk, n, nb = q.shape[0], k_cmp.shape[1], q.shape[2], stencil.shape[1]
    if 0 in (b, n, nb, *k_cmp.shape[1:3]):
        return q.new_zeros(b, hk, n, nb, dtype=torch.float32)
    out = launching.new(q, b, hk, n, nb)
    size = _sizes(q, k_cmp, q.shape[3], 1, 1)._replace(nb=nb)
    config, options = _plan("scores", q, q.shape[3], size.g, 1, scale, 0)
    # Rows of the stencil that touch a tile of selection blocks.
    touched = torch.nn.functional.pad(stencil > 0, (0, -nb % config.BM)).unflatten(1, (-1, config.BM)).any(2)
    place = torch.arange(k_cmp.shape[2], device=q.device)[:, None]
    span = torch.stack(
        (place.where(touched, k_cmp.shape[2]).amin(0), (place + 1).where(touched, 0).amax(0)), 1
    )
    steps = (0, 0)
    if visible is not None:
        visible = row_dense(visible[:, 0]).view(torch.uint8)
        steps = tuple(
            0 if s == 1 else step for s, step in zip(visible.shape[:2], visible.stride()[:2], strict=True)
        )
    with on_device(q):
        tk.selected_scores_kernel[(b * hk, triton.cdiv(n, config.BN), triton.cdiv(nb, config.BM))](
            q, k_cmp, stencil, span.to(torch.int32), visible, lse.contiguous(), out, q.stride()[:3], k_cmp.stride()[:3],
            steps, size, C=config, **options,
        )  # fmt: skip
    return out


def top(scores: Tensor, count: int) -> Tensor:
    """The ``count`` best entries of each row, ascending, -1 for missing ones; -inf is never taken."""
    blocks = scores.shape[-1]
    count = min(count, blocks)
    index = scores.new_full((*scores.shape[:-1], count), -1, dtype=torch.int64)
    if index.numel():
        with on_device(scores):
            tk.selected_topn_kernel[(scores.numel() // blocks,)](
                scores.contiguous(), index, blocks, count, W=pow2(blocks)
            )
    return index


_QUERIES, _CHOSEN, _BLOCK, _GROUP, _STRIDE = 4096, 16, 64, 16, 16


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """Groups of 16 heads, blocks of 64 keys; scores over compressed keys with a stride of 16; the choice, which has no head size, once."""
    dot, precision = dot_types(dtype, target.backend)
    data = cases.SHORT[dtype]
    batch, groups = cases.BATCH, 4
    rows = float(batch * groups * _GROUP * _QUERIES)
    pairs, compressed = rows * _CHOSEN * _BLOCK, rows * _QUERIES / _STRIDE
    moved = rows * dim * (4 if dtype == "float32" else 2)
    unaligned = (*(f"size.{f}" for f in tk.Sizes._fields[:-2]), *cases.UNALIGNED)
    pointers = cases.pointers(data) | {
        "INDEX": "i32", "PTR": "i32", "QUERIES": "i32", "STENCIL": "fp32", "SPAN": "i32", "SCORES": "fp32", "VISIBLE": "u8",
        "visible_strides": ("i32", "i32"), "size": tk.Sizes(*("i32",) * 8),
    }  # fmt: skip
    for kernel, name, work in (
        (tk.selected_fwd_kernel, "fwd", 2 * pairs),
        (tk.selected_bwd_dq_kernel, "bwd_dq", 3 * pairs),
        (tk.selected_bwd_dkdv_kernel, "bwd_dkdv", 4 * pairs),
        (tk.selected_scores_kernel, "scores", compressed),
    ):
        t = tiles(name, target.backend, dot, dim)
        config = tk.Config(
            dim**-0.5, 0, _BLOCK, t.queries, t.keys, pow2(dim), pow2(dim), DOT_TYPES[dot], precision, t.piece
        )
        variants = (("mask", ("mask",), 0), ("positions", ("positions", "right"), 2))
        for variant, names, band in variants[: 1 if name == "scores" else 2]:
            given = pointers | {"x": cases.operands(names, data)}
            own = {n: kind for n, kind in given.items() if n in kernel.arg_names}
            yield GateCase(
                kernel, variant, own, {"C": config._replace(band=band)}, t.warps, t.stages, True, Cost(2.0 * work * dim, 4 * moved),
                f"B{batch} Hk{groups} G{_GROUP} N{_QUERIES} D{dim}", unaligned=unaligned,
            )  # fmt: skip
    if dtype == "float32" and dim == 16:
        blocks = _QUERIES // _BLOCK
        yield GateCase(
            tk.selected_topn_kernel, "n16", {"SCORES": "fp32", "INDEX": "i64"}, {"W": 64}, 4, 3, False,
            Cost(0.0, batch * groups * _QUERIES * 4.0 * blocks), f"rows {batch * groups * _QUERIES}", unaligned=("nb", "count"),
        )  # fmt: skip
