"""Every Triton kernel against the float64 reference, in child processes with TRITON_INTERPRET=1; two, for two workers."""

import pytest

pytest.importorskip("triton", reason="Triton kernels need triton")

# Of about the same time each.
FILES = {"pairs": ("softmax", "sparse", "memory"), "scans": ("linear", "decay", "delta", "prefix")}


@pytest.mark.parametrize("group", FILES)
def test_kernels_under_the_interpreter(child, group):
    done = child(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist",
        *(f"tests/kernels/interpreted_{name}.py" for name in FILES[group]), timeout=580, TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
