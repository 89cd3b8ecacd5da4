"""Scans on random shapes, masks, gates and readers: the chunked path equals the recurrence, and splits anywhere change nothing."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis", reason="property tests need hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kernels.decay import decay_scan  # noqa: E402
from kernels.delta import delta_scan  # noqa: E402
from zoo.bench import ops, scans  # noqa: E402

CASE = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "n": st.integers(1, 40),
        "m": st.integers(1, 40),
        "d": st.integers(1, 9),
        "e": st.integers(1, 9),
        "chunk": st.integers(1, 45),
        "gates": st.sampled_from(["none", "scalar", "vector"]),
        "strength": st.sampled_from([0.0, 0.1, 3.0, 60.0]),
        "masked": st.booleans(),
        "placed": st.booleans(),
        "read": st.sampled_from(["inclusive", "exclusive"]),
    }
)


def build(case):
    gen = torch.Generator().manual_seed(case["seed"])
    new = lambda *s: torch.randn(2, 1, *s, generator=gen, dtype=torch.float64)
    n, m, d, e = (case[x] for x in "nmde")
    q, k, v, beta = new(n, d), F.normalize(new(m, d), dim=-1), new(m, e), new(m).sigmoid()
    options = {"read": case["read"]}
    if case["gates"] != "none":
        shape = (m,) if case["gates"] == "scalar" else (m, d)
        options["log_g"] = -case["strength"] * new(*shape).abs()
    if case["masked"]:
        options["key_mask"] = torch.rand(2, m, generator=gen) > 0.4
    if case["placed"]:
        options["positions"] = torch.randint(-2, m + 2, (2, n), generator=gen)
    return q, k, v, beta, options


@settings(max_examples=40, deadline=None, derandomize=True)
@given(CASE)
def test_chunks_equal_the_recurrence(case):
    q, k, v, beta, options = build(case)
    for call in (
        lambda **o: decay_scan(q, k, v, **options, **o),
        lambda **o: delta_scan(q, k, v, beta, **options, **o),
    ):
        want, have = call(impl="reference"), call(impl="torch", chunk=case["chunk"])
        torch.testing.assert_close(have, want, rtol=1e-8, atol=1e-8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(CASE, st.integers(0, 40))
def test_a_split_anywhere_changes_nothing(case, cut):
    case = {**case, "m": case["n"], "placed": False}
    q, k, v, beta, options = build(case)
    cut = min(cut, case["n"])
    per_key = {n: options.pop(n) for n in ("log_g", "key_mask") if n in options}

    def part(name, t, a, b):
        return t[:, a:b] if name == "key_mask" else t[:, :, a:b]

    for scan, inputs in ((decay_scan, (q, k, v)), (delta_scan, (q, k, v, beta))):
        whole = scan(*inputs, **per_key, **options)
        state, rows = None, []
        for a, b in ((0, cut), (cut, case["n"])):
            mine = {n: part(n, t, a, b) for n, t in per_key.items()}
            o, state = scan(
                *(t[:, :, a:b] for t in inputs), **mine, **options, initial_state=state, return_state=True
            )
            rows.append(o)
        torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", scans.STEPWISE)
def test_steps_are_the_same_function_as_the_scan_they_are_timed_against(name):
    gen = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 9, 8, generator=gen, dtype=torch.float64) for _ in range(3)]
    found = ops.ours()
    torch.testing.assert_close(found[f"{name} step by step"](*tensors), found[name](*tensors))
