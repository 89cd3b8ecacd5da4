"""Coefficients of the Navier-Stokes equations from a velocity field in closed form, by the weak form.

With w = (u, v), multiply w_t + l1 (w . grad) w + grad p - l2 laplace w = 0 by test functions phi = (psi_y, -psi_x) that
vanish on the border (or share the period) and integrate by parts: the pressure drops out, because phi is free of
divergence, and no derivative of the field is left. Each psi gives one equation that is linear in both coefficients,

    - int w . phi_t  -  l1 int w_i w_j d_j phi_i  -  l2 int w . laplace phi = 0,

and least squares over all of them gives l1 and l2. A network's error is mostly in short waves: in derivatives it weighs
more than the viscous term, which is why coefficients trained inside the pointwise residual are off by several percent
long after the field is right. The test functions are long waves, no shorter than four measurements. That rule looks at no
true value and hardly matters: with 1 to 5 waves, l2 of `experiment=pinn_inverse` is off by 0.4 to 0.7 % (1 % noise: 0.2 to
1.5 %). The idea is that of weak-form identification (Messenger and Bortz, arXiv:2007.02848), applied to the network's field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NODES = 32


@dataclass(frozen=True)
class Axis:
    """Functions of one coordinate.

    Attributes:
        nodes, weights: Quadrature, [n].
        values: Derivatives of order 0 to 3 of each function at the nodes, [4, count, n].
    """

    nodes: np.ndarray
    weights: np.ndarray
    values: np.ndarray

    def square(self, order: int) -> np.ndarray:
        """Integral of each function's squared derivative, [count]."""
        return (self.values[order] ** 2) @ self.weights


def _sines(x: np.ndarray, frequency: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """sin(frequency x + phase) and three derivatives, [4, M, n]."""
    angle = frequency[:, None] * x + phase[:, None]
    return np.stack([frequency[:, None] ** r * np.sin(angle + r * np.pi / 2) for r in range(4)])


def periodic_axis(lower: float, period: float, waves: int) -> Axis:
    """1, cos and sin of 1 .. `waves` waves."""
    x = lower + period * np.arange(NODES) / NODES
    k = 2 * np.pi / period * np.concatenate([np.arange(waves + 1), np.arange(1, waves + 1)])
    phase = np.repeat([np.pi / 2, 0.0], [waves + 1, waves])
    return Axis(x, np.full(NODES, period / NODES), _sines(x, k, phase))


def bounded_axis(lower: float, upper: float, waves: int, zeros: int) -> Axis:
    """Half waves under a window that has a zero of order 1 or 3 at both ends.

    sin^3 cos k = (3 (s[k + 1] - s[k - 1]) - (s[k + 3] - s[k - 3])) / 8 with s[m] = sin of m half waves.
    """
    x, weights = np.polynomial.legendre.leggauss(NODES)
    length, count = upper - lower, 2 * waves
    x, weights = lower + length * (x + 1) / 2, weights * length / 2
    m = np.arange(1, count + 4)
    s = _sines(x, m * np.pi / length, -m * np.pi * lower / length)
    if zeros == 1:
        return Axis(x, weights, s[:, :count])
    mix = np.zeros((count, len(m)))
    for k in range(count):
        for shift, factor in ((1, 3.0), (-1, -3.0), (3, -1.0), (-3, 1.0)):
            if k + shift:
                mix[k, abs(k + shift) - 1] += factor * np.sign(k + shift) / 8
    return Axis(x, weights, np.einsum("km,rmn->rkn", mix, s))


def shortest_waves(measurements: int) -> int:
    """Waves along an axis that are four of the measurements long, at least 1."""
    return max(1, int(measurements ** (1 / 3) / 4))


def weak_coefficients(
    velocity: Callable[[Tensor], Tensor],
    lower: Sequence[float],
    upper: Sequence[float],
    periods: Sequence[float | None] | None,
    waves: int,
) -> dict[str, float]:
    """l1 and l2 of the flow in a box of x, y, t.

    Args:
        velocity: Points [N, 3] float64 -> u and v, [N, 2].
        lower, upper: The box.
        periods: Period of x and y, None where there is none.
        waves: Shortest test functions: this many waves along an axis.
    """
    axes = [
        periodic_axis(low, period, waves) if period else bounded_axis(low, high, waves, 3)
        for low, high, period in zip(lower[:2], upper[:2], periods or (None, None), strict=False)
    ]
    axes.append(bounded_axis(lower[2], upper[2], waves, 1))
    mesh = np.meshgrid(*(a.nodes for a in axes), indexing="ij")
    points = torch.from_numpy(np.stack([g.ravel() for g in mesh], 1))
    u, v = np.moveaxis(velocity(points).numpy().reshape(NODES, NODES, NODES, 2), -1, 0)
    x, y, t = axes

    def integral(f: np.ndarray, *orders: int) -> np.ndarray:
        """Of f times a derivative of every psi, [count of all products]."""
        for axis, order in zip(axes, orders, strict=True):  # the first axis is summed, its functions go last
            f = np.tensordot(f, axis.values[order] * axis.weights, axes=([0], [1]))
        return f.ravel()

    def norm(*terms: tuple[int, int, int]) -> np.ndarray:
        """Integral of the sum of squared derivatives of every psi."""
        products = (np.einsum("a,b,c->abc", x.square(i), y.square(j), t.square(k)) for i, j, k in terms)
        return sum(products).ravel()

    rate = integral(v, 1, 0, 1) - integral(u, 0, 1, 1)
    convection = integral(u * v, 2, 0, 0) - integral(u * v, 0, 2, 0) - integral(u * u - v * v, 1, 1, 0)
    viscous = integral(v, 3, 0, 0) + integral(v, 1, 2, 0) - integral(u, 2, 1, 0) - integral(u, 0, 3, 0)
    # What an error of the field of size one does to an equation, through its rate and its convection.
    size = norm((1, 0, 1), (0, 1, 1))
    size += (u * u + v * v).mean() * norm((1, 1, 0), (1, 1, 0), (2, 0, 0), (0, 2, 0))
    kept = size > 0  # not psi of t alone, whose phi is zero
    scale = 1 / np.sqrt(size[kept])
    matrix = np.stack((convection[kept], viscous[kept]), 1) * scale[:, None]
    (l1, l2), *_ = np.linalg.lstsq(matrix, -rate[kept] * scale, rcond=None)
    return {"l1": float(l1), "l2": float(l2)}
