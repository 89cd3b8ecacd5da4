"""Accidents at the two moments that are easiest to get wrong: before a validation and amid one.

An epoch has 20 steps, checkpoints come every 3: step 60 ends both.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tasks.engine.callbacks import AveragedWeights
from tests import reliability


@pytest.fixture(scope="module", autouse=True)
def several_batches_a_validation():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reliability, "MODEL", [*reliability.MODEL, "data.eval_batch_size=48"])
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    place = tmp_path_factory.mktemp("undisturbed")
    assert reliability.run(place / "run", False, place / "log") == 0, (place / "log").read_text()
    return reliability.content(place / "run")


@pytest.mark.parametrize(("blow", "step"), [("SIGKILL", 60), ("SIGTERM", 40)])
def test_a_validation_is_neither_lost_nor_broken(tmp_path: Path, monkeypatch, undisturbed, blow, step):
    begin = AveragedWeights.on_validation_start

    def struck(self, trainer, module):
        if trainer.global_step == step:
            os.kill(os.getpid(), getattr(signal, blow))
        begin(self, trainer, module)

    with monkeypatch.context() as accident:
        accident.setattr(AveragedWeights, "on_validation_start", struck)
        assert reliability.run(tmp_path / "run", False, tmp_path / "log") in (-9, 128 + signal.SIGTERM)
    assert not list((tmp_path / "run").glob("result.json"))
    assert reliability.run(tmp_path / "run", False, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert reliability.content(tmp_path / "run") == undisturbed
