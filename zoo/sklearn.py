"""Scikit-learn estimators: any attention variant on any table, with fit, predict, score, save and load.

    from zoo.sklearn import TabularClassifier
    TabularClassifier(attention="mala").fit(X, y).predict_proba(X)

They take arrays and DataFrames, follow scikit-learn's conventions (clone, pipelines, cross validation, grid search) and
train with a plain loop: no Lightning, no configuration files.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_X_y, column_or_1d, validate_data

from zoo.errors import ConfigError, DataError, WeightsError
from zoo.models import create_model
from zoo.pretrained.weights import read_card, read_tensors, save_weights
from zoo.tabular.outputs import readings
from zoo.tabular.preprocess import Preprocessor
from zoo.tabular.schema import Schema, Target, infer_schema

ROWS_AT_ONCE = 4096


class _TabularEstimator(BaseEstimator):
    """What classifier and regressor share; the parameters are documented there."""

    def __init__(
        self,
        attention: str | Mapping[str, Any] = "softmax",
        *,
        model: str = "ft_transformer",
        model_options: Mapping[str, Any] | None = None,
        allow_order: bool = False,
        categorical_features: list[str] | None = None,
        epochs: int = 50,
        batch_size: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        ema_decay: float = 0.99,
        validation_fraction: float = 0.1,
        patience: int = 8,
        normalisation: str = "quantile",
        num_bins: int = 32,
        random_state: int | None = None,
    ) -> None:
        self.attention = attention
        self.model = model
        self.model_options = model_options
        self.allow_order = allow_order
        self.categorical_features = categorical_features
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.ema_decay = ema_decay
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.normalisation = normalisation
        self.num_bins = num_bins
        self.random_state = random_state

    # ---------------------------------------------------------------- fitting

    def _fit(self, X: Any, y: np.ndarray, target: Target) -> None:
        self._check_parameters()
        seed = self.random_state
        if not isinstance(seed, int):
            seed = int(check_random_state(seed).randint(2**31 - 1))
        table = self._table(X)
        table[_TARGET] = y
        order = np.random.RandomState(seed).permutation(len(table))
        val_rows = int(round(self.validation_fraction * len(table)))
        if val_rows < 10:  # too few to choose by
            val_rows = 0
        train, val = order[val_rows:], order[:val_rows]
        if target.kind != "regression" and val_rows:
            lost = set(y[val]) - set(y[train])
            if lost:  # a class must be seen in training
                train, val = order, order[:0]
        schema = _schema(table.iloc[train], target, self.categorical_features)
        self.preprocessor_ = Preprocessor(
            schema, normalisation=self.normalisation, num_bins=self.num_bins, seed=seed
        ).fit(table.iloc[train])
        arrays = self.preprocessor_.encode(table)
        values = self.preprocessor_.encode_target(table, target)
        if target.kind == "regression":
            values = (values - target.mean) / target.std
        tensors = [torch.from_numpy(arrays[k]) for k in ("numerical", "categorical", "missing")]
        tensors.append(torch.from_numpy(values.astype(np.float32)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model_ = self._build()
            if hasattr(self.model_, "set_bank"):
                self.model_.set_bank(*(t[train[:1024]] for t in tensors[:3]))
            self._train(tensors, torch.from_numpy(train), torch.from_numpy(val), target)

    def _check_parameters(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 1), ("patience", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {low}")
        if not 0 <= self.validation_fraction < 0.9:
            raise ConfigError(f"validation_fraction={self.validation_fraction} is outside [0, 0.9)")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay} is outside [0, 1)")
        if self.lr <= 0:
            raise ConfigError(f"lr={self.lr} must be positive")

    def _build(self) -> torch.nn.Module:
        p = self.preprocessor_
        sizes = {
            "num_numerical": len(p.schema.numerical),
            "cardinalities": p.cardinalities,
            "bins": p.edges,
            "outputs": [t.outputs for t in p.schema.targets],
        }
        attention = self.attention if isinstance(self.attention, str) else dict(self.attention)
        return create_model(
            self.model,
            attention=attention,
            allow_order=self.allow_order,
            **sizes,
            **dict(self.model_options or {}),
        )

    def _train(
        self, tensors: list[torch.Tensor], train: torch.Tensor, val: torch.Tensor, target: Target
    ) -> None:
        """AdamW with warm-up and cosine decay on averaged weights; stops when validation no longer improves."""
        model = self.model_
        average = copy.deepcopy(model).eval()
        steps = math.ceil(len(train) / self.batch_size)
        total, warmup = self.epochs * steps, max(1, int(0.1 * self.epochs * steps))
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda t: (
                (t + 1) / warmup
                if t < warmup
                else 0.5 * (1 + math.cos(math.pi * (t - warmup) / max(1, total - warmup)))
            ),
        )
        best, waited, kept, step = math.inf, 0, None, 0
        self.history_: list[dict[str, float]] = []
        for epoch in range(self.epochs):
            model.train()
            order = train[torch.randperm(len(train))]
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                loss = _loss(model(*(t[rows] for t in tensors[:3])), tensors[3][rows], target)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                step += 1
                decay = min(self.ema_decay, (1 + step) / (10 + step))
                with torch.no_grad():
                    for a, b in zip(average.parameters(), model.parameters(), strict=True):
                        a.lerp_(b, 1 - decay)
            record = {"epoch": epoch + 1, "train_loss": float(loss.detach())}
            if not math.isfinite(record["train_loss"]):
                raise DataError(f"the loss is {record['train_loss']} in epoch {epoch + 1}; try a smaller lr")
            if len(val):
                out = _outputs(average, [t[val] for t in tensors[:3]])
                record["val_loss"] = float(_loss(out, tensors[3][val], target))
                if record["val_loss"] < best:
                    best, waited, kept = record["val_loss"], 0, copy.deepcopy(average.state_dict())
                else:
                    waited += 1
            self.history_.append(record)
            if waited >= self.patience:
                break
        if kept is not None:
            average.load_state_dict(kept)
        # In double precision a row's prediction is the same to the last printed digit whatever rows come with it.
        self.model_, self.n_iter_ = average.double(), len(self.history_)

    # ---------------------------------------------------------------- predicting

    def _predict(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        arrays = self.preprocessor_.encode(self._table(X, reset=False))
        inputs = [torch.from_numpy(arrays[k]) for k in ("numerical", "categorical", "missing")]
        inputs[0] = inputs[0].double()
        target = self.preprocessor_.schema.targets[0]
        return readings(_outputs(self.model_, inputs), [target])[0].numpy()

    def _table(self, X: Any, *, reset: bool = True) -> Any:
        """X as a DataFrame; arrays get columns x0, x1 ... Numbers are checked by scikit-learn's rules."""
        import pandas as pd

        if isinstance(X, pd.DataFrame) and not all(d.kind in "fiu" for d in X.dtypes):
            if reset:
                self.feature_names_in_ = np.array([str(c) for c in X.columns], dtype=object)
                self.n_features_in_ = X.shape[1]
            return X.reset_index(drop=True).rename(columns=str)
        names = [str(c) for c in X.columns] if isinstance(X, pd.DataFrame) else None
        values = validate_data(self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan")
        return pd.DataFrame(values, columns=names or [f"x{i}" for i in range(values.shape[1])])

    # ---------------------------------------------------------------- storing

    def save(self, path: str | Path) -> None:
        """Write `path` (.safetensors) and its card; nothing in them is executable.

        Raises:
            WeightsError: The suffix is not .safetensors.
        """
        check_is_fitted(self)
        path = Path(path)
        if path.suffix != ".safetensors":
            raise WeightsError(f"{path}: the name must end in .safetensors")
        parameters = self.get_params(deep=False)
        card = {
            "task": "tabular",
            "estimator": type(self).__name__,
            "parameters": {k: dict(v) if isinstance(v, Mapping) else v for k, v in parameters.items()},
            "model": {"name": self.model},
            "preprocessing": self.preprocessor_.to_dict(),
            "features": list(map(str, getattr(self, "feature_names_in_", []))),
            "n_features": self.n_features_in_,
            "classes": np.asarray(self.classes_).tolist() if hasattr(self, "classes_") else None,
            "history": self.history_,
        }
        save_weights(path, copy.deepcopy(self.model_).float(), card)

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """The fitted estimator that `save` wrote.

        Raises:
            WeightsError: Missing or damaged files, or another estimator's.
        """
        path = Path(path)
        card = read_card(path)
        if card.get("estimator") != cls.__name__:
            raise WeightsError(
                f"{path} holds {card.get('estimator') or 'a run of train.py'}, not {cls.__name__}"
            )
        self = cls(**card["parameters"])
        self.preprocessor_ = Preprocessor.from_dict(card["preprocessing"])
        model = self._build().eval()
        model.load_state_dict(read_tensors(path, card["sha256"]))
        self.model_ = model.double()
        self.n_features_in_, self.history_ = card["n_features"], card["history"]
        self.n_iter_ = len(self.history_)
        if card["features"]:
            self.feature_names_in_ = np.array(card["features"], dtype=object)
        if card["classes"] is not None:
            self.classes_ = np.array(card["classes"])
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.non_deterministic = False
        return tags


class TabularClassifier(ClassifierMixin, _TabularEstimator):
    """Classifier on tables.

    Args:
        attention: Variant's name, or a mapping with `name` and its options.
        model: A tabular model: ft_transformer, tabnsa, multitab, tabm, tab_mlp.
        model_options: The model's own options, e.g. {"dim": 32}.
        allow_order: Let order-dependent variants use the order of the columns.
        categorical_features: Columns (names of a DataFrame) that hold categories although they look like numbers;
            columns of words always do.
        epochs: Most passes over the training rows.
        batch_size: Rows per step.
        lr: Peak learning rate.
        weight_decay: Of AdamW.
        ema_decay: Moving average of the weights, which predicts; 0 = off.
        validation_fraction: Share of the rows that decides when to stop; fewer than 10 rows are not held out.
        patience: Epochs without improvement before training stops.
        normalisation: quantile, standard or none.
        num_bins: Most bins per column of the piecewise-linear embedding.
        random_state: Seed; None draws one.
    """

    def fit(self, X: Any, y: Any) -> TabularClassifier:
        """Fit on rows X [N, F] (array or DataFrame; NaN = missing) and labels y [N]."""
        X, y = _check_pair(self, X, y, numeric=False)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"y has 1 class ({self.classes_[0]!r}); a classifier needs at least 2")
        kind = "binary" if len(self.classes_) == 2 else "multiclass"
        target = Target(_TARGET, kind, [str(i) for i in range(len(self.classes_))])
        self._fit(X, codes, target)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each class, [N, K], columns as in `classes_`."""
        p = self._predict(X)
        return np.stack((1 - p, p), 1) if p.ndim == 1 else p

    def predict(self, X: Any) -> np.ndarray:
        """Most probable class of each row, [N]."""
        return (
            self.classes_[self.predict_proba(X).argmax(1)] if hasattr(self, "classes_") else self._predict(X)
        )


class TabularRegressor(RegressorMixin, _TabularEstimator):
    """Regressor on tables; the parameters are those of `TabularClassifier`."""

    def fit(self, X: Any, y: Any) -> TabularRegressor:
        """Fit on rows X [N, F] (array or DataFrame; NaN = missing) and values y [N]."""
        X, y = _check_pair(self, X, y, numeric=True)
        self._fit(X, y.astype(np.float64), Target(_TARGET, "regression"))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Values on y's scale, [N]."""
        return self._predict(X)


_TARGET = "__target__"


def _check_pair(estimator: Any, X: Any, y: Any, *, numeric: bool) -> tuple[Any, np.ndarray]:
    import pandas as pd

    if y is None:
        raise ValueError(f"{type(estimator).__name__} requires y to be passed, but the target y is None")
    if isinstance(X, pd.DataFrame) and not all(d.kind in "fiu" for d in X.dtypes):
        y = column_or_1d(y, warn=True)
        if len(X) != len(y):
            raise DataError(f"X has {len(X)} rows, y has {len(y)}")
        return X, np.asarray(y)
    _, y = check_X_y(
        X, y, ensure_all_finite="allow-nan", dtype=np.float64, y_numeric=numeric, estimator=estimator
    )
    return X, y


def _schema(train: Any, target: Target, categorical: list[str] | None) -> Schema:
    """Kinds of the inputs; the target's kind is known, so any varying column stands in for it."""
    names = [c for c in train.columns if c != _TARGET]
    kinds = dict.fromkeys(categorical or (), "categorical")
    schema = None
    if len(train) > 1:
        stand_in = train.assign(**{_TARGET: np.arange(len(train), dtype=float)})
        try:
            schema = infer_schema(stand_in, [_TARGET], columns=kinds, target_kinds={_TARGET: "regression"})
        except DataError as error:
            if "no input column" not in str(error):
                raise
    if schema is None:  # nothing varies: the model can only learn the prior
        numbers = [c for c in names if train[c].dtype.kind in "fiub"]
        schema = Schema(numerical=numbers, categorical=[c for c in names if c not in numbers], targets=[])
    schema.targets = [target]
    return schema


def _loss(out: torch.Tensor, truth: torch.Tensor, target: Target) -> torch.Tensor:
    if out.dim() == 3:
        truth = truth[:, None].expand(out.shape[:2])
    if target.kind == "regression":
        return F.mse_loss(out[..., 0], truth)
    if target.kind == "binary":
        return F.binary_cross_entropy_with_logits(out[..., 0], truth)
    return F.cross_entropy(out.flatten(0, -2), truth.flatten().long())


@torch.no_grad()
def _outputs(model: torch.nn.Module, inputs: list[torch.Tensor]) -> torch.Tensor:
    model.eval()
    rows = range(0, len(inputs[0]), ROWS_AT_ONCE)
    return torch.cat([model(*(t[i : i + ROWS_AT_ONCE] for t in inputs)) for i in rows])
