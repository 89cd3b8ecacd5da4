"""The prefix operations' Triton kernel against the float64 reference, in a child process with TRITON_INTERPRET=1."""

import pytest

pytest.importorskip("triton", reason="Triton kernels need triton")


def test_kernels_under_the_interpreter(child):
    done = child(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/kernels/interpreted_prefix.py",
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
