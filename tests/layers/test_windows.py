"""Sliding windows: they cover everything, are full, and agree where the score is local."""

import pytest
import torch

from zoo.errors import ConfigError
from zoo.layers.windows import _starts, sliding_window


@pytest.mark.parametrize("length", [8, 9, 15, 16, 23, 100])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.9])
def test_windows_are_full_cover_everything_and_overlap(length, overlap):
    starts = _starts(length, 8, overlap)
    assert starts[0] == 0 and starts[-1] == length - 8
    steps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert all(1 <= s <= max(1, round(8 * (1 - overlap))) for s in steps)


@pytest.mark.parametrize("size", [(8, 8), (13, 30), (5, 20), (1, 1)])
def test_a_local_score_gives_the_same_map(size):
    torch.manual_seed(0)
    weight = torch.randn(4, 3)
    calls = []

    def score(x):
        calls.append(tuple(x.shape))
        return torch.einsum("kc,bchw->bkhw", weight, x)

    images = torch.randn(2, 3, *size)
    found = sliding_window(score, images, (8, 8), batch=5)
    assert torch.allclose(found, score(images).softmax(1), atol=1e-5)
    assert all(c[1:] == (3, 8, 8) and c[0] <= 5 for c in calls[:-1])


def test_windows_are_averaged():
    def score(x):  # 1 and 3 by turns: probabilities of two classes
        ramp = torch.arange(len(x)).view(-1, 1, 1, 1).float().expand(-1, 1, *x.shape[2:])
        return torch.cat((ramp, -ramp), 1)

    found = sliding_window(score, torch.zeros(1, 1, 4, 6), (4, 4), overlap=0.5)
    first, second = (torch.tensor([[i, -i]]).float().softmax(1)[0, 0] for i in (0, 1))
    assert torch.allclose(
        found[0, 0, 0], torch.stack([first] * 2 + [(first + second) / 2] * 2 + [second] * 2)
    )


def test_bad_windows_are_refused():
    with pytest.raises(ConfigError, match="overlap=1"):
        sliding_window(lambda x: x, torch.zeros(1, 1, 4, 4), (4, 4), overlap=1.0)
