"""BLASST: which tiles it leaves out, and what that may change."""

import torch
from variants import build, inputs, make, qkv

from kernels import softmax as kernel
from zoo.attention import Pattern


def test_blasst_without_threshold_is_softmax_and_errors_stay_below_the_bound():
    q, k, v = qkv(n=40, m=64)
    q = 6 * q
    exact = kernel.attention(q, k, v)
    assert torch.equal(make("blasst", factor=0.0).attend(q, k, v), exact)
    shares = []
    for factor in (0.01, 0.1, 1.0, 64.0):
        module = make("blasst", factor=factor, block_q=8, block_k=4)
        out = module.attend(q, k, v)
        weights, full = module.weights(q, k), (q @ k.mT * 6**-0.5).softmax(-1)
        dropped = (full * (weights == 0)).sum(-1)
        assert dropped.max() < factor
        assert ((out - exact).abs().amax(-1) <= 2 * dropped * v.abs().max() + 1e-9).all()
        shares.append(module.sparsity(q, k))
        _, lse = kernel.attention(q, k, v, skip_threshold=factor, skip_tile=(8, 4), return_lse=True)
        assert (lse <= kernel.attention(q, k, v, return_lse=True)[1] + 1e-12).all()
    assert shares == sorted(shares) and shares[0] < shares[-1] and shares[-1] > 0.3


def test_blasst_row_blocks_and_tiles_by_a_loop(monkeypatch):
    from kernels.softmax import torch as path

    q, k, v = qkv(n=20, m=30)
    q = 5 * q
    tile, factor = (4, 8), 2.0
    limit = torch.tensor(factor / 30).log()
    scores = q @ k.mT * 6**-0.5
    keep = torch.ones_like(scores, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            for r in range(0, 20, 4):
                best = torch.full((4,), -torch.inf).double()
                for c in range(0, 30, 8):
                    top = scores[b, h, r : r + 4, c : c + 8].amax(-1)
                    best = torch.maximum(best, top)
                    keep[b, h, r : r + 4, c : c + 8] = not bool((top - best < limit).all())
    want = scores.masked_fill(~keep, -torch.inf).softmax(-1) @ v
    assert not keep.all()
    have = kernel.attention(q, k, v, skip_threshold=factor, skip_tile=tile)
    assert (have - want).abs().max() < 1e-12
    monkeypatch.setitem(path.attention.__kwdefaults__, "block_elements", 1500)
    assert (kernel.attention(q, k, v, skip_threshold=factor, skip_tile=tile) - want).abs().max() < 1e-12


def test_a_query_decides_for_itself_wherever_it_may_come_alone():
    """Decoding gives one query at a time to causal and cross attention: those about it must not keep a tile for it."""
    module = build("blasst", Pattern.CROSS, factor=4.0, block_k=2)
    x, context = inputs(Pattern.CROSS, n=9, m=30)
    with torch.no_grad():
        module.q.weight.mul_(8)
        assert module.sparsity(*module.project(x, context, context)[:2]) > 0.1
        state = module.init_state(2, context=context)
        rows = torch.cat([module.step(x[:, t : t + 1], state)[0] for t in range(9)], 1)
    torch.testing.assert_close(rows, module(x, context), rtol=1e-4, atol=1e-5)


def test_padding_behind_the_end_is_deletion(monkeypatch):
    """Padded queries share tiles with real ones and must not keep keys for them; blocks of rows agree."""
    from kernels.softmax import torch as path

    module = make("blasst", factor=8.0, block_q=8, block_k=2)
    q, k, v = qkv(n=30, m=30)
    mask = torch.arange(30).expand(2, -1) < 19
    short = [t[:, :, :19] for t in (6 * q, k, v)]
    assert module.sparsity(*short[:2]) > 0.1
    want = module.attend(*short)
    for elements in (None, 2000):
        if elements:
            monkeypatch.setitem(path.attention.__kwdefaults__, "block_elements", elements)
        assert (module.attend(6 * q, k, v, key_mask=mask)[:, :, :19] - want).abs().max() < 1e-12
    weights = module.weights(6 * q, k, key_mask=mask)
    assert (weights[:, :, :19, :19] - module.weights(*short[:2])).abs().max() < 1e-12
