"""Scikit-learn estimators: any attention variant on any table, with fit, predict, score, save and load.

    from zoo.sklearn import TabularClassifier
    TabularClassifier(attention="mala").fit(X, y).predict_proba(X)

They take arrays and DataFrames, follow scikit-learn's conventions (clone, pipelines, cross validation, grid search) and
train with a plain loop: no Lightning, no configuration files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets

from zoo.errors import DataError
from zoo.sklearn.estimator import TabularEstimator
from zoo.sklearn.inputs import TARGET, check_pair
from zoo.tabular.schema import Target

__all__ = ["TabularClassifier", "TabularRegressor"]


class TabularClassifier(ClassifierMixin, TabularEstimator):
    """Classifier on tables.

    Args:
        attention: Variant's name, or a mapping with `name` and its options.
        model: A tabular model: ft_transformer, tabnsa, multitab, tabm, tabr, tab_mlp.
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
        X, y = check_pair(self, X, y, numeric=False)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(f"y has 1 class ({self.classes_[0]!r}); a classifier needs at least 2")
        kind = "binary" if len(self.classes_) == 2 else "multiclass"
        target = Target(TARGET, kind, [str(i) for i in range(len(self.classes_))])
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


class TabularRegressor(RegressorMixin, TabularEstimator):
    """Regressor on tables; the parameters are those of `TabularClassifier`."""

    def fit(self, X: Any, y: Any) -> TabularRegressor:
        """Fit on rows X [N, F] (array or DataFrame; NaN = missing) and values y [N]."""
        X, y = check_pair(self, X, y, numeric=True)
        self._fit(X, y.astype(np.float64), Target(TARGET, "regression"))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Values on y's scale, [N]."""
        return self._predict(X)
