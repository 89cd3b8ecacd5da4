"""Treatment effects with known answers: simulated surfaces like those of IHDP, or its usual .npz files.

Source: Hill, "Bayesian nonparametric modeling for causal inference", JCGS 2011 (response surface B).
Differs from it in: covariates are drawn, not taken from the trial; treatment depends on them through a logistic model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import register_data
from data.base import SPLITS, DataError, SplitDataset, ZooData, check_at_least, check_range, hash_arrays
from data.sampler import BatchKey
from zoo.files import read_arrays

CONTINUOUS, BINARY = 6, 19
FIELDS = ("x", "t", "yf", "mu0", "mu1")


@register_data("ihdp")
class IhdpData(ZooData):
    """25 covariates, one of two treatments, one outcome; the expected outcomes under both are known for scoring.

    Batches: ``covariates`` float32 [B, 25] (standardised), ``treatment`` int64 [B], ``outcome`` float32 [B]
    (standardised), ``mu`` float32 [B, 2] (expected outcomes without and with treatment, own scale; never trained on).

    Args:
        path: An .npz file with x [n, 25] or [n, 25, replications], t, yf, mu0, mu1; null generates.
        replication: Which one of the file.
        rows: Rows generated.
        confounding: How strongly covariates decide who is treated, >= 0; 0 is a randomised trial.
        noise: Standard deviation of the outcome around its expectation.
        common: Options of :class:`data.base.ZooData`.
    """

    licence = "generated"
    kind: ClassVar[str] = "treatment"
    VERSION = "1"

    def __init__(
        self,
        *,
        path: str | None = None,
        replication: int = 0,
        rows: int = 2000,
        confounding: float = 1.0,
        noise: float = 1.0,
        batch_size: int = 64,
        eval_batch_size: int = 1024,
        **common: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **common)
        check_at_least(0, replication=replication, confounding=confounding, noise=noise)
        check_range(50, 10_000_000, rows=rows)
        self.path = Path(path).expanduser() if path else None
        self.replication, self.rows = replication, rows
        self.confounding, self.noise = confounding, noise
        self.raw: dict[str, np.ndarray] = {}
        self._splits: dict[str, np.ndarray] = {}
        self._scale: dict[str, Any] = {}

    def generate(self) -> dict[str, np.ndarray]:
        """Draw a table from ``split_seed``: mu0 = exp(x b), mu1 = x b - w, with w such that treating the treated gains 4 on
        average. Hill adds 1/2 to every covariate under exp; here that factor is divided out again.
        """
        draw = np.random.RandomState(self.split_seed)
        n = self.rows
        x = np.concatenate(
            [
                draw.normal(size=(n, CONTINUOUS)),
                draw.binomial(1, draw.uniform(0.1, 0.9, BINARY), (n, BINARY)),
            ],
            1,
        )
        lean = x @ draw.normal(0, 0.3, x.shape[1])
        chance = 1 / (1 + np.exp(-self.confounding * (lean - np.quantile(lean, 0.7))))
        t = draw.binomial(1, chance)
        slope = draw.choice([0, 0.1, 0.2, 0.3, 0.4], x.shape[1], p=[0.6, 0.1, 0.1, 0.1, 0.1])
        mu0, linear = np.exp((x + 0.5) @ slope - 0.5 * slope.sum()), x @ slope
        mu1 = linear - (np.mean((linear - mu0)[t == 1]) - 4)
        yf = np.where(t == 1, mu1, mu0) + self.noise * draw.normal(size=n)
        return {"x": x, "t": t, "yf": yf, "mu0": mu0, "mu1": mu1}

    def _read(self) -> dict[str, np.ndarray]:
        if not self.path.is_file():
            raise DataError(f"data.path={self.path}: no such file; give an .npz with {', '.join(FIELDS)}")
        found = dict(zip(FIELDS, read_arrays(self.path, *FIELDS), strict=True))
        if found["x"].ndim == 3:
            count = found["x"].shape[2]
            if self.replication >= count:
                raise DataError(f"data.replication={self.replication}: the file has 0 .. {count - 1}")
            found = {f: a[..., self.replication] for f, a in found.items()}
        found = {f: a.reshape(len(a), -1) if f == "x" else a.reshape(-1) for f, a in found.items()}
        for field, array in found.items():
            if len(array) != len(found["x"]):
                raise DataError(
                    f"{self.path}: x has {len(found['x'])} rows, but {field} has {len(array)} numbers"
                )
            if not np.isfinite(array).all():
                raise DataError(
                    f"{self.path}: {field} holds empty or infinite values; fill them or drop their rows"
                )
        return found

    def load(self) -> dict[str, Dataset]:
        """Read or generate, split 60/20/20, standardise by training rows."""
        self.raw = {
            k: np.asarray(v, dtype=np.float64)
            for k, v in (self._read() if self.path else self.generate()).items()
        }
        if set(np.unique(self.raw["t"])) != {0.0, 1.0}:
            raise DataError(f"treatments must be 0 and 1, both present; found {np.unique(self.raw['t'])[:5]}")
        n = len(self.raw["t"])
        order = np.random.RandomState(self.split_seed).permutation(n)
        self._splits = dict(zip(SPLITS, np.split(order, [int(0.6 * n), int(0.8 * n)]), strict=True))
        train = self._splits["train"]
        x, y = self.raw["x"][train], self.raw["yf"][train]
        spread = x.std(0)
        self._scale = {
            "mean": x.mean(0).tolist(),
            "std": np.where(spread > 0, spread, 1.0).tolist(),
            "outcome_mean": float(y.mean()),
            "outcome_std": float(y.std()) or 1.0,
        }
        return {s: SplitDataset(len(rows), _Batches(self, rows)) for s, rows in self._splits.items()}

    def batch(self, rows: np.ndarray, key: BatchKey) -> dict[str, Tensor]:
        """One batch of a split."""
        r, s = rows[key.indices], self._scale
        x = (self.raw["x"][r] - np.array(s["mean"])) / np.array(s["std"])
        y = (self.raw["yf"][r] - s["outcome_mean"]) / s["outcome_std"]
        return {
            "covariates": torch.from_numpy(x).float(),
            "treatment": torch.from_numpy(self.raw["t"][r]).long(),
            "outcome": torch.from_numpy(y).float(),
            "mu": torch.from_numpy(np.stack((self.raw["mu0"][r], self.raw["mu1"][r]), 1)).float(),
        }

    @property
    def num_covariates(self) -> int:
        """Number of covariates."""
        self.setup()
        return self.raw["x"].shape[1]

    def preprocessing(self) -> dict[str, Any]:
        """Means and deviations of covariates and outcome."""
        self.setup()
        return {"kind": "treatment", **self._scale}

    def split_ids(self) -> dict[str, list[str]]:
        """Row numbers."""
        self.setup()
        return {split: [str(i) for i in rows] for split, rows in self._splits.items()}

    def data_hash(self) -> str:
        """Hash of table, split and version."""
        self.setup()
        return hash_arrays(*(self.raw[f] for f in FIELDS), *self._splits.values(), self.VERSION)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Difference of means; ridge and boosted trees, one model for each treatment or one for both."""
        from sklearn.ensemble import HistGradientBoostingRegressor
        from sklearn.linear_model import RidgeCV

        self.setup()
        x, t, y = self.raw["x"], self.raw["t"], self.raw["yf"]
        fit = np.concatenate((self._splits["train"], self._splits["val"]))
        test = self._splits["test"]
        one, none = fit[t[fit] == 1], fit[t[fit] == 0]
        ridge = lambda: RidgeCV(np.logspace(-2, 3, 12))  # noqa: E731
        trees = lambda: HistGradientBoostingRegressor(max_leaf_nodes=15, random_state=0)  # noqa: E731
        found = {}
        means = np.tile([y[none].mean(), y[one].mean()], (len(test), 1))
        found["difference_of_means"] = means
        for name, make in (("ridge_per_treatment", ridge), ("boosting_per_treatment", trees)):
            found[name] = np.stack([make().fit(x[g], y[g]).predict(x[test]) for g in (none, one)], 1)
        both = trees().fit(np.c_[x, t][fit], y[fit])
        found["boosting_shared"] = np.stack(
            [both.predict(np.c_[x[test], np.full(len(test), v)]) for v in (0.0, 1.0)], 1
        )
        truth = np.stack((self.raw["mu0"][test], self.raw["mu1"][test]), 1)
        return {n: effect_scores(p, truth, t[test].astype(int), y[test]) for n, p in found.items()}


def effect_scores(
    predicted: np.ndarray, truth: np.ndarray, treatment: np.ndarray, outcome: np.ndarray
) -> dict[str, float]:
    """Scores of predicted outcomes.

    Args:
        predicted, truth: Outcomes without and with treatment, [N, 2].
        treatment: Which one each row got, [N].
        outcome: What was seen, [N].

    Returns:
        pehe: root mean squared error of the effect; ate_error: error of the mean effect; rmse: of the seen outcome.
    """
    effect, true_effect = predicted[:, 1] - predicted[:, 0], truth[:, 1] - truth[:, 0]
    seen = predicted[np.arange(len(predicted)), treatment]
    return {
        "pehe": float(np.sqrt(((effect - true_effect) ** 2).mean())),
        "ate_error": float(abs(effect.mean() - true_effect.mean())),
        "rmse": float(np.sqrt(((seen - outcome) ** 2).mean())),
    }


class _Batches:
    """Picklable ``key -> batch`` of one split."""

    def __init__(self, owner: IhdpData, rows: np.ndarray) -> None:
        self.owner = owner
        self.rows = rows

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        return self.owner.batch(self.rows, key)
