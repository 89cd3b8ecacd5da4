"""Inputs that would be read past their end, broadcast in silence or mean something else are refused by name."""

import pytest
import torch

from kernels import decay, delta, linear, local, prefix, selected, softmax
from kernels.memory import memory_scan, memory_step

B, H, N, D = 2, 2, 5, 4


def x(*shape):
    return torch.randn(shape or (B, H, N, D))


def state(kv, exponent=None):
    return decay.DecayState(kv, exponent)


def memory(**changed):
    args = {"weights": (x(H, D, D),), "lr": x(B, H, N)}
    return memory_scan(x(), x(), x(), **{**args, **changed})


REFUSED = {
    "decay state of another batch": (lambda: decay.decay_scan(x(), x(), x(), initial_state=state(x(1, H, D, D))), "initial_state.kv"),
    "decay state without its sum": (
        lambda: decay.decay_scan(x(), x(), x(), normalizer="denom", initial_state=state(x(B, H, D, D))), "normalizer",
    ),
    "decay state in units of an exponent": (
        lambda: decay.decay_scan(x(), x(), x(), initial_state=state(x(B, H, D, D), x(B, H))), "give log_i",
    ),
    "decay_state alike": (lambda: decay.decay_state(x(), x(), initial_state=state(x(B, H, D))), "initial_state.kv"),
    "delta state": (lambda: delta.delta_scan(x(), x(), x(), x(B, H, N), initial_state=x(H, D, D)), "initial_state must"),
    "delta_state": (lambda: delta.delta_state(x(), x(), x(B, H, N), initial_state=x(B, H, D, 1)), "initial_state must"),
    "linear state": (
        lambda: linear.linear_attention(x(), x(), x(), causal=True, initial_state=linear.global_state(x(1, H, N, D), x(1, H, N, D))),
        "initial_state.kv",
    ),
    "mala rotated queries": (lambda: linear.mala(x(), x(), x(), rotated=(x(B, H, N, 2), x())), "rotated queries"),
    "mala rotated keys": (lambda: linear.mala(x(), x(), x(), rotated=(x(), x(B, H, N - 1, D))), "rotated keys"),
    "head gate of too many axes": (lambda: softmax.attention(x(), x(), x(), head_gate=x(B, H, N, 1)), "head_gate must be 3-D"),
    "query off the grid": (
        lambda: softmax.attention(
            x(), x(B, H, 6, D), x(B, H, 6, D), positions=torch.arange(2, 7), score_mod=softmax.RelativeTable2d(x(H, 3, 5))
        ),
        "query positions must be below 6",
    ),
    "key off the grid": (
        lambda: softmax.attention(
            x(), x(B, H, 6, D), x(B, H, 6, D), positions=(torch.arange(9, 14), torch.arange(1, 7)),
            score_mod=softmax.RowColumn(x(B, H, N, 2), x(B, H, N, 3)),
        ),
        "key positions must be below 6",
    ),
    "stencil": (lambda: selected.block_scores(x(), x(), torch.ones(3, 2)), r"stencil must be \[5, Nb\]"),
    "visible of each head": (
        lambda: selected.block_scores(x(), x(), torch.eye(N), visible=torch.ones(B, H, N, N, dtype=torch.bool)), "visible must be",
    ),
    "lse": (lambda: selected.block_scores(x(), x(), torch.eye(N), lse=x(B, 1, N)), "lse must be"),
    "index of floats": (lambda: selected.attention(x(), x(), x(), torch.zeros(B, H, N, 1), block_size=2), "must hold integers"),
    "prefix exclusive at positions": (
        lambda: prefix.prefix_softmax(x(B, H, N), x(), read="exclusive", positions=torch.arange(N)), "positions - 1",
    ),
    "even side": (lambda: local.depthwise_grid(x(B, 6, 3), (2, 3), x(3, 1, 2, 2)), "odd side"),
    "memory rates": (lambda: memory(lr=x(B, H, 1)), "lr must be"),
    "memory gates": (lambda: memory(log_keep=x(B, 1, N)), "log_keep must be"),
    "memory positions of keys": (lambda: memory(positions=(torch.arange(N), torch.arange(N))), "positions as one tensor"),
    "memory in two tokens": (
        lambda: memory_step(None, x(B, H, 2, D), x(B, H, 2, D), lr=x(B, H, 2)), "one token at a time",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        call()


def test_an_empty_choice_and_no_readers():
    assert selected.select_blocks(torch.zeros(B, H, N, 0), 2).shape == (B, H, N, 0)
    assert prefix.prefix_softmax(x(B, H, N), x(), queries=0).shape == (B, H, 0, D)


def test_a_head_gate_keeps_the_type_of_the_queries():
    q, k, v = (x().bfloat16() for _ in range(3))
    assert softmax.attention(q, k, v, head_gate=torch.ones(1, H, 1)).dtype == torch.bfloat16


def test_states_continue_in_the_type_of_sums():
    """A state kept in half precision is taken up in float32."""
    q, k, v = (x().bfloat16() for _ in range(3))
    kept = decay.decay_state(k, v, log_g=-x(B, H, N).abs())
    low = state(kept.kv.bfloat16())
    out, after = decay.decay_scan(q, k, v, initial_state=low, return_state=True)
    assert out.dtype == torch.bfloat16 and after.kv.dtype == torch.float32
