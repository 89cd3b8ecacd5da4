"""Token-local helpers: convolutions under masks, shift, rotations of points and intervals."""

import pytest
import torch

from kernels import local

D64 = torch.float64


def tokens(n=7, c=3):
    return torch.randn(2, n, c, generator=torch.Generator().manual_seed(0), dtype=D64)


@pytest.mark.parametrize("causal", [True, False])
def test_sequence_convolution_is_a_sum_of_shifts(causal):
    x, weight = tokens(), torch.randn(3, 1, 3, dtype=D64)
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) > 0.3
    later = [2, 1, 0] if causal else [1, 0, -1]
    want = sum(local.shift(x, s, key_mask=mask) * weight[:, 0, i] for i, s in enumerate(later))
    spoilt = x.masked_fill(~mask[..., None], torch.nan)
    have = local.depthwise_sequence(spoilt, weight, causal=causal, key_mask=mask)
    torch.testing.assert_close(have, want)


def test_grid_convolution_ignores_masked_tokens():
    x, weight = tokens(1 + 6), torch.randn(3, 1, 3, 3, dtype=D64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 3] = False
    spoilt = x.masked_fill(~mask[..., None], torch.nan)
    have = local.depthwise_grid(spoilt, (2, 3), weight, prefix=1, key_mask=mask)
    empty = x.masked_fill(~mask[..., None], 0.0)
    torch.testing.assert_close(have, local.depthwise_grid(empty, (2, 3), weight, prefix=1))


def test_shift():
    x = tokens()
    torch.testing.assert_close(local.shift(x, 2)[:, 2:], x[:, :-2])
    assert (local.shift(x, 2)[:, :2] == 0).all() and (local.shift(x, -9) == 0).all()
    torch.testing.assert_close(local.shift(x, -1)[:, :-1], x[:, 1:])


def test_rotations_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=D64)
    frequencies = local.rope_frequencies(4).double()
    for layout in ("interleaved", "half"):
        scores = []
        for start in (0, 11):
            angles = local.rope_angles(torch.arange(5)[:, None] + start, frequencies)
            scores.append(local.rotate(q, angles, layout=layout) @ local.rotate(k, angles, layout=layout).mT)
        torch.testing.assert_close(scores[0], scores[1])


def test_interval_gains_are_the_mean_rotation():
    frequencies = local.rope_frequencies(4).double()
    radius = torch.tensor([0.0, 0.5, 3.0], dtype=D64)
    points = torch.linspace(-1, 1, 20001, dtype=D64)[:, None, None] * radius[:, None] * frequencies
    torch.testing.assert_close(
        local.interval_gains(radius, frequencies, norm="none"), points.cos().mean(0), rtol=0, atol=2e-4
    )
    ones = torch.ones(3, dtype=D64)
    torch.testing.assert_close(local.interval_gains(radius, frequencies).mean(-1), ones)
    torch.testing.assert_close(local.interval_gains(radius, frequencies, norm="rms").square().mean(-1), ones)
    with pytest.raises(ValueError, match="choose mean"):
        local.interval_gains(radius, frequencies, norm="max")


def test_second_derivatives():
    x, weight = tokens(4, 2).requires_grad_(), torch.randn(2, 1, 3, dtype=D64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    angles = torch.randn(4, 1, dtype=D64, requires_grad=True)

    def call(x, weight, angles):
        mixed = local.depthwise_sequence(x, weight, causal=True, key_mask=mask) + local.shift(x, 1)
        return local.rotate(mixed[:, None], angles).sin()

    assert torch.autograd.gradgradcheck(call, (x, weight, angles))
