"""Tables: schema, encoding without leaks, splits, formats, errors that show the way out."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.base import DataError
from data.multitab_bench import MultiTabBenchData, task_directions
from data.sampler import BatchKey
from data.table import TableData
from data.tabular_baselines import tabular_baselines
from zoo.errors import DataError as ZooDataError
from zoo.tabular import Preprocessor, Target, infer_schema, score_target
from zoo.tabular.bins import bin_edges
from zoo.tabular.columns import as_words
from zoo.tabular.scores import interval

ANY = (DataError, ZooDataError)


def frame(n=400, seed=0):
    draw = np.random.default_rng(seed)
    age = draw.integers(18, 80, n).astype(float)
    town = draw.choice(["Kiel", "Bonn", "Ulm"], n)
    table = pd.DataFrame({"age": age, "town": town, "height": draw.normal(170, 10, n)})
    table.loc[::7, "height"] = np.nan
    table["rich"] = np.where(age + 20 * (town == "Kiel") + draw.normal(0, 5, n) > 55, "yes", "no")
    return table


def write(tmp_path, table, name="table.csv"):
    path = tmp_path / name
    table.to_parquet(path) if name.endswith("parquet") else table.to_csv(path, index=False)
    return str(path)


def make(tmp_path, table, target="rich", **options):
    data = TableData(path=write(tmp_path, table), target=target, show_schema=False, **options)
    data.setup()
    return data


# ---------------------------------------------------------------- schema


def test_kinds_are_guessed_from_values():
    table = frame().assign(
        constant=1,
        empty=np.nan,
        text_number=[str(i % 9) for i in range(400)],
        flag=True,
        key=[f"id{i}" for i in range(400)],
    )
    table.loc[::2, "flag"] = False
    schema = infer_schema(table, ["rich"])
    assert schema.numerical == ["age", "height", "text_number"]
    assert schema.categorical == ["town", "flag"]
    assert set(schema.ignored) == {"constant", "empty", "key"}
    assert schema.targets[0].kind == "binary" and schema.targets[0].classes == ["no", "yes"]
    assert "text_number" in schema.describe()


def test_a_constant_or_empty_column_is_ignored_even_when_its_kind_is_given():
    table = frame().assign(constant=1, empty=None)
    schema = infer_schema(table, ["rich"], columns={"constant": "numerical", "empty": "categorical"})
    assert set(schema.ignored) == {"constant", "empty"}


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (lambda t: t, {"target": "rihc"}, "nearest: rich"),
        (lambda t: t, {"columns": {"agee": "numerical"}}, "nearest: age"),
        (lambda t: t, {"columns": {"age": "number"}}, "numerical, categorical, ignore"),
        (lambda t: t, {"columns": {"town": "numerical"}}, "declare the column categorical"),
        (lambda t: t.assign(age=t.age.replace(20, np.inf)), {}, "infinite value"),
        (lambda t: t.assign(rich="yes"), {}, "nothing to predict"),
        (lambda t: t.assign(rich=[*["yes"] * 200, *[None] * 200]), {}, "drop_missing_target"),
        (lambda t: t.assign(rich=["only", *t.rich[1:]]), {}, "no training row"),
        (lambda t: t.assign(rich=[f"w{i}" for i in range(len(t))]), {}, "stored as text"),
        (lambda t: t.iloc[:2], {}, "too few"),
        (lambda t: t, {"target_kind": {"rihc": "binary"}}, "the targets are rich"),
        (lambda t: t, {"target": ["rich", "rich"]}, "occurs 2 times"),
    ],
    ids=[
        "target",
        "column",
        "kind",
        "mixed",
        "inf",
        "constant-target",
        "empty-target",
        "one-row-class",
        "ids",
        "rows",
        "kind-of-no-target",
        "repeated-target",
    ],
)
def test_errors_show_the_way_out(tmp_path, change, options, words):
    table = change(frame())
    if words == "no training row":  # the row must fall into val or test for its class to be lost
        order = np.random.RandomState(0).permutation(len(table))
        rich = frame().rich.to_numpy().copy()
        rich[order[-1]] = "only"
        table = frame().assign(rich=rich)
    with pytest.raises(ANY, match=words):
        make(tmp_path, table, **{"target": "rich", **options})


def test_a_target_of_few_values_in_training_alone_is_to_be_declared(tmp_path):
    table = frame()
    table["rich"] = np.arange(400) % 20
    order = np.random.RandomState(0).permutation(len(table))
    table.loc[order[-1], "rich"] = 20
    with pytest.raises(ANY, match="data.target_kind={rich: regression}"):
        make(tmp_path, table)
    make(tmp_path, table, target_kind={"rich": "regression"})


def test_rare_classes_can_be_dropped(tmp_path):
    table = frame()
    table.loc[5, "rich"] = "only"
    data = make(tmp_path, table, rare_classes="drop")
    assert data.labels == ["no", "yes"] and data.skipped
    assert sum(len(v) for v in data.split_ids().values()) == 399


def test_repeated_column_names_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,a,y\n1,2,0\n3,4,1\n")
    with pytest.raises(ANY, match="'a' occurs 2 times"):
        TableData(path=str(path), target="y").setup()


def test_missing_or_unknown_files(tmp_path):
    with pytest.raises(ANY, match=r"no table at"):
        TableData(path=str(tmp_path / "none.csv"), target="y").setup()
    (tmp_path / "t.xyz").write_text("a")
    with pytest.raises(ANY, match="unknown kind of table"):
        TableData(path=str(tmp_path / "t.xyz"), target="y").setup()
    with pytest.raises(ANY, match=r"data\.path"):
        TableData(target="y")


# ---------------------------------------------------------------- encoding


@pytest.mark.parametrize("normalisation", ["quantile", "standard", "none"])
def test_no_statistic_of_val_or_test_reaches_preprocessing(tmp_path, normalisation):
    table = frame()
    data = make(tmp_path, table, normalisation=normalisation)
    outside = np.concatenate([data._splits["val"], data._splits["test"]])
    planted = table.copy()
    planted.loc[outside, "age"] = 1e6 + np.arange(len(outside))
    planted.loc[outside, "height"] = np.nan
    planted.loc[outside, "town"] = "Nowhere"
    planted.loc[outside, "rich"] = "yes"
    other = make(tmp_path, planted, normalisation=normalisation)
    assert data.preprocessing() == other.preprocessing()
    # The test can fail: planting the same in training rows changes the encoding.
    planted.loc[data._splits["train"][:50], "age"] = 1e6
    assert make(tmp_path, planted, normalisation=normalisation).preprocessing() != data.preprocessing()


def test_quantile_transform_equals_scikit_learns():
    from sklearn.preprocessing import QuantileTransformer

    from zoo.tabular.preprocess import quantile_normal

    draw = np.random.default_rng(0)
    x = np.concatenate([draw.exponential(1, 3000), np.full(1000, 0.5)])
    ours = QuantileTransformer(n_quantiles=100, output_distribution="normal", subsample=10**9).fit(x[:, None])
    new = np.concatenate([draw.exponential(1, 500), [0.5, -1.0, 99.0]])
    expected = ours.transform(new[:, None])[:, 0]
    np.testing.assert_allclose(quantile_normal(new, ours.quantiles_[:, 0]), expected, atol=2e-6)


def test_encoding_survives_json(tmp_path):
    data = make(tmp_path, frame())
    content = json.loads(json.dumps(data.preprocessor.to_dict()))
    again = Preprocessor.from_dict(content)
    for name, values in again.encode(frame(seed=1)).items():
        np.testing.assert_array_equal(values, data.preprocessor.encode(frame(seed=1))[name])


def test_unseen_and_missing_words(tmp_path):
    table = frame()
    table.loc[::11, "town"] = None
    p = make(tmp_path, table).preprocessor
    new = pd.DataFrame({"age": [30.0] * 4, "height": [170.0] * 4, "town": ["Bonn", "Nowhere", None, "?"]})
    codes = p.encode(new)["categorical"][:, 0]
    assert codes[1] == 0 and codes[2] == codes[3] > 0 and codes[0] not in (0, codes[2])


def test_a_word_is_the_same_however_the_file_around_it_is_read(tmp_path):
    """Beside a word pandas reads text, in a file of numbers alone numbers: 007, 7 and 7.0 are then one word."""
    table = frame().assign(code=["007", "8", "x", "9.0", "+5", "5"] * 66 + ["x"] * 4)
    p = make(tmp_path, table).preprocessor
    place = p.schema.categorical.index("code")

    def codes(values):
        rows = frame()[: len(values)].assign(code=values)
        return p.encode(rows)["categorical"][:, place].tolist()

    text = codes(["007", "8", "9.0", "5"])
    assert 0 not in text and codes([7, 8, 9, 5]) == codes(["7", "8.0", "9", "5"]) == text
    assert codes(["05", "5.5", "y"]) == [0, 0, 0]  # training told +5 and 5 apart


def test_infinity_is_a_word_of_a_categorical_column():
    assert as_words(pd.Series([1.0, np.inf, np.nan, 2.5])).tolist() == ["1", "inf", None, "2.5"]


def test_gaps_become_a_mask_or_an_indicator(tmp_path):
    data = make(tmp_path, frame())
    batch = data.dataset("train")[BatchKey(np.arange(64), 0, 0)]
    assert batch["missing"][:, 1].any() and not batch["missing"][:, 0].any()
    assert batch["numerical"].isfinite().all()
    data = make(tmp_path, frame(), missing="indicator")
    assert (
        data.preprocessor.feature_names[-1] == "height is missing"
        and data.preprocessor.cardinalities[-1] == 3
    )
    batch = data.dataset("train")[BatchKey(np.arange(64), 0, 0)]
    assert "missing" not in batch and set(batch["categorical"][:, -1].tolist()) == {1, 2}


def test_a_gap_in_a_column_without_training_gaps_gets_the_median(tmp_path):
    p = make(tmp_path, frame()).preprocessor
    new = pd.DataFrame({"age": [np.nan, p.fill[0]], "height": [170.0, 170.0], "town": ["Ulm", "Ulm"]})
    coded = p.encode(new)
    assert not coded["missing"][:, 0].any() and coded["numerical"][0, 0] == coded["numerical"][1, 0]


def test_targets_are_standardised_by_training_rows_and_come_back(tmp_path):
    table = frame().drop(columns="rich").assign(price=lambda t: 1000 + 50 * t.age)
    data = make(tmp_path, table, target="price")
    batch = data.dataset("test")[BatchKey(np.arange(10), -1, 0)]
    target = data.targets[0]
    back = batch["target"][:, 0].numpy() * target.std + target.mean
    np.testing.assert_allclose(back, table.price.iloc[data._splits["test"][:10]], rtol=1e-5)
    train = table.price.iloc[data._splits["train"]]
    assert target.mean == pytest.approx(train.mean()) and target.std == pytest.approx(train.std(ddof=0))


def test_tree_bins_find_the_step_that_quantiles_miss():
    draw = np.random.default_rng(0)
    x = draw.uniform(0, 1, 5000)
    y = (x > 0.97).astype(float)[:, None]
    tree = bin_edges(x, y, method="tree", num_bins=4)
    assert min(abs(e - 0.97) for e in tree) < 2e-3
    assert min(abs(e - 0.97) for e in bin_edges(x, y, method="quantile", num_bins=4)) > 0.02
    assert bin_edges(np.full(9, 2.0), y[:9]) == [1.5, 2.5]
    assert all(np.diff(bin_edges(np.repeat([1.0, 2.0], 50), np.repeat([0.0, 1.0], 50)[:, None])) > 0)


# ---------------------------------------------------------------- formats and splits


def test_parquet_equals_csv(tmp_path):
    a = make(tmp_path, frame())
    b = TableData(path=write(tmp_path, frame(), "t.parquet"), target="rich", show_schema=False)
    b.setup()
    for name in a.arrays:
        np.testing.assert_allclose(a.arrays[name], b.arrays[name], atol=1e-6)


def test_split_column(tmp_path):
    table = frame().assign(part=["train", "test", "valid", "train"] * 100)
    data = make(tmp_path, table, split_column="part")
    assert data.split_record()["sizes"] == {"train": 200, "val": 100, "test": 100}
    assert "part" not in data.preprocessor.feature_names
    train = [int(i) for i in data.split_ids()["train"]]
    assert sorted(train) == [i for i in range(400) if i % 4 in (0, 3)] and train != sorted(train)
    with pytest.raises(ANY, match="write train, val or test"):
        make(tmp_path, table.assign(part="x"), split_column="part")


def test_rtdl_folder(tmp_path):
    draw = np.random.default_rng(0)
    for split, n in (("train", 100), ("val", 20), ("test", 30)):
        np.save(tmp_path / f"N_{split}.npy", draw.normal(size=(n, 3)).astype(np.float32))
        np.save(tmp_path / f"C_{split}.npy", draw.choice(["a", "b"], (n, 1)))
        np.save(tmp_path / f"y_{split}.npy", draw.normal(size=n))
    (tmp_path / "info.json").write_text(json.dumps({"task_type": "regression", "name": "x"}))
    data = TableData(path=str(tmp_path), show_schema=False)
    data.setup()
    assert data.split_record()["sizes"] == {"train": 100, "val": 20, "test": 30}
    assert len(data.preprocessor.schema.numerical) == 3 and data.targets[0].kind == "regression"
    np.save(tmp_path / "C_train.npy", np.array([["a"], [None]], dtype=object), allow_pickle=True)
    with pytest.raises(ANY, match="Python objects"):
        TableData(path=str(tmp_path), show_schema=False).setup()
    (tmp_path / "C_train.npy").write_bytes(b"")
    with pytest.raises(ANY, match=r"C_train\.npy is no readable"):
        TableData(path=str(tmp_path), show_schema=False).setup()


def test_generated_tasks_have_the_wanted_correlation():
    w = task_directions(4, 9, 0.4, np.random.RandomState(0))
    np.testing.assert_allclose(w @ w.T, 0.4 + 0.6 * np.eye(4), atol=1e-12)
    with pytest.raises(DataError, match="as many features"):
        task_directions(5, 4, 0.1, np.random.RandomState(0))
    with pytest.raises(DataError, match="out of range"):
        task_directions(3, 4, -0.9, np.random.RandomState(0))


def test_generated_table_is_the_same_for_fewer_tasks():
    one, all_ = MultiTabBenchData(rows=200, tasks=[2]), MultiTabBenchData(rows=200)
    one.setup(), all_.setup()
    np.testing.assert_array_equal(one.arrays["numerical"], all_.arrays["numerical"])
    np.testing.assert_array_equal(one.arrays["target"][:, 0], all_.arrays["target"][:, 2])


# ---------------------------------------------------------------- scores and baselines


def test_scores_equal_scikit_learns():
    from sklearn import metrics

    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, 500)
    p = (draw.random(500) * 0.7 + 0.3 * y).round(1)  # many ties
    found = score_target("binary", p, y)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(y, p))
    assert found["ap"] == pytest.approx(metrics.average_precision_score(y, p))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(y, p.clip(1e-7, 1 - 1e-7)))
    y3 = draw.integers(0, 3, 500)
    p3 = draw.dirichlet([1, 1, 1], 500)
    found = score_target("multiclass", p3, y3)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(y3, p3, multi_class="ovr"))
    assert found["f1_macro"] == pytest.approx(metrics.f1_score(y3, p3.argmax(1), average="macro"))
    t, q = draw.normal(size=99), draw.normal(size=99)
    found = score_target("regression", q, t)
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(t, q))
    assert found["r2"] == pytest.approx(metrics.r2_score(t, q))


def test_interval_holds_the_score_and_narrows_with_rows():
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, 4000)
    p = 0.5 * draw.random(4000) + 0.2 * y
    low, high = interval("binary", p, y)
    assert low < score_target("binary", p, y)["auc"] < high
    short = interval("binary", p[:200], y[:200])
    assert high - low < short[1] - short[0]


def test_baselines_beat_the_trivial_one(tmp_path):
    data = make(tmp_path, frame(600), baseline_models="fast")
    found = data.compute_baselines()
    assert found["majority"]["auc"] == 0.5
    assert found["logistic_regression"]["auc"] > 0.8 and found["hist_gradient_boosting"]["auc"] > 0.8


def test_baselines_never_train_on_test_targets(tmp_path):
    data = make(tmp_path, frame(300), baseline_models="fast")
    values = data.arrays["target"].copy()
    values[data._splits["test"]] = np.random.default_rng(1).integers(0, 2, (len(data._splits["test"]), 1))
    found = tabular_baselines(
        data.targets,
        numbers=data.preprocessor._numbers(data.frame),
        codes=data.arrays["categorical"],
        values=values,
        splits=data._splits,
        models="fast",
    )
    assert abs(found["hist_gradient_boosting"]["auc"] - 0.5) < 0.25


def test_unknown_target_kind():
    with pytest.raises(ANY, match="binary, multiclass, regression"):
        infer_schema(frame(), ["rich"], target_kinds={"rich": "class"})
    assert Target("y", "multiclass", ["a", "b", "c"]).outputs == 3


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_stream_holds_the_same_rows_as_a_table_in_memory(tmp_path, suffix):
    from data.table_stream import TableStreamData

    path = write(tmp_path, frame(), f"t.{suffix}")
    # Standardised: the noise that separates ties before a quantile transform falls on rows in file order.
    options = {"path": path, "target": "rich", "baseline_models": "fast", "normalisation": "standard"}
    stream = TableStreamData(**options, piece_rows=100, scratch=str(tmp_path / "scratch"))
    whole = TableData(**options, show_schema=False)
    stream.setup(), whole.setup()
    assert stream.preprocessor.schema.to_dict()["numerical"] == whole.preprocessor.schema.numerical
    for split in ("train", "val", "test"):
        key = BatchKey(np.arange(len(whole.dataset(split))), -1, 0)
        a, b = stream.dataset(split)[key], whole.dataset(split)[key]
        np.testing.assert_array_equal(a["categorical"], b["categorical"])
        np.testing.assert_array_equal(a["target"], b["target"])
        np.testing.assert_array_equal(a["missing"], b["missing"])
        np.testing.assert_allclose(a["numerical"], b["numerical"], atol=1e-5)
    assert stream.compute_baselines()["logistic_regression"]["auc"] > 0.8
    assert isinstance(stream.arrays["numerical"], np.memmap)


def test_a_stream_refuses_repeated_column_names(tmp_path):
    from data.table_stream import TableStreamData

    path = write(tmp_path, frame().rename(columns={"height": "age"}))
    with pytest.raises(ANY, match="'age' occurs 2 times"):
        TableStreamData(path=path, target="rich", scratch=str(tmp_path / "s")).setup()


def test_a_stream_says_in_which_rows_of_the_file_a_fault_lies(tmp_path):
    from data.table_stream import TableStreamData

    table = frame()
    table.loc[250, "rich"] = None
    with pytest.raises(ANY, match="rows 200 to 299: .* row 50 "):
        TableStreamData(
            path=write(tmp_path, table),
            target="rich",
            piece_rows=100,
            sample_rows=100,
            scratch=str(tmp_path / "s"),
        ).setup()


def test_a_stream_does_not_hold_the_file(tmp_path):
    """Python's own allocations stay below a fraction of the file while it is encoded."""
    import tracemalloc

    from data.table_stream import TableStreamData

    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        draw.normal(size=(40_000, 40)).astype(np.float32), columns=[f"x{i}" for i in range(40)]
    )
    table["y"] = table.x0 + draw.normal(size=40_000)
    path = write(tmp_path, table, "big.parquet")
    stream = TableStreamData(
        path=path, target="y", sample_rows=500, piece_rows=500, scratch=str(tmp_path / "s")
    )
    tracemalloc.start()
    stream.setup()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = Path(path).stat().st_size
    assert peak < 0.6 * size, f"{peak / 2**20:.1f} MiB for a file of {size / 2**20:.1f} MiB"
