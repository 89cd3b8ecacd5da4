"""Cases of the softmax kernels for the compile gate."""

from collections.abc import Iterable

from kernels._common.cost import Cost
from kernels._common.launching import pow2
from kernels._common.targets import GateCase, Target
from kernels.softmax import triton as tk
from kernels.softmax.operands import Config, Operands, Sizes
from kernels.softmax.skipping import widest
from kernels.softmax.tiles import bias_kernel, dot_types, skip_table, table

BATCH, HEADS, LENGTH = 8, 16, 4096
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
STRIDES = ("i32",) * 3
_GRID_SIDE = 64
# name: operands that are given, band, score mod, soft cap, share of the pairs that is visible
VARIANTS = {
    "plain": ((), 0, None, 0.0, 1.0),
    "causal+mask": (("mask", "right"), 1, None, 0.0, 0.5),
    "bias+positions": (("bias", "mask", "positions", "left", "right"), 2, None, 0.0, 1.0),
    "factors+cap": (("factors",), 0, None, 30.0, 1.0),
    "skip+causal+mask": (("mask", "right", "limit"), 1, None, 0.0, 0.5),
    "post+causal": (("post", "right"), 1, None, 0.0, 0.5),
    "table2d": (("table_a",), 0, (3, 1, _GRID_SIDE, _GRID_SIDE), 0.0, 1.0),
    "row+column": (("table_a", "table_b"), 0, (4, _GRID_SIDE, _GRID_SIDE), 0.0, 1.0),
    "polyline": (("table_a", "table_b"), 0, (5, 1, _GRID_SIDE, LENGTH, 0), 0.0, 1.0),
}
# Variants with no more than a band and a key mask.
PLAIN = ("plain", "causal+mask", "skip+causal+mask")


def operands(names: tuple[str, ...], data: str) -> Operands:
    """Types of what a call gives."""
    kinds = {}
    for name in ("bias", "post"):
        if name in names:
            kinds |= {name: f"*{data}", f"{name}_b": "i32", f"{name}_h": "i32", f"{name}_n": "i32"}
    if "mask" in names:
        kinds |= {"mask": "*u8", "mask_b": "i32"}
    if "positions" in names:
        kinds |= {"pos_q": "*i32", "pos_q_b": "i32", "pos_k": "*i32", "pos_k_b": "i32"}
    if "factors" in names:
        kinds |= {"phi_q": "*fp32", "phi_q_b": "i32", "phi_k": "*fp32", "phi_k_b": "i32"}
    if "limit" in names:
        kinds |= {"limit": "*fp32", "limit_b": "i32", "kept": "*u8"}
    kinds |= {name: "*fp32" for name in ("table_a", "table_b") if name in names}
    kinds |= {name: "i32" for name in ("left", "right") if name in names}
    return Operands(**kinds)


UNALIGNED = (
    *(f"size.{field}" for field in ("h", "hk", "n", "m", "r")), "x.mask_b", "x.pos_q_b", "x.pos_k_b", "x.left", "x.right",
    "x.bias_n", "x.post_n", "x.phi_q_b", "x.phi_k_b", "x.limit_b", "span", "B", "BB", "BH",
)  # fmt: skip


def sizes(names: tuple[str, ...]) -> Sizes:
    return Sizes(*("i32",) * 6, "i32" if "factors" in names else None)


def pointers(data: str) -> dict[str, str | tuple]:
    """Of everything but the operands and sizes."""
    return (
        {n: data for n in ("Q", "K", "V", "DO", "O", "DK", "DV", "DQ")}
        | {n: "fp32" for n in ("LSE", "DELTA", "DPHI", "DB")}
        | {n: STRIDES for n in ("q_strides", "k_strides", "v_strides", "o_strides")}
    )


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """Each kernel with each variant; the forward also split over the keys, the bias kernel where it fits. ALiBi and the table of
    distances are simpler than the score mods that are listed."""
    dot, precision = dot_types(dtype, target.backend)
    data, item = SHORT[dtype], 4 if dtype == "float32" else 2
    pairs = float(BATCH * HEADS * LENGTH * LENGTH)
    moved = float(BATCH * HEADS * LENGTH * dim * item)
    arch = target.arch if isinstance(target.arch, int) else 90
    kernels = (
        (tk.softmax_fwd_kernel, "fwd", 2),
        (tk.softmax_bwd_dkdv_kernel, "bwd_dkdv", 4),
        (tk.softmax_bwd_dq_kernel, "bwd_dq", 3),
        (tk.softmax_bwd_dbias_kernel, "bwd_dbias", 2),
    )
    for kernel, name, products in kernels:
        for variant, (names, band, mod, softcap, share) in VARIANTS.items():
            if name == "bwd_dbias" and not ("bias" in names and bias_kernel(target.backend)):
                continue
            scores = "factors" if "factors" in names else "plain" if variant in PLAIN else "rich"
            t = table(name, target.backend, dot, dim, dim, arch, scores)
            skip = (widest(dtype == "float32", dim),) * 2 if "limit" in names else None
            if skip and target.backend == "hip":
                continue
            if skip:
                t = skip_table(name, t, skip, dot, dim, dim, arch)
            config = Config(
                dim**-0.5, softcap, band, mod, None, t.queries, t.keys, pow2(dim), pow2(dim), 16, tk.DOT_TYPES[dot], precision, skip, t.piece,
            )  # fmt: skip
            given = {**pointers(data), "size": sizes(names), "x": operands(names, data)}
            if "factors" not in names:
                given["DPHI"] = None
            extras = [("", {})]
            if name == "bwd_dbias":
                extras = [(" rows", {"ROWS": True}), (" keys", {"ROWS": False})]
            if name == "fwd":
                extras = (
                    [("", {"span": None}), (" split", {})] if variant == "plain" else [("", {"span": None})]
                )
            for suffix, more in extras:
                consts = {"C": config, "lists": None, **more}
                consts |= {n: None for n, kind in given.items() if kind is None}
                own = {n: kind for n, kind in given.items() if kind is not None}
                yield GateCase(
                    kernel,
                    variant + suffix,
                    {n: kind for n, kind in own.items() if n in kernel.arg_names},
                    {n: value for n, value in consts.items() if n in kernel.arg_names},
                    t.warps,
                    t.stages,
                    True,
                    Cost(2.0 * pairs * dim * products * share, moved * 4),
                    f"B{BATCH} H{HEADS} N{LENGTH} D{dim}",
                    unaligned=UNALIGNED,
                )
