"""Peak memory of heavy cases, each in a process of its own: `python -m zoo bench memory`.

Memory does not depend on what else computes on the machine, so this may run at any time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.system import peak_memory

GIB = 2**30
PIECE_ROWS = 8192
MODULE = "zoo.bench.memory"


def click_step(**_: Any) -> dict[str, float]:
    """DARE: 10,000 behaviours, batch 256, one training step."""
    from zoo.models import create_model

    batch, length, items = 256, 10_000, 100_000
    model = create_model("dare", num_items=items, num_categories=1000, max_length=length)
    history, candidate = torch.randint(1, items + 1, (batch, length)), torch.randint(1, items + 1, (batch,))

    def loss() -> torch.Tensor:
        out = model(candidate, candidate % 1000 + 1, history, history % 1000 + 1)
        return out["logit"].mean() + out["auxiliary"].mean()

    return {"limit": 8 * GIB, **_step(model, loss)}


def staeformer_step(**_: Any) -> dict[str, float]:
    """STAEformer of the paper's size: 883 sensors, 12 steps, batch 16, one training step."""
    return {"limit": 24 * GIB, **_traffic_step("staeformer", batch=16)}


def gman_step(**_: Any) -> dict[str, float]:
    """GMAN of the paper's size with group attention: 883 sensors, 12 steps, batch 4, one training step."""
    return {"limit": 24 * GIB, **_traffic_step("gman", batch=4, embedding="learned", group_size=-1)}


def pinn_step(**_: Any) -> dict[str, float]:
    """PhysicsFormer on Burgers' residual, 2,000 points, one Taylor-mode step; at most what nested autograd takes."""
    from zoo.bench.peers_pinn import CHUNK

    return {"limit": _in_process("pinn_nested_step")["peak"], **_pinn_step("taylor", CHUNK)}


def pinn_nested_step(**_: Any) -> dict[str, float]:
    """The same step by nested autograd."""
    from zoo.bench.peers_pinn import POINTS

    return {"limit": float("inf"), **_pinn_step("reverse", POINTS)}


def table_stream(*, rows: int = 100_000, columns: int = 300) -> dict[str, float]:
    """A Parquet file of numbers (300 columns): encoding it, then one epoch of batches; at most 1.5 times the file."""
    with tempfile.TemporaryDirectory() as folder:
        _stream_once(Path(folder) / "small.parquet", 1000, columns)  # imports belong to `before`
        return _stream_once(Path(folder) / "table.parquet", rows, columns)


def _stream_once(path: Path, rows: int, columns: int) -> dict[str, float]:
    from data.table_stream import TableStreamData

    # In another process: what writing the file takes is not what reading it takes.
    subprocess.run([sys.executable, "-m", MODULE, "write", path, str(rows), str(columns)], check=True)
    before, start = peak_memory(), time.perf_counter()
    options = {"sample_rows": 5000, "bins": "quantile", "baseline_models": "none"}
    data = TableStreamData(path=str(path), target="y", scratch=str(path.parent), **options)
    data.setup()
    for _ in data.train_dataloader():
        pass
    used = {"before": before, "peak": peak_memory(), "seconds": time.perf_counter() - start}
    return {"limit": before + 1.5 * path.stat().st_size, "file": path.stat().st_size, **used}


def write_table(path: Path, rows: int, columns: int) -> None:
    """Random numbers, a hundredth of them missing, and a target; written piece by piece."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = np.random.default_rng(0)
    names = [f"x{i}" for i in range(columns)]
    schema = pa.schema([(name, pa.float32()) for name in [*names, "y"]])
    with pq.ParquetWriter(path, schema) as file:
        for start in range(0, rows, PIECE_ROWS):
            x = draw.standard_normal((min(PIECE_ROWS, rows - start), columns), dtype=np.float32)
            y = x[:, 0] + x[:, 1] * x[:, 2]
            x[draw.random(x.shape) < 0.01] = np.nan
            file.write_table(pa.table([*x.T, y], schema=schema))


def _traffic_step(name: str, *, batch: int, **options: Any) -> dict[str, float]:
    from zoo.models import create_model

    sensors, steps = 883, 12
    model = create_model(name, size="paper", num_sensors=sensors, slots_per_day=288, **options)
    x = torch.rand(batch, steps, sensors)
    seen, clock = torch.ones_like(x, dtype=torch.bool), torch.zeros(batch, dtype=torch.long)
    return _step(model, lambda: model(x, seen, clock).abs().mean())


def _pinn_step(method: str, chunk: int) -> dict[str, float]:
    from zoo.bench.peers_pinn import POINTS, network, residual_step

    step = residual_step(network("softmax"), torch.rand(POINTS, 2), method, chunk)
    before, start = peak_memory(), time.perf_counter()
    step()
    return {"before": before, "peak": peak_memory(), "seconds": time.perf_counter() - start}


def _step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, float]:
    optimizer = torch.optim.AdamW(model.parameters())
    before, start = peak_memory(), time.perf_counter()
    loss().backward()
    optimizer.step()
    return {"before": before, "peak": peak_memory(), "seconds": time.perf_counter() - start}


CASES: dict[str, Callable[..., dict[str, float]]] = {
    f.__name__: f for f in (click_step, staeformer_step, gman_step, pinn_step, pinn_nested_step, table_stream)
}


def measure(names: list[str] | None = None, *, rows: int = 100_000) -> dict[str, dict[str, float]]:
    """Run cases in processes of their own.

    Args:
        names: Of `CASES`; all when left out.
        rows: Of the streamed table.

    Returns:
        By case: bytes `before` and at the `peak`, `limit`, `seconds`, and what else the case reports.
    """
    found = {}
    for name in names or CASES:
        found[name] = _in_process(name, rows)
    return found


def _in_process(name: str, rows: int = 0) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", MODULE, name, str(rows)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def show(found: dict[str, dict[str, float]]) -> None:
    """One line a case."""
    for name, case in found.items():
        verdict = "within" if case["peak"] <= case["limit"] else "ABOVE"
        extra = ""
        if "file" in case:
            ratio = (case["peak"] - case["before"]) / case["file"]
            extra = f", file {case['file'] / GIB:.2f}, {ratio:.2f} times the file added"
        print(
            f"{name}: {CASES[name].__doc__} Peak {case['peak'] / GIB:.2f} GiB ({case['before'] / GIB:.2f} before"
            f"{extra}), {verdict} the limit of {case['limit'] / GIB:.2f}; {case['seconds']:.0f} s"
        )


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "write":
        write_table(Path(rest[0]), int(rest[1]), int(rest[2]))
    else:
        print(json.dumps(CASES[what](**({"rows": int(rest[0])} if what == "table_stream" else {}))))
