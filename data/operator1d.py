"""Initial states of Burgers' equation and the states they become: u_t + u u_x = nu u_xx on the periodic [0, 1)."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import register_data
from data.base import SplitDataset, ZooData, check_at_least, hash_arrays
from data.carriers import cache_dir, write_atomic
from data.errors import DataError
from data.sampler import BatchKey

VERSION = "1"  # part of the cache key: raise it when the generator changes
NODES = 256


def burgers_flow(start: np.ndarray, nu: float, duration: float, steps: int) -> np.ndarray:
    """State after `duration`: dealiased pseudo-spectral, RK4 with integrating factor.

    Args:
        start: [S, N] on uniform nodes of [0, 1).
    """
    n = start.shape[1]
    k = 2 * np.pi * np.fft.rfftfreq(n, 1 / n)
    keep, dt = k < 2 * np.pi * n / 3, duration / steps
    half, full = np.exp(-nu * k**2 * dt / 2), np.exp(-nu * k**2 * dt)

    def slope(w: np.ndarray) -> np.ndarray:
        u = np.fft.irfft(w, n)
        return -0.5j * k * keep * np.fft.rfft(u * u)

    w = np.fft.rfft(start)
    for _ in range(steps):
        a = slope(w)
        b = slope(half * (w + 0.5 * dt * a))
        c = slope(half * w + 0.5 * dt * b)
        d = slope(full * w + dt * half * c)
        w = full * w + dt / 6 * (full * a + 2 * half * (b + c) + d)
    return np.fft.irfft(w, n)


@register_data("operator1d")
class Operator1dData(ZooData):
    """Pairs of functions at 256 nodes; training uses every 256 / `nodes`-th of them.

    Args:
        nu: Viscosity, > 0.
        duration: Time between the two states, > 0.
        modes: Harmonics of the random initial states.
        train, valid, test: Numbers of functions.
        nodes: Nodes in training and validation; divides 256.
        refine: Nodes at which the test is repeated without training there; divide 256.
        batch_size: Functions per step.
        eval_batch_size: Functions per step in validation and test.
        num_workers: Worker processes; data are in memory, 0 is fastest.
        seed: Order of the training functions.
        split_seed: Draws the functions.
    """

    kind = "operator"
    licence = "generated"
    source = "pseudo-spectral solver"

    def __init__(
        self,
        *,
        nu: float = 0.02,
        duration: float = 0.5,
        modes: int = 6,
        train: int = 512,
        valid: int = 64,
        test: int = 64,
        nodes: int = 64,
        refine: tuple[int, ...] = (128, 256),
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            split_seed=split_seed,
        )
        check_at_least(1, modes=modes, train=train, valid=valid, test=test)
        if nu <= 0 or duration <= 0:
            raise DataError(f"data.nu={nu} and data.duration={duration} must be positive")
        for option, counts in {"nodes": (nodes,), "refine": refine}.items():
            if wrong := [count for count in counts if count < 2 or NODES % count]:
                raise DataError(f"data.{option}: {wrong[0]} must divide {NODES} and be at least 2")
        self.nu, self.duration, self.modes = nu, duration, modes
        self.sizes, self.nodes, self.refine = (train, valid, test), nodes, tuple(refine)

    def load(self) -> dict[str, SplitDataset]:
        """Generate once, keep in the cache."""
        key = hash_arrays(
            f"{VERSION}-{self.nu}-{self.duration}-{self.modes}-{sum(self.sizes)}-{self.split_seed}"
        )
        path = cache_dir() / "operator1d" / f"{key[:24]}.npy"
        pair = None
        if path.is_file():
            with contextlib.suppress(ValueError, EOFError):  # a damaged cache file is made again
                pair = np.load(path, allow_pickle=False)
        if pair is None:
            pair = self._generate()
            buffer = io.BytesIO()
            np.save(buffer, pair)
            with contextlib.suppress(OSError):  # a read-only or full cache only costs the time next time
                write_atomic(path, buffer.getvalue())
        u0, u1 = torch.from_numpy(pair).float()
        edges = np.cumsum((0, *self.sizes))
        self.split = {
            name: (u0[a:b], u1[a:b])
            for name, a, b in zip(("train", "val", "test"), edges, edges[1:], strict=False)
        }
        return {name: SplitDataset(len(u0), _Batches(u0, u1)) for name, (u0, u1) in self.split.items()}

    def _generate(self) -> np.ndarray:
        draw, x = np.random.default_rng(self.split_seed), np.arange(NODES) / NODES
        k = np.arange(1, self.modes + 1)
        a, b = draw.standard_normal((2, sum(self.sizes), self.modes)) / k**1.5
        angle = 2 * np.pi * k[:, None] * x
        start = 0.5 * (a @ np.cos(angle) + b @ np.sin(angle)) + 0.3 * draw.standard_normal(
            (sum(self.sizes), 1)
        )
        steps = int(np.ceil(self.duration / 2e-3))
        return np.stack((start, burgers_flow(start, self.nu, self.duration, steps)))

    def preprocessing(self) -> dict[str, Any]:
        """What the operator maps to what."""
        return {"equation": "burgers", "nu": self.nu, "duration": self.duration, "nodes": self.nodes}

    def split_ids(self) -> dict[str, list[str]]:
        """Numbers of the generated functions."""
        edges = np.cumsum((0, *self.sizes))
        return {
            n: [str(i) for i in range(a, b)]
            for n, a, b in zip(("train", "val", "test"), edges, edges[1:], strict=False)
        }

    def data_hash(self) -> str:
        """Of all functions."""
        return hash_arrays(*(t for pair in self.split.values() for t in pair))

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """The input itself, the heat equation's exact flow, and ridge regression between node values."""
        (x, y), (xv, yv), (xt, yt) = (
            tuple(t[:, :: NODES // self.nodes].double().numpy() for t in self.split[s])
            for s in ("train", "val", "test")
        )

        def score(found: np.ndarray, true: np.ndarray) -> float:
            return float((np.linalg.norm(found - true, axis=1) / np.linalg.norm(true, axis=1)).mean())

        k = 2 * np.pi * np.fft.rfftfreq(self.nodes, 1 / self.nodes)
        heat = np.fft.irfft(np.fft.rfft(xt) * np.exp(-self.nu * k**2 * self.duration), self.nodes)
        fits = []
        for penalty in (1e-3, 1e-1, 1e1):
            matrix = np.linalg.solve(x.T @ x + penalty * np.eye(self.nodes), x.T @ y)
            fits.append((score(xv @ matrix, yv), score(xt @ matrix, yt)))
        return {
            "input": {"rel_l2": score(xt, yt)},
            "heat_equation": {"rel_l2": score(heat, yt)},
            "ridge_regression": {"rel_l2": min(fits)[1]},
        }


class _Batches:
    """Pairs of one split by their numbers; a class, so that worker processes can be sent it."""

    def __init__(self, u0: Tensor, u1: Tensor) -> None:
        self.u0, self.u1 = u0, u1

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        return {"u0": self.u0[key.indices], "u1": self.u1[key.indices]}
