"""HSTU's pointwise attention by its definition."""

import pytest
import torch
import torch.nn.functional as F

from zoo.attention import create_attention


@pytest.mark.parametrize("length", [None, 50])
@pytest.mark.parametrize("pattern", ["self", "causal_self"])
def test_equals_its_definition(pattern, length):
    """A sum over the visible keys of SiLU(score) times value, over their number or the fixed length."""
    module = create_attention("hstu", 12, 2, pattern=pattern, length=length).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    bias = torch.randn(2, 2, 7, 7, dtype=torch.float64)
    q, k, v = module.project(x, x, x)
    plain = [t.unflatten(-1, (2, 6)).transpose(1, 2) for t in module.qkv(x).chunk(3, -1)]
    for have, raw in zip((q, k, v), plain, strict=True):
        torch.testing.assert_close(have, F.silu(raw))
    want = torch.zeros(2, 2, 7, 6, dtype=torch.float64)
    for i in range(7):
        seen = i + 1 if pattern == "causal_self" else 7
        for j in range(seen):
            score = (q[:, :, i] * k[:, :, j]).sum(-1) / 6**0.5 + bias[:, :, i, j]
            want[:, :, i] += F.silu(score)[..., None] * v[:, :, j] / (length or seen)
    torch.testing.assert_close(module.attend(q, k, v, bias=bias), want)


def test_more_of_the_same_counts_more_with_a_fixed_length():
    """What softmax loses: ten equal events say more than one."""
    module = create_attention("hstu", 8, 2, pattern="cross", length=50)
    query, event = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    q, k, v = module.project(query, event, event)
    one, ten = (module.attend(q, k.expand(-1, -1, n, -1), v.expand(-1, -1, n, -1)) for n in (1, 10))
    torch.testing.assert_close(ten, 10 * one)
