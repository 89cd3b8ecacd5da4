"""Sequence parallelism over gloo: three real processes give the values and gradients of one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_parts_equal_the_whole(tmp_path):
    """Each process compares its part, in float64; see split_worker.py for the checks.

    Three: one has a part before and one after its own, and the one before is not the one after.
    """
    world = 3
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "USE_LIBUV": "0"}
    command = [sys.executable, str(Path(__file__).parent / "split_worker.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "meet")],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
        for line in (
            "softmax causal=True",
            "decay vector denom",
            "delta scalar",
            "uneven",
            "traffic",
            "model kda",
        ):
            assert line in output
