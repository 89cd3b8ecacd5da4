"""Identities of the NSA card."""

import pytest
import torch
import torch.nn.functional as F
from variants import build, inputs

from kernels import selected
from kernels import softmax as dense
from zoo.attention import Pattern, create_attention
from zoo.errors import ConfigError

CAUSAL = ["causal_self", "causal_cross"]


def qkv(branches, n=21, heads=4, groups=2, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    new = lambda h: torch.randn(2, h, n, d, generator=g, dtype=torch.float64)
    return new(heads), new(groups * branches), new(groups * branches)


def nsa(pattern, **options):
    module = create_attention("nsa", 24, 4, pattern=pattern, num_kv_heads=2, **options)
    return module.double().eval()


def gates(which, branches, n=21):
    return F.one_hot(torch.tensor(which), branches).double().expand(2, 4, n, branches)


@pytest.mark.parametrize("compress", [{}, {"compress_block": 4, "compress_stride": 4}])
@pytest.mark.parametrize("pattern", ["self", "causal_self", "cross", "causal_cross"])
def test_all_blocks_equal_softmax(pattern, compress):
    module = nsa(pattern, select_block=4, num_selected=6, **compress)
    q, k, v = qkv(module.branches)
    have = module.attend(q, k, v, gates=gates(1, module.branches))
    want = dense.attention(q, k[:, 2:4], v[:, 2:4], causal=module.causal)
    assert (have - want).abs().max() < 1e-10


@pytest.mark.parametrize("pattern", ["self", "causal_self", "causal_cross"])
def test_wide_window_equals_softmax(pattern):
    module = nsa(pattern, window=43)
    q, k, v = qkv(3)
    want = dense.attention(q, k[:, 4:], v[:, 4:], causal=module.causal)
    assert (module.attend(q, k, v, gates=gates(2, 3)) - want).abs().max() < 1e-10


def test_narrow_window_holds_w_tokens():
    for pattern, row, expected in (("causal_self", 9, [7, 8, 9]), ("self", 9, [8, 9, 10])):
        module = nsa(pattern, window=3, compress="mean")
        q, k, _ = qkv(3)
        one_hot = torch.eye(21, dtype=torch.float64).expand(2, 6, 21, 21)
        weights = module.attend(q, k, one_hot, gates=gates(2, 3))
        assert weights[0, 0, row].nonzero().flatten().tolist() == expected


def test_first_causal_rows_have_no_compressed_block():
    module = nsa("causal_self", compress_block=8, compress_stride=4)
    q, k, v = qkv(3)
    out = module.attend(q, k, v, gates=gates(0, 3))
    assert out[:, :, :7].abs().max() == 0 and out[:, :, 7].abs().min() > 0


def test_compressed_branch_by_hand():
    module = nsa("self", compress_block=4, compress_stride=2)
    q, k, v = qkv(3, n=21)
    phi = lambda c, x: c.down(F.gelu(c.up((x + c.place).flatten(-2))))
    starts = range(0, 18, 2)
    k_pad, v_pad = (F.pad(t[:, :2], (0, 0, 0, 1)) for t in (k, v))
    keep = torch.ones(22).double()
    keep[21] = 0

    def block(c, t, s):
        x = (t[:, :, s : s + 4] + c.place) * keep[s : s + 4, None]
        return c.down(F.gelu(c.up(x.flatten(-2))))

    starts = [*starts, 18]
    kc = torch.stack([block(module.compress_k, k_pad, s) for s in starts], 2)
    vc = torch.stack([block(module.compress_v, v_pad, s) for s in starts], 2)
    want = dense.attention(q, kc, vc)
    assert (module.attend(q, k, v, gates=gates(0, 3)) - want).abs().max() < 1e-10
    assert phi(module.compress_k, k_pad[:, :, :4]).shape == kc[:, :, 0].shape


@pytest.mark.parametrize("pattern", ["self", "causal_self"])
def test_group_shares_its_choice_and_forced_blocks_are_in(pattern):
    module = nsa(pattern, select_block=4, num_selected=3, local_blocks=2, initial_blocks=1)
    q, k, v = qkv(3)
    kc, _, cmp_mask = module._compress(k[:, :2], v[:, :2], None)
    pos = module._positions(21, 21, None, q.device)
    index = module._choose(q, kc, 21, cmp_mask, None, pos)
    assert index.shape == (2, 2, 21, 3)
    for t in range(21):
        own = t // 4
        wanted = {own, max(own - 1, 0)} | ({0} if module.causal else set())
        for row in index[:, :, t].reshape(-1, 3).tolist():
            assert wanted <= set(row)
            if module.causal:
                assert max(row) <= own


def test_choice_has_no_gradient_but_the_rest_does():
    module = nsa("self", select_block=4, num_selected=2)
    q, k, v = (t.requires_grad_() for t in qkv(3))
    module.attend(q, k, v, gates=gates(1, 3)).square().sum().backward()
    assert k.grad[:, :2].abs().max() == 0  # the compressed keys only chose
    assert k.grad[:, 2:4].abs().max() > 0 and q.grad.abs().max() > 0


def test_gates_weigh_the_branches_and_start_even():
    module = create_attention("nsa", 16, 2, pattern="self")
    (x,) = inputs(Pattern.SELF)
    with torch.no_grad():
        module.gate.weight.zero_()
        q, k, v = module.project(x, x, x)
        heads = module.mix(x, x, x, key_mask=None, bias=None, grid=None, positions=None)
    assert (heads - module.attend(q, k, v)).abs().max() < 1e-6


@pytest.mark.parametrize("pattern", CAUSAL)
def test_positions_restrict_each_branch(pattern):
    module = nsa(pattern, select_block=4, num_selected=3, window=5)
    q, k, v = qkv(3)
    positions = torch.tensor([3, 20, 11]).repeat(7)
    before = module.attend(q, k, v, positions=positions)
    k, v = k.clone(), v.clone()
    k[:, :, 12:], v[:, :, 12:] = 9.0, -9.0
    after = module.attend(q, k, v, positions=positions)
    for t in range(21):
        changed = (after[:, :, t] - before[:, :, t]).abs().max()
        assert changed < 1e-12 if positions[t] <= 11 else changed > 1e-3


@pytest.mark.parametrize("pattern", list(Pattern), ids=str)
def test_holes_in_the_mask(pattern):
    """Masked tokens in the middle, and a hole as large as a selection block."""
    module = build("nsa", pattern, m=30, select_block=4, num_selected=3, compress_block=4, compress_stride=2)
    arguments = list(inputs(pattern, n=30, m=30))
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 8:14] = mask[1, 3] = False
    before = module(*arguments, key_mask=mask)
    arguments[-1] = arguments[-1].masked_fill(~mask[..., None], 41.0)
    after = module(*arguments, key_mask=mask)
    rows = torch.ones_like(mask) if pattern.cross else mask
    assert (after - before)[rows].abs().max() < 1e-4


def test_shared_keys_and_mean_compression_have_fewer_parameters():
    sizes = [
        create_attention("nsa", 32, 4, pattern="self", **o).cost(64).parameters
        for o in ({}, {"compress": "mean"}, {"shared_kv": True, "compress": "mean"}, {"num_kv_heads": 1, "shared_kv": True, "compress": "mean"})
    ]  # fmt: skip
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_mean_compression_equals_pooled_keys():
    """As flash-linear-attention pools: l = d = l', no positions."""
    module = nsa("self", compress="mean", compress_block=4, compress_stride=4, select_block=4, shared_kv=True)
    q, k, v = qkv(1, n=20)
    pooled_k, pooled_v = (t.unflatten(2, (5, 4)).mean(3) for t in (k, v))
    want = dense.attention(q, pooled_k, pooled_v)
    assert (module.attend(q, k, v, gates=gates(0, 3, 20)) - want).abs().max() < 1e-10


def test_matches_an_independent_choice():
    """Own loop over queries: probabilities, overlap, group sum, best blocks, dense softmax on their tokens."""
    module = nsa("self", select_block=4, num_selected=3, compress_block=4, compress_stride=2, local_blocks=0)
    q, k, v = qkv(3, n=20)
    kc, _, _ = module._compress(k[:, :2], v[:, :2], None)
    out = module.attend(q, k, v, gates=gates(1, 3, 20))
    for t in (0, 7, 19):
        for g in range(2):
            p = (q[0, 2 * g : 2 * g + 2, t] @ kc[0, g].T * 6**-0.5).softmax(-1).sum(0).detach()
            score = [
                sum(
                    float(p[i]) * max(0, min(2 * i + 4, 4 * j + 4) - max(2 * i, 4 * j)) / 2
                    for i in range(len(p))
                )
                for j in range(5)
            ]
            best = sorted(sorted(range(5), key=lambda j: -score[j])[:3])
            tokens = torch.cat([torch.arange(4 * j, 4 * j + 4) for j in best])
            for h in (2 * g, 2 * g + 1):
                w = (q[0, h, t] @ k[0, 2 + g, tokens].T * 6**-0.5).softmax(-1)
                assert (w @ v[0, 2 + g, tokens] - out[0, h, t]).abs().max() < 1e-10


def test_decoding_state_grows_as_told():
    module = build("nsa", Pattern.CAUSAL_SELF, dim=16)
    state = module.init_state(1)
    with torch.no_grad():
        for _ in range(40):
            _, state = module.step(torch.randn(1, 1, 16), state)
    assert state["k_win"].shape[2] == 16 and state["k_recent"].shape[2] == 8
    assert state["blocks"] == (40 - 8) // 4 + 1
    assert module.state_size(40) == (40 + 9 + 16 + 8) * 2 * 16


def test_options_that_cannot_be():
    for options, text in (
        ({"compress_stride": 3}, "must divide"),
        ({"num_selected": 1, "initial_blocks": 1, "local_blocks": 2}, "forced blocks"),
        ({"num_kv_heads": 3}, "must divide the 4"),
        ({"compress": "sum"}, "mlp, mean"),
        ({"window": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            create_attention("nsa", 16, 4, pattern="causal_self", **options)
    assert selected.select_blocks(torch.zeros(1, 1, 1, 3), 2).shape[-1] == 2
