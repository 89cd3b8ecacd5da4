"""Click task: simulator, log data with drawn negatives, metrics, decoupled tables, figures."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from data import create_data
from data.errors import DataError
from data.rec_metrics import auc
from tasks.ctr import ClickThrough, correlation_with_truth, recall_of_truth
from zoo.attention.slots import resolve_slots
from zoo.errors import ConfigError
from zoo.models.registry import build_model, model_slots
from zoo.predict.ctr import TaskPredictor


@pytest.fixture(scope="module")
def simulated():
    data = create_data(
        "ctr_simulator", users=400, items=100, categories=10, behaviours=40, impressions=12, max_length=40
    )
    data.setup()
    return data


def make(data, name: str = "dare", task_options: dict | None = None, **options):
    options = {"width": 6, "hidden": (16,), **options, **ClickThrough.model_arguments(data)}
    factories = resolve_slots(model_slots(name, **options), {"name": "softmax"}, task="ctr")
    torch.manual_seed(0)
    return ClickThrough(build_model(name, attention=factories, **options), data, **(task_options or {}))


def test_simulator_repeats_itself_and_has_room_to_learn(simulated) -> None:
    again = create_data(
        "ctr_simulator",
        users=400,
        items=100,
        categories=10,
        behaviours=40,
        impressions=12,
        max_length=40,
        seed=5,
    )
    again.setup()
    assert again.data_hash() == simulated.data_hash()
    assert {s: len(r) for s, r in again.log.splits.items()} == {"train": 3200, "val": 800, "test": 800}
    scores = simulated.compute_baselines()
    assert scores["constant"]["auc"] == 0.5
    assert scores["true_probability"]["auc"] > scores["logistic_counts"]["auc"] + 0.1 > 0.55


def test_truth_is_what_drew_the_labels(simulated) -> None:
    batch = next(iter(simulated.test_dataloader()))
    own = batch["category"][:, None] == batch["categories"]
    relevance = batch["relevance"]
    assert ((relevance > 0) | ~own).all()  # every behaviour of the category counts
    first, last = relevance[own][:1], relevance[own][-1:]
    assert first > 0 and last > 0
    shorter = create_data(
        "ctr_simulator", users=400, items=100, categories=10, behaviours=40, impressions=12, max_length=10
    )
    shorter.setup()
    cut = next(iter(shorter.test_dataloader()))
    torch.testing.assert_close(cut["probability"], batch["probability"])
    torch.testing.assert_close(cut["relevance"], relevance[:, -10:])
    chance = batch["probability"].numpy()
    assert auc(chance, batch["label"].numpy()) > 0.6
    assert abs(chance.mean() - batch["label"].numpy().mean()) < 0.06


def test_training_lowers_the_loss_and_figures_are_drawn(simulated, tmp_path: Path) -> None:
    task = make(simulated).train()
    optimizer = torch.optim.AdamW(task.model.parameters(), 1e-2)
    losses = []
    for epoch in range(6):
        loader = simulated.train_dataloader()
        loader.set_epoch(epoch)
        for batch in loader:
            terms = task.losses(batch)
            assert set(terms) == {"click", "search"}
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            losses.append(float(terms["click"].detach()))
    assert np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.02
    task.eval()
    logits, labels = [], []
    with torch.no_grad():
        for batch in simulated.test_dataloader():
            task.update_metrics(batch, task.metrics["test"], "test")
            logits.append(
                task.model(*(batch[n] for n in ("item", "category", "items", "categories")))["logit"]
            )
            labels.append(batch["label"])
    values = task.compute_metrics("test")
    assert values["auc"] == pytest.approx(auc(torch.cat(logits).numpy(), torch.cat(labels).numpy()))
    assert {"gauc", "log_loss", "recall_of_truth", "recall_of_weight", "correlation_of_truth"} <= set(values)
    assert [p.name for p in task.figures(tmp_path)] == ["calibration.png", "search_scores.png"]
    task.on_test_start()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        task.update_metrics(batch, task.metrics["test"], "test")
    assert len(task.figures(tmp_path)) == 2, "numpy has no half precision of this kind"
    metrics = task.make_metrics()
    with torch.no_grad():
        task.update_metrics(batch | {"relevance": torch.zeros_like(batch["relevance"])}, metrics, "valid")
    assert metrics["recall"].update_count == 1, "processes without relevant behaviours take part in the mean"
    task.metrics["valid"] = metrics
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "recall_of_truth" not in task.compute_metrics("valid")


def test_recall_of_truth_equals_sets() -> None:
    torch.manual_seed(0)
    scores, real = torch.randn(20, 15), torch.rand(20, 15) < 0.9
    relevance = torch.where(torch.rand(20, 15) < 0.4, torch.rand(20, 15), torch.zeros(())) * real
    relevance[3] = 0
    expected, held = [], []
    for s, w, r in zip(scores, relevance, real, strict=True):
        wanted = {int(i) for i in w.argsort(descending=True)[:5] if w[i] > 0}
        found = {int(i) for i in s.masked_fill(~r, -9).argsort(descending=True)[:5]}
        if wanted:
            expected.append(len(wanted & found) / len(wanted))
            held.append(float(w[list(found)].sum() / w[list(wanted)].sum()))
    recall, weight = recall_of_truth(scores, relevance, real, 5)
    assert recall.tolist() == pytest.approx(expected)
    assert weight.tolist() == pytest.approx(held, abs=1e-5)
    assert len(expected) == 19


def test_perfect_and_useless_scores() -> None:
    relevance = torch.rand(50, 40) * (torch.rand(50, 40) < 0.3)
    real = torch.ones(50, 40, dtype=torch.bool)
    assert all(part.min() > 0.9999 for part in recall_of_truth(relevance, relevance, real, 10))
    constant = recall_of_truth(torch.zeros(50, 40), relevance, real, 10)[0].mean()
    assert abs(constant - 0.25) < 0.1  # 10 of 40 at random
    nothing = recall_of_truth(torch.full((50, 40), -torch.inf), relevance, real, 10)
    assert all(part.max() == 0 for part in nothing), "a search that leaves everything out finds nothing"
    truth = relevance + 1e-3
    right = correlation_with_truth(truth.log(), truth, real)
    assert right.min() > 0.999


@pytest.fixture
def taobao(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        f"{u},{i},{i % 7},{'pv' if rng.random() < 0.8 else 'buy'},{1_511_500_000 + 60 * t}"
        for u in range(25)
        for t, i in enumerate(rng.integers(1000, 1400, 30))
    ]
    path = tmp_path / "UserBehavior.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_log_becomes_impressions_without_leaks(taobao: Path) -> None:
    data = create_data("clicks", path=str(taobao), behaviours=["pv"], max_length=12, positives=3, stride=2)
    data.setup()
    log, test = data.log, data.log.splits["test"]
    owned = [set(log.item[s:e]) for s, e in zip(log.offsets[:-1], log.offsets[1:], strict=True)]
    for split, rows in log.splits.items():
        assert (rows.label.reshape(-1, 3) == [1, 0, 0]).all()
        assert (log.item[rows.end] == rows.item)[
            rows.label == 1
        ].all()  # the history ends before the positive
        assert all(
            i not in owned[u] for u, i, y in zip(rows.user, rows.item, rows.label, strict=True) if y == 0
        )
        last = log.offsets[rows.user + 1]
        distance = {"train": (last - rows.end).min() >= 3, "val": (last - rows.end == 2).all()}
        assert distance.get(split, (last - rows.end == 1).all())
    assert len(test) == 25 * 3
    assert data.num_categories == 7 and data.split_record()["counted"]["filtered"] > 50
    losses = make(data, "din").train().losses(next(iter(data.train_dataloader())))
    assert losses["click"].isfinite()


def test_prediction_takes_the_ids_of_the_log(taobao: Path) -> None:
    data = create_data("clicks", path=str(taobao), max_length=12)
    task = make(data, "din").eval()
    predictor = TaskPredictor(task.model, {"preprocessing": data.preprocessing()})
    ids = data.log.items[4], data.log.items[8]
    item, history = torch.tensor([9]), torch.tensor([[5, 9]])
    category = torch.from_numpy(data.log.category)
    logit = task.model(item, category[item], history, category[history])["logit"]
    found = predictor.predict(f"{ids[1]}:{ids[0]},nowhere,{ids[1]}")
    assert found["probability"] == pytest.approx(logit.sigmoid().item(), abs=1e-6)
    assert found["ignored"] == ["nowhere"]
    with pytest.raises(DataError, match="item '9' .* not in the catalogue, whose ids look like"):
        predictor.predict("9:5")


def test_log_errors_name_the_way_out(taobao: Path) -> None:
    with pytest.raises(DataError, match="data.path=UserBehavior.csv"):
        create_data("clicks")
    with pytest.raises(DataError, match=r"data.behaviours=\['view'\]; the log has: buy, pv"):
        create_data("clicks", path=str(taobao), behaviours=["view"]).setup()
    with pytest.raises(DataError, match="min_history"):
        create_data("clicks", path=str(taobao), min_history=90).setup()


@pytest.mark.parametrize("name", ["dare", "din"])
def test_tables_have_groups_of_their_own(simulated, name) -> None:
    options = {"table_weight_decay": 0.5, "search_weight_decay": 0.25, "search_lr_factor": 3.0}
    task = make(simulated, name, task_options={**options, "schedule": "constant", "warmup_fraction": 0.0})
    task.total_steps = lambda: 10
    groups = task.configure_optimizers()["optimizer"].param_groups
    tables = {
        id(p) for m in task.model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()
    }
    search = {id(p) for p in task.model.compare.parameters()} if name == "dare" else set()
    found = {g["weight_decay"]: {id(p) for p in g["params"]} for g in groups}
    assert found[0.5] == tables - search
    assert found.get(0.25, set()) == search
    assert {g["lr"] / task.lr for g in groups if g["weight_decay"] == 0.25} == ({3.0} if search else set())
    assert {g["lr"] for g in groups if g["weight_decay"] != 0.25} == {task.lr}
    assert sum(len(g["params"]) for g in groups) == len(list(task.model.parameters()))


def test_wrong_settings_name_the_rule(simulated) -> None:
    with pytest.raises(ConfigError, match="did you mean 'clicks'"):
        make(simulated, task_options={"gauc_weights": "click"})
    with pytest.raises(ConfigError, match="truth_k=0"):
        make(simulated, task_options={"truth_k": 0})
    with pytest.raises(ConfigError, match="search_lr_factor=0"):
        make(simulated, task_options={"search_lr_factor": 0})
