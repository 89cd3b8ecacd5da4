"""Forms that fulfil initial and boundary conditions exactly: field = what is prescribed + (zero there) * network.

Each takes coordinates [N, d] and raw outputs [N, F], as tensors or jets, and returns fields [N, F]. They belong to the
model, because weights are useless without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.errors import unknown

Ansatz = Callable[..., Tensor]
ANSATZ: dict[str, Ansatz] = {}


def ansatz(function: Ansatz) -> Ansatz:
    """Register under the function's name."""
    ANSATZ[function.__name__] = function
    return function


def get_ansatz(name: str) -> Ansatz:
    """The form called `name`; the message names the nearest ones otherwise."""
    if name not in ANSATZ:
        raise unknown("ansatz", name, ANSATZ)
    return ANSATZ[name]


def _columns(points: Tensor) -> list[Tensor]:
    return [points[:, i : i + 1] for i in range(points.shape[1])]


@ansatz
def none(points: Tensor, raw: Tensor) -> Tensor:
    """The network itself; conditions stay in the loss."""
    return raw


@ansatz
def burgers1d(points: Tensor, raw: Tensor) -> Tensor:
    """u(x, 0) = -sin pi x, u(+-1, t) = 0."""
    x, t = _columns(points)
    return (t * (1.0 - x * x)) * raw - torch.sin(x * math.pi)


@ansatz
def convection(points: Tensor, raw: Tensor) -> Tensor:
    """u(x, 0) = sin x; periodicity comes from the features."""
    x, t = _columns(points)
    return torch.sin(x) + t * raw


@ansatz
def reaction(points: Tensor, raw: Tensor) -> Tensor:
    """u(x, 0) = exp(-(x - pi)^2 / (2 (pi / 4)^2))."""
    x, t = _columns(points)
    far = (x - math.pi) * (4.0 / math.pi)
    return torch.exp(far * far * -0.5) + t * raw


@ansatz
def wave1d(points: Tensor, raw: Tensor) -> Tensor:
    """u(x, 0) = sin pi x + sin(3 pi x) / 2, u_t(x, 0) = 0, u(0, t) = u(1, t) = 0."""
    x, t = _columns(points)
    start = torch.sin(x * math.pi) + torch.sin(x * (3 * math.pi)) * 0.5
    return start + (t * t) * (x * (1.0 - x)) * raw


@ansatz
def cavity(points: Tensor, raw: Tensor, sharpness: float = 50.0) -> Tensor:
    """Velocity (1 - cosh(C (x - 1/2)) / cosh(C / 2), 0) on the lid y = 1 of the unit square, 0 on the other walls."""
    x, y = _columns(points)
    # exp(C (|x - 1/2| - 1/2)) without the absolute value; cosh(C / 2) itself overflows float32 for C above 176.
    edge = (torch.exp((x - 1.0) * sharpness) + torch.exp(x * -sharpness)) * (
        1.0 / (1.0 + math.exp(-sharpness))
    )
    lid = (1.0 - edge) * (y * y)
    inside = (x * (1.0 - x)) * (y * (1.0 - y)) * 16.0
    return torch.cat((lid + inside * raw[:, 0:1], inside * raw[:, 1:2], raw[:, 2:]), dim=1)


def apply_ansatz(name: str, points: Any, raw: Any, options: dict[str, Any] | None = None) -> Any:
    """Fields from raw outputs."""
    return get_ansatz(name)(points, raw, **(options or {}))
