"""Block scores, selection and attention to selected blocks."""

import importlib.util
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from kernels import selected
from kernels import softmax as dense
from kernels.selected import ops, streamed
from kernels.selected import torch as torch_path

D64 = torch.float64


def make(b=2, h=4, hk=2, n=9, m=37, d=6, e=5, seed=0, dtype=D64):
    g = torch.Generator().manual_seed(seed)
    new = lambda *s: torch.randn(*s, generator=g, dtype=dtype)
    return new(b, h, n, d), new(b, hk, m, d), new(b, hk, m, e)


def choice(b, hk, n, blocks, count, seed=1):
    scores = torch.rand(b, hk, n, blocks, generator=torch.Generator().manual_seed(seed))
    return selected.select_blocks(scores, count)


def test_scores_equal_the_double_sum_of_the_paper():
    """p_slc[j] = sum_a sum_b p_cmp[(l'/d) j + a - b], 0-based."""
    l, d, size, blocks = 8, 4, 12, 9
    q, _, _ = make(h=4, hk=2)
    k_cmp = make(m=blocks)[1]
    nb = -(-((blocks - 1) * d + l) // size)
    stencil = selected.overlap_stencil(blocks, nb, l, d, size, torch.device("cpu"))
    have = selected.block_scores(q, k_cmp, stencil)
    p = (q.unflatten(1, (2, 2)).float() @ k_cmp[:, :, None].float().mT * 6**-0.5).softmax(-1).sum(2)
    want = torch.zeros_like(have)
    for j in range(nb):
        for a in range(size // d):
            for b in range(l // d):
                i = (size // d) * j + a - b
                if 0 <= i < blocks:
                    want[..., j] += p[..., i]
    assert (have - want).abs().max() < 1e-5
    same = selected.overlap_stencil(blocks, blocks, 4, 4, 4, torch.device("cpu"))
    assert torch.equal(same, torch.eye(blocks))  # l = d = l': scores are the probabilities


def test_scores_carry_no_gradient_and_do_not_depend_on_row_blocks(monkeypatch):
    q, k, _ = make()
    q.requires_grad_()
    stencil = selected.overlap_stencil(37, 10, 4, 4, 16, torch.device("cpu"))
    visible = torch.rand(1, 1, 9, 37, generator=torch.Generator().manual_seed(3)) > 0.5
    visible[:, :, 2] = False
    whole = selected.block_scores(q, k, stencil, visible=visible)
    assert not whole.requires_grad and whole[:, :, 2].abs().max() == 0
    monkeypatch.setattr(torch_path, "BLOCK_ELEMENTS", 700)
    assert torch.allclose(selected.block_scores(q, k, stencil, visible=visible), whole)


def test_selection_is_deterministic_and_honours_forced_and_valid():
    scores = torch.zeros(1, 1, 2, 6)
    assert selected.select_blocks(scores, 3).tolist() == [[[[0, 1, 2], [0, 1, 2]]]]  # ties: lowest first
    scores[0, 0, 0] = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.0])
    assert selected.select_blocks(scores, 2)[0, 0, 0].tolist() == [1, 3]
    forced = torch.zeros(6, dtype=torch.bool)
    forced[5] = True
    assert selected.select_blocks(scores, 2, forced=forced)[0, 0, 0].tolist() == [3, 5]
    valid = torch.tensor([True, False, False, False, False, True])
    assert selected.select_blocks(scores, 3, forced=forced, valid=valid)[0, 0, 0].tolist() == [0, 5, -1]
    assert selected.select_blocks(scores, 9).shape[-1] == 6


@pytest.mark.parametrize("way", ["masked", "gathered", "streamed"])
@pytest.mark.parametrize("explicit", [False, True], ids=["first-order", "higher-order"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("limit", [1 << 24, 900], ids=["whole", "rows"])
def test_torch_equals_reference_in_value_and_gradient(way, explicit, causal, limit, monkeypatch):
    monkeypatch.setattr(torch_path, "STREAM_PRICE", 0 if way == "streamed" else 1 << 20)
    monkeypatch.setattr(torch_path, "GATHER_PRICE", 0 if way == "gathered" else 1 << 20)
    monkeypatch.setattr(torch_path, "BLOCK_ELEMENTS", limit)
    monkeypatch.setattr(streamed, "PAIRS", 4)
    monkeypatch.setattr(streamed, "ROWS", limit // 100)
    q, k, v = make()
    index = choice(2, 2, 9, 10, 3)
    index[0, 0, 3] = -1
    index[1, 1, :, 2:] = -1
    mask = torch.rand(2, 37, generator=torch.Generator().manual_seed(4)) > 0.3
    weight = torch.randn(2, 4, 9, 5, dtype=D64)
    results = []
    for impl, dtype in (("reference", D64), ("torch", D64 if explicit else torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        options = dict(block_size=4, causal=causal, key_mask=mask, return_lse=explicit, impl=impl)
        if causal:
            options["positions"] = torch.arange(9) * 4
        out = selected.attention(*leaves, index, **options)
        out, lse = out if explicit else (out, None)
        loss = (out * weight.to(dtype)).sum()
        if explicit:
            loss = loss + lse.masked_fill(lse == -torch.inf, 0.0).sin().sum()
            assert (lse == -torch.inf).any()
        results.append([out, *torch.autograd.grad(loss, leaves)])
    for want, have in zip(*results, strict=True):
        assert (have.double() - want).abs().max() < (1e-10 if explicit else 1e-5)
    assert results[1][0][0, :2, 3].abs().max() == 0  # a row without blocks


def test_all_blocks_chosen_equals_softmax():
    q, k, v = make(m=40)
    index = choice(2, 2, 9, 10, 10)
    have, lse = selected.attention(q, k, v, index, block_size=4, return_lse=True)
    want, want_lse = dense.attention(q, k, v, return_lse=True)
    assert (have - want).abs().max() < 1e-12 and (lse - want_lse).abs().max() < 1e-12


@pytest.mark.parametrize("price", [0, 1 << 20], ids=["streamed", "explicit"])
def test_second_derivative(price, monkeypatch):
    monkeypatch.setattr(torch_path, "STREAM_PRICE", price)
    q, k, v = make(b=1, h=2, hk=1, n=3, m=7, d=2, e=2)
    index = choice(1, 1, 3, 4, 2)
    call = lambda *t: selected.attention(*t, index, block_size=2, higher_order=price > 0, return_lse=True)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
    places = torch.arange(3)[None], torch.arange(7)[None]
    single = [t.detach().float().requires_grad_() for t in leaves]
    quick = {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(ops.selected_fwd, (*single, index, None, *places, 2, True, 0.7, "torch"), **quick)


@pytest.mark.parametrize("way", ["masked", "gathered", "streamed"])
@pytest.mark.parametrize("size", [1e4, 0.0], ids=["extreme", "equal"])
def test_extreme_equal_and_missing_scores(way, size, monkeypatch):
    """Logits of +-10,000 pick single keys, equal ones average what is chosen; rows without a block are zero, all without a NaN."""
    monkeypatch.setattr(torch_path, "STREAM_PRICE", 0 if way == "streamed" else 1 << 20)
    monkeypatch.setattr(torch_path, "GATHER_PRICE", 0 if way == "gathered" else 1 << 20)
    q, k, v = make(h=2, d=2, dtype=torch.float32)
    q, k = size * q.sign(), k.sign()
    index = choice(2, 2, 9, 10, 3)
    index[:, :, 4] = -1
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1] = False  # a sample without keys
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = selected.attention(*leaves, index, block_size=4, key_mask=mask, scale=0.5, return_lse=True)
    grads = torch.autograd.grad(out.sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum(), leaves)
    assert all(t.isfinite().all() for t in (out, *grads))
    for t in (out[0, :, 4], out[1], grads[0][0, :, 4], *(g[1] for g in grads)):
        assert t.abs().max() == 0
    assert (lse[1] == -torch.inf).all() and (lse[0, :, 4] == -torch.inf).all()
    for row in (0, 8):
        for head in (0, 1):
            keys = (index[0, head, row][:, None] * 4 + torch.arange(4)).flatten()
            keys = keys[(keys >= 0) & (keys < 37)]
            logits = 0.5 * k[0, head, keys] @ q[0, head, row]
            best = keys[logits == logits.max()]
            torch.testing.assert_close(out[0, head, row], v[0, head, best].mean(0), rtol=1e-5, atol=1e-5)


def test_refusals_name_the_rule(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = make()
    with pytest.raises(ValueError, match=r"index must be \[B, Hk, N, S\]"):
        selected.attention(q, k, v, torch.zeros(2, 4, 9, 1, dtype=torch.long), block_size=4)
    with pytest.raises(NotImplementedError, match="impl='torch'"):
        selected.attention(
            q.float(), k.float(), v.float(), choice(2, 2, 9, 10, 2), block_size=4, impl="triton"
        )
    q, k, v = make(h=65, hk=1, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="groups of 65 heads, only up to 64; use impl='torch'"):
        selected.attention(q, k, v, choice(2, 1, 9, 10, 2), block_size=4, impl="triton")
    with pytest.raises(ValueError, match="must divide"):
        selected.overlap_stencil(3, 3, 8, 3, 6, torch.device("cpu"))
    assert selected.cost(1, 4, 64, 4, 8, 16).flops == 2 * 4 * 64 * 32 * 32


def test_a_tail_without_compressed_block_scores_nothing():
    """l = d = l' and a length that is no multiple: the last selection block overlaps no compressed one."""
    stencil = selected.overlap_stencil(5, 6, 4, 4, 4, torch.device("cpu"))
    q, k, _ = make(b=1, h=4, hk=2, n=21, m=5, d=6, e=6)
    scores = selected.block_scores(q, k, stencil)
    whole = selected.block_scores(q, k, stencil[:, :5])
    assert scores.shape == (1, 2, 21, 6) and torch.equal(scores[..., :5], whole)
    assert scores[..., 5].abs().max() == 0


def test_agrees_with_flash_linear_attention(monkeypatch):
    """Its plain loops over queries, causal: the selected branch, and the compressed one with l = d."""
    pytest.importorskip("einops", reason="fla-core's naive forms need einops")
    found = importlib.util.find_spec("fla")
    if found is None:
        pytest.skip("fla-core is not installed (pip install --no-deps fla-core)")
    # One file of it is loaded; importing the package needs a GPU. It names two helpers that these functions do not call.
    for name, attribute in (
        ("fla", ""),
        ("fla.ops", ""),
        ("fla.ops.utils", "prepare_chunk_offsets"),
        ("fla.ops.utils.pooling", "mean_pooling"),
    ):
        module = types.ModuleType(name)
        module.__path__ = []
        setattr(module, attribute or "unused", None)
        monkeypatch.setitem(sys.modules, name, module)
    file = Path(found.origin).parent / "ops" / "nsa" / "naive.py"
    spec = importlib.util.spec_from_file_location("_fla_nsa", file)
    naive = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(naive)
    q, k, v = make(b=1, h=4, hk=2, n=24, m=24, d=6, e=6, dtype=torch.float32)
    scores = torch.rand(1, 2, 24, 6, generator=torch.Generator().manual_seed(3))
    own = torch.arange(24)[:, None] // 4
    blocks = torch.arange(6)
    index = selected.select_blocks(scores, 3, forced=blocks == own, valid=blocks <= own)
    flip = lambda t: t.transpose(1, 2)
    want = naive.naive_nsa_selection(flip(q), flip(k), flip(v), flip(index), block_size=4)
    have = selected.attention(q, k, v, index, block_size=4, causal=True)
    assert (flip(want) - have).abs().max() < 1e-5
    # Its choice: mean probability of the group over begun blocks, complete ones scored; first, own and previous block always taken.
    pooled = [t.unflatten(2, (6, 4)).mean(3) for t in (k, v)]
    stencil = selected.overlap_stencil(6, 6, 4, 4, 4, torch.device("cpu"))
    complete = (blocks * 4 + 3 <= torch.arange(24)[:, None])[None, None]
    ours = selected.block_scores(q, pooled[0], stencil, visible=complete)
    forced = (blocks == 0) | (blocks == own) | (blocks == own - 1)
    ours = selected.select_blocks(ours, 4, forced=forced & (blocks <= own), valid=blocks <= own)
    theirs = flip(naive.naive_nsa_topk(flip(q), flip(pooled[0]), 4, 4, 6**-0.5))
    missing = lambda t: t.where(t >= 0, 99).sort(-1).values
    assert torch.equal(missing(ours), missing(theirs.long()))
    ends = torch.arange(6) * 4 + 3
    want = naive.naive_nsa_compression(flip(q), flip(pooled[0]), flip(pooled[1]), 4, 6**-0.5)[0]
    have = dense.attention(q, *pooled, causal=True, positions=(torch.arange(24), ends))
    assert (flip(want) - have)[:, :, 3:].abs().max() < 1e-5 and have[:, :, :3].abs().max() == 0
