"""Token-local helpers and online memory on random shapes, masks and settings."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis", reason="property tests need hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kernels import local  # noqa: E402
from kernels.memory import memory_scan  # noqa: E402

D64 = torch.float64
QUICK = settings(max_examples=25, deadline=None, derandomize=True)
SEED = st.integers(0, 10**6)


def normal(seed):
    gen = torch.Generator().manual_seed(seed)
    return gen, lambda *s: torch.randn(*s, generator=gen, dtype=D64)


def differ(found, wanted, leaves):
    """Compare results and gradients; where nothing depends on a leaf, its gradient is zero."""
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    grads = [
        torch.autograd.grad(t.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
        if t.requires_grad else [torch.zeros_like(leaf) for leaf in leaves]
        for t in (found, wanted)
    ]  # fmt: skip
    for have, want in zip(*grads, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-8)


@QUICK
@given(
    seed=SEED,
    n=st.integers(1, 9),
    c=st.integers(1, 3),
    taps=st.integers(1, 6),
    causal=st.booleans(),
    keep=st.floats(0, 1),
)
def test_sequence_convolution_is_a_sum_of_shifts(seed, n, c, taps, causal, keep):
    gen, new = normal(seed)
    x, weight = new(2, n, c).requires_grad_(), new(c, 1, taps).requires_grad_()
    mask = torch.rand(2, n, generator=gen) < keep
    first = taps - 1 if causal else (taps - 1) // 2
    wanted = sum(local.shift(x, first - i, key_mask=mask) * weight[:, 0, i] for i in range(taps))
    spoilt = x.masked_fill(~mask[..., None], torch.nan)
    differ(local.depthwise_sequence(spoilt, weight, causal=causal, key_mask=mask), wanted, [x, weight])


@QUICK
@given(
    seed=SEED,
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    side=st.sampled_from([1, 3, 5]),
    prefix=st.integers(0, 2),
    keep=st.floats(0, 1),
)
def test_grid_convolution_is_a_sum_over_neighbours(seed, h, w, side, prefix, keep):
    gen, new = normal(seed)
    x, weight = new(2, prefix + h * w, 2).requires_grad_(), new(2, 1, side, side).requires_grad_()
    mask = torch.rand(2, prefix + h * w, generator=gen) < keep
    image = (x * mask[..., None])[:, prefix:].unflatten(1, (h, w))
    rows = []
    for i in range(h):
        for j in range(w):
            near = [
                image[:, i + a - side // 2, j + b - side // 2] * weight[:, 0, a, b]
                for a in range(side) for b in range(side)
                if 0 <= i + a - side // 2 < h and 0 <= j + b - side // 2 < w
            ]  # fmt: skip
            rows.append(sum(near))
    spoilt = x.masked_fill(~mask[..., None], torch.nan)
    have = local.depthwise_grid(spoilt, (h, w), weight, prefix=prefix, key_mask=mask)
    differ(have, torch.stack(rows, 1), [x, weight])


@QUICK
@given(
    seed=SEED,
    n=st.integers(1, 6),
    pairs=st.integers(1, 5),
    layout=st.sampled_from(["interleaved", "half"]),
    axes=st.integers(1, 3),
)
def test_rotations_are_undone_and_turn_scores_by_distances(seed, n, pairs, layout, axes):
    _, new = normal(seed)
    q, k, moved = new(1, 2, n, 2 * pairs * axes), new(1, 2, n, 2 * pairs * axes), new(axes)
    place, frequencies = new(n, axes), local.rope_frequencies(pairs).double()
    turned = []
    for shift in (0.0, moved):
        angles = local.rope_angles(place + shift, frequencies)
        a, b = (local.rotate(t, angles, layout=layout) for t in (q, k))
        torch.testing.assert_close(local.rotate(a, -angles, layout=layout), q)
        turned.append(a @ b.mT)
    torch.testing.assert_close(*turned)


@QUICK
@given(
    seed=SEED, n=st.integers(1, 9), a=st.integers(0, 10), b=st.integers(0, 10), sign=st.sampled_from([1, -1])
)
def test_shifts_one_way_add_up(seed, n, a, b, sign):
    _, new = normal(seed)
    x = new(2, n, 3)
    torch.testing.assert_close(
        local.shift(local.shift(x, sign * a), sign * b), local.shift(x, sign * (a + b))
    )


MEMORY = {
    "n": st.integers(1, 7), "m": st.integers(1, 7), "d": st.integers(1, 4), "e": st.integers(2, 4), "chunk": st.integers(1, 9),
    "layers": st.sampled_from([1, 2]), "decays": st.booleans(), "momentum": st.booleans(), "keep": st.floats(0, 1),
    "how": st.sampled_from(["aligned", "exclusive", "reverse", "placed"]),
}  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=SEED, case=st.fixed_dictionaries(MEMORY))
def test_memory_in_chunks_is_memory_token_by_token(seed, case):
    """Gradients too; and skipped tokens, NaN among them, are as if they were not there."""
    gen, new = normal(seed)
    n, m, d, e = (case[x] for x in "nmde")
    n = m if case["how"] == "reverse" else n
    unit = lambda *s: F.normalize(new(*s), dim=-1)
    leaves = [unit(2, 1, n, d), unit(2, 1, m, d), new(2, 1, m, e), 0.2 * new(2, 1, m).sigmoid()]
    leaves += [new(1, d, e)] if case["layers"] == 1 else [new(1, d, 3), new(1, 3, e)]
    leaves = [t.requires_grad_() for t in leaves]
    mask = torch.rand(2, m, generator=gen) < case["keep"]
    gate = lambda on: F.logsigmoid(2 + new(2, 1, m)) if on else None
    options = {
        "log_keep": gate(case["decays"]), "log_momentum": gate(case["momentum"]), "chunk": case["chunk"], "key_mask": mask,
        "gain": None if case["layers"] == 1 else 1 + 0.1 * new(1, e),
    }  # fmt: skip
    if case["how"] == "placed":
        options["positions"] = torch.randint(-2, m + 2, (2, n), generator=gen)
    elif case["how"] != "aligned":
        options |= {"read": "exclusive", "reverse": case["how"] == "reverse"}

    def call(impl: str, fill: float):
        q, *keys, lr = leaves[:4]
        drop = ~mask[:, None, :, None]
        k, v = (t.masked_fill(drop, fill) for t in keys)
        return memory_scan(q, k, v, lr=lr, weights=tuple(leaves[4:]), impl=impl, **options)

    differ(call("torch", torch.nan), call("reference", 0.0), leaves)
