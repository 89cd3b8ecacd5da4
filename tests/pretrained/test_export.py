"""Exported programs give the model's results at every batch size, say what they need, and refuse what cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TASKS, raw_inputs, tiny_weights

from zoo.cli.export import main
from zoo.errors import ConfigError
from zoo.models import get_model
from zoo.pretrained import load
from zoo.programs import SUFFIXES, ExportError, export

ROOT = Path(__file__).parents[2]


def test_every_task_has_tiny_weights():
    assert TASKS == sorted(p.stem for p in (ROOT / "conf" / "task").glob("*.yaml"))


# Two have tests of their own below. The converter to ONNX takes seconds: here one task goes through it.
@pytest.mark.parametrize("task", sorted(set(TASKS) - {"vit", "asr"}))
def test_every_task_is_exported(task, tmp_path):
    weights = tiny_weights(task, tmp_path)
    format = "onnx" if task == "recommendation" else "torch_export"
    output = tmp_path / "out" / f"{task}{SUFFIXES[format]}"
    written = export(weights, output, format=format)
    assert all(item.path.exists() and item.difference < 1e-4 and not item.fixed for item in written)
    card = json.loads(output.with_suffix(".json").read_text())
    assert (
        card["task"] == task
        and card["preprocessing"]
        and list(card["programs"]) == [w.path.name for w in written]
    )
    for program in card["programs"].values():
        assert program["inputs"][0]["shape"][0] == "batch", "the batch is free"
    left = {p.name for p in output.parent.iterdir()}
    assert left == {f"{task}.json", *(item.path.name for item in written)}


def test_networks_of_their_own_keep_their_banks(tmp_path):
    weights = tiny_weights("tabular_multitask", tmp_path, separate=True)
    (written,) = export(weights, tmp_path / f"many{SUFFIXES['torch_export']}", format="torch_export")
    assert written.difference < 1e-4 and not written.fixed


def test_an_onnx_file_alone_gives_the_predictors_answer(tmp_path):
    """What a stranger does with the file and its card, without torch in between."""
    import onnxruntime

    weights = tiny_weights("vit", tmp_path, "mala")
    assert main([str(weights), "--output", str(tmp_path / "vit.onnx")]) == 0
    (folder,), bad = raw_inputs("vit", tmp_path)
    Path(bad).unlink()
    predictor = load(weights)
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx")
    (name,) = [i.name for i in session.get_inputs()]
    assert name == "images" and session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    for path in predictor.inputs([folder]):
        (logits,) = session.run(["logits"], {name: predictor.preprocess(path).numpy()})
        chance = np.exp(logits[0]) / np.exp(logits[0]).sum()
        labels = json.loads((tmp_path / "vit.json").read_text())["labels"]
        assert labels[int(chance.argmax())] == predictor.predict(path)["label"]
        assert chance.max() == pytest.approx(predictor.predict(path)["confidence"], abs=1e-4)


def test_speech_is_transcribed_by_two_onnx_files(tmp_path):
    """Encoder at any length, decoder over the sentence so far: greedy decoding gives the predictor's tokens."""
    import onnxruntime

    from zoo.decoding import greedy

    weights = tiny_weights("asr", tmp_path)
    export(weights, tmp_path / "asr.onnx")
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / f"asr.{part}.onnx") for part in ("encoder", "decoder")
    )
    assert encoder.get_inputs()[0].shape == ["batch", "length"]
    model = load(weights).model
    for samples in (5000, 11111):
        audio, lengths = 0.2 * torch.randn(1, samples), torch.tensor([samples])
        memory, places, ctc = encoder.run(None, {"audio": audio.numpy(), "lengths": lengths.numpy()})
        own, own_places = model.encode(audio, lengths)
        torch.testing.assert_close(torch.from_numpy(memory), own.detach(), atol=1e-4, rtol=1e-4)
        assert places.tolist() == own_places.tolist() and ctc.shape[:2] == memory.shape[:2]
        limit = torch.tensor([6])
        wanted = greedy(model, own.detach(), own_places, limit=limit).tokens[0]
        tokens = [1]
        while len(tokens) <= 6:
            inputs = {"tokens": np.array([tokens]), "memory": memory, "places": places}
            logits = decoder.run(None, inputs)[0][0, -1]
            logits[:2] = -np.inf
            if (best := int(logits.argmax())) == 2:
                break
            tokens.append(best)
        assert tokens[1:] == wanted


def test_a_fixed_batch_and_what_is_refused(tmp_path, monkeypatch):
    weights = tiny_weights("mqar", tmp_path)
    output = tmp_path / "out" / "m.pt2"
    options = {"format": "torch_export"}
    export(weights, output, batch=3, **options)
    (program,) = json.loads(output.with_suffix(".json").read_text())["programs"].values()
    assert program["inputs"] == [{"name": "tokens", "dtype": "int64", "shape": [3, 16]}]
    before = output.read_bytes()
    with pytest.raises(ConfigError, match="ends in .onnx"):
        export(weights, output)
    with pytest.raises(ConfigError, match="did you mean 'onnx'"):
        export(weights, output, format="onx")
    with pytest.raises(ExportError, match="differs from the model's by .* nothing was written"):
        export(weights, output, tolerance=-1.0, **options)
    with pytest.raises(ConfigError, match="give a folder"):
        main([str(weights), str(weights), "--output", str(tmp_path / "a.onnx")])
    model = get_model("recall_lm")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda self, tokens: forward(self, tokens) * float(tokens.sum()))
    with pytest.raises(
        ExportError, match="recall_lm with attention 'softmax': torch.export cannot trace inputs tokens"
    ):
        export(weights, output, **options)
    monkeypatch.setattr(model, "forward", lambda self, tokens: torch.special.airy_ai(forward(self, tokens)))
    with pytest.raises(ExportError, match="aten.special_airy_ai.* has no form in ONNX"):
        export(weights, tmp_path / "out" / "m.onnx")
    assert output.read_bytes() == before
    assert sorted(p.name for p in output.parent.iterdir()) == ["m.json", "m.pt2"]
