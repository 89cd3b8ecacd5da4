"""A training step over 10,000 behaviours fits an ordinary machine."""

import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import resource, sys, time, torch
from zoo.models import create_model
torch.manual_seed(0)
batch, length = 256, 10_000
model = create_model("dare", num_items=100_000, num_categories=1000, max_length=length)
items = torch.randint(1, 100_001, (batch, length)); categories = items % 1000 + 1
item = torch.randint(1, 100_001, (batch,)); category = item % 1000 + 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
start = time.perf_counter()
out = model(item, category, items, categories)
(out["logit"].sum() + out["auxiliary"].sum()).backward()
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.perf_counter() - start)
"""


def _run(code: str) -> list[float]:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()]


@pytest.mark.slow
def test_step_over_ten_thousand_behaviours_fits_eight_gib() -> None:
    before, peak, seconds = _run(STEP)
    print(f"{before:.2f} GiB before, {peak:.2f} GiB at most, {seconds:.1f} s")
    assert peak < 8
