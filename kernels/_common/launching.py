"""What every launch of a Triton kernel needs; torch only."""

import contextlib

import torch
from torch import Tensor


def new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to write, on the device of ``like``. Tests fill it with NaN: call it through this module."""
    return torch.empty(shape, device=like.device, dtype=dtype)


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Kernels start on the current device, which need not be that of the tensors."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()


def row_dense(t: Tensor) -> Tensor:
    """Kernels that are handed strides take any but the last."""
    return t if t.stride(-1) == 1 else t.contiguous()


def platform() -> str:
    """Of this machine, as `Target.backend`."""
    return "hip" if torch.version.hip else "cuda"


def pow2(n: int) -> int:
    """Side of a tile that holds ``n``: a power of two, at least what a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())
