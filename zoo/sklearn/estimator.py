"""What classifier and regressor share: parameters, fitting, predicting, storing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from zoo.errors import ConfigError, WeightsError
from zoo.models import create_model
from zoo.pretrained.weights import read_card, read_tensors, save_weights
from zoo.sklearn.inputs import TARGET, table_schema
from zoo.sklearn.training import Recipe, fit_network, outputs
from zoo.tabular.outputs import readings
from zoo.tabular.preprocess import Preprocessor
from zoo.tabular.schema import Target


class TabularEstimator(BaseEstimator):
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
        table[TARGET] = y
        order = np.random.RandomState(seed).permutation(len(table))
        val_rows = int(round(self.validation_fraction * len(table)))
        if val_rows < 10:  # too few to choose by
            val_rows = 0
        train, val = order[val_rows:], order[:val_rows]
        if target.kind != "regression" and val_rows:
            lost = set(y[val]) - set(y[train])
            if lost:  # a class must be seen in training
                train, val = order, order[:0]
        schema = table_schema(table.iloc[train], target, self.categorical_features)
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
                rows = train[: self.model_.bank_size]
                self.model_.set_bank(*(t[rows] for t in tensors[:3]), tensors[3][rows, None])
            recipe = Recipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})
            self.model_, self.history_ = fit_network(
                self.model_, tensors, torch.from_numpy(train), torch.from_numpy(val), target, recipe
            )
        self.n_iter_ = len(self.history_)

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

    # ---------------------------------------------------------------- predicting

    def _predict(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        arrays = self.preprocessor_.encode(self._table(X, reset=False))
        inputs = [torch.from_numpy(arrays[k]) for k in ("numerical", "categorical", "missing")]
        inputs[0] = inputs[0].double()
        target = self.preprocessor_.schema.targets[0]
        return readings(outputs(self.model_, inputs), [target])[0].numpy()

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

        A `random_state` that is a generator is left out: the loaded estimator would draw its own.

        Raises:
            WeightsError: The suffix is not .safetensors.
        """
        check_is_fitted(self)
        path = Path(path)
        if path.suffix != ".safetensors":
            raise WeightsError(f"{path}: the name must end in .safetensors")
        card = {
            "task": "tabular",
            "estimator": type(self).__name__,
            "parameters": _plain(self.get_params(deep=False)),
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


def _plain(value: Any) -> Any:
    """Parameters as JSON has them; grids made with NumPy hold its numbers, which would be stored as text."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.random.RandomState):
        return None
    return value.item() if isinstance(value, np.generic) else value
