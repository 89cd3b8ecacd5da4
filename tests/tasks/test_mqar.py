"""Recall task: what is scored, the model's two forms, and the figure over runs."""

import json

import pytest
import torch

from data import create_data
from tasks.mqar import Recall
from tasks.mqar_figures import main
from zoo.attention.slots import resolve_slots
from zoo.errors import ConfigError
from zoo.models.recall_lm import RecallLm


def model(name="softmax", **options):
    return RecallLm(
        resolve_slots(RecallLm.slots(), {"name": name}), vocabulary=64, max_length=32, dim=16, **options
    )


def data():
    module = create_data(
        "mqar", vocabulary=64, length=32, pairs=4, train_size=40, val_size=10, test_size=12, batch_size=8
    )
    module.setup()
    return module


def test_only_asked_places_count():
    source = data()
    task = Recall(model(), source)
    batch = next(iter(source.test_dataloader()))
    loss = task.losses(batch)["cross_entropy"]
    asked = batch["targets"] >= 0
    scores = task.model(batch["tokens"])
    want = torch.nn.functional.cross_entropy(scores[asked], batch["targets"][asked])
    torch.testing.assert_close(loss, want)
    metrics = task.metrics["test"]
    task.update_metrics(batch, metrics, "test")
    hits = (scores.argmax(-1) == batch["targets"])[asked].float()
    assert float(metrics["accuracy"].compute()) == pytest.approx(float(hits.mean()))
    whole = hits.view(12, 4).bool().all(1).float().mean()
    assert float(metrics["sequence_accuracy"].compute()) == pytest.approx(float(whole))


def test_figures_and_state_size(tmp_path, capsys):
    source = data()
    task = Recall(model("gdn"), source)
    for batch in source.test_dataloader():
        task.update_metrics(batch, task.metrics["test"], "test")
    assert [f.name for f in task.figures(tmp_path)] == ["recall_by_distance.png"]
    assert min(int(distance.min()) for distance, _ in task._tested) >= 2
    assert task.state_size() == 2 * task.model.blocks[0].attn.state_size(32)
    for i, name in enumerate(("softmax", "gdn")):
        result = {
            "task": "mqar",
            "attention": name,
            "cost": {"state_size": 10 + i},
            "test": {"accuracy": 0.5 + i / 4},
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "recall_by_state.png").stat().st_size > 5000
    assert (
        (tmp_path / "recall_by_state.md").read_text().splitlines()[2].startswith("| gdn | 11 | 0.750 | 1 |")
    )
    assert main([str(tmp_path / "gdn"), "--out", str(tmp_path / "pages")]) == 0
    assert (tmp_path / "pages" / "recall_by_state.md").exists() and not (
        tmp_path / "gdn" / "recall_by_state.md"
    ).exists()
    assert main([str(tmp_path / "empty")]) == 1
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "FOLDER" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["softmax", "gdn", "mlstm", "linear"])
@torch.no_grad()
def test_step_by_step_equals_the_whole_sequence(name):
    net = model(name).eval()
    tokens = torch.randint(0, 64, (3, 20))
    state, rows = net.init_state(3), []
    for t in range(20):
        scores, state = net.step(tokens[:, t], state)
        rows.append(scores)
    torch.testing.assert_close(torch.stack(rows, 1), net(tokens), rtol=1e-3, atol=1e-4)


def test_prediction_from_token_numbers():
    from zoo.errors import DataError
    from zoo.predict import get_predictor

    card = {"task": "mqar", "preprocessing": data().preprocessing()}
    predictor = get_predictor(card)(model().eval(), card)
    answer = predictor.predict("5,40,7,50 5")
    assert 0 <= answer["value"] < 64 and 0 < answer["probability"] <= 1
    assert "->" in predictor.format("5", answer)
    for bad, message in (("5,99", "below 64"), ("x", "whole numbers"), ("", "1 to 32")):
        with pytest.raises(DataError, match=message):
            predictor.predict(bad)


def test_model_errors():
    with pytest.raises(ConfigError, match="max_length"):
        model()(torch.zeros(1, 40, dtype=torch.long))
    with pytest.raises(ConfigError, match="learned or none"):
        model(position="rope")
