"""Argument checks and small pieces of index arithmetic that several operations use."""

import torch
from torch import Tensor

Positions = Tensor | tuple[Tensor, Tensor]


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, *, grouped: bool = False) -> None:
    """Raise ValueError unless q [B,H,N,D], k [B,Hk,M,D] and v [B,Hk,M,E] fit together (Hk = H unless ``grouped``)."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(
                f"{op}: {name} must be [batch, heads, tokens, channels], got shape {tuple(t.shape)}"
            )
        if not t.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {t.dtype}; convert it with .float()")
        if t.device != q.device:
            raise ValueError(f"{op}: q is on {q.device} but {name} is on {t.device}; move both to one device")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{op}: q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one"
        )
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: batch must agree, k and v "
            "must share heads and tokens, q and k must share the last dimension"
        )
    if k.shape[1] != q.shape[1] and not (grouped and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0):
        rule = "divide the query heads" if grouped else "equal the query heads; repeat k and v over the group"
        raise ValueError(
            f"{op}: key heads must {rule}, got {k.shape[1]} key heads and {q.shape[1]} query heads"
        )


def check_key_mask(op: str, key_mask: Tensor | None, batch: int, keys: int) -> None:
    """Raise ValueError unless ``key_mask`` is None or bool [B, M]."""
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool:
        raise ValueError(
            f"{op}: key_mask must be bool (True = keep the key), got {key_mask.dtype}; use key_mask.bool()"
        )
    if tuple(key_mask.shape) != (batch, keys):
        raise ValueError(
            f"{op}: key_mask must be [batch, keys] = [{batch}, {keys}], got {tuple(key_mask.shape)}"
        )


def check_shape(op: str, name: str, t: Tensor | None, *shape: int) -> None:
    """Raise ValueError unless ``t`` is None or floating point of this shape: kernels read by shape, and torch would broadcast in silence."""
    if t is not None and (tuple(t.shape) != shape or not t.is_floating_point()):
        raise ValueError(f"{op}: {name} must be floating point {list(shape)}, got {t.dtype} {tuple(t.shape)}")


def query_key_positions(
    op: str, positions: Positions | None, batch: int, queries: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of queries [B|1, N] and keys [B|1, M]; key j is visible to query i if its position is not larger.

    Left out, queries are aligned with the end of the keys: ``i + M - N`` against ``j``. A single tensor gives the positions
    of the queries on the key axis (the index of the last key each may read); a pair gives both.
    """
    pos_k = torch.arange(keys, device=device)[None]
    if positions is None:
        return torch.arange(queries, device=device)[None] + (keys - queries), pos_k
    pos_q = positions
    if isinstance(positions, (tuple, list)):
        pos_q, pos_k = positions
    out = []
    for name, t, size in (("query", pos_q, queries), ("key", pos_k, keys)):
        t = t[None] if t.dim() == 1 else t
        if t.dim() != 2 or t.shape[1] != size or t.shape[0] not in (1, batch) or t.is_floating_point():
            raise ValueError(
                f"{op}: {name} positions must be integers of shape [{size}] or [{batch}, {size}], "
                f"got {t.dtype} {tuple(t.shape)}"
            )
        out.append(t)
    return out[0], out[1]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and states are kept in float32, or in float64 for float64 inputs."""
    return dtype if dtype == torch.float64 else torch.float32
