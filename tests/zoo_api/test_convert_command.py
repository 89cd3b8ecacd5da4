"""`python -m zoo convert` on real runs: any task with a loss of a batch, all layers or some, and the file it writes."""

import pytest

from tests.commands import run
from zoo.cli import convert as command
from zoo.cli.verify import agrees, reproduce
from zoo.errors import ConfigError
from zoo.pretrained import load_model

RUNS = {
    "vit": ["data=digits", "model.patch_size=2", "model.dim=16", "model.num_heads=2", "model.depth=2"],
    "mqar": [
        "data.train_size=256",
        "data.val_size=32",
        "data.test_size=32",
        "data.length=64",
        "data.pairs=4",
    ],
}


@pytest.fixture(scope="module", params=list(RUNS))
def weights(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = [f"task={request.param}", *RUNS[request.param], "trainer.max_epochs=1"]
    assert run(*arguments, f"hydra.run.dir={folder}") == 0
    return folder / "weights.safetensors"


@pytest.mark.parametrize("layers", [[], ["--layers", "1"]])
def test_what_is_written_is_what_was_scored(weights, layers, tmp_path, capsys):
    out = tmp_path / "swapped.safetensors"
    argv = [
        str(weights),
        "attention=mala",
        "key_norm=sum",
        "--samples",
        "96",
        "--epochs",
        "2",
        "--out",
        str(out),
    ]
    assert command.main([*argv, *layers]) == 0
    printed = capsys.readouterr().out
    assert all(
        moment in printed for moment in (" before: ", " without transfer: ", " after: ", "transfer loss")
    )
    model, card = load_model(out)
    names = [m.name for m in model.modules() if hasattr(m, "pattern")]
    assert sorted(names) == (["mala", "softmax"] if layers else ["mala", "mala"])
    assert card["attention"] == ("softmax+mala" if layers else "mala")
    assert card["swapped"][0]["options"] == {"key_norm": "sum"}
    recorded, found = reproduce(str(out))
    assert recorded and all(agrees(value, found[name]) for name, value in recorded.items())


def test_a_solver_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="retrain"):
        command.main(
            ["physicsformer_softmax.burgers1d", "attention=mala", "--out", str(tmp_path / "x.safetensors")]
        )
    assert not list(tmp_path.iterdir())
