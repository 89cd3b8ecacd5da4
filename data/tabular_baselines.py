"""Trivial, linear and boosted-tree models on tables, fitted on train, stopped on val, scored on test."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from zoo.tabular.schema import Target
from zoo.tabular.scores import score_target

VERSION = "2"  # part of the cache key: raise it when a method changes
LOGISTIC_C = (0.1, 1.0, 10.0)
RIDGE_ALPHA = (0.1, 1.0, 10.0, 100.0)
ROUNDS, RATE, PATIENCE, LEAVES = 1500, 0.05, 50, 63

Part = tuple[np.ndarray, np.ndarray]


def version(models: str) -> str:
    """Cache key: which methods run, with the libraries that are installed."""
    boosters = [m for m in ("lightgbm", "xgboost") if importlib.util.find_spec(m)] if models == "all" else []
    return f"{VERSION}-{models}-{'-'.join(boosters)}"


def tabular_baselines(
    targets: Sequence[Target],
    *,
    numbers: np.ndarray,
    codes: np.ndarray,
    values: np.ndarray,
    splits: Mapping[str, np.ndarray],
    models: str = "all",
) -> dict[str, dict[str, float]]:
    """Scores on test by method; with several targets the metric names end in the target's.

    Args:
        targets: What is predicted.
        numbers: Numerical columns on their own scale, NaN where missing, [N, Fn].
        codes: Categorical codes, 0 = never seen, [N, Fc].
        values: Class numbers or standardised values of the targets, [N, T].
        splits: Row numbers of train, val and test.
        models: "all", "fast" or "none".
    """
    if models == "none":
        return {}
    scores: dict[str, dict[str, float]] = {}
    linear_inputs = _one_hot(numbers, codes, splits["train"])
    tree_inputs = np.concatenate((numbers, codes), 1)
    categorical = np.arange(tree_inputs.shape[1]) >= numbers.shape[1]
    for column, target in enumerate(targets):
        y = values[:, column].astype(np.float64)
        suffix = f"_{target.name}" if len(targets) > 1 else ""
        methods = _methods(target, models, linear_inputs, tree_inputs, categorical)
        if len(targets) > 1:
            methods["single_task_mlp"] = (lambda a, v, x, t=target: _mlp(t, a, x), linear_inputs)
        for name, (fit, inputs) in methods.items():
            data = {s: (inputs[rows], y[rows]) for s, rows in splits.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # convergence: the number of steps is the protocol
                prediction = fit(data["train"], data["val"], data["test"][0])
            truth = data["test"][1]
            if target.kind == "regression":
                prediction, truth = prediction * target.std + target.mean, truth * target.std + target.mean
            found = score_target(target.kind, prediction, truth)
            scores.setdefault(name, {}).update({k + suffix: v for k, v in found.items()})
    return scores


def _one_hot(numbers: np.ndarray, codes: np.ndarray, train: np.ndarray) -> Any:
    """Standardised numbers with indicators of gaps, one-hot codes: sparse [N, ...]."""
    from scipy import sparse
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    parts = []
    if numbers.shape[1]:
        gaps = np.isnan(numbers)
        middle = np.nanmedian(numbers[train], 0)
        filled = np.where(gaps, np.nan_to_num(middle), numbers)
        parts.append(StandardScaler().fit(filled[train]).transform(filled))
        parts.append(gaps[:, gaps[train].any(0)].astype(np.float64))
    if codes.shape[1]:
        parts.append(OneHotEncoder(handle_unknown="ignore").fit(codes[train]).transform(codes))
    return sparse.hstack([sparse.csr_matrix(p) for p in parts]).tocsr()


def _methods(
    target: Target, models: str, linear: Any, trees: np.ndarray, categorical: np.ndarray
) -> dict[str, tuple[Callable[..., np.ndarray], Any]]:
    regression = target.kind == "regression"
    found: dict[str, tuple[Callable[..., np.ndarray], Any]] = {
        "mean" if regression else "majority": (lambda a, v, x: _trivial(target, a, x), trees),
        "ridge" if regression else "logistic_regression": (lambda a, v, x: _linear(target, a, v, x), linear),
        "hist_gradient_boosting": (lambda a, v, x: _hist(target, a, v, x, categorical), trees),
    }
    if models == "all" and importlib.util.find_spec("lightgbm"):
        found["lightgbm"] = (lambda a, v, x: _lightgbm(target, a, v, x, categorical), trees)
    if models == "all" and importlib.util.find_spec("xgboost"):
        found["xgboost"] = (lambda a, v, x: _xgboost(target, a, v, x, categorical), trees)
    return found


def _trivial(target: Target, train: Part, x: np.ndarray) -> np.ndarray:
    y = train[1]
    if target.kind == "regression":
        return np.full(x.shape[0], y.mean())
    share = np.bincount(y.astype(int), minlength=len(target.classes)) / len(y)
    return np.full(x.shape[0], share[1]) if target.kind == "binary" else np.tile(share, (x.shape[0], 1))


def _probabilities(target: Target, model: Any, x: Any) -> np.ndarray:
    """Probabilities in the order of the target's classes; classes that the model did not see get 0."""
    if target.kind == "regression":
        return model.predict(x)
    p = np.zeros((x.shape[0], len(target.classes)))
    p[:, model.classes_.astype(int)] = model.predict_proba(x)
    return p[:, 1] if target.kind == "binary" else p


def _loss(target: Target, prediction: np.ndarray, truth: np.ndarray) -> float:
    return score_target(target.kind, prediction, truth)["rmse" if target.kind == "regression" else "log_loss"]


def _linear(target: Target, train: Part, val: Part, x: Any) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression, Ridge

    if target.kind == "regression":
        models: list[Any] = [Ridge(alpha=a) for a in RIDGE_ALPHA]
    else:
        models = [LogisticRegression(C=c, max_iter=300) for c in LOGISTIC_C]
    fitted = [m.fit(*train) for m in models]
    best = min(fitted, key=lambda m: _loss(target, _probabilities(target, m, val[0]), val[1]))
    return _probabilities(target, best, x)


def _mlp(target: Target, train: Part, x: Any) -> np.ndarray:
    """One perceptron for one target: what several targets at once are compared with."""
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    cls = MLPRegressor if target.kind == "regression" else MLPClassifier
    model = cls(
        hidden_layer_sizes=(128, 128),
        batch_size=256,
        early_stopping=True,
        n_iter_no_change=8,
        max_iter=60,
        random_state=0,
    )
    return _probabilities(target, model.fit(*train), x)


def _hist(target: Target, train: Part, val: Part, x: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    cls = HistGradientBoostingRegressor if target.kind == "regression" else HistGradientBoostingClassifier
    # scikit-learn takes at most 255 codes per categorical column; longer ones serve as ordered numbers.
    few = categorical & (np.nanmax(train[0], 0) < 254)
    model = cls(
        max_iter=ROUNDS,
        learning_rate=RATE,
        max_leaf_nodes=LEAVES if len(train[1]) > 2000 else 15,
        categorical_features=few if few.any() else None,
        early_stopping=True,
        n_iter_no_change=PATIENCE,
        random_state=0,
    )
    model.fit(*train, X_val=val[0], y_val=val[1])
    return _probabilities(target, model, x)


def _lightgbm(target: Target, train: Part, val: Part, x: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    import lightgbm

    cls = lightgbm.LGBMRegressor if target.kind == "regression" else lightgbm.LGBMClassifier
    model = cls(n_estimators=ROUNDS, learning_rate=RATE, num_leaves=LEAVES, verbose=-1, random_state=0)
    names = np.flatnonzero(categorical).tolist()
    model.fit(
        *train,
        eval_set=[val],
        categorical_feature=names or "auto",
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    return _probabilities(target, model, x)


def _xgboost(target: Target, train: Part, val: Part, x: np.ndarray, categorical: np.ndarray) -> np.ndarray:
    import xgboost

    cls = xgboost.XGBRegressor if target.kind == "regression" else xgboost.XGBClassifier
    model = cls(
        n_estimators=ROUNDS,
        learning_rate=RATE,
        max_leaves=LEAVES,
        tree_method="hist",
        early_stopping_rounds=PATIENCE,
        feature_types=["c" if c else "q" for c in categorical],
        enable_categorical=True,
        random_state=0,
    )
    model.fit(*train, eval_set=[val], verbose=False)
    return _probabilities(target, model, x)
