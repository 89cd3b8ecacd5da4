"""Evaluating a trained solver at points and on grids."""

import numpy as np
import pytest
import torch

from tests.tasks.pinn_tasks import make
from zoo.errors import ConfigError, DataError


def test_predictor_writes_fields(tmp_path):
    from zoo.predict.pinn import TaskPredictor

    task = make(problem="kovasznay")
    predictor = TaskPredictor(task.model, {"preprocessing": task.data.preprocessing()})
    predictor.options({"out": str(tmp_path / "flow.npz")})
    found = predictor.predict("grid:4x3")
    with np.load(tmp_path / "flow.npz") as saved:
        at = torch.from_numpy(np.stack((saved["x"], saved["y"]), 1)).float()
        np.testing.assert_allclose(saved["v"], task.model(at)[:, 1].detach().numpy(), rtol=1e-5, atol=1e-6)
    assert found["points"] == 12 and "grid:4x3: 12 points" in predictor.format("grid:4x3", found)
    with pytest.raises(ConfigError, match="one file, but there are 2 inputs"):
        list(predictor.inputs(["grid:4x3", "grid:5x5"]))
    (tmp_path / "points.csv").write_text("y,x\n0.5,0.1\n1.5,0.2\n")
    assert predictor.preprocess(str(tmp_path / "points.csv")).tolist() == [[0.1, 0.5], [0.2, 1.5]]
    for bad, text in (
        ("grid:4", "one positive number per coordinate"),
        ("grid:99999999x99999999", "9,999,999,800,000,001 points; at most"),
        (np.zeros((0, 2)), "N > 0"),
        ([[5.0, 0.0]], "outside the trained box"),
    ):
        with pytest.raises(DataError, match=text):
            predictor.predict(bad)


def test_predictor_derives_velocities_from_a_stream_function(tmp_path):
    from zoo.predict.pinn import TaskPredictor

    physics = {"measurements": 30, "snapshots": 4, "duration": 0.3, "formulation": "stream"}
    task = make(problem="ns_inverse", physics=physics).double()
    predictor = TaskPredictor(task.model, {"preprocessing": task.data.preprocessing()})
    predictor.options({"out": str(tmp_path / "flow.csv")})
    predictor.predict("grid:3x4x2")
    table = np.genfromtxt(tmp_path / "flow.csv", delimiter=",", names=True)
    assert table.dtype.names == ("x", "y", "t", "s", "p", "u", "v")
    at = torch.from_numpy(np.stack([table[c] for c in "xyt"], 1))
    up, down = (task.model(at + torch.tensor([0.0, h, 0.0]))[:, 0] for h in (1e-5, -1e-5))
    np.testing.assert_allclose(table["u"], ((up - down) / 2e-5).detach().numpy(), atol=1e-6)


def test_vtk_by_meshio_or_a_way_out(tmp_path):
    from zoo.predict.pinn import TaskPredictor

    task = make(problem="kovasznay")
    predictor = TaskPredictor(task.model, {"preprocessing": task.data.preprocessing()})
    predictor.options({"out": str(tmp_path / "flow.vtk")})
    try:
        import meshio
    except ImportError:
        with pytest.raises(ConfigError, match="pip install meshio"):
            predictor.predict("grid:4x3")
        return
    predictor.predict("grid:4x3")
    mesh = meshio.read(tmp_path / "flow.vtk")
    assert len(mesh.points) == 12 and set(mesh.point_data) == {"u", "v", "p"}
