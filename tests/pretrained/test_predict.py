"""`zoo.load(...).predict` and `python -m zoo predict` over weights of every task."""

import csv
import json

import pytest
from tiny import TASKS, raw_inputs, tiny_weights

import zoo
from zoo.__main__ import main
from zoo.errors import DataError, WeightsError

WITHOUT_FIGURE = {"ctr", "mqar"}


@pytest.mark.parametrize("task", TASKS)
def test_predict_of_every_task(task, tmp_path, capsys):
    """Text, JSON and csv; the bad input is named and skipped, the good ones are predicted."""
    weights = str(tiny_weights(task, tmp_path))
    given, bad = raw_inputs(task, tmp_path)
    assert main(["predict", weights, *given]) == 1
    out, err = capsys.readouterr()
    assert out.strip() and "1 of " in err and f"skipped {bad}:" in err
    assert main(["predict", weights, *given, "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr()[0].splitlines()]
    direct = json.loads(json.dumps(zoo.load(weights).predict(lines[0]["input"])))
    assert lines and {k: v for k, v in lines[0].items() if k != "input"} == direct
    assert bad not in [line["input"] for line in lines]
    folder = tmp_path / "figures"
    figures = [] if task in WITHOUT_FIGURE else ["--figures", str(folder)]
    assert (
        main(["predict", weights, *given, "--format=csv", "--output", str(tmp_path / "o.csv"), *figures]) == 1
    )
    assert not capsys.readouterr()[0]
    with open(tmp_path / "o.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["input"] for row in rows} <= {line["input"] for line in lines}
    assert task in ("detr",) or len(rows) >= len(lines)
    if figures:
        assert [p.stat().st_size > 2000 for p in folder.iterdir()] == [True] * len(lines)


def test_task_options_and_unknown_ones(tmp_path, capsys):
    weights = str(tiny_weights("recommendation", tmp_path))
    assert main(["predict", weights, "--user-history", "i1,i2", "--top-k=3", "--format", "csv"]) == 0
    assert len(capsys.readouterr()[0].splitlines()) == 4
    assert main(["predict", weights, "i1", "--topk", "3"]) == 2
    assert "did you mean '--top-k'" in capsys.readouterr()[1]
    (tmp_path / "histories.txt").write_bytes(b"i1,i2\n\xff\xfe")
    assert main(["predict", weights, str(tmp_path / "histories.txt")]) == 2
    assert "as text with one history a line" in capsys.readouterr()[1]
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tiny_weights("vit", tmp_path)), str(tmp_path / "empty")]) == 2
    assert "empty: nothing there that weights of task 'vit' read" in capsys.readouterr()[1]
    for argument, text in (
        (["--output", str(tmp_path / "empty")], "is a folder; name a file"),
        ([""], "none of them empty"),
    ):
        with pytest.raises(SystemExit):
            main(["predict", weights, "i1", *argument])
        assert text in capsys.readouterr()[1]
    assert main(["predict", weights, "i1", "--output", str(tmp_path / "histories.txt" / "o.csv")]) == 2
    assert (
        "error: " in (said := capsys.readouterr()[1]) and "histories.txt" in said and "Traceback" not in said
    )
    assert main(["convert", weights, "attention=mala", "--out", str(tmp_path / "c.safetensors")]) == 2
    assert "holds no configuration" in capsys.readouterr()[1]
    assert main(["predict", str(tiny_weights("ctr", tmp_path)), "3:1", "--figures", str(tmp_path)]) == 2
    assert "have no figure" in capsys.readouterr()[1]


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pkl"])
def test_commands_run_nothing_that_a_pickle_asks_for(tmp_path, capsys, suffix):
    import pickle
    from pathlib import Path

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    path.with_suffix(".json").write_text(tiny_weights("vit", tmp_path / "x").with_suffix(".json").read_text())
    with pytest.raises(WeightsError, match="safetensors.torch.save_file"):
        zoo.load(path)
    for command in (["predict", str(path), "a.png"], ["verify", str(path)], ["export", str(path)]):
        assert main(command) > 0
        assert "safetensors.torch.save_file" in "".join(capsys.readouterr())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("zone, hour", [("+02:00", 6), ("+00:00", 4), ("Pacific/Auckland", 17)])
def test_traffic_times_with_an_offset_are_put_on_the_models_clock(zone, hour):
    """Auckland is 13 hours ahead in its summer."""
    from datetime import datetime

    from zoo.predict.traffic import TaskPredictor

    predictor = TaskPredictor(None, {"preprocessing": {"zone": zone, "sensors": ["a"]}})
    predictor.options({"at": "2025-01-01T06:00+02:00"})
    assert predictor.at == datetime(2025, 1, 1, hour)
    given = {datetime.fromisoformat("2025-01-01T04:00Z"): [1.0]}
    assert predictor._readings(given) == {predictor.at: [1.0]}


def test_traffic_refuses_times_with_an_offset_where_the_clock_has_no_zone(tmp_path):
    from zoo.predict.traffic import TaskPredictor

    predictor = TaskPredictor(None, {"preprocessing": {"sensors": ["a"]}})
    with pytest.raises(DataError, match="give local times without an offset"):
        predictor.options({"at": "2025-01-01T06:00Z"})
    (tmp_path / "t.csv").write_text("time,a\n2025-01-01T06:00Z,1\n")
    with pytest.raises(DataError, match="give local times without an offset"):
        predictor.predict(tmp_path / "t.csv")


def test_traffic_slots_count_seconds():
    """Steps of half a minute: 00:01:30 on a Monday is slot 3, as the training data number them."""
    from datetime import datetime, timedelta

    from zoo.predict.traffic import TaskPredictor

    sizes = {
        "step_minutes": 0.5,
        "history_steps": 2,
        "horizon_steps": 1,
        "lag_steps": [],
        "null_value": "nan",
    }
    predictor = TaskPredictor(None, {"preprocessing": {**sizes, "sensors": ["a"]}})
    monday = datetime(2024, 1, 1, 0, 1, 30)
    readings = {monday + timedelta(seconds=30 * i): [1.0] for i in range(2)}
    assert predictor.preprocess(readings)["clock"].tolist() == [3]
