"""Small numerical solvers that give reference fields: a steady cavity and periodic two-dimensional flow."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from data.errors import DataError


def lid_profile(x: np.ndarray, sharpness: float | None) -> np.ndarray:
    """Lid velocity: 1, or 1 - cosh(C (x - 1/2)) / cosh(C / 2), which vanishes in the corners."""
    if sharpness is None:
        return np.ones_like(x)
    return 1 - (np.exp(sharpness * (x - 1)) + np.exp(-sharpness * x)) / (1 + np.exp(-sharpness))


def cavity_flow(
    reynolds: float, cells: int = 96, sharpness: float | None = 50.0, tolerance: float = 1e-10
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steady lid-driven cavity by Newton's method on stream function and vorticity, second-order differences.

    Args:
        reynolds: Reynolds number, solved by continuation above 100.
        cells: Cells per side.
        sharpness: C of the lid's profile; None for velocity 1 up to the corners.
        tolerance: Largest Newton update at the end.

    Returns:
        Axis [n], stream function, u and v, each [n, n] indexed [x, y], n = cells + 1.
    """
    n, h = cells + 1, 1.0 / cells
    axis = np.linspace(0, 1, n)
    number = np.arange(n * n).reshape(n, n)
    inner, walls = number[1:-1, 1:-1].ravel(), np.setdiff1d(number, number[1:-1, 1:-1])
    shift = {"e": n, "w": -n, "n": 1, "s": -1}

    def stencil(weights: dict[str, float]) -> sp.csr_matrix:
        parts = [
            sp.csr_matrix((np.full(len(inner), w), (inner, inner + shift.get(k, 0))), shape=(n * n, n * n))
            for k, w in weights.items()
        ]
        return sum(parts)

    dx, dy = stencil({"e": 0.5 / h, "w": -0.5 / h}), stencil({"n": 0.5 / h, "s": -0.5 / h})
    laplace = stencil({"e": 1 / h**2, "w": 1 / h**2, "n": 1 / h**2, "s": 1 / h**2, "c": -4 / h**2})
    at_inner = sp.csr_matrix((np.ones(len(inner)), (inner, inner)), shape=(n * n, n * n))
    at_walls = sp.csr_matrix((np.ones(len(walls)), (walls, walls)), shape=(n * n, n * n))
    # Thom's formula: wall vorticity = -2 psi(next inside) / h^2 - 2 U / h on the lid.
    rows, columns = [], []
    for wall, inside in (
        (number[0, :], number[1, :]),
        (number[-1, :], number[-2, :]),
        (number[1:-1, 0], number[1:-1, 1]),
        (number[1:-1, -1], number[1:-1, -2]),
    ):
        rows.append(wall)
        columns.append(inside)
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    thom = sp.csr_matrix((np.full(len(rows), 2 / h**2), (rows, columns)), shape=(n * n, n * n))
    lid = np.zeros(n * n)
    lid[number[1:-1, -1]] = 2 * lid_profile(axis[1:-1], sharpness) / h

    psi, omega = np.zeros(n * n), np.zeros(n * n)
    for re in [r for r in (100.0, 400.0, 1000.0) if r < reynolds] + [reynolds]:
        for _ in range(40):
            u, v = dy @ psi, -(dx @ psi)
            wx, wy = dx @ omega, dy @ omega
            transport = u * wx + v * wy - (laplace @ omega) / re
            residual = np.concatenate(
                (
                    laplace @ psi + at_inner @ omega + at_walls @ psi,
                    transport + at_walls @ omega + thom @ psi + lid,
                )
            )
            jacobian = sp.bmat(
                [
                    [laplace + at_walls, at_inner],
                    [
                        sp.diags(wx) @ dy - sp.diags(wy) @ dx + thom,
                        sp.diags(u) @ dx + sp.diags(v) @ dy - laplace / re + at_walls,
                    ],
                ]
            ).tocsc()
            step = splu(jacobian).solve(-residual)
            psi, omega = psi + step[: n * n], omega + step[n * n :]
            if np.abs(step).max() < tolerance * max(1.0, np.abs(omega).max()):
                break
        else:
            raise DataError(
                f"the cavity solver did not converge at Re={re:g}; try fewer cells or a lower Reynolds number"
            )
    u, v = (dy @ psi).reshape(n, n), -(dx @ psi).reshape(n, n)
    u[:, -1] = lid_profile(axis, sharpness)
    return axis, psi.reshape(n, n), u, v


def periodic_flow(
    viscosity: float, duration: float, modes: int = 64, snapshots: int = 21, step: float = 2.5e-3
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Unsteady flow on [0, 2 pi]^2 from modes of unequal wavenumber: dealiased pseudo-spectral, RK4.

    Returns:
        Side [n], times [T], and u, v, p, each [n, n, T] indexed [x, y, t]; p has mean zero.

    Raises:
        DataError: The waves that `modes` can hold are too long for this viscosity, or the steps.
    """
    n = modes
    side = np.arange(n) * (2 * np.pi / n)
    k = np.fft.fftfreq(n, 1 / n)
    kx, ky = k[:, None], k[None, :]
    k2 = kx**2 + ky**2
    inverse = np.where(k2 > 0, 1 / np.where(k2 > 0, k2, 1), 0)
    keep = (np.abs(kx) < n / 3) & (np.abs(ky) < n / 3)
    finest = keep & (np.maximum(np.abs(kx), np.abs(ky)) >= 5 / 6 * n / 3)
    x, y = side[:, None], side[None, :]
    # Single-|k| flows cannot tell the convective coefficient; these modes have |k|^2 = 1, 2 and 5.
    psi = np.cos(x) + np.sin(y) + 0.5 * np.sin(x + y) + 0.3 * np.cos(2 * x - y)
    w = np.fft.fft2(psi) * k2

    def velocity(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        s = w * inverse
        return np.fft.ifft2(1j * ky * s).real, np.fft.ifft2(-1j * kx * s).real

    def slope(w: np.ndarray) -> np.ndarray:
        u, v = velocity(w)
        transport = u * np.fft.ifft2(1j * kx * w).real + v * np.fft.ifft2(1j * ky * w).real
        return -np.fft.fft2(transport) * keep - viscosity * k2 * w

    times = np.linspace(0, duration, snapshots)
    between = max(1, int(np.ceil((times[1] - times[0]) / step)))
    dt = (times[1] - times[0]) / between
    fields: list[tuple[np.ndarray, ...]] = []
    for number in range(snapshots):
        u, v = velocity(w)
        uu, uv, vv = (np.fft.fft2(a) for a in (u * u, u * v, v * v))
        p = np.fft.ifft2(-(kx * kx * uu + 2 * kx * ky * uv + ky * ky * vv) * inverse).real
        fields.append((u, v, p))
        energy = np.abs(w) ** 2 * inverse
        # 64 modes at t = 3: errors stay below 0.002 (velocities reach 2) while this is below 1e-3, and grow along with it.
        share = np.sqrt(energy[finest].sum() / energy.sum())
        if not share < 1e-3:
            way = "a larger viscosity (0.005 is safe up to t = 3) or a shorter duration"
            if not np.isfinite(share):
                way = f"a smaller viscosity ({2 / (step * n * n):.2g} is safe)"
            raise DataError(
                f"viscosity={viscosity}: {n} modes and steps of {step} do not resolve the reference at t = {times[number]:.3g}; "
                f"choose {way}"
            )
        if number == snapshots - 1:
            break
        for _ in range(between):
            a = slope(w)
            b = slope(w + 0.5 * dt * a)
            c = slope(w + 0.5 * dt * b)
            d = slope(w + dt * c)
            w = w + dt / 6 * (a + 2 * b + 2 * c + d)
    u, v, p = (np.stack(f, -1) for f in zip(*fields, strict=True))
    return side, times, u, v, p
