"""Trivial and classical classifiers that a trained model is compared with."""

from __future__ import annotations

import warnings

import numpy as np

VERSION = "1"  # part of the cache key: raise it when a method changes
LOGISTIC_C = (0.003, 0.01, 0.03, 0.1)
SVM_C = (2.0, 5.0, 10.0)


def classification_baselines(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> dict[str, dict[str, float]]:
    """Fit on train, choose the penalty on val, score on test.

    Args:
        train: Features [N, F] and labels [N]; val and test likewise.

    Returns:
        Accuracy of ``majority_class``, ``logistic_regression`` and ``svm_rbf``.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    (x, y), (x_val, y_val), (x_test, y_test) = train, val, test
    majority = np.bincount(y).argmax()
    scores = {"majority_class": {"accuracy": float((y_test == majority).mean())}}
    if len(np.unique(y)) < 2:
        return scores
    centre, spread = x.mean(0), x.std() or 1.0  # one scale for all: pixels that hardly vary stay small
    x, x_val, x_test = ((part - centre) / spread for part in (x, x_val, x_test))
    candidates = {
        "logistic_regression": [LogisticRegression(C=c, max_iter=300) for c in LOGISTIC_C],
        "svm_rbf": [SVC(C=c) for c in SVM_C],
    }
    for name, models in candidates.items():
        best = -1.0
        for model in models:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps are the protocol
                model.fit(x, y)
            chosen = float((model.predict(x_val) == y_val).mean())
            if chosen > best:
                best = chosen
                scores[name] = {"accuracy": float((model.predict(x_test) == y_test).mean())}
    return scores
