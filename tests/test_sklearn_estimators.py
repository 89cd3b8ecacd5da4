"""The estimators keep scikit-learn's rules and do what ours promise besides."""

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import estimator_checks_generator

from zoo.errors import ConfigError, DataError, WeightsError
from zoo.sklearn import TabularClassifier, TabularRegressor

SMALL = {
    "model_options": {"dim": 16, "depth": 1, "num_heads": 2},
    "epochs": 25,
    "batch_size": 32,
    "lr": 1e-2,
    "random_state": 0,
    "ema_decay": 0.9,
}
# The suite of scikit-learn trains some 150 models; these checks cover its rules, the others run with -m slow.
QUICK = (
    "check_estimators_unfitted",
    "check_fit_score_takes_y",
    "check_n_features_in_after_fitting",
    "check_dataframe_column_names_consistency",
    "check_estimator_cloneable",
    "check_dict_unchanged",
    "check_dont_overwrite_attributes",
    "check_fit2d_1sample",
    "check_fit2d_1feature",
    "check_methods_subset_invariance",
    "check_estimators_pickle",
    "check_classifiers_one_label",
    "check_classifiers_regression_target",
    "check_supervised_y_2d",
    "check_parameters_default_constructible",
    "check_requires_y_none",
    "check_complex_data",
    "check_estimators_empty_data_messages",
)


def checks(quick):
    for cls in (TabularClassifier, TabularRegressor):
        options = {**SMALL, "epochs": 3} if quick else SMALL
        for estimator, check in estimator_checks_generator(cls(**options)):
            name = getattr(check, "func", check).__name__
            if (name in QUICK) == quick:
                yield pytest.param(estimator, check, id=f"{cls.__name__}-{name}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("estimator", "check"), checks(True))
def test_rules_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("estimator", "check"), checks(False))
def test_further_rules_of_scikit_learn(estimator, check):
    check(estimator)


def table(n=300):
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"size": draw.normal(size=n), "kind": draw.choice(["a", "b", "c"], n)})
    frame.loc[::10, "size"] = np.nan
    label = np.where(frame["size"].fillna(0) + 2 * (frame.kind == "a") > 0.8, "big", "small")
    return frame, label


def test_words_and_gaps_and_saving(tmp_path):
    frame, label = table()
    model = TabularClassifier(attention="linear", **SMALL).fit(frame, label)
    assert model.score(frame, label) > 0.9 and list(model.classes_) == ["big", "small"]
    p = model.predict_proba(frame)
    np.testing.assert_allclose(p.sum(1), 1)
    model.save(tmp_path / "m.safetensors")
    again = TabularClassifier.load(tmp_path / "m.safetensors")
    np.testing.assert_allclose(again.predict_proba(frame), p, atol=1e-12)
    assert again.get_params() == model.get_params()
    with pytest.raises(WeightsError, match="not TabularRegressor"):
        TabularRegressor.load(tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="input column 'kind'"):
        model.predict(frame[["size"]].assign(other="x"))


def test_parameters_of_a_numpy_grid_come_back_as_numbers(tmp_path):
    X, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 2
    for state, back in ((np.int64(3), 3), (np.random.RandomState(0), None)):
        given = {**SMALL, "epochs": np.int64(1), "random_state": state}
        TabularClassifier(**given).fit(X, y).save(tmp_path / "a.safetensors")
        found = TabularClassifier.load(tmp_path / "a.safetensors").get_params()
        assert (found["epochs"], found["random_state"]) == (1, back)


def test_regression_comes_back_on_its_own_scale():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 3))
    y = 5000 + 300 * x[:, 0] + 10 * draw.normal(size=300)
    model = TabularRegressor(**SMALL).fit(x, y)
    assert model.score(x, y) > 0.9 and 4000 < model.predict(x).mean() < 6000


def test_cross_validation_clones():
    frame, label = table(150)
    scores = cross_val_score(TabularClassifier(**{**SMALL, "epochs": 10}), frame, label, cv=2)
    assert scores.min() > 0.7
    assert clone(TabularClassifier(lr=0.5)).lr == 0.5


def test_bad_parameters():
    x, y = np.zeros((20, 2)), np.arange(20) % 2
    with pytest.raises(ConfigError, match="did you mean 'softmax'"):
        TabularClassifier(attention="softmx", **SMALL).fit(np.random.default_rng(0).normal(size=(20, 2)), y)
    with pytest.raises(ConfigError, match="lr=0"):
        TabularClassifier(lr=0).fit(x, y)
    with pytest.raises(NotFittedError):
        TabularClassifier().predict(x)
