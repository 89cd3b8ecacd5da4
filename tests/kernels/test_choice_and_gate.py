"""Choice of implementation, import without triton, and the compile gate."""

import json

import pytest
import torch

import kernels
from kernels._common.cost import Cost
from kernels.linear import linear_attention


def test_precedence_of_call_context_and_environment(monkeypatch):
    x = torch.zeros(1)
    assert kernels.choose("op", None, x) == "torch"
    monkeypatch.setenv("ZOO_KERNELS", "reference")
    assert kernels.choose("op", None, x) == "reference"
    with kernels.use("torch"):
        assert kernels.choose("op", None, x) == "torch"
        assert kernels.choose("op", "reference", x) == "reference"
        with kernels.use("auto"):
            assert kernels.current() is None
    assert kernels.current() == "reference"
    monkeypatch.setenv("ZOO_KERNELS", "torhc")
    with pytest.raises(ValueError, match="ZOO_KERNELS; did you mean 'torch'"):
        kernels.choose("op", None, x)


def test_an_explicit_choice_never_falls_back(monkeypatch):
    q = torch.zeros(1, 1, 2, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with kernels.use("triton"), pytest.raises(NotImplementedError, match="needs tensors on a GPU"):
        linear_attention(q, q, q)
    with pytest.raises(NotImplementedError, match="needs tensors on a GPU, got device 'meta'"):
        kernels.choose("op", "triton", torch.zeros(1, device="meta"))
    with pytest.raises(NotImplementedError, match="no Triton kernel for float64 inputs; use impl='torch'"):
        linear_attention(q.double(), q.double(), q.double(), causal=True, impl="triton")


def test_choice_reaches_the_reference(monkeypatch):
    from kernels.linear import reference

    monkeypatch.setattr(reference, "linear_attention", lambda q, *a, **k: q + 41)
    q = torch.zeros(1, 1, 2, 4)
    with kernels.use("reference"):
        assert (linear_attention(q, q, q) == 41).all()
    assert not (linear_attention(q, q, q) == 41).any()


def test_import_needs_torch_alone(child):
    code = (
        "import sys\n"
        "for name in ('triton', 'timm', 'torch_geometric', 'torchaudio', 'wandb'): sys.modules[name] = None\n"
        "import torch, kernels\n"
        "from kernels.linear import mala, ops\n"
        "from kernels.softmax import attention\n"
        "x = torch.ones(1, 1, 3, 4)\n"
        "assert mala(x, x, x).shape == attention(x, x, x).shape == x.shape\n"
    )
    done = child("-c", code)
    assert done.returncode == 0, done.stderr


def test_cost_adds_and_times():
    total = Cost(2e12, 1e9) + 2 * Cost(1e12, 0)
    assert total == Cost(4e12, 1e9) and total.time_s(1e12, 1e9) == 4.0 and total.time_s(1e15, 1e9) == 1.0


BROKEN = """
import json, sys
import triton, triton.language as tl
from kernels import gate
from kernels._common.targets import TARGETS, GateCase

@triton.jit
def plain_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + i[None, :])
    tl.store(Y + i[:, None] * N + i[None, :], x + 1.0)

@triton.jit
def greedy_kernel(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i[:, None] * N + i[None, :])
    tl.store(Y + i[:, None] * N + i[None, :], tl.dot(x, x, input_precision="ieee"))

def check(kernel, has_dot, n, target, warps=1):
    case = GateCase(kernel, "v", {"X": "fp32", "Y": "fp32"}, {"N": n}, warps, 1, has_dot)
    return gate.compile_case(case, TARGETS[target]).problems

print(json.dumps({
    "good": check(plain_kernel, False, 16, "sm_90"),
    "no_tensor": check(greedy_kernel, True, 16, "sm_80"),
    "amd_tensor": check(greedy_kernel, True, 32, "gfx942"),
    "spills": check(plain_kernel, False, 256, "sm_80"),
    "shared": check(greedy_kernel, True, 256, "gfx942", 16),
}))
"""


def test_the_gate_sees_spills_shared_memory_and_missing_tensor_cores(child, tmp_path):
    pytest.importorskip("triton", reason="the gate compiles with triton")
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    done = child(str(script), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["good"] == [] and found["amd_tensor"] == []
    assert any("tensor" in p for p in found["no_tensor"])
    assert any("spills" in p for p in found["spills"])
    assert any("shared memory" in p for p in found["shared"])


def test_covering_subset_covers():
    from kernels import gate

    keys = [
        gate.Key("op", target, dtype, dim, kernel, variant)
        for target in ("sm_80", "gfx942") for dtype in gate.DTYPES for dim in (16, 32, 64)
        for kernel in ("a", "b") for variant in ("x", "y")
    ]  # fmt: skip
    chosen = gate.covering(keys)
    assert len(chosen) < len(keys) / 2
    for field in ("dtype", "dim", "variant"):
        have = {(k.kernel, k.target, getattr(k, field)) for k in chosen}
        assert have == {(k.kernel, k.target, getattr(k, field)) for k in keys}


def test_the_subset_takes_the_widest_head_of_each_type():
    from kernels import gate

    sizes = {"float16": (16, 128, 256), "float32": (16, 128)}
    keys = [
        gate.Key("op", "sm_80", dtype, dim, "k", v)
        for dtype, dims in sizes.items()
        for dim in dims
        for v in "xy"
    ]
    chosen = {(k.dtype, k.dim) for k in gate.covering(keys)}
    assert {("float16", 256), ("float32", 128)} <= chosen


def test_gate_command_on_one_target(child, tmp_path):
    pytest.importorskip("triton", reason="the gate compiles with triton")
    assert child("-m", "kernels.gate", "--ops", "liner").returncode == 2
    env = {"ZOO_KERNEL_CACHE": str(tmp_path)}
    done = child(
        "-m", "kernels.gate", "--full", "--ops", "prefix", "--targets", "sm_90", "--jobs", "1", **env
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 failed" in done.stdout and "diag_scan_fwd_kernel" in done.stdout
    # Channels beyond 32 are cut into tiles of 32: the same code, compiled once.
    assert "10 of 10 cases, 0 failed, 6 from the cache" in done.stdout
    again = child("-m", "kernels.gate", "--ops", "prefix", "--targets", "sm_90", "--jobs", "1", **env)
    cases = int(again.stdout.strip().splitlines()[-1].split()[0])
    assert f"{cases} from the cache" in again.stdout
