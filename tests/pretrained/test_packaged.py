"""Packaged weights are small, say what they are, and reproduce the metrics of their cards."""

from pathlib import Path

import pytest

import zoo
from zoo.cli.verify import agrees, reproduce
from zoo.errors import DataError
from zoo.pretrained import weights
from zoo.programs import export

PACKAGED = sorted(p.stem for p in (Path(weights.__file__).parent / "weights").glob("*.safetensors"))


def test_sizes():
    assert PACKAGED
    sizes = [
        (Path(weights.__file__).parent / "weights" / f"{n}.safetensors").stat().st_size for n in PACKAGED
    ]
    assert max(sizes) <= 2 * 2**20 and sum(sizes) <= 20 * 2**20


@pytest.mark.parametrize("name", PACKAGED)
def test_card_is_complete(name):
    predictor = zoo.load(name)
    for key in (
        "task",
        "model",
        "attention",
        "slots",
        "preprocessing",
        "data",
        "metrics",
        "interval",
        "baselines",
        "licence",
        "command",
    ):
        assert predictor.card[key], key
    assert predictor.card["sha256"] == weights.sha256(weights.resolve(name))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", PACKAGED)
def test_metrics_are_reproduced(name):
    if weights.read_card(weights.resolve(name))["task"] == "asr":
        pytest.skip(
            "its corpus is rendered for minutes on a fresh machine; `python -m zoo verify` repeats it"
        )
    try:
        card, now = reproduce(name)
    except DataError as error:
        pytest.skip(f"its data cannot be fetched here: {error}")
    for metric, value in card.items():
        assert agrees(value, now[metric]), metric


def test_verify_goes_on_after_weights_that_cannot_be_verified(tmp_path, capsys, monkeypatch):
    from tiny import tiny_weights

    from zoo.cli import verify

    good = {"loss": 0.5, "accuracy": 0.9}
    broken = str(tiny_weights("vit", tmp_path))  # its card has no configuration to repeat the test with
    honest = verify.reproduce
    results = {"good": (good, good), "worse": (good, {"loss": 0.5, "accuracy": 0.91})}
    monkeypatch.setattr(verify, "reproduce", lambda name: results.get(name) or honest(name))
    assert verify.main([broken, "good", "worse"]) == 1
    lines = capsys.readouterr()[0].splitlines()
    assert "NOT VERIFIED" in lines[0] and "holds no configuration" in lines[0]
    assert [line.endswith("DIFFERS") for line in lines[1:]] == [False, False, False, True]
    assert verify.main(["good"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PACKAGED if "_mala." in n])
def test_attention_beyond_softmax_is_exported(name, tmp_path):
    """Every task is exported with softmax in test_export.py; a program that differs is refused."""
    done = export(name, tmp_path / f"{name}.onnx", format="onnx", tolerance=1e-4)
    assert done and all(item.path.exists() for item in done)
