"""Cases of the linear kernels for the compile gate."""

from collections.abc import Iterable

from kernels._common.cost import Cost
from kernels._common.targets import GateCase, Target
from kernels.linear import taylor_launch
from kernels.linear import triton as tk
from kernels.linear.launch import dot_types, tiles

GATE_BATCH, GATE_HEADS, GATE_LENGTH = 8, 16, 4096
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def gate_cases(target: Target, dtype: str, dim: int) -> Iterable[GateCase]:
    """Every kernel in the variants that linear attention and MALA launch (with and without mask, weights, rotation)."""
    fwd, fwd_p, bwd, bwd_p = dot_types(dtype, "elu1", target.backend)
    data = _SHORT[dtype]
    item = 4 if dtype == "float32" else 2
    rows = GATE_BATCH * GATE_HEADS * GATE_LENGTH
    shape = f"B{GATE_BATCH} H{GATE_HEADS} N{GATE_LENGTH} D{dim}"

    def case(
        kernel, name: str, variant: str, tensors: dict, consts: dict, passes: int, moved: int
    ) -> GateCase:
        dot = bwd if "bwd" in variant or "bwd" in name else fwd
        t = tiles(name, target.backend, dot, dim, dim)
        rows_name = "BN" if "BN" in kernel.arg_names else "BM"
        consts = {rows_name: t.rows, "BF": t.bf, "BE": t.be, **consts}
        work = Cost(2.0 * rows * dim * dim * passes, float(rows * dim * item * moved))
        return GateCase(
            kernel, variant, tensors, consts, t.warps, t.stages, True, work, shape, unaligned=("N", "M", "H", "smb")
        )  # fmt: skip

    base = {n: data for n in ("X", "XR", "Y")}
    small = {n: "fp32" for n in ("CM", "KB", "KR", "VB", "GAIN", "EPS")}
    state_out = {n: "fp32" for n in ("WS", "WA", "WB", "WC", "S", "A", "BR", "C")}
    forms = (("plain", 0, 0, 0), ("mask+weight", 0, 1, 1), ("rotated+mask", 1, 1, 0))
    for variant, rot, mask, weights in forms:
        consts = dict(
            FEATURE="elu1", HAS_ROT=bool(rot), HAS_MASK=bool(mask), WEIGHTS=weights,
            DOT=tk.DOT_TYPES[fwd], PRECISION=fwd_p,
        )  # fmt: skip
        pointers = base | state_out | {"MASK": "u8"}
        yield case(tk.linear_state_fwd_kernel, "state_fwd", variant, pointers, consts, 1, 2 + rot)
    for variant, rot in (("bwd sums", 0), ("bwd sums rotated", 1)):
        consts = dict(
            FEATURE="elu1", HAS_ROT=bool(rot), HAS_MASK=False, WEIGHTS=4,
            DOT=tk.DOT_TYPES[bwd], PRECISION=bwd_p,
        )  # fmt: skip
        pointers = base | state_out | {"MASK": data}
        yield case(tk.linear_state_fwd_kernel, "state_fwd", variant, pointers, consts, 1, 2 + rot)
    for mode, rot in (("none", 0), ("denom", 0), ("mala", 0), ("mala", 1)):
        consts = dict(FEATURE="elu1", HAS_ROT=bool(rot), MODE=mode, PRECISION=fwd_p, DOT=tk.DOT_TYPES[fwd])
        variant = mode + (" rotated" if rot else "")
        yield case(
            tk.linear_read_fwd_kernel, "read_fwd", variant,
            {"Q": data, "QR": data, "O": data} | small, consts, 1, 2 + rot,
        )  # fmt: skip
        consts |= dict(DOT=tk.DOT_TYPES[bwd], PRECISION=bwd_p, FWD_DOT=tk.DOT_TYPES[fwd])
        outs = {n: data for n in ("Q", "QR", "DO", "DQ")} | {n: "fp32" for n in ("WS", "WA", "WB", "WC")}
        yield case(
            tk.linear_read_bwd_q_kernel, "read_bwd", variant,
            outs | small | {"DQR": data if rot else "fp32"}, consts, 1, 3 + 2 * rot,
        )  # fmt: skip
    for variant, rot, mask, weight in forms:
        consts = dict(
            FEATURE="elu1", HAS_ROT=bool(rot), HAS_MASK=bool(mask), HAS_W=bool(weight),
            DOT=tk.DOT_TYPES[bwd], PRECISION=bwd_p,
        )  # fmt: skip
        pointers = base | {n: "fp32" for n in ("W", "DS", "DA", "DB", "DC", "DW")}
        pointers |= {"MASK": "u8", "DX": data, "DY": data, "DXR": data if rot else "fp32"}
        yield case(tk.linear_state_bwd_kernel, "state_bwd", variant, pointers, consts, 2, 4 + 2 * rot)
    yield from taylor_launch.gate_cases(target, dtype, dim)
