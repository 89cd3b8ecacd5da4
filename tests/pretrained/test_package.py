"""From a run folder to packaged weights: names, rounding, clean cards, intervals, limits; and the list of what is retrained."""

import json
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from tiny import TASKS, tiny_weights

from tasks.engine.cli import CONF
from zoo.errors import ConfigError, WeightsError
from zoo.pretrained import load_model
from zoo.pretrained.package import clean_command, intervals, package, weights_name, wilson
from zoo.pretrained.storage import decode, encode
from zoo.pretrained.weights import read_card, update_card


def run(folder, task="vit", **changes):
    path = tiny_weights(task, folder)
    card = {
        "metrics": {"accuracy": 0.9, "loss": 0.3},
        "data": {"name": "digits", "split": {"sizes": {"test": 400}}},
        "command": "python /somewhere/train.py task=vit hydra.run.dir=/tmp/x",
        "seed": 0,
        **changes,
    }
    update_card(path, **card)
    return folder


def test_a_run_becomes_named_weights_with_a_clean_card(tmp_path):
    path = package(run(tmp_path / "run"), tmp_path / "weights")
    assert path.name == "vit_softmax.digits.safetensors"
    card = read_card(path)
    assert card["command"] == "python train.py task=vit" and card["storage"] == "full"
    low, high = card["interval"]["accuracy"]
    assert low < 0.9 < high and card["interval"]["method"] == "Wilson, 400 test samples"
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_model(path)[0](images), load_model(tmp_path / "run")[0](images))
    solver = {
        "model": {"name": "m", "options": {"size": "s"}},
        "attention": "a",
        "preprocessing": {"problem": "p"},
    }
    assert weights_name(solver) == "m_s_a.p"
    assert (
        clean_command("python a/b/train.py -m seed=0,1 'x=[1, 2]'")
        == "python train.py -m seed=0,1 'x=[1, 2]'"
    )


def test_what_a_licence_keeps_private_is_left_out(tmp_path):
    made = run(tmp_path / "run", "recommendation")
    preprocessing = read_card(made / "weights.safetensors")["preprocessing"]
    update_card(
        made / "weights.safetensors",
        preprocessing=preprocessing | {"titles": ["A film"], "private": ["titles"]},
    )
    left = read_card(package(made, tmp_path / "weights"))["preprocessing"]
    assert "titles" not in left and "private" not in left and left["items"] == preprocessing["items"]


def test_interval_over_seeds_is_students(tmp_path):
    others = [
        run(tmp_path / str(seed), metrics={"accuracy": value, "loss": 0.3}, seed=seed)
        for seed, value in ((1, 0.92), (2, 0.94))
    ]
    path = package(run(tmp_path / "run"), tmp_path / "weights", seeds=others)
    low, high = read_card(path)["interval"]["accuracy"]
    assert (low + high) / 2 == pytest.approx(0.92) and (high - low) / 2 == pytest.approx(
        4.302653 * 0.02 / math.sqrt(3)
    )
    assert read_card(path)["interval"]["method"] == "mean over 3 seeds, Student's t"
    rounded = package(run(tmp_path / "run"), tmp_path / "weights", seeds=others, storage="half")
    assert read_card(rounded)["interval"]["method"].endswith("Student's t, before rounding")
    with pytest.raises(WeightsError, match="a seed occurs twice"):
        package(run(tmp_path / "run"), tmp_path / "weights", seeds=[tmp_path / "run"])
    other = run(tmp_path / "other", seed=3, config={"data": {"name": "digits", "batch_size": 7}})
    mine = run(tmp_path / "run", config={"data": {"name": "digits", "batch_size": 8}})
    with pytest.raises(WeightsError, match="seed alone; here differs data.batch_size"):
        package(mine, tmp_path / "weights", seeds=[other])
    split = {"name": "digits", "split": {"sizes": {"test": 400}, "sha256": {"test": "other"}}}
    with pytest.raises(WeightsError, match="here differs the test split, test metric loss"):
        package(
            mine, tmp_path / "weights", seeds=[run(tmp_path / "4", metrics={"accuracy": 1.0}, data=split)]
        )


def test_what_is_refused_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "weights"
    with pytest.raises(WeightsError, match="--licence"):
        package(run(tmp_path / "a", licence=None), target)
    assert package(tmp_path / "a", target, licence="CC0-1.0", name="named").stem == "named"
    with pytest.raises(WeightsError, match="names files of this machine: /home/someone/data"):
        package(run(tmp_path / "b", config={"root": "/home/someone/data"}), target)
    with pytest.raises(WeightsError, match="finished run"):
        package(tmp_path, target)
    with pytest.raises(WeightsError, match="has no command, data; package a finished run"):
        package(tiny_weights("vit", tmp_path / "bare").parent, target)
    monkeypatch.setattr("zoo.pretrained.package.MAX_BYTES", 1000)
    with pytest.raises(WeightsError, match="--storage half or byte"):
        package(run(tmp_path / "c"), target)
    assert sorted(p.name for p in target.iterdir()) == ["named.json", "named.safetensors"]


@pytest.mark.parametrize(("storage", "error", "share"), [("half", 5e-4, 0.5), ("byte", 0.505 / 127, 0.3)])
def test_rounded_storage_is_small_and_near(tmp_path, storage, error, share):
    weight, bias, steps = (
        torch.randn(64, 64) * torch.logspace(-3, 1, 64)[:, None],
        torch.randn(64),
        torch.tensor(7),
    )
    edges = torch.tensor([[-float("inf"), 0.1, 1e9]])  # a buffer
    entries = encode({"w": weight, "b": bias, "n": steps, "edges": edges}, storage, {"w", "b", "n"})
    back = decode(entries)
    assert torch.equal(back["edges"], edges)
    row = weight.abs().amax(1, keepdim=True)
    assert ((back["w"] - weight).abs() <= error * row).all() and back["w"].dtype == torch.float32
    assert (back["b"] - bias).abs().max() < 3e-3 and torch.equal(back["n"], steps)
    size = sum(t.numel() * t.element_size() for t in entries.values())
    assert size <= share * 4 * (64 * 64 + 64) + 8 + 12
    path = package(run(tmp_path / "run"), tmp_path / "weights", storage=storage)
    images = torch.randn(4, 3, 16, 16)
    exact, rounded = load_model(tmp_path / "run")[0](images), load_model(path)[0](images)
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_storage_refuses_what_it_cannot_hold(tmp_path):
    with pytest.raises(ConfigError, match="range of float16"):
        encode({"w": torch.tensor([1e6])}, "half", {"w"})
    with pytest.raises(ConfigError, match="not finite"):
        encode({"w": torch.full((2, 9), float("inf"))}, "byte", {"w"})
    with pytest.raises(ConfigError, match="choose full, half, byte"):
        encode({}, "quarter", set())
    with pytest.raises(WeightsError, match="do not fit together"):
        decode({"w": torch.zeros(2, 3), "w::factor": torch.zeros(2)})


def test_a_file_in_double_precision_stays_so(tmp_path):
    from zoo.pretrained import save_weights

    path = tiny_weights("pinn", tmp_path)
    model, card = load_model(path)
    save_weights(
        path, model.double(), {k: v for k, v in card.items() if k not in ("sha256", "bytes", "format")}
    )
    points = torch.rand(5, 2, dtype=torch.float64)
    assert torch.equal(load_model(path)[0](points), model(points))


def test_every_task_is_retrained_for_the_zoo():
    named = set()
    for name in ("zoo_weights", "zoo_weights_others"):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [f"experiment={name}"], return_hydra_config=True)
        params = cfg.hydra.sweeper.params
        named |= set(params["task"].split(","))
        if name == "zoo_weights":
            assert {"vit", "asr", "traffic", "tabular"} <= named and len(params["attention"].split(",")) >= 3
    assert named == set(TASKS)


def test_wilson():
    assert wilson(0.5, 100) == pytest.approx([0.404, 0.596], abs=1e-3)
    assert wilson(1.0, 10)[1] == 1.0 and json.dumps(wilson(0.0, 10))


def test_the_command_states_metrics_after_rounding_or_refuses(tmp_path, capsys, monkeypatch):
    from zoo.__main__ import main
    from zoo.cli import verify

    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path / "named"))
    folder = run(tmp_path / "run")
    after = {"accuracy": 0.88, "loss": 0.31}
    monkeypatch.setattr(verify, "reproduce", lambda path: (read_card(tmp_path / path)["metrics"], after))
    assert main(["package", str(folder), "--local", "--storage", "half"]) == 0
    card = read_card(tmp_path / "named" / "vit_softmax.digits.safetensors")
    assert card["metrics"] == after and card["metrics_before_rounding"] == {"accuracy": 0.9, "loss": 0.3}
    assert "accuracy: 0.9 before rounding, 0.88 after" in capsys.readouterr()[0]
    assert card["interval"] == intervals(card)
    kept = {p: p.read_bytes() for p in (tmp_path / "named").iterdir()}
    after["loss"] = math.nan
    assert main(["package", str(folder), "--local", "--storage", "byte"]) == 2
    assert {p: p.read_bytes() for p in (tmp_path / "named").iterdir()} == kept  # a failure replaces nothing
    assert main(["package", str(folder), "--local", "--storage", "byte", "--name", "other"]) == 2
    assert "ruins loss" in capsys.readouterr()[1]
    assert sorted(p.stem for p in (tmp_path / "named").iterdir()) == ["vit_softmax.digits"] * 2
