"""Runs the softmax kernels over lists of tiles, and describes these runs to the compile gate."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from kernels._common.cost import Cost
from kernels._common.launching import platform, pow2
from kernels._common.targets import GateCase, Target
from kernels.block_sparse.lists import block_lists
from kernels.block_sparse.masks import decode
from kernels.softmax import cases, tiles
from kernels.softmax import launch as softmax
from kernels.softmax import triton as tk
from kernels.softmax.operands import Config, Lists

# Tokens that stand together on a grid: squares of 8 x 8, cubes of 4 x 4 x 4. Multiples of the tile sizes.
NEAR = 64
# How many numbers of a rule's code the kernels need at compile time; the others are lengths and document numbers.
_CONSTANTS = {2: 4, 3: 2, 4: 2, 5: 3}


def _constants(rule: tuple[int, ...]) -> tuple[int, ...]:
    return rule[: _CONSTANTS.get(rule[0])]


@lru_cache(maxsize=64)
def sparse(rule: tuple[int, ...], queries: int, keys: int, device: torch.device) -> softmax.Sparse:
    """The rule's lists on the device, for tiles of so many queries and keys."""
    found = block_lists(decode(rule), queries, keys, device, near=NEAR)
    full = found.full.to(torch.uint8)
    ids = torch.tensor(rule[2:], dtype=torch.int32, device=device) if rule[0] == 3 else None
    rows = Lists(found.row_ptr, found.col, full, found.order, ids)
    columns = Lists(found.t_row_ptr, found.t_col, full[found.t_at.long()], found.order, ids)
    return softmax.Sparse(rows, columns, _constants(rule))


def _prepare(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, rule, scale):
    problem = softmax.Problem(q, k, v, key_mask=key_mask, scale=scale)
    dot, _ = tiles.types_of(q)
    widths = q.shape[3], v.shape[3]
    t = tiles.sparse_table("fwd", platform(), dot, *widths, tiles.compute_capability())
    return problem, sparse(tuple(rule), t.queries, t.keys, q.device)


def fwd(q, k, v, key_mask, rule, scale) -> tuple[Tensor, Tensor]:
    problem, lists = _prepare(q, k, v, key_mask, rule, scale)
    return softmax.fwd(problem, lists)[:2]


def bwd(q, k, v, key_mask, rule, scale, lse, do, delta) -> tuple[Tensor, Tensor, Tensor]:
    problem, lists = _prepare(q, k, v, key_mask, rule, scale)
    return tuple(softmax.bwd(problem, lse, do, delta, False, sparse=lists)[:3])


# name: rule, keys that a query sees at the gate's length; one axis and the prefix rule are simpler than these
RULES = {
    "2d": ((1, 1, 2, 64, 13, 1, 1, 0, 64, 13, 1, 1, 0), 170),
    "3d-causal": ((1, 0, 3, 16, 5, 1, 1, 1, 16, 5, 2, 2, 0, 16, 5, 1, 1, 0), 125),
    "disc": ((2, 77, 64, 63), 278),
    "segments": ((3, 1), 256),
    "window": ((5, 128, 16), 273),
}


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """The kernels of softmax without and with a key mask, over each kind of rule."""
    lists = Lists("*i32", "*i32", "*u8", "*i32", None)
    arch = target.arch if isinstance(target.arch, int) else 90
    dot, precision = tiles.dot_types(dtype, target.backend)
    for kernel, name, products in (
        (tk.softmax_fwd_kernel, "fwd", 2),
        (tk.softmax_bwd_dkdv_kernel, "bwd_dkdv", 4),
        (tk.softmax_bwd_dq_kernel, "bwd_dq", 3),
    ):
        t = tiles.sparse_table(name, target.backend, dot, dim, dim, arch)
        for variant, (rule, keys) in RULES.items():
            names = ("mask",) if variant in ("2d", "segments") else ()
            given = {
                **cases.pointers(cases.SHORT[dtype]), "size": cases.sizes(()), "x": cases.operands(names, ""),
                "lists": lists._replace(ids="*i32" if rule[0] == 3 else None),
            }  # fmt: skip
            del given["DPHI"]
            config = Config(
                dim**-0.5, 0.0, 0, None, rule, t.queries, t.keys, pow2(dim), pow2(dim), 16,
                tk.DOT_TYPES[dot], precision, None, t.piece,
            )  # fmt: skip
            consts = {"C": config, "span": None, "DPHI": None}
            pairs = float(cases.BATCH * cases.HEADS * cases.LENGTH * keys)
            moved = float(cases.BATCH * cases.HEADS * cases.LENGTH * dim * (4 if dtype == "float32" else 2))
            yield GateCase(
                kernel,
                variant,
                {n: kind for n, kind in given.items() if n in kernel.arg_names},
                {n: value for n, value in consts.items() if n in kernel.arg_names},
                t.warps,
                t.stages,
                True,
                Cost(2.0 * pairs * dim * products, moved * 4),
                f"B{cases.BATCH} H{cases.HEADS} N{cases.LENGTH} D{dim}",
                unaligned=cases.UNALIGNED,
            )
