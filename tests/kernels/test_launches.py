"""What launches ask of a GPU, seen without one: the kernels are replaced by a note of their grid."""

import pytest
import torch

pytest.importorskip("triton", reason="launches need triton")

from kernels.decay import launch as decay  # noqa: E402
from kernels.delta import launch as delta  # noqa: E402
from kernels.linear import launch as linear  # noqa: E402
from kernels.memory import launch as memory  # noqa: E402
from kernels.prefix import launch as prefix  # noqa: E402
from kernels.selected import launch as selected  # noqa: E402
from kernels.softmax import launch as softmax  # noqa: E402

# CUDA's limit for the second and third axis of a grid.
LIMIT = 65535
LONG = LIMIT + 4465


class Note:
    """Stands for a kernel."""

    def __init__(self, grids: list) -> None:
        self.grids = grids

    def __getitem__(self, grid: tuple[int, ...]):
        self.grids.append(grid)
        return lambda *args, **options: None


def _softmax(x):
    p = softmax.Problem(x, x, x)
    rows = x[..., 0]
    softmax.fwd(p)
    softmax.bwd(p, rows, x, rows, False)


def _selected(x):
    index = torch.zeros(*x.shape[:3], 1, dtype=torch.int64)
    call = x, x, x, index, None, None, None, 64, False, 1.0
    selected.fwd(*call)
    selected.bwd(*call, x[..., 0], x, x[..., 0])
    selected.scores(x, x[:, :, :4], torch.ones(4, 2), None, x[..., 0], 1.0)
    selected.top(x[..., :2], 1)


def _decay(x):
    for gate in (None, -x[..., 0].abs(), -x.abs()):
        for values in (False, True):
            decay.scan(x, x, x, gate, None, True, values, False)


def _delta(x):
    chunks = x.reshape(x.shape[0], -1, 10, x.shape[3])
    delta.walk(chunks, chunks, chunks, None, None, x.new_zeros(x.shape[0], 2, 2), False, "float32")
    delta.pairs(chunks.flatten(0, 1), chunks.flatten(0, 1), "float32")


def _memory(x):
    chunks, state = x.reshape(x.shape[0], -1, 10, x.shape[3]), x.new_zeros(x.shape[0], 2, 2)
    gate = x.new_ones(*chunks.shape[:2], 4)
    memory.walk(chunks, chunks, None, chunks, None, gate, None, None, state, state, False, "float32")


def _linear(x):
    state, small, one = x.new_zeros(*x.shape[:2], 2, 2), x.new_zeros(*x.shape[:2], 2), x.new_ones(x.shape[0])
    linear.state_fwd(x, x, None, None, None, "elu1")
    linear.state_bwd(x, x, None, None, None, state, small, small, small, "elu1")
    linear.read_fwd(x, None, state, small, None, None, one, one, "denom", "elu1")
    linear.read_bwd(x, None, state, small, None, None, one, one, x, "denom", "elu1")


def _prefix(x):
    prefix.scan(x.flatten(0, 1), x.flatten(0, 1), None)


CALLS = {"softmax": _softmax, "selected": _selected, "decay": _decay, "delta": _delta, "memory": _memory, "linear": _linear, "prefix": _prefix}  # fmt: skip


@pytest.mark.parametrize("shape", [(1, LONG), (LONG, 10)], ids=["long", "many"])
@pytest.mark.parametrize("name", CALLS)
def test_grids_of_long_and_of_many_sequences_fit(name, shape, monkeypatch):
    """70,000 tokens, and 70,000 sequences of ten: only a grid's first axis may grow with both."""
    grids: list[tuple[int, ...]] = []
    module = globals()[name]
    for kernel in [n for n in vars(module.tk) if n.endswith("_kernel")]:
        monkeypatch.setattr(module.tk, kernel, Note(grids))
    batch, n = shape
    CALLS[name](torch.zeros(batch, 1, n, 2))
    assert grids and all(size <= LIMIT for grid in grids for size in grid[1:])
