"""Weights and cards: round trips, and refusal of everything that is damaged, foreign or unsafe."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import zoo
from zoo.errors import WeightsError
from zoo.models.registry import build_model, get_model
from zoo.pretrained import load_model, load_weights, save_weights
from zoo.pretrained.weights import build_from_card, read_card, resolve

OPTIONS = {"size": "micro", "depth": 1, "dim": 16, "num_heads": 2, "num_classes": 3}


def saved(folder: Path, attention="mala"):
    from zoo.attention import resolve_slots

    factories = resolve_slots(get_model("vit").slots(**OPTIONS), {"name": attention})
    model = build_model("vit", attention=factories, **OPTIONS).eval()
    card = {
        "task": "vit",
        "kind": "classification",
        "model": {"name": "vit", "options": OPTIONS},
        "attention": attention,
        "slots": {"encoder": {"name": attention, "options": {}}},
        "labels": ["a", "b", "c"],
        "preprocessing": {},
    }
    path = folder / "weights.safetensors"
    save_weights(path, model, card)
    return model, path


def test_round_trip_by_path_folder_and_name(tmp_path, monkeypatch):
    model, path = saved(tmp_path)
    images = torch.randn(2, 1, 28, 28)
    expected = model(images)
    for name in (path, tmp_path, str(tmp_path)):
        again, card = load_model(name)
        assert torch.equal(again(images), expected) and card["attention"] == "mala"
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    assert resolve("weights") == path
    named = zoo.create_model(
        "vit_micro", attention="mala", pretrained="weights", depth=1, dim=16, num_heads=2, num_classes=3
    )
    assert torch.equal(named.eval()(images), expected)
    with pytest.raises(WeightsError, match="no weights named 'wights'; did you mean 'weights'"):
        resolve("wights")


def test_misfit_is_reported_by_name(tmp_path):
    _, path = saved(tmp_path)
    other = build_from_card(
        read_card(path) | {"model": {"name": "vit", "options": {**OPTIONS, "num_classes": 5}}}
    )
    with pytest.raises(WeightsError, match=r"head.weight \[3, 16\] -> \[5, 16\].*strict=False"):
        load_weights(other, path)
    report = load_weights(other, path, strict=False)
    assert len(report.mismatched) == 2 and report.loaded > 10


def test_damaged_and_foreign_files(tmp_path):
    _, path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] + b"\0" * 7)
    with pytest.raises(WeightsError, match="SHA-256 differs"):
        load_model(path)
    card = path.with_suffix(".json")
    content = json.loads(card.read_text())
    del content["sha256"]
    card.write_text(json.dumps(content))
    path.write_bytes(whole[:100])
    with pytest.raises(WeightsError, match="damaged or not a safetensors file"):
        load_model(path)
    path.write_bytes(b"\x80\x04not weights")
    with pytest.raises(WeightsError, match="damaged or not a safetensors file"):
        load_model(path)
    card.write_text("{")
    with pytest.raises(WeightsError, match="cannot read the card"):
        load_model(path)
    card.unlink()
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="has no card"):
        load_model(path)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pkl", ".bin"])
def test_a_pickle_named_as_weights_runs_nothing(tmp_path, suffix):
    trace = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return Path.touch, (trace,)

    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    model = build_model("vit", attention=_softmax(), **OPTIONS)
    with pytest.raises(WeightsError, match="refused.*safetensors.torch.save_file"):
        load_weights(model, path)
    from tasks.engine.callbacks import load_checkpoint

    with pytest.raises(WeightsError, match="cannot read checkpoint"):
        load_checkpoint(path)
    assert not trace.exists()


def _softmax():
    from zoo.attention import resolve_slots

    return resolve_slots(get_model("vit").slots(**OPTIONS), {"name": "softmax"})


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    _, path = saved(tmp_path)
    before = path.read_bytes()
    from zoo.pretrained import weights

    def fail(tensors, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError):
        saved(tmp_path)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_weights_are_as_readable_as_the_users_other_files(tmp_path):
    _, path = saved(tmp_path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
