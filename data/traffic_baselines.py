"""Forecasts that a trained model has to beat: persistence, calendar means, ridge regression, boosted trees.

All of them see what a model sees: the history, the earlier looks and the calendar. Settings are chosen on validation.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from data.traffic_scores import score
from data.traffic_windows import Windows

VERSION = "3"  # part of the cache key: raise it when a method changes
STRENGTHS = (0.3, 3.0, 30.0, 300.0, 3000.0)
# Cells of one training design matrix; longer sets are thinned evenly to stay below it.
MAX_CELLS = 40_000_000
# Sensors times history steps up to which the ridge over all sensors is fitted.
MAX_NETWORK_FEATURES = 1500
BOOST = {"objective": "l1", "num_leaves": 63, "learning_rate": 0.08, "min_data_in_leaf": 40, "verbose": -1}
BOOST_TREES = 2000  # a bound that early stopping never reached on the zoo's data


def has_lightgbm() -> bool:
    """Whether the optional boosted-trees baseline can run."""
    return find_spec("lightgbm") is not None


class ForecastBaselines:
    """Fits and scores the baselines of one data set.

    Args:
        windows: All rows.
        starts: First rows of the windows of each split, int64.
        profile: Mean by slot of the week, [W, N], from training rows.
        std: Deviation of each sensor from its profile in training rows, [N].
        steps: Steps ahead that are reported.
        mape_min: See `HorizonErrors`.
    """

    def __init__(
        self,
        windows: Windows,
        starts: dict[str, np.ndarray],
        profile: np.ndarray,
        std: np.ndarray,
        *,
        steps: tuple[int, ...],
        mape_min: float,
    ) -> None:
        self.windows, self.steps, self.mape_min = windows, steps, mape_min
        self.profile, self.std = torch.from_numpy(profile), torch.from_numpy(np.maximum(std, 1e-6))
        sensors, g = windows.values.shape[1], windows.geometry
        stride = max(
            1, -(-len(starts["train"]) * sensors * (g.history + g.horizon * (1 + len(g.lags))) // MAX_CELLS)
        )
        self.starts = {**starts, "train": starts["train"][::stride]}

    def run(self) -> dict[str, dict[str, float]]:
        """Scores on test by name of the baseline."""
        test = self._arrays("test")
        scores = {
            "copy_last": self._score(self._copy_last(test), test),
            "historical_average": self._score(test["base"], test),
        }
        week = 7 * self._slots_per_day
        if week in self.windows.geometry.lags:
            place = self.windows.geometry.lags.index(week)
            scores["last_week"] = self._score(self._unscale(test["known"][:, place], test["base"]), test)
        train, val = self._arrays("train"), self._arrays("val")
        scores["ridge"] = self._score(self._ridge(train, val, test, network=False), test)
        if self.profile.shape[1] * self.windows.geometry.history <= MAX_NETWORK_FEATURES:
            scores["ridge_network"] = self._score(self._ridge(train, val, test, network=True), test)
        if has_lightgbm():
            scores["lightgbm"] = self._boosted(train, val, test)
        return scores

    @property
    def _slots_per_day(self) -> int:
        return len(self.profile) // 7

    def _arrays(self, split: str) -> dict[str, Tensor]:
        """History and earlier looks as scaled distances from the profile (0 where missing), and targets."""
        batch = self.windows.batch(torch.from_numpy(self.starts[split]))
        g, slots = self.windows.geometry, len(self.profile)
        past = (batch["clock"][:, None] + torch.arange(g.history)) % slots
        future = (batch["clock"][:, None] + g.history + torch.arange(g.horizon)) % slots
        base = self.profile[future]
        arrays = {
            "base": base,
            "future": future,
            "last": batch["history"],
            "seen": batch["history_seen"],
            "history": self._scaled(batch["history"], self.profile[past], batch["history_seen"]),
            "target": batch["target"].masked_fill(~batch["target_seen"], torch.nan),
            "y": self._scaled(batch["target"], base, batch["target_seen"]),
            "y_seen": batch["target_seen"],
        }
        if g.lags:
            slot = (future[:, None] - torch.tensor(g.lags)[:, None]) % slots
            arrays["known"] = self._scaled(batch["known"], self.profile[slot], batch["known_seen"])
        else:
            arrays["known"] = base.new_zeros(len(base), 0, *base.shape[1:])
        return arrays

    def _scaled(self, values: Tensor, base: Tensor, seen: Tensor) -> Tensor:
        return ((values - base) / self.std).masked_fill(~seen, 0.0)

    def _unscale(self, z: Tensor, base: Tensor) -> Tensor:
        return base + z * self.std

    def _score(self, prediction: Tensor, arrays: dict[str, Tensor]) -> dict[str, float]:
        return score(prediction.float().numpy(), arrays["target"].numpy(), self.steps, self.mape_min)

    def _copy_last(self, arrays: dict[str, Tensor]) -> Tensor:
        """The latest reading in the window, repeated; the profile where the window has none."""
        steps = torch.arange(self.windows.geometry.history)[:, None]
        latest = torch.where(arrays["seen"], steps, -1).amax(dim=1, keepdim=True)
        last = arrays["last"].gather(1, latest.clamp_min(0)).expand_as(arrays["base"])
        return torch.where(latest >= 0, last, arrays["base"])

    def _ridge(
        self, train: dict[str, Tensor], val: dict[str, Tensor], test: dict[str, Tensor], *, network: bool
    ) -> Tensor:
        """Ridge per sensor and step on distances from the profile; `network` adds the histories of all sensors."""
        out = []
        for q in range(self.windows.geometry.horizon):
            x, x_val, x_test = (self._features(a, q, network) for a in (train, val, test))
            gram, moment = _moments(x, train["y"][:, q], train["y_seen"][:, q])
            truth = val["target"][:, q]
            best, chosen = float("inf"), None
            for strength in STRENGTHS:
                penalty = strength * torch.eye(gram.shape[-1], dtype=gram.dtype)
                penalty[-1, -1] = 0.0  # the constant
                weights = torch.linalg.solve(gram + penalty + 1e-6 * torch.eye(len(penalty)), moment)
                forecast = self._unscale(_apply(x_val, weights), val["base"][:, q])
                error = float((forecast - truth).abs().nanmean())
                if error < best:
                    best, chosen = error, weights
            out.append(self._unscale(_apply(x_test, chosen), test["base"][:, q]))
        return torch.stack(out, dim=1)

    def _features(self, arrays: dict[str, Tensor], q: int, network: bool) -> Tensor:
        """[S, N, F] per sensor, or [S, 1, F] with all sensors' readings."""
        parts = [arrays["history"].transpose(1, 2), arrays["known"][:, :, q].transpose(1, 2)]
        x = torch.cat(parts, dim=-1)
        if network:
            x = x.flatten(1)[:, None]
        return torch.cat((x, x.new_ones(*x.shape[:2], 1)), dim=-1)

    def _boosted(
        self, train: dict[str, Tensor], val: dict[str, Tensor], test: dict[str, Tensor]
    ) -> dict[str, float]:
        """One LightGBM model a reported step over all sensors, L1 loss, stopped on validation."""
        import lightgbm

        scores: dict[str, float] = {}
        for step in (s for s in self.steps if s <= self.windows.geometry.horizon):
            data = [self._table(a, step - 1) for a in (train, val, test)]
            (x, y, keep), (x_val, y_val, keep_val), (x_test, _, _) = data
            first = lightgbm.Dataset(x[keep], y[keep])
            model = lightgbm.train(
                {**BOOST, "seed": 0, "num_threads": torch.get_num_threads()},
                first,
                BOOST_TREES,
                valid_sets=[lightgbm.Dataset(x_val[keep_val], y_val[keep_val], reference=first)],
                callbacks=[lightgbm.early_stopping(20, verbose=False)],
            )
            z = torch.from_numpy(model.predict(x_test)).view(-1, self.profile.shape[1]).float()
            forecast = test["base"][:, step - 1] + z  # trees see readings: no scaling by sensor
            part = score(
                forecast[:, None].numpy(), test["target"][:, step - 1 : step].numpy(), (), self.mape_min
            )
            scores |= {f"{name}_h{step}": value for name, value in part.items()}
        return scores

    def _table(self, arrays: dict[str, Tensor], q: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows for trees, targets (distance from the profile in the readings' unit) and rows that count."""
        rows, sensors = arrays["y"].shape[0], arrays["y"].shape[2]
        history = arrays["history"] * self.std
        known = arrays["known"][:, :, q] * self.std
        calendar = arrays["future"][:, q, None].expand(rows, sensors)
        columns = [
            history.transpose(1, 2),
            known.transpose(1, 2),
            history.mean(dim=2, keepdim=True).transpose(1, 2).expand(rows, sensors, -1),
            arrays["base"][:, q, :, None],
            torch.stack(
                (
                    calendar % self._slots_per_day,
                    calendar // self._slots_per_day,
                    torch.arange(sensors).expand(rows, sensors),
                ),
                dim=-1,
            ),
        ]
        x = torch.cat([c.float() for c in columns], dim=-1).flatten(0, 1)
        y = (arrays["y"][:, q] * self.std).flatten()
        return x.numpy(), y.numpy(), arrays["y_seen"][:, q].flatten().numpy()


def _moments(x: Tensor, y: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Normal equations of each sensor over the rows where its target is present: [N, F, F] and [N, F, 1]."""
    x = x.double().transpose(0, 1)  # [N | 1, S, F]
    y, weight = y.double().T[..., None], seen.double().T[..., None]
    gram = x.transpose(1, 2) @ x
    if len(x) == len(weight):
        gram = gram - x.transpose(1, 2) @ (x * (1 - weight)) if (weight == 0).any() else gram
        return gram, x.transpose(1, 2) @ (y * weight)
    grams = []
    for sensor in range(len(weight)):
        missing = x[0][weight[sensor, :, 0] == 0]
        grams.append(gram[0] - missing.T @ missing)
    return torch.stack(grams), x.transpose(1, 2) @ (y * weight)


def _apply(x: Tensor, weights: Tensor) -> Tensor:
    """[S, N | 1, F] and [N, F, 1] to [S, N]."""
    if x.shape[1] == 1:
        return (x[:, 0].double() @ weights[..., 0].T).float()
    return torch.einsum("snf,nf->sn", x.double(), weights[..., 0]).float()
