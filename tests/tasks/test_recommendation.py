"""Next-item task: learns a chain, losses, cloze, figures, exactness of the evaluation, prediction."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data import create_data
from data.rec_controls import control_scores
from tasks.recommendation import Recommendation
from tests.commands import forked
from zoo.attention.slots import resolve_slots
from zoo.errors import ConfigError, DataError
from zoo.models.registry import build_model, model_slots
from zoo.predict.recommendation import TaskPredictor


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    """Item i is nearly always followed by i + 1 of 30."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(120):
        item = int(rng.integers(30))
        for step in range(12):
            rows.append((user, f"i{item:02d}", 1_500_000_000 + step))
            item = (item + 1) % 30 if rng.random() < 0.95 else int(rng.integers(30))
    path = tmp_path_factory.mktemp("log") / "log.csv"
    pd.DataFrame(rows, columns=["user", "item", "timestamp"]).to_csv(path, index=False)
    out = create_data("interactions", path=str(path), max_length=8, batch_size=30)
    out.setup()
    return out


def make(data, name: str = "sasrec", **task_options):
    options = {"dim": 24, "dropout": 0.0, **Recommendation.model_arguments(data)}
    factories = resolve_slots(model_slots(name, **options), {"name": "softmax"}, task="recommendation")
    torch.manual_seed(0)
    return Recommendation(build_model(name, attention=factories, **options), data, **task_options)


def train(task, steps: int, lr: float = 1e-2) -> list[float]:
    task.train()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr)
    loader, losses = task.data.train_dataloader(), []
    for epoch in range(1000):
        loader.set_epoch(epoch)
        for batch in loader:
            loss = sum(task.losses(batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if len(losses) == steps:
                return losses


@torch.no_grad()
def scores_of(task, split: str = "test") -> dict[str, float]:
    task.eval()
    for batch in task.data.loader(split):
        task.update_metrics(batch, task.metrics["test"], split)
    values = task.compute_metrics("test")
    task.metrics["test"].reset()
    return values


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sasrec", {}),
        ("sasrec", {"loss": "sampled", "negatives": 20}),
        ("sasrec", {"loss": "binary"}),
        ("hstu", {}),
        ("bert4rec", {"mask_last": 0.5}),
    ],
)
def test_learns_the_chain(data, name: str, options: dict) -> None:
    task = make(data, name, **options)
    before = scores_of(task)["hr_at_5"]
    train(task, 200 if name != "bert4rec" else 300)
    after = scores_of(task)["hr_at_5"]
    assert after > 0.6 > 2 * before  # chance is about 5 / 20 unseen items


def test_evaluation_equals_ranking_by_hand(data, tmp_path: Path) -> None:
    task = make(data)
    train(task, 20)
    values = scores_of(task)
    hits = gains = 0.0
    log, events = data.log, data.parts.samples["test"]
    with torch.no_grad():
        for event in events:
            user = np.searchsorted(log.offsets, event, side="right") - 1
            history = log.item[log.offsets[user] : event]
            row = torch.from_numpy(history[-8:])[None]
            scores = task.model.scores(task.model.user_vector(row))[0].double().numpy()
            target = log.item[event] - 1
            allowed = [i for i in range(len(scores)) if i == target or i + 1 not in history]
            rank = 1 + sum(scores[i] > scores[target] for i in allowed)
            hits += rank <= 10
            gains += (rank <= 10) / np.log2(rank + 1)
    assert values["hr_at_10"] == pytest.approx(hits / len(events), abs=1e-6)
    assert values["ndcg_at_10"] == pytest.approx(gains / len(events), abs=1e-6)
    written = task.figures(tmp_path)
    assert [p.name for p in written] == ["ranking.png", "coverage.png"]
    assert all(p.stat().st_size > 5000 for p in written)


def test_controls_see_every_user_in_each_of_two_processes(data, tmp_path: Path) -> None:
    whole = control_scores(data)

    def one_of_two(rank: int) -> None:
        for name, scores in control_scores(data).items():
            assert scores == pytest.approx(whole[name], abs=1e-9), name

    assert forked(one_of_two, 2, tmp_path) == [0, 0]


@torch.no_grad()
def test_padding_of_a_history_hides_no_item(data) -> None:
    task = make(data).eval()
    batch = next(iter(data.test_dataloader()))
    for extra in (0, 2):
        seen = torch.nn.functional.pad(batch["seen"], (extra, 0))
        task.update_metrics({**batch, "seen": seen}, task.metrics["test"], "test")
    for first, second in zip(*task._tested, strict=True):
        assert torch.equal(first, second)


def test_constant_scorer_gets_chance_not_one(data) -> None:
    task = make(data)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.zero_()
    values = scores_of(task)
    allowed = [
        30 - len(set(batch["seen"][row].tolist()) - {0, int(batch["target"][row])})
        for batch in data.test_dataloader()
        for row in range(len(batch["target"]))
    ]
    assert values["hr_at_10"] == pytest.approx(np.mean([min(1, 10 / n) for n in allowed]), abs=1e-6)


def test_hidden_items_are_asked_and_nothing_else(data) -> None:
    task = make(data, "bert4rec", mask_fraction=0.3)
    batch = next(iter(data.train_dataloader()))
    items, targets = task._hide(batch["items"], batch["targets"])
    hidden = items == task.model.mask_token
    assert hidden.any() and (targets[~hidden] == 0).all() and (targets[hidden] > 0).all()
    full = torch.cat((batch["items"][:, 1:], batch["targets"][:, -1:]), 1)
    assert torch.equal(targets[hidden], full[hidden]) and torch.equal(items[~hidden], full[~hidden])
    alone = make(data, "bert4rec", mask_last=1.0)._hide(batch["items"], batch["targets"])[0]
    assert ((alone == task.model.mask_token).nonzero()[:, 1] == 7).all()
    few = make(data, "bert4rec", mask_fraction=1e-9, mask_last=0.0)._hide(batch["items"], batch["targets"])[1]
    assert ((few > 0).sum(1) == 1).all()  # none goes by without a question


def test_prediction_continues_the_chain_and_reports_unknown_items(data) -> None:
    task = make(data)
    train(task, 200)
    predictor = TaskPredictor(task.model.eval(), {"preprocessing": data.preprocessing()})
    assert predictor.options({"user-history": "i03,i04,i05", "top-k": "3"}) == ["i03,i04,i05"]
    out = predictor.predict("i03,i04,nothing,i05")
    assert out["top"][0][0] == "i06" and len(out["top"]) == 3
    assert out["ignored"] == ["nothing"] and out["used"] == 3
    assert not {"i03", "i04", "i05"} & {item for item, *_ in out["top"]}
    assert "i06" in predictor.format("x", out)
    with pytest.raises(DataError, match="history is empty"):
        predictor.predict(" , ")
    with pytest.raises(DataError, match="did you mean i"):
        predictor.predict("i0")
    with pytest.raises(ConfigError, match="--top-k"):
        predictor.options({"top-k": "0"})
    with pytest.raises(ConfigError, match="did you mean '--user-history'"):
        predictor.options({"user-histori": "1"})


def test_wrong_settings_name_the_rule(data) -> None:
    with pytest.raises(ConfigError, match="did you mean 'sampled'"):
        make(data, loss="sample")
    with pytest.raises(ConfigError, match="mask_fraction"):
        make(data, mask_fraction=1.0)
    with pytest.raises(ConfigError, match="task.label_smoothing=0.1 belongs to task.loss=full, not sampled"):
        make(data, loss="sampled", label_smoothing=0.1)
