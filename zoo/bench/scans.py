"""Scans: ours, fla-core's naive chunk forms where that package is installed, and the recurrences step by step.

Gates and strengths are computed from the inputs, alike for every contestant, so that their gradients are timed too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decay import decay_scan
from kernels.delta import delta_scan
from kernels.linear import add_states, apply_feature, global_state, linear_read, mala_read
from kernels.prefix import prefix_read, prefix_softmax, prefix_state

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]

# Longest sequence for what is far slower than the rest: one call takes seconds there.
STEPWISE = ("linear causal", "mala causal", "prefix softmax", "decay", "decay per channel", "delta", "kda")
LONGEST = {"fla kda": 1024, "fla gla step by step": 1024} | {
    f"{name} step by step": 1024 for name in STEPWISE
}


def step_gate(k: Tensor) -> Tensor:
    """Log decay per step, [B, H, N]."""
    return F.logsigmoid(k[..., 0]) / 16


def channel_gate(k: Tensor) -> Tensor:
    """Log decay per channel, [B, H, N, D]."""
    return F.logsigmoid(k) / 16


def ours() -> dict[str, Operation]:
    """The project's scans, and their recurrences step by step."""

    def decay(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
        return decay_scan(q, k, v, log_g=step_gate(k), impl=impl)

    def wide_decay(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
        return decay_scan(q, k, v, log_g=channel_gate(k), impl=impl)

    def delta(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
        return delta_scan(q, F.normalize(k, dim=-1), v, v[..., 0].sigmoid(), log_g=step_gate(k), impl=impl)

    def kda(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
        return delta_scan(q, F.normalize(k, dim=-1), v, v[..., 0].sigmoid(), log_g=channel_gate(k), impl=impl)

    def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix_softmax((q * k).sum(-1) / 8, v)

    fast = {"decay": decay, "decay per channel": wide_decay, "delta": delta, "kda": kda}
    slow = {name: partial(f, impl="reference") for name, f in fast.items()} | {
        "linear causal": partial(_linear_by_steps, read=linear_read),
        "mala causal": partial(_linear_by_steps, read=mala_read),
        "prefix softmax": _prefix_by_steps,
    }
    return fast | {"prefix softmax": prefix} | {f"{name} step by step": slow[name] for name in STEPWISE}


def _linear_by_steps(q: Tensor, k: Tensor, v: Tensor, read: Callable[..., Tensor]) -> Tensor:
    q, k = apply_feature("elu1", q), apply_feature("elu1", k)
    state, rows = None, []
    for q_t, k_t, v_t in zip(*(t.split(1, 2) for t in (q, k, v)), strict=True):
        state = add_states(state, global_state(k_t, v_t))
        rows.append(read(q_t, state))
    return torch.cat(rows, 2)


def _prefix_by_steps(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, rows = None, []
    for s_t, v_t in zip(((q * k).sum(-1) / 8).split(1, 2), v.split(1, 2), strict=True):
        state = prefix_state(s_t, v_t, initial_state=state)
        rows.append(prefix_read(state))
    return torch.cat(rows, 2)


def peers() -> dict[str, Operation]:
    """fla-core's references; empty if it is not installed. Its tensors are [B, T, H, D]."""
    if importlib.util.find_spec("fla") is None:
        return {}
    chunk_linear = _naive("linear_attn", "naive_chunk_linear_attn")
    simple_gla = _naive("simple_gla", "naive_chunk_simple_gla")
    gla = _naive("gla", "naive_recurrent_gla")
    gated_delta = _naive("gated_delta_rule", "naive_chunk_gated_delta_rule")
    kda = _naive("kda", "naive_chunk_kda")
    turn = lambda *tensors: [t.transpose(1, 2) for t in tensors]

    def first(result: Tensor | tuple) -> Tensor:
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    def delta_inputs(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> list[Tensor]:
        return turn(q, F.normalize(k, dim=-1), v, gate, v[..., 0].sigmoid())

    return {
        "fla linear": lambda q, k, v: first(
            chunk_linear(*turn(F.elu(q) + 1, F.elu(k) + 1, v), normalize=True)
        ),
        "fla simple gla": lambda q, k, v: first(simple_gla(*turn(q, k, v, step_gate(k)))),
        "fla gla step by step": lambda q, k, v: first(gla(*turn(q, k, v, channel_gate(k)))),
        "fla gated delta": lambda q, k, v: first(gated_delta(*delta_inputs(q, k, v, step_gate(k)))),
        "fla kda": lambda q, k, v: first(kda(*delta_inputs(q, k, v, channel_gate(k)))),
    }


def _naive(op: str, name: str) -> Callable:
    """Load one file: importing the package as a whole needs a GPU."""
    root = Path(importlib.util.find_spec("fla").origin).parent
    spec = importlib.util.spec_from_file_location(f"_fla_{op}", root / "ops" / op / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
