"""Tabular tasks end to end on small generated tables: train, resume from weights, predict, estimators, effects."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from data.ihdp import IhdpData, effect_scores
from data.table import TableData
from tasks.tabular import TabularTask
from tasks.tabular_figures import permutation_importance
from tasks.tabular_multitask import geometric_mean, multitask_gain, read_reference
from tasks.treatment_effect import TreatmentEffectTask
from zoo.attention.registry import list_attention
from zoo.errors import ConfigError, DataError
from zoo.models import create_model
from zoo.predict.tabular import TaskPredictor
from zoo.tabular import Target

ROOT = Path(__file__).parents[2]
TINY = {"dim": 16, "depth": 1, "num_heads": 2}


def table(n=500, seed=0):
    draw = np.random.default_rng(seed)
    a, b, c = draw.normal(size=n), draw.normal(size=n), draw.choice(["u", "v", "w"], n)
    a[::9] = np.nan
    score = np.nan_to_num(a) + 2 * (c == "u") + 0.2 * draw.normal(size=n)
    frame = pd.DataFrame({"a": a, "b": b, "c": c, "price": 100 + 20 * score})
    frame["label"] = np.where(score > 0.5, "yes", "no")
    frame["grade"] = np.digitize(score, [-0.5, 1.0])
    return frame


def make_data(tmp_path, target, name="t.csv", **options):
    table().to_csv(tmp_path / name, index=False)
    drop = dict.fromkeys({"price", "label", "grade"} - {target} - set(target), "ignore")
    data = TableData(
        path=str(tmp_path / name),
        target=target,
        columns=drop,
        show_schema=False,
        baseline_models="fast",
        **options,
    )
    data.setup()
    return data


def run_folder_config(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


def train(folder, *overrides, capsys=None):
    sys.path.insert(0, str(ROOT))
    import train as entry

    GlobalHydra.instance().clear()
    argv, sys.argv = sys.argv, ["train.py", *overrides, f"hydra.run.dir={folder}"]
    try:
        return entry.entry()
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tabular")
    table(1500).to_csv(folder / "train.csv", index=False)
    status = train(
        folder / "run",
        "task=tabular",
        "data=table",
        f"data.path={folder / 'train.csv'}",
        "data.target=label",
        "data.columns={price: ignore, grade: ignore}",
        "data.baseline_models=fast",
        "data.batch_size=64",
        "model.dim=16",
        "model.depth=1",
        "task.lr=1e-2",
        "callbacks.ema_decay=0.9",
        "trainer.max_epochs=4",
        "task.importance_rows=100",
    )
    assert status == 0
    return folder


def test_a_run_beats_the_trivial_baseline_and_leaves_figures(finished):
    result = json.loads((finished / "run/result.json").read_text())
    test = result["test"]
    assert test["auc"] > 0.9 and test["auc_low"] <= test["auc"] <= test["auc_high"]
    assert result["baselines"]["majority"]["auc"] == 0.5
    assert {"figures/target_label.png", "figures/importance.png"} <= set(result["figures"])
    assert all((finished / "run" / f).stat().st_size > 5000 for f in result["figures"])


def test_weights_predict_files_as_the_test_said(finished, tmp_path):
    from zoo.pretrained import load_model

    model, card = load_model(finished / "run/weights.safetensors")
    predictor = TaskPredictor(model.eval(), card)
    frame = table(1500)
    order = np.random.RandomState(0).permutation(1500)
    test = frame.iloc[order[-225:]]
    test[["c", "b", "a"]].assign(extra=1).to_csv(
        tmp_path / "new.csv", index=False
    )  # other order, one more column
    found = predictor.predict(str(tmp_path / "new.csv"))
    accuracy = np.mean(np.array(found["predictions"]["label"]) == test["label"].to_numpy())
    assert accuracy == pytest.approx(card["metrics"]["accuracy"], abs=1e-6)
    one = predictor.predict({"a": None, "b": 0.1, "c": "never seen"})
    assert one["rows"] == 1 and one["predictions"]["label"][0] in ("yes", "no")
    assert "row 0: label" in predictor.format("new.csv", found)
    with pytest.raises(DataError, match="input column 'a'"):
        predictor.predict(test[["b", "c"]])
    with pytest.raises(DataError, match="more than once"):
        predictor.predict(test[["a", "b", "c", "c"]])
    with pytest.raises(DataError, match="no rows"):
        predictor.predict(test[:0])


def test_words_for_missing_values_travel_with_the_weights(tmp_path):
    frame = table()
    frame["a"] = frame["a"].fillna(-999)
    frame.to_csv(tmp_path / "new.csv", index=False)
    data = TableData(
        path=str(tmp_path / "new.csv"),
        target="label",
        columns={"price": "ignore", "grade": "ignore"},
        missing_words=["-999.0"],
        show_schema=False,
    )
    card = {"preprocessing": json.loads(json.dumps(data.preprocessing()))}
    found = TaskPredictor(torch.nn.Identity(), card).preprocess(str(tmp_path / "new.csv"))
    assert found["missing"][:, 0].sum() == 56 == table()["a"].isna().sum()


@pytest.mark.parametrize("target", ["price", "label", "grade"])
def test_losses_and_readings_of_each_kind(tmp_path, target):
    data = make_data(tmp_path, target)
    model = create_model("ft_transformer", **TINY, **data.model_arguments())
    task = TabularTask(model, data, class_weight="balanced", label_smoothing=0.1)
    batch = next(iter(data.train_dataloader()))
    loss = sum(task.losses(batch).values())
    loss.backward()
    assert loss.isfinite() and model.head.weight.grad.abs().sum() > 0
    (prediction,) = task.eval().predictions(batch)
    if target == "price":  # on the original scale: an untrained model is near the mean, not near 0
        assert 60 < float(prediction.mean()) < 180
    else:
        assert (prediction >= 0).all() and (prediction <= 1).all()


def test_balanced_classes_weigh_alike(tmp_path):
    data = make_data(tmp_path, "grade")
    task = TabularTask(create_model("tab_mlp", **data.model_arguments()), data, class_weight="balanced")
    counts = torch.tensor(data.targets[0].counts, dtype=torch.float32)
    per_class = counts * task.class_weights_0
    torch.testing.assert_close(per_class, per_class.mean().expand(3))


def test_the_members_losses_are_averaged_not_the_loss_of_their_mean(tmp_path):
    data = make_data(tmp_path, "label")
    task = TabularTask(create_model("tabm", members=2, **data.model_arguments()), data)
    out, truth = torch.tensor([[[3.0], [-1.0]]]), torch.tensor([1.0])
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = (bce(out[0, 0], truth) + bce(out[0, 1], truth)) / 2
    torch.testing.assert_close(task.target_loss(0, out, truth), expected)


def test_retrieval_hides_a_rows_own_target_in_training_only(tmp_path):
    data = make_data(tmp_path, "price")
    options = {"dropout": 0.0, "context_dropout": 0.0, "unknown_rate": 0.0, "neighbors": 4, "dim": 16}
    model = create_model("tabr", **options, **data.model_arguments())
    task = TabularTask(model, data)
    assert int(model.bank.count) == len(data.dataset("train"))
    batch = next(iter(data.train_dataloader()))
    own = batch["index"][:1]
    before = [task.train(mode).logits(batch)[0].detach() for mode in (True, False)]
    model.bank.targets[own] += 5
    train, evaluation = (task.train(mode).logits(batch)[0].detach() for mode in (True, False))
    torch.testing.assert_close(train, before[0], rtol=0, atol=0)
    assert not torch.allclose(evaluation, before[1], atol=1e-4)


def test_permutation_importance_finds_the_columns_that_matter(tmp_path):
    data = make_data(tmp_path, "price")
    model = create_model("tab_mlp", dim=32, depth=1, **data.model_arguments())
    task = TabularTask(model, data, importance_rows=70)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    batch = data.dataset("train")[next(iter(data.loader("train").sampler))]
    for _ in range(60):
        optimizer.zero_grad()
        sum(task.losses(batch).values()).backward()
        optimizer.step()
    a, b, c = permutation_importance(task)
    assert c > 5 * abs(b) and a > 2 * abs(b)


def test_a_reported_gain_by_hand():
    targets = [Target("x", "regression"), Target("y", "binary", ["a", "b"])]
    ours, single = {"rmse_x": 0.8, "auc_y": 0.9}, {"rmse_x": 1.0, "auc_y": 0.6}
    assert multitask_gain(targets, ours, single) == pytest.approx((20 + 50) / 2)


def test_geometric_mean_weighs_each_target_by_one_over_its_loss():
    losses = torch.tensor([0.5, 8.0, 2.0], requires_grad=True)
    mean = geometric_mean(losses, [1.0, 1.0, 1.0])
    assert mean.item() == pytest.approx(2.0, rel=1e-5)
    mean.backward()
    torch.testing.assert_close(losses.grad * losses.detach(), torch.full((3,), 2.0 / 3))
    assert geometric_mean(losses, [1.0, 0.0, 1.0]).item() == pytest.approx(1.0, rel=1e-5)


def test_multitask_beside_single_task_networks(tmp_path, capsys):
    """The control trains one network per target; the multitask run reports its gain over that run, by hand."""
    table(300).to_csv(tmp_path / "t.csv", index=False)
    common = (
        "task=tabular_multitask",
        "data=table",
        f"data.path={tmp_path / 't.csv'}",
        "data.target=[price,label]",
        "data.columns={grade: ignore}",
        "data.baseline_models=none",
        "data.batch_size=64",
        "model.dim=16",
        "model.depth=1",
        "trainer.max_epochs=1",
        "task.importance_rows=0",
    )
    assert train(tmp_path / "single", *common, "model.separate=true") == 0, capsys.readouterr().err
    more = ("task.balance=geometric", f"task.reference={tmp_path / 'single'}")
    assert train(tmp_path / "multi", *common, *more) == 0, capsys.readouterr().err
    single, ours = (json.loads((tmp_path / f / "result.json").read_text()) for f in ("single", "multi"))
    assert single["cost"]["parameters"] > 1.5 * ours["cost"]["parameters"]
    a, b = ours["test"], single["test"]
    gain = 50 * ((b["rmse_price"] - a["rmse_price"]) / b["rmse_price"] + a["auc_label"] / b["auc_label"] - 1)
    assert a["gain_over_single_percent"] == pytest.approx(gain, rel=1e-4)
    assert "gain_over_single_percent" not in b
    for folder, words in ((tmp_path, "no result.json"), (tmp_path / "single", "has no rmse_other")):
        with pytest.raises(ConfigError, match=words):
            read_reference(folder, [Target("other", "regression"), Target("label", "binary")])


def test_multitask_trains_on_mixed_kinds(tmp_path, capsys):
    table(300).to_csv(tmp_path / "t.csv", index=False)
    status = train(
        tmp_path / "run",
        "task=tabular_multitask",
        "data=table",
        f"data.path={tmp_path / 't.csv'}",
        "data.target=[price,label,grade]",
        "data.baseline_models=fast",
        "data.batch_size=64",
        "model.dim=16",
        "model.depth=1",
        "trainer.max_epochs=1",
        "task.importance_rows=0",
    )
    assert status == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "run/result.json").read_text())
    test = result["test"]
    assert {"score_mean", "gain_percent"} <= set(test)
    for name in ("rmse_price", "auc_label", "accuracy_grade"):
        assert test[f"{name}_low"] <= test[name] <= test[f"{name}_high"]
    assert "single_task_mlp" in result["baselines"]


@pytest.mark.parametrize("attention", ["softmax", "linear", "none"])
@pytest.mark.parametrize("task", ["tabular", "tabular_multitask", "treatment_effect"])
def test_configurations_compose_with_matching_names(task, attention):
    if not (ROOT / f"conf/attention/{attention}.yaml").exists():
        pytest.skip(f"variant {attention} has no yaml yet")
    cfg = run_folder_config(f"task={task}", f"attention={attention}")
    assert cfg.task.name == task and cfg.attention.name == attention


@pytest.mark.parametrize(
    "name",
    ["adult", "adult_multitask", "california", "diamonds", "table", "table_stream", "multitab_bench", "ihdp"],
)
def test_yaml_equals_the_signature(name):
    from omegaconf import OmegaConf

    from tasks.registry import get_data, options_of

    given = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/data/{name}.yaml"))
    assert given.pop("name") == name
    defaults = options_of(get_data(name))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    plain = {k: ({} if v is None and given.get(k) == {} else v) for k, v in plain.items()}
    assert given == plain


@pytest.mark.parametrize(
    "name", ["ft_transformer", "tabnsa", "tabm", "tabr", "tab_mlp", "multitab", "transtee"]
)
def test_model_yaml_equals_the_signature(name):
    from omegaconf import OmegaConf

    from zoo.models.registry import model_options

    given = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/model/{name}.yaml"))
    assert given.pop("name") == name
    assert given == {k: list(v) if isinstance(v, tuple) else v for k, v in model_options(name).items()}


# ---------------------------------------------------------------- treatment effects


def test_simulated_effects_have_the_wanted_mean_and_confounding():
    data = IhdpData(rows=4000)
    data.setup()
    raw = data.raw
    treated = raw["t"] == 1
    assert (raw["mu1"] - raw["mu0"])[treated].mean() == pytest.approx(4.0)
    apart = np.abs(raw["x"][treated].mean(0) - raw["x"][~treated].mean(0)).max()
    calm = IhdpData(rows=4000, confounding=0.0)
    calm.setup()
    t = calm.raw["t"] == 1
    assert apart > 3 * np.abs(calm.raw["x"][t].mean(0) - calm.raw["x"][~t].mean(0)).max()


def test_effects_are_learned_and_never_read_the_answer(tmp_path):
    data = IhdpData(rows=300)
    data.setup()
    model = create_model("transtee", **TINY)
    task = TreatmentEffectTask(model, data, propensity_weight=0.5)
    batch = next(iter(data.train_dataloader()))
    assert set(task.losses(batch)) == {"mse", "propensity"}
    changed = {**batch, "mu": batch["mu"] + 99}
    task.eval()
    assert task.losses(batch)["mse"] == task.losses(changed)["mse"]
    both = task.outcomes(batch["covariates"])
    alone = torch.stack(
        [model(batch["covariates"], torch.full_like(batch["treatment"], t)) for t in (0, 1)], 1
    )
    torch.testing.assert_close(both, alone.double() * task.outcome_std + task.outcome_mean)


def test_effect_scores_by_hand():
    predicted, truth = np.array([[0.0, 2.0], [1.0, 1.0]]), np.array([[0.0, 1.0], [0.0, 3.0]])
    found = effect_scores(predicted, truth, np.array([1, 0]), np.array([1.0, 1.0]))
    assert found["pehe"] == pytest.approx(np.sqrt((1 + 9) / 2)) and found["ate_error"] == 1.0
    assert found["rmse"] == pytest.approx(np.sqrt(0.5))


def test_ihdp_files(tmp_path):
    data = IhdpData(rows=60)
    data.setup()
    stacked = {k: np.stack([v, v[::-1]], -1) for k, v in data.raw.items()}
    np.savez(tmp_path / "ihdp.npz", ycf=stacked["yf"], **stacked)
    again = IhdpData(path=str(tmp_path / "ihdp.npz"), replication=1)
    again.setup()
    np.testing.assert_array_equal(again.raw["x"], data.raw["x"][::-1])
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        IhdpData(path=str(tmp_path / "ihdp.npz"), replication=2).setup()
    for words, change in (("yf has 120", {"yf": stacked["yf"]}), ("mu0 holds", {"mu0": np.full(60, np.nan)})):
        np.savez(tmp_path / "odd.npz", **{**data.raw, **change})
        with pytest.raises(ValueError, match=words):
            IhdpData(path=str(tmp_path / "odd.npz")).setup()
    np.savez(tmp_path / "bad.npz", x=stacked["x"])
    with pytest.raises(ValueError, match="expected the arrays x, t, yf, mu0, mu1, found x"):
        IhdpData(path=str(tmp_path / "bad.npz")).setup()


def test_every_variant_learns_treatment_effects_or_says_why_not():
    for attention in list_attention():
        try:
            model = create_model("transtee", attention=attention, **TINY)
        except (ConfigError, NotImplementedError) as error:
            assert attention in str(error)
            continue
        out = model(torch.randn(3, 25), torch.tensor([0, 1, 0]))
        out.square().sum().backward()
        assert out.isfinite().all(), attention
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), attention
