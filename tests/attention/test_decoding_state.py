"""The numbers that decoding keeps: as many as `state_size` says, and no more for later tokens where it says so."""

import pytest
import torch
from test_recurrences import NAMES, size

from zoo.attention import Pattern, create_attention, list_attention

STREAMING = list_attention(pattern=Pattern.CAUSAL_SELF, streaming=True)


def make(name, dim, heads):
    torch.manual_seed(0)
    return create_attention(name, dim, heads, pattern=Pattern.CAUSAL_SELF).eval()


CONSTANT = [n for n in STREAMING if (m := make(n, 8, 1)).state_size(4096) == m.state_size(8192)]


@pytest.mark.parametrize("name", STREAMING)
@torch.no_grad()
def test_state_is_as_large_as_told(name):
    module, held = make(name, 16, 2), {}
    state = module.init_state(1)
    for t in range(1, 65):
        _, state = module.step(torch.randn(1, 1, 16), state)
        held[t] = size({k: v for k, v in state.items() if k not in ("length", "blocks")})
    for t in (16, 64):  # where buffers that double are full; those of NSA's blocks are not
        slack = module.state_size(t) if name == "nsa" else 1
        assert 0 <= held[t] - module.state_size(t) <= slack, (t, held[t])
    assert (held[16] == held[64]) == (name in CONSTANT and name != "based")  # whose window holds 64


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CONSTANT) - set(NAMES)))
@torch.no_grad()
def test_state_stays_constant_and_finite_over_ten_thousand_steps(name):
    module, tokens = make(name, 8, 1), torch.randn(10_000, 1, 1, 8)
    state, held = module.init_state(1), []
    for t, token in enumerate(tokens):
        y, state = module.step(token, state)
        if t in (127, 9_999):
            held.append(size({k: v for k, v in state.items() if k != "length"}))
    assert held[0] == held[1] and y.isfinite().all()
