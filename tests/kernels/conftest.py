"""Kernel tests. The Triton ones run in one child process with the interpreter on.

Triton reads TRITON_INTERPRET when it is imported, and the compile gate needs it off: two settings cannot share a process. Setting the
variable here would reach whatever else the same pytest worker collects, so ``interpreter`` runs a file of checks by itself.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels._common import launching

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _plain_choice(monkeypatch):
    """A developer's ZOO_KERNELS must not change what is tested."""
    monkeypatch.delenv("ZOO_KERNELS", raising=False)


@pytest.fixture
def unwritten(monkeypatch):
    """Memory that kernels forget to write is NaN, and shows."""

    def new(like, *shape, dtype=torch.float32):
        return torch.full(shape, torch.nan, device=like.device, dtype=dtype)

    monkeypatch.setattr(launching, "new", new)


@pytest.fixture(scope="session")
def child():
    """Run Python with extra environment variables from the repository root; returns the finished process."""

    def run(*args: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
        full = {
            k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")
        }
        full |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
        return subprocess.run(
            [sys.executable, *args], cwd=ROOT, env=full, capture_output=True, text=True, timeout=timeout
        )

    return run
