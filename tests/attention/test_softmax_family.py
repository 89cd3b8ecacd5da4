"""Identities of the variants that are softmax attention with something added: sinks, sqa, moh, flash_bias, affine, blasst, causal_vit."""

import pytest
import torch
from variants import build, inputs

from kernels import softmax as kernel
from zoo.attention import Grid, Pattern, create_attention
from zoo.attention.base import BiasFactors
from zoo.attention.flash_bias import factorize
from zoo.errors import CapabilityError, ConfigError

PATTERNS = ["self", "causal_self", "cross", "causal_cross"]


def qkv(n=11, m=11, h=4, hk=4, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    new = lambda heads, s: torch.randn(2, heads, s, d, generator=g, dtype=torch.float64)
    return new(h, n), new(hk, m), new(hk, m)


def make(name, pattern="self", **options):
    return create_attention(name, 24, 4, pattern=pattern, **options).double().eval()


def with_extra_key(q, k, v, logit, value=None):
    """Softmax over the keys and one more, whose score is `logit` [.., N]."""
    scores = torch.cat((q @ k.mT * q.shape[-1] ** -0.5, logit.expand(*q.shape[:3])[..., None]), -1)
    value = torch.zeros_like(v[:, :, :1]) if value is None else value.expand(*v.shape[:2], 1, -1)
    return scores.softmax(-1) @ torch.cat((v, value), 2)


# ---------------------------------------------------------------- sinks and cap


@pytest.mark.parametrize("sink", ["off_by_one", "zero_kv", "learned", "token"])
def test_sinks_are_one_more_key(sink):
    q, k, v = qkv()
    module = make("softmax", sink=sink)
    logit, value = torch.zeros(1, 1, 1).double(), None
    with torch.no_grad():
        if sink == "learned":
            module.sink_logit.normal_()
            logit = module.sink_logit[:, None]
        if sink == "token":
            module.sink_key.normal_()
            module.sink_value.normal_()
            logit = (q @ module.sink_key[..., None])[..., 0] * 6**-0.5
            value = module.sink_value[:, None]
        have = module.attend(q, k, v)
        assert (have - with_extra_key(q, k, v, logit, value)).abs().max() < 1e-12
        assert module.weights(q, k).sum(-1).max() < 1


def test_a_sink_far_down_is_softmax_and_takes_all_of_an_empty_row():
    q, k, v = qkv()
    module = make("softmax", sink="learned")
    torch.nn.init.constant_(module.sink_logit, -60.0)
    assert (module.attend(q, k, v) - kernel.attention(q, k, v)).abs().max() < 1e-12
    token = make("softmax", sink="token")
    torch.nn.init.normal_(token.sink_value)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    assert token.attend(q, k, v, key_mask=mask).abs().max() == 0


def test_gradients_reach_the_sinks():
    q, k, v = qkv(n=3, m=4)
    for sink in ("learned", "token"):
        module = make("softmax", sink=sink, higher_order=True)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        names = [n for n, _ in module.named_parameters() if n.startswith("sink")]
        leaves = [module.get_parameter(n) for n in names]

        def call(*values, module=module, names=names):
            shifted = dict(zip(names, values, strict=True))
            return torch.func.functional_call(
                _Attend(module), {f"inner.{n}": t for n, t in shifted.items()}, (q, k, v)
            )

        assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


class _Attend(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *tensors):
        return self.inner.attend(*tensors)


def test_softcap_bounds_the_scores():
    q, k, v = qkv()
    module = make("softmax", softcap=2.0)
    scores = 2 * torch.tanh(20 * q @ k.mT * 6**-0.5 / 2)
    assert (module.attend(20 * q, k, v) - scores.softmax(-1) @ v).abs().max() < 1e-12
    assert (make("softmax", softcap=1e5).attend(q, k, v) - kernel.attention(q, k, v)).abs().max() < 1e-8


@pytest.mark.parametrize("pattern", ["causal_self", "cross"])
@pytest.mark.parametrize("options", [{"sink": "token", "softcap": 3.0}, {"sink": "learned", "qk_norm": True}])
def test_options_decode_alike(pattern, options):
    module = build("softmax", Pattern(pattern), **options)
    arguments = inputs(Pattern(pattern))
    with torch.no_grad():
        state = module.init_state(2, **({"context": arguments[1]} if pattern == "cross" else {}))
        rows = []
        for t in range(7):
            y, state = module.step(arguments[0][:, t : t + 1], state)
            rows.append(y)
        assert (torch.cat(rows, 1) - module(*arguments)).abs().max() < 1e-5


def test_softmax_options_that_cannot_be():
    with pytest.raises(ConfigError, match="none, token"):
        make("softmax", sink="drain")
    with pytest.raises(ConfigError, match="positive"):
        make("softmax", softcap=0.0)


# ---------------------------------------------------------------- sqa


def test_sqa_is_attention_with_fewer_query_heads():
    q, k, v = qkv(h=2, hk=1)
    have = make("sqa", reduction=2, num_kv_heads=1).attend(q, k, v)
    assert (have - kernel.attention(q, k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1))).abs().max() < 1e-12
    whole = make("sqa", reduction=1)
    assert (whole.attend(*qkv()) - kernel.attention(*qkv())).abs().max() < 1e-12


def test_sqa_parameters_and_cost():
    c, heads, d = 64, 8, 8
    for reduction, kv in ((2, None), (2, 2), (4, None), (8, 1)):
        module = create_attention("sqa", c, heads, pattern="self", reduction=reduction, num_kv_heads=kv)
        hq, hk = heads // reduction, kv or heads // reduction
        wanted = (c + 1) * (hq + 2 * hk) * d + (hq * d + 1) * c
        assert module.cost(64).parameters == wanted
    full = create_attention("sqa", c, heads, pattern="self", reduction=1)
    half = create_attention("sqa", c, heads, pattern="self")
    assert half.attend_cost(64, 64)[0] * 2 == full.attend_cost(64, 64)[0]


def test_sqa_window_and_bias_of_all_heads():
    q, k, v = qkv(h=2, hk=2)
    banded = make("sqa", pattern="causal_self", window=3)
    assert (
        banded.attend(q, k, v) - kernel.attention(q, k, v, causal=True, window=(3, 0))
    ).abs().max() < 1e-12
    bias = torch.randn(2, 4, 11, 11, dtype=torch.float64)
    want = kernel.attention(q, k, v, bias=bias.unflatten(1, (2, 2)).mean(2))
    assert (make("sqa").attend(q, k, v, bias=bias) - want).abs().max() < 1e-12
    with pytest.raises(ConfigError, match="must divide"):
        create_attention("sqa", 25, 5, pattern="self", reduction=2)
    with pytest.raises(CapabilityError, match="window"):
        make("sqa", window=3, ordered=False)


# ---------------------------------------------------------------- moh


def moh(pattern="self", heads=8, **options):
    return create_attention("moh", 32, heads, pattern=pattern, **options).double().eval()


@pytest.mark.parametrize(
    "options", [{"shared_heads": 0, "active_heads": 8}, {"shared_heads": 8}, {"active_heads": 4}]
)
def test_even_routers_with_every_head_equal_multi_head_attention(options):
    module = moh(**options)
    for router in (module.route_shared, module.route, module.route_kind):
        if router is not None:
            torch.nn.init.zeros_(router.weight)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    gates, _ = module.gates(x)
    assert (gates - 1).abs().max() < 1e-12
    q, k, v = module.project(x, x, x)
    want = module.output(kernel.attention(q, k, v), x)
    assert (module(x) - want).abs().max() < 1e-10


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("extra", ["none", "mask+bias"])
def test_heads_left_out_are_not_computed_and_it_makes_no_difference(pattern, extra, monkeypatch):
    from zoo.attention import moh as file

    module = moh(pattern, shared_heads=2, active_heads=2)
    x, context = torch.randn(2, 24, 32, dtype=torch.float64), torch.randn(2, 24, 32, dtype=torch.float64)
    arguments = (x, context) if module.pattern.cross else (x,)
    call = {}
    if extra != "none":
        mask = torch.ones(2, 24, dtype=torch.bool)
        mask[0, 20:] = False
        call = {"key_mask": mask, "bias": torch.randn(1, 8, 24, 24, dtype=torch.float64)}
    rows = []
    whole = kernel.attention
    monkeypatch.setattr(
        file.kernel,
        "attention",
        lambda q, *a, **o: rows.append(q.shape[0] * q.shape[1] * q.shape[2]) or whole(q, *a, **o),
    )
    monkeypatch.setattr(file, "COMPACT_BELOW", 1.0)
    compact = module(*arguments, **call)
    few = sum(rows)
    rows.clear()
    monkeypatch.setattr(file, "COMPACT_BELOW", -1.0)
    dense = module(*arguments, **call)
    assert (compact - dense).abs().max() < 1e-10
    assert few < 0.85 * sum(rows)  # 2 shared + 2 of 6 routed heads, and the longest list decides


def test_moh_gate_arithmetic():
    x = torch.randn(3, 10, 32, dtype=torch.float64)
    module = moh(shared_heads=3, active_heads=2)
    gates, index = module.gates(x)
    kind = 2 * module.route_kind(x).softmax(-1)
    assert (gates[:, 3:].sum(1) / kind[..., 1] - 2).abs().max() < 1e-10  # routed gates sum to k
    assert (gates[:, :3].sum(1) / kind[..., 0] - 3).abs().max() < 1e-10
    assert ((gates[:, 3:] > 0).sum(1) == 2).all()
    best = module.route(x).topk(2, -1).indices.sort(-1).values
    assert torch.equal(index.sort(-1).values, best)
    paper = moh(shared_heads=3, active_heads=2, gating="paper")
    paper.load_state_dict(module.state_dict())
    plain, _ = paper.gates(x)
    alpha, prob = module.route_kind(x).softmax(-1), module.route(x).softmax(-1)
    chosen = torch.zeros_like(prob).scatter(-1, best, 1.0)
    assert (plain[:, 3:].transpose(1, 2) - alpha[..., 1:] * prob * chosen).abs().max() < 1e-12


def test_moh_balance_loss_is_k_when_balanced_and_steers_the_router():
    module = moh(shared_heads=2, active_heads=2).train()
    x = torch.randn(4, 12, 32, dtype=torch.float64)
    prob = torch.full((4, 12, 6), 1 / 6, dtype=torch.float64)
    chosen = torch.zeros_like(prob)
    for t in range(12):
        chosen[:, t, [(2 * t) % 6, (2 * t + 1) % 6]] = 1.0
    assert (module._load(prob, chosen, None) - 2).abs() < 1e-12
    module(x)
    loss = module.auxiliary_loss()
    loss.backward()
    assert loss > 0 and module.route.weight.grad.abs().max() > 0
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[:, 6:] = False
    module(x, key_mask=mask)
    half = module.auxiliary_loss()
    module(x[:, :6])
    assert (half - module.auxiliary_loss()).abs() < 1e-12
    assert module.eval().__getstate__()["_balance"] is None


def test_unselected_heads_get_no_gradient_from_a_token():
    module = moh(shared_heads=2, active_heads=2)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    q, k, v = module.project(x, x, x)
    q = q.detach().requires_grad_()
    gates, index = module.gates(x)
    module._gated(q, k, v, gates, index).square().sum().backward()
    off = gates == 0
    assert q.grad[off].abs().max() == 0 and q.grad[~off].abs().min(-1).values.max() > 0


# ---------------------------------------------------------------- flash_bias


@pytest.mark.parametrize("pattern", PATTERNS)
def test_factors_equal_the_dense_bias(pattern):
    module = make("flash_bias", pattern, factors="none")
    q, k, v = qkv()
    factors = BiasFactors(torch.randn(2, 4, 11, 3).double(), torch.randn(1, 4, 11, 3).double())
    have = module.attend(q * 6**-0.5, k, v, bias=factors)
    assert (have - kernel.attention(q, k, v, bias=factors.dense(), causal=module.causal)).abs().max() < 1e-12
    turn = torch.randn(3, 3).double() + 3 * torch.eye(3).double()
    other = BiasFactors(factors.query @ turn, factors.key @ torch.linalg.inv(turn).mT)
    assert (module.attend(q * 6**-0.5, k, v, bias=other) - have).abs().max() < 1e-10
    assert (
        module.attend(q * 6**-0.5, k, v) - kernel.attention(q, k, v, causal=module.causal)
    ).abs().max() < 1e-12


def dense_of(module, x, grid=None):
    phi_q, phi_k = module._phi(x, x, 0, grid)
    return phi_q @ phi_k.mT


def test_exact_factors_equal_their_formulas():
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    i = torch.arange(12).double()
    alibi = make("flash_bias", "causal_self", factors="alibi")
    slope = torch.nn.functional.softplus(alibi.slope)[:, None, None]
    assert (dense_of(alibi, x)[0] - slope * (i - i[:, None]) / 64).abs().max() < 1e-12
    line = make("flash_bias", factors="distance")
    p = 2 * i / 11 - 1
    assert (
        dense_of(line, x)[0] + torch.nn.functional.softplus(line.slope)[:, None, None] * (p - p[:, None]) ** 2
    ).abs().max() < 1e-12
    grid = Grid((3, 4))
    plane = make("flash_bias", factors="distance", grid=grid)
    rows, cols = i.div(4, rounding_mode="floor") - 1, 2 * (i % 4) / 3 - 1
    square = (rows - rows[:, None]) ** 2 + (cols - cols[:, None]) ** 2
    assert (
        dense_of(plane, x, grid)[0] + torch.nn.functional.softplus(plane.slope)[:, None, None] * square
    ).abs().max() < 1e-12
    assert plane.rank == 4 and line.rank == 3
    other = {"grid": Grid((2, 6))}  # a picture of another shape than the module was built for
    mixed = plane.attention_map(x, **other) @ plane.project(x, x, x)[2]
    torch.testing.assert_close(plane.output(mixed, x), plane(x, **other))
    wave = make("flash_bias", factors="cosine", rank=4)
    torch.nn.init.normal_(wave.slope)
    angle = wave.frequency * (p[:, None] - p)[..., None]
    assert (dense_of(wave, x)[0] - (wave.slope[:, None, None] * angle.cos()).sum(-1)).abs().max() < 1e-10


def test_learned_factors_start_without_bias_and_learn():
    module = create_attention("flash_bias", 24, 4, pattern="self").double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    q, k, v = super(type(module), module).project(x, x, x)
    assert (module(x) - module.output(kernel.attention(q, k, v), x)).abs().max() < 1e-12
    module(x).square().sum().backward()
    assert module.factor_q.down.weight.grad.abs().max() > 0


def test_factorize_keeps_the_energy():
    table = torch.randn(3, 20, 4) @ torch.randn(3, 4, 20) + 1e-4 * torch.randn(3, 20, 20)
    factors = factorize(table)
    assert factors.query.shape[-1] <= 4
    assert (factorize(table, rank=4).dense() - table).norm() < 1e-2 * table.norm()
    error = (factors.dense() - table).square().sum((1, 2)) / table.square().sum((1, 2))
    assert error.max() <= 0.005 + 1e-6


def test_infinite_key_bias_and_decoding_of_places():
    module = make("flash_bias", factors="none")
    q, k, v = qkv()
    hide = torch.zeros(1, 1, 1, 11).double()
    hide[..., 4] = -torch.inf
    assert (
        module.attend(q * 6**-0.5, k, v, bias=hide) - kernel.attention(q, k, v, bias=hide)
    ).abs().max() < 1e-12
    for factors in ("alibi", "distance", "cosine"):
        causal = build("flash_bias", Pattern.CAUSAL_SELF, factors=factors)
        (x,) = inputs(Pattern.CAUSAL_SELF)
        state, rows = causal.init_state(2), []
        with torch.no_grad():
            for t in range(7):
                y, state = causal.step(x[:, t : t + 1], state)
                rows.append(y)
            assert (torch.cat(rows, 1) - causal(x)).abs().max() < 1e-5
    with pytest.raises(CapabilityError, match="full rank"):
        make("flash_bias", factors="alibi")
    with pytest.raises(CapabilityError, match="ordered"):
        make("flash_bias", "cross", factors="distance")


# ---------------------------------------------------------------- affine


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("masked", [False, True])
def test_affine_equals_its_explicit_matrix(pattern, masked):
    module = make("affine", pattern)
    q, k, v = qkv(n=9, m=11) if module.pattern.cross else qkv()
    n = q.shape[2]
    mask = torch.ones(2, 11, dtype=torch.bool)
    if masked:
        mask[0, [1, 9]] = False
        mask[1] = False
    seen = mask[:, None, None].expand(2, 1, n, 11)
    if module.causal:
        seen = seen & (torch.arange(11) <= torch.arange(n)[:, None] + 11 - n)
    alpha = torch.rand(2, 4, n).double()
    module.average.uniform_()
    p = (q @ k.mT * 6**-0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    beta = (module.average[:, None] - alpha) / seen.sum(-1).clamp(min=1)
    weights = (alpha[..., None] * p + beta[..., None]) * seen
    have = module.attend(q, k, v, alpha=alpha, key_mask=mask if masked else None)
    assert (have - weights @ v).abs().max() < 1e-12
    full = seen.any(-1).expand(2, 4, n)
    assert (weights.sum(-1) - module.average[:, None])[full].abs().max() < 1e-12


def test_affine_reduces_to_softmax_and_to_the_mean():
    q, k, v = qkv()
    module = make("affine")
    module.average.fill_(1.0)
    assert (
        module.attend(q, k, v, alpha=torch.ones(2, 4, 11).double()) - kernel.attention(q, k, v)
    ).abs().max() < 1e-12
    module.average.fill_(0.7)
    mean = module.attend(q, k, v, alpha=torch.zeros(2, 4, 11).double())
    assert (mean - 0.7 * v.mean(2, keepdim=True)).abs().max() < 1e-12


def test_affine_average_moves_in_training_alone():
    module = make("affine", average_start=0.0, decay=0.9)
    x = torch.randn(2, 5, 24).double()
    module(x)
    assert module.average.abs().max() == 0
    module.train()(x, key_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert module.average.abs().max() == 0  # nothing to see
    module(x).sum().backward()
    assert (module.average - 0.05).abs().max() < 1e-7  # 0.1 x the first alpha of a half
    assert "average" in module.state_dict()


# ---------------------------------------------------------------- blasst


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


# ---------------------------------------------------------------- causal_vit


def test_causal_vit_ends():
    q, k, v = qkv()
    module = make("causal_vit", anneal_steps=9)
    module.passes.fill_(-1)
    assert module.softness == 1.0
    assert (module.attend(q, k, v) - kernel.attention(q, k, v)).abs().max() < 1e-12
    causal = kernel.attention(q, k, v, causal=True)
    pre = make("causal_vit", mask_site="pre", anneal_steps=0)
    assert (pre.attend(q, k, v) - causal).abs().max() < 1e-12
    post = make("causal_vit", anneal_steps=0)
    _, part = kernel.attention(q, k, v, causal=True, return_lse=True)
    _, total = kernel.attention(q, k, v, return_lse=True)
    share = (part - total).exp()
    assert (post.weights(q, k).sum(-1) - share).abs().max() < 1e-12
    assert (post.attend(q, k, v) - share[..., None] * causal).abs().max() < 1e-12
    for site in ("pre", "post"):
        half = make("causal_vit", mask_site=site, anneal_steps=1)
        soft = torch.where(torch.ones(11, 11).tril().bool(), 1.0, 0.5).double()
        p = (q @ k.mT * 6**-0.5).exp()
        want = p * soft / (p * soft if site == "pre" else p).sum(-1, keepdim=True)
        assert (half.weights(q, k) - want).abs().max() < 1e-12


def test_causal_vit_schedule_and_class_token_last():
    module = create_attention("causal_vit", 24, 4, pattern="self", anneal_steps=4, grid=Grid((2, 3), 1))
    x, seen = torch.randn(2, 7, 24), []
    for _ in range(5):
        seen.append(round(module.softness, 3))
        module.train()(x)
    module.eval()(x)
    assert seen == [0.8, 0.6, 0.4, 0.2, 0.0] and int(module.passes) == 5
    weights = module.attention_map(x)
    assert (weights[:, :, 0] > 0).all()  # the class token sees every patch
    assert weights[:, :, 1:, 0].max() == 0 and weights[:, :, 1, 2:].max() == 0
    pre = create_attention(
        "causal_vit", 24, 4, pattern="self", anneal_steps=0, mask_site="pre", grid=Grid((2, 3), 1)
    )
    assert (pre.attention_map(x)[:, :, 0] > 0).all()


def test_strictly_causal_with_the_mask_before_the_softmax():
    module = build("causal_vit", Pattern.CAUSAL_SELF, mask_site="pre")
    (x,) = inputs(Pattern.CAUSAL_SELF)
    other = x.clone()
    other[:, 4:] = 0.0
    assert (module(x) - module(other))[:, :4].abs().max() < 1e-6
