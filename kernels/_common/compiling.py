"""Compile one Triton kernel ahead of time for a GPU target, and read what the compiled code uses. No GPU needed."""

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kernels._common.targets import GateCase, Target

# Tensor-core instructions: PTX of Ampere (mma.sync), Hopper (wgmma), Blackwell (tcgen05); AMD matrix instructions.
_TENSOR = {
    "cuda": re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"),
    "hip": re.compile(r"\bv_mfma_\w+"),
}
_PLAIN_DOT = re.compile(r"=\s*tt\.dot\s.*->\s*tensor<[^>]*#blocked", re.M)


@dataclass
class Result:
    """What the compiled code uses; ``problems`` is empty if the case passes."""

    registers: int
    spills: int
    shared: int
    tensor: int
    seconds: float
    problems: list[str]
    cached: bool = False


def compile_case(case: GateCase, target: Target) -> Result:
    """Compile one kernel and check what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature, constexprs, attrs = {}, {}, {}
    for i, name in enumerate(names):
        if name in case.constexprs:
            signature[name] = "constexpr"
            constexprs[(i,)] = case.constexprs[name]
            continue
        given = case.pointers.get(name)
        if isinstance(given, tuple):
            signature[name] = (
                type(given)(*("constexpr" if t is None else t for t in given))
                if hasattr(given, "_fields")
                else given
            )
            for at, (field, kind) in enumerate(
                zip(getattr(given, "_fields", range(len(given))), given, strict=True)
            ):
                if kind is None:
                    constexprs[(i, at)] = None
                elif f"{name}.{field}" not in case.unaligned:
                    attrs[(i, at)] = [["tt.divisibility", 16]]
            continue
        signature[name] = f"*{given}" if given else "i32"
        if name not in case.unaligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    unknown = (set(case.pointers) | set(case.constexprs)) - set(names)
    if unknown:
        raise ValueError(f"{case.kernel.__name__} has no argument {', '.join(sorted(unknown))}")
    start = time.perf_counter()
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constexprs, attrs),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    seconds = time.perf_counter() - start
    asm, shared = compiled.asm, int(compiled.metadata.shared)
    if target.backend == "cuda":
        registers, spills = _cubin_usage(asm["cubin"])
        tensor = len(_TENSOR["cuda"].findall(asm["ptx"]))
    else:
        text = asm["amdgcn"]
        registers = _number(text, "vgpr_count")
        spills = _number(text, "vgpr_spill_count") + _number(text, "sgpr_spill_count")
        shared = max(shared, _number(text, "group_segment_fixed_size"))
        tensor = len(_TENSOR["hip"].findall(text))
    problems = []
    if spills:
        problems.append(f"spills {spills}")
    if shared > target.shared_bytes:
        problems.append(f"shared memory {shared} > {target.shared_bytes}")
    if case.has_dot and not tensor:
        problems.append("no tensor-core instruction")
    elif _PLAIN_DOT.search(asm.get("ttgir", "")):
        problems.append("a product without tensor cores")
    return Result(registers, spills, shared, tensor, seconds, problems)


def _number(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s*(\d+)", text)
    if found is None:
        raise RuntimeError(
            f"the compiled AMD code has no .{name} entry: its format changed, adapt kernels/_common/compiling.py"
        )
    return int(found.group(1))


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory plus stack per thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if set(found) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cannot read resource usage from cuobjdump: {text.strip()[:200]!r}")
    return found["REG"], found["STACK"] + found["LOCAL"]
