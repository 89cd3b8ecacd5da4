"""Forms that fulfil initial and boundary conditions exactly: field = what is prescribed + (zero there) * network.

Each takes coordinates [N, d] and raw outputs [N, F], as tensors or jets, and returns fields [N, F]. They belong to the
model, because weights are useless without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
def kovasznay(points: Tensor, raw: Tensor, reynolds: float = 40.0) -> Tensor:
    """u and v of Kovasznay's flow on the sides of [-0.5, 1] x [-0.5, 1.5], p free.

    Inside, the side values are blended linearly (Coons' patch). On y = -0.5 and 1.5, u = 1 + e^(kx) and v = 0.
    """
    x, y = _columns(points)
    k = reynolds / 2 - math.sqrt(reynolds**2 / 4 + 4 * math.pi**2)
    across, up = (x + 0.5) * (1 / 1.5), (y + 0.5) * 0.5
    ends = across * (math.exp(k) - math.exp(-0.5 * k)) + math.exp(-0.5 * k)
    angle = y * (2 * math.pi)
    u = torch.exp(x * k) - ends * (torch.cos(angle) + 1.0) + 1.0
    v = ends * torch.sin(angle) * (k / (2 * math.pi))
    inside = (across * (1.0 - across)) * (up * (1.0 - up)) * 16.0
    return torch.cat((u + inside * raw[:, 0:1], v + inside * raw[:, 1:2], raw[:, 2:]), dim=1)


@ansatz
def taylor_green(points: Tensor, raw: Tensor) -> Tensor:
    """u = -cos x sin y, v = sin x cos y at t = 0, p free; periodicity comes from the features."""
    x, y, t = _columns(points)
    u, v = torch.cos(x) * torch.sin(y) * -1.0, torch.sin(x) * torch.cos(y)
    return torch.cat((u + t * raw[:, 0:1], v + t * raw[:, 1:2], raw[:, 2:]), dim=1)


@ansatz
def cavity(points: Tensor, raw: Tensor, sharpness: float = 50.0) -> Tensor:
    """Velocity (1 - cosh(C (x - 1/2)) / cosh(C / 2), 0) on the lid y = 1 of the unit square, 0 on the other walls.

    Below the lid the profile widens with the distance to it, C(y) = C / (1 + C (1 - y)), as flow in a corner does: kept
    sharp, it would leave layers of width 1 / C along both walls for the network to cancel.
    """
    x, y = _columns(points)
    c = ((1.0 - y) * sharpness + 1.0).reciprocal() * sharpness
    # exp(C (|x - 1/2| - 1/2)) without the absolute value; cosh(C / 2) itself overflows float32 for C above 176.
    edge = (torch.exp((x - 1.0) * c) + torch.exp(x * c * -1.0)) * (torch.exp(c * -1.0) + 1.0).reciprocal()
    lid = (1.0 - edge) * (y * y)
    # Steeper at the walls than x (1 - x): velocities in the lid's corners are of order 1 at any distance to them.
    across, up = (w * (w + 0.05).reciprocal() for w in (x * (1.0 - x), y * (1.0 - y)))
    inside = across * up
    return torch.cat((lid + inside * raw[:, 0:1], inside * raw[:, 1:2], raw[:, 2:]), dim=1)
