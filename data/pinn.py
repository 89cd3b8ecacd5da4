"""Collocation points, conditions and a reference grid for one equation of `data.problems`.

Training sees collocation points and prescribed values only. Validation is the equation's residual at held-out points;
the reference solution is used by the test alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor

from data import register_data
from data.base import SplitDataset, ZooData, check_at_least
from data.errors import DataError
from data.problems import Condition, create_problem
from data.sampler import BatchKey, derive_seed

SAMPLINGS = ("sobol", "latin", "uniform", "grid")
_VALID, _CONDITIONS = 1_000_003, 1_000_033  # offsets that keep the streams of points apart


def sample_box(kind: str, count: int, lower: np.ndarray, upper: np.ndarray, seed: int) -> Tensor:
    """Points in a box, [count, d] float64.

    Args:
        kind: "sobol" (scrambled), "latin" hypercube, "uniform", or "grid" (the same cell centres for every seed).
    """
    dims = len(lower)
    if kind == "sobol":
        power = max(0, int(np.ceil(np.log2(max(count, 1)))))
        unit = qmc.Sobol(dims, seed=seed).random_base2(power)[:count]
    elif kind == "latin":
        unit = qmc.LatinHypercube(dims, seed=seed).random(count)
    elif kind == "uniform":
        unit = np.random.default_rng(seed).random((count, dims))
    elif kind == "grid":
        side = int(np.ceil(count ** (1 / dims)))
        axes = [(np.arange(side) + 0.5) / side] * dims
        unit = np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], 1)
    else:
        raise DataError(f"data.sampling={kind!r}: choose {', '.join(SAMPLINGS)}")
    return torch.from_numpy(lower + (upper - lower) * unit)


@register_data("pinn")
class PinnData(ZooData):
    """One equation.

    Args:
        problem: File stem in data/problems.
        physics: The problem's own options, e.g. {nu: 0.003} or {reynolds: 100}.
        interior: Candidate collocation points drawn for each training step.
        border: Points per condition, drawn once.
        valid_points: Held-out points of the validation.
        sampling: sobol | latin | uniform | grid.
        hard_conditions: Fulfil by the network's form what the problem has a form for; false puts all into the loss.
        steps_per_epoch: Training steps between validations.
        eval_batch_size: Grid points per step in validation and test.
        num_workers: Worker processes; sampling is cheap, 0 is fastest.
        seed: Draws the points.
        split_seed: Unused; there is no split to draw.
    """

    kind = "pinn"
    licence = "generated"

    def __init__(
        self,
        *,
        problem: str = "burgers1d",
        physics: dict[str, Any] | None = None,
        interior: int = 768,
        border: int = 200,
        valid_points: int = 4000,
        sampling: str = "sobol",
        hard_conditions: bool = True,
        steps_per_epoch: int = 100,
        eval_batch_size: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=1,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            split_seed=split_seed,
        )
        check_at_least(
            1, interior=interior, border=border, valid_points=valid_points, steps_per_epoch=steps_per_epoch
        )
        if sampling not in SAMPLINGS:
            raise DataError(f"data.sampling={sampling!r}: choose {', '.join(SAMPLINGS)}")
        self.problem = create_problem(problem, physics)
        self.physics = dict(physics or {})
        self.interior, self.border, self.valid_points = interior, border, valid_points
        self.sampling, self.steps_per_epoch = sampling, steps_per_epoch
        self.hard_conditions = hard_conditions
        self.lower, self.upper = np.array(self.problem.lower), np.array(self.problem.upper)
        self.source = self.problem.source

    def load(self) -> dict[str, SplitDataset]:
        """Train: one batch of points a step. Val: held-out points. Test: the reference grid."""
        self.grid, self.reference, self.grid_shape = self.problem.reference()
        if not torch.isfinite(self.reference).all():
            raise DataError(f"the reference of problem {self.problem.name!r} is not finite")
        held_out = sample_box(
            "sobol", self.valid_points, self.lower, self.upper, derive_seed(self.seed, _VALID) % 2**32
        )
        return {
            "train": SplitDataset(self.steps_per_epoch, self._train_batch),
            "val": SplitDataset(len(held_out), lambda key: {"points": held_out[key.indices]}),
            "test": SplitDataset(
                len(self.grid),
                lambda key: {"points": self.grid[key.indices], "values": self.reference[key.indices]},
            ),
        }

    def _train_batch(self, key: BatchKey) -> dict[str, Tensor]:
        return {"points": self.draw(self.interior, key.epoch, key.batch)}

    def draw(self, count: int, *where: int) -> Tensor:
        """Fresh interior points, the same for the same numbers, [count, d] float64."""
        return sample_box(
            self.sampling, count, self.lower, self.upper, derive_seed(self.seed, *where) % 2**32
        )

    def conditions(self, held_out: bool = False) -> list[Condition]:
        """The problem's conditions at fixed points, for training or for validation and test."""
        seed = derive_seed(self.seed, _VALID if held_out else _CONDITIONS)
        return self.problem.conditions(self.border, np.random.default_rng(seed))

    def preprocessing(self) -> dict[str, Any]:
        """Names and box of coordinates and fields, for evaluating weights."""
        p = self.problem
        return {
            "problem": p.name,
            "coordinates": list(p.coordinates),
            "fields": list(p.fields),
            "lower": list(p.lower),
            "upper": list(p.upper),
            "reported": {k: [list(part) for part in terms] for k, terms in p.reported.items()},
        }

    def split_ids(self) -> dict[str, list[str]]:
        """Counts of points; they are drawn, not listed."""
        return {
            "train": [f"{self.sampling}-{self.interior}-per-step"],
            "val": [f"sobol-{self.valid_points}"],
            "test": [f"grid-{'x'.join(map(str, self.grid_shape))}"],
        }

    def data_hash(self) -> str:
        """Of the reference."""
        return hashlib.sha256(self.reference.numpy().tobytes() + self.problem.name.encode()).hexdigest()

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """The zero field and, where time is a coordinate, the initial state kept for ever."""
        from data.problems.baselines import field_baselines

        return field_baselines(self)
