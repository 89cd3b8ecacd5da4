"""Exported programs give the model's results at every batch size, say what they need, and refuse what cannot be."""

import json
from pathlib import Path

import pytest
from tiny import TASKS, tiny_weights

from zoo.export import export

ROOT = Path(__file__).parents[2]


def test_every_task_has_tiny_weights():
    assert TASKS == sorted(p.stem for p in (ROOT / "conf" / "task").glob("*.yaml"))


@pytest.mark.parametrize("task", TASKS)
def test_torch_export_of_every_task(task, tmp_path):
    weights = tiny_weights(task, tmp_path)
    written = export(weights, tmp_path / "out" / f"{task}.pt2", format="torch_export")
    assert all(item.path.exists() and item.difference < 1e-4 for item in written)
    card = json.loads((tmp_path / "out" / f"{task}.json").read_text())
    assert card["task"] == task and card["preprocessing"] and len(card["programs"]) == len(written)
    for program in card["programs"].values():
        assert program["inputs"][0]["shape"][0] == "batch", "the batch is free"
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left == {f"{task}.json", *(item.path.name for item in written)}
