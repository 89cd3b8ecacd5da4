"""How tensors lie in a weights file: as they are, in half precision, or as bytes with a factor per row."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from zoo.errors import ConfigError, WeightsError

STORAGES = ("full", "half", "byte")
FACTOR = "::factor"
"""Suffix of the entry that holds the factors of a tensor stored as bytes."""


def encode(tensors: dict[str, Tensor], storage: str, parameters: Container[str]) -> dict[str, Tensor]:
    """The entries of the file.

    Args:
        tensors: State dict.
        storage: "full"; "half", floating tensors as float16; "byte", matrices as int8 with one factor per
            row (first axis), the rest as float16.
        parameters: Names of what may be rounded: bin edges, scalings and other buffers stay as they are.

    Raises:
        ConfigError: Unknown storage, or values outside the range of float16.
    """
    if storage not in STORAGES:
        raise ConfigError(f"storage={storage!r}: choose {', '.join(STORAGES)}")
    if storage == "full":
        return tensors
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not value.is_floating_point() or name not in parameters:
            found[name] = value
        elif not value.isfinite().all():
            raise ConfigError(f"tensor {name!r} holds values that are not finite; use storage='full'")
        elif storage == "byte" and value.dim() > 1 and value.numel() > 4 * value.shape[0]:
            rows = value.flatten(1)
            factor = (rows.abs().amax(1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
            found[name] = (
                (rows / factor[:, None].to(rows.dtype))
                .round()
                .clamp(-127, 127)
                .to(torch.int8)
                .view(value.shape)
            )
            found[name + FACTOR] = factor
        else:
            found[name] = _half(name, value)
    return found


def decode(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that a file's entries stand for; half precision becomes float32."""
    found: dict[str, Tensor] = {}
    for name, value in entries.items():
        if name.endswith(FACTOR):
            continue
        factor = entries.get(name + FACTOR)
        if factor is not None:
            if value.dtype != torch.int8 or factor.shape != value.shape[:1]:
                raise WeightsError(
                    f"tensor {name!r} and its factors do not fit together; save the weights again"
                )
            value = value.float() * factor.float().view(-1, *[1] * (value.dim() - 1))
        found[name] = value.float() if value.dtype == torch.float16 else value
    return found


def _half(name: str, value: Tensor) -> Tensor:
    half = value.to(torch.float16)
    if not torch.equal(half.isfinite(), value.isfinite()):
        raise ConfigError(f"tensor {name!r} holds values beyond the range of float16; use storage='full'")
    return half
