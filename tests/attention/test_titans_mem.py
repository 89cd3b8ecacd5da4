"""Identities of the Titans memory, through the module; the rule itself is tested in tests/kernels/test_memory.py."""

import pytest
import torch
from variants import build, inputs

from kernels.delta import delta_scan
from zoo.attention import Pattern, create_attention
from zoo.errors import ConfigError


def test_linear_memory_without_momentum_and_decay_is_the_delta_rule():
    module = build(
        "titans_mem", Pattern.CAUSAL_SELF, memory="linear", chunk=1, momentum=False, decay=False, max_lr=0.5
    )
    (x,) = inputs(Pattern.CAUSAL_SELF)
    q, packed, v = module.project(x, x, x)
    k, gates = module._split(packed, v.dtype)
    start = module.memory_weights[0].expand(2, -1, -1, -1)
    want = delta_scan(q, k, v, 2 * gates[..., 0], initial_state=start)
    torch.testing.assert_close(module.attend(q, packed, v), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
@pytest.mark.parametrize("chunk", [1, 4])
@torch.no_grad()
def test_steps_equal_the_parallel_form_at_every_chunk(memory, chunk):
    module = build("titans_mem", Pattern.CAUSAL_SELF, memory=memory, chunk=chunk)
    (x,) = inputs(Pattern.CAUSAL_SELF, n=11)
    state, rows = module.init_state(2), []
    for t in range(11):
        y, state = module.step(x[:, t : t + 1], state)
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), module(x), rtol=1e-3, atol=5e-5)
    assert module.state_size(10) == module.state_size(10_000)


def test_padding_in_the_middle_does_not_shift_chunks():
    module = build("titans_mem", Pattern.CROSS, chunk=2, conv=0)
    x, context = inputs(Pattern.CROSS)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, [1, 4]] = False
    have = module(x, context, key_mask=mask)
    torch.testing.assert_close(have, module(x, context[:, mask[0]]), rtol=1e-4, atol=1e-5)


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="linear, mlp"):
        create_attention("titans_mem", 16, 2, pattern="self", memory="deep")
    with pytest.raises(ConfigError, match="at least 1"):
        create_attention("titans_mem", 16, 2, pattern="self", chunk=0)
