"""What the estimators accept: pairs of inputs and targets, and the schema they make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import check_X_y, column_or_1d

from zoo.errors import DataError
from zoo.tabular.schema import Schema, Target, infer_schema

TARGET = "__target__"  # column of the targets


def check_pair(estimator: Any, X: Any, y: Any, *, numeric: bool) -> tuple[Any, np.ndarray]:
    """Inputs [N, F] and targets [N], checked by scikit-learn's rules; a DataFrame with words stays as it is."""
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


def table_schema(train: Any, target: Target, categorical: list[str] | None) -> Schema:
    """Kinds of the inputs; the target's kind is known, so any varying column stands in for it."""
    names = [c for c in train.columns if c != TARGET]
    kinds = dict.fromkeys(categorical or (), "categorical")
    schema = None
    if len(train) > 1:
        stand_in = train.assign(**{TARGET: np.arange(len(train), dtype=float)})
        try:
            schema = infer_schema(stand_in, [TARGET], columns=kinds, target_kinds={TARGET: "regression"})
        except DataError as error:
            if "no input column" not in str(error):
                raise
    if schema is None:  # nothing varies: the model can only learn the prior
        numbers = [c for c in names if train[c].dtype.kind in "fiub"]
        schema = Schema(numerical=numbers, categorical=[c for c in names if c not in numbers], targets=[])
    schema.targets = [target]
    return schema
