"""The zoo in timm's verbs: listing, creating with weights, load reports, third-party packages, light imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_weights

import zoo
from zoo.errors import ConfigError, WeightsError
from zoo.pretrained.weights import load_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture
def local(tmp_path, monkeypatch):
    """Two named weights in the user's folder."""
    for attention in ("mala", "gla"):
        folder = tmp_path / attention
        path = tiny_weights("vit", folder, attention)
        for file in (path, path.with_suffix(".json")):
            file.rename(tmp_path / f"vit_micro_{attention}.tiny{file.suffix}")
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    return tmp_path


def test_models_are_listed_by_task_attention_and_weights(local):
    assert "aed" in zoo.list_models(task="asr") and "vit" not in zoo.list_models(task="asr")
    assert zoo.list_models("plain*", task="detr") == ["plain_detr"]
    assert {zoo.models.task_of(n) for n in zoo.list_models()} <= {
        p.stem for p in (ROOT / "conf" / "task").glob("*.yaml")
    }
    takes_gla = zoo.list_models(attention="gla")
    assert "vit" in takes_gla and "pinn_mlp" not in takes_gla and "tno" not in takes_gla
    assert {"vit_micro_mala.tiny", "vit_micro_gla.tiny"} <= set(zoo.list_models(pretrained=True))
    assert zoo.list_models("*tiny", pretrained=True, attention="gla") == ["vit_micro_gla.tiny"]
    assert zoo.list_models("*tiny", pretrained=True, task="asr") == []


def test_create_with_weights_takes_options_and_attention_from_the_card(local):
    images = torch.randn(2, 3, 16, 16)
    expected = zoo.load("vit_micro_gla.tiny").model(images)
    for arguments in (
        {"pretrained": "vit_micro_gla.tiny"},
        {"pretrained": True, "attention": "gla"},
        {"pretrained": local / "vit_micro_gla.tiny.safetensors", "num_classes": 3},
    ):
        model = zoo.create_model("vit", **arguments).eval()
        assert torch.equal(model(images), expected) and not model.load_report.mismatched


def test_another_head_starts_afresh_and_another_attention_is_refused(local):
    model = zoo.create_model("vit", pretrained="vit_micro_mala.tiny", num_classes=7)
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 7)
    assert model.load_report.mismatched == ["head.bias [3] -> [7]", "head.weight [3, 16] -> [7, 16]"]
    with pytest.raises(WeightsError, match="missing"):
        zoo.create_model("vit", pretrained="vit_micro_gla.tiny", attention="mala")
    with pytest.raises(WeightsError, match="not of 'aed'"):
        zoo.create_model("aed", pretrained="vit_micro_mala.tiny")
    with pytest.raises(ConfigError, match="vit_micro_gla.tiny.*PATH_OR_NAME"):
        zoo.create_model("vit", pretrained=True)


def test_a_resampled_table_is_reported(local):
    model = zoo.create_model(
        "vit", attention="gla", image_size=32, in_channels=3, num_classes=3, dim=16, depth=1, num_heads=2
    )
    report = load_weights(model, "vit_micro_gla.tiny")
    assert report.reshaped == ["pos_embed [1, 16, 16] -> [1, 64, 16]"]
    assert "1 reshaped" in str(report)


def test_packages_of_others_join_by_their_metadata(tmp_path):
    """A real distribution on the path: a variant and a model, listed, created, trained with each other."""
    (tmp_path / "third_party.py").write_text(
        "import torch\nfrom torch import nn\nfrom zoo.attention import Pattern, Slot\n"
        "from zoo.attention.softmax import SoftmaxAttention\n"
        "class Cold(SoftmaxAttention):\n    pass\n"
        "class Reader(nn.Module):\n"
        "    task = 'vit'\n"
        "    def __init__(self, attention, *, dim=8):\n"
        "        super().__init__()\n        self.attn = attention['reader'](dim, 2)\n"
        "    @classmethod\n"
        "    def slots(cls, **options):\n        return {'reader': Slot(Pattern.SELF)}\n"
        "    def forward(self, x):\n        return self.attn(x)\n"
    )
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "RECORD").write_text("")
    (info / "entry_points.txt").write_text(
        "[attention_zoo.attention]\ncold = third_party:Cold\n[attention_zoo.models]\nreader = third_party:Reader\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, zoo\n"
        "assert 'cold' in zoo.list_attention() and 'reader' in zoo.list_models()\n"
        "assert 'third_party' not in sys.modules, 'listing imports nothing'\n"
        "model = zoo.create_model('reader', attention='cold')\n"
        "assert model.attn.name == 'cold' and 'reader' in zoo.list_models(task='vit')\n"
        "model(torch.randn(1, 3, 8)).sum().backward()\n"
        "print(zoo.create_model('vit_micro', attention='cold').blocks[0].attn.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cold"]


HEAVY = (
    "lightning timm torch_geometric torchaudio torchvision wandb hydra pandas scipy sklearn matplotlib PIL triton onnx "
    "huggingface_hub torchmetrics torch._dynamo torch._inductor"
).split()


def test_what_is_not_imported_and_what_is_exported():
    """What would make `import zoo` and `zoo list` slow; and a function named like a module would be hidden by it."""
    code = (
        "import torch, sys\n"
        "before = set(sys.modules)\n"
        f"late = lambda: sorted(set({HEAVY!r}) & (set(sys.modules) - before))\n"
        "import zoo\n"
        "assert len(set(sys.modules) - before) < 10 and not late(), late()\n"
        "from zoo.__main__ import main\n"
        "for kind in ('attention', 'models', 'weights'):\n"
        "    main(['list', kind])\n"
        "    assert not late(), (kind, late())\n"
        "for name in zoo.__all__[1:]:\n"
        "    assert callable(getattr(zoo, name)) and callable(getattr(zoo, name)), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_listing_says_how_good_weights_are(local, capsys):
    from zoo.__main__ import main

    assert main(["list", "weights", "--attention", "gla"]) == 0
    assert capsys.readouterr()[0].split()[:3] == ["vit_micro_gla.tiny", "vit", "loss"]
    assert main(["list", "models", "--task", "ctr", "--attention", "softmax"]) == 0
    assert {"dare", "din"} <= set(capsys.readouterr()[0].split())
    assert main(["list", "data", "--task", "vit"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "digits",
        "imagefolder",
        "mnist",
    ]
    assert main(["list", "models", "--task", "vitt"]) == 2
    assert "did you mean 'vit'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["list", "tasks", "--attention", "mala"])
    assert "--attention chooses among models, weights" in capsys.readouterr().err
    assert main(["list", "weights", "--task", "asr"]) == 0
