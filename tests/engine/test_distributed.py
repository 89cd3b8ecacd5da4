"""Two real processes over gloo train the same model as one, and test metrics count every sample once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands import run

ROOT = Path(__file__).parents[2]
SMALL = [
    "data=digits",
    "model.patch_size=2",
    "model.stem=patch",
    "model.dim=16",
    "model.num_heads=2",
    "model.depth=1",
]


def side_by_side(*overrides):
    """Processes that Lightning starts itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "train.py", *overrides, "trainer=ddp", "trainer.accelerator=cpu"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_ddp_equals_one_process(tmp_path):
    """Without augmentation and dropout, two processes with half the batch take the same steps."""
    common = [
        *SMALL,
        "trainer.max_epochs=1",
        "trainer.gradient_clip_val=null",
        "trainer.limit_train_batches=10",
        "data.augment=false",
        "callbacks.progress=none",
    ]
    assert run(*common, "data.batch_size=64", f"hydra.run.dir={tmp_path}/one") == 0
    side_by_side(*common, "data.batch_size=32", f"hydra.run.dir={tmp_path}/two")
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    # 360 test images do not divide evenly in batches; a padded sampler would count some twice.
    assert two["test"]["accuracy"] * 360 == pytest.approx(round(two["test"]["accuracy"] * 360), abs=1e-3)
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        if name.endswith("qkv.bias"):
            # A bias of the keys shifts all scores of a query alike: its gradient is rounding noise, which Adam scales.
            tensor, weights[1][name] = (t.view(3, -1)[[0, 2]] for t in (tensor, weights[1][name]))
        assert (tensor - weights[1][name]).abs().max() < 2e-4, name
    assert one["test"]["loss"] == pytest.approx(two["test"]["loss"], abs=1e-3)
