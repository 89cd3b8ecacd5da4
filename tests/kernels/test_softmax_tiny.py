"""The path for huge batches of very short sequences agrees with the reference, gradients included."""

import pytest
import torch

from kernels import softmax
from kernels.softmax import torch as torch_path


@pytest.mark.parametrize(
    ("n", "m", "causal"),
    [(12, 12, False), (12, 12, True), (5, 12, True), (12, 5, True), (7, 3, False), (1, 9, False)],
)
def test_tiny_matches_reference(n, m, causal, monkeypatch):
    calls = []
    tiny = torch_path._tiny
    monkeypatch.setattr(torch_path, "_tiny", lambda *a, **k: calls.append(1) or tiny(*a, **k))
    shapes = ((n, 8), (m, 8), (m, 6))
    q, k, v = (torch.randn(100, 4, t, d, requires_grad=True) for t, d in shapes)
    grad = torch.randn(100, 4, n, 6)
    results = []
    for impl in ("torch", "reference"):
        out = softmax.attention(q, k, v, causal=causal, impl=impl)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    assert calls == [1]
    for ours, exact in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, exact, atol=5e-6, rtol=0)


def test_long_or_few_sequences_do_not_take_it(monkeypatch):
    monkeypatch.setattr(torch_path, "_tiny", lambda *a, **k: pytest.fail("wrong path"))
    for batch, n in ((100, 65), (2, 12)):
        q = torch.randn(batch, 4, n, 8)
        softmax.attention(q, q, q, impl="torch")
