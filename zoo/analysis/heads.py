"""Which heads a model needs.

Gate probe: every head's output is multiplied by a gate xi_h = 1, and the importance of a head is the mean over samples of
``|dL/dxi_h| = |<dL/dO_h, O_h>|``: one backward pass for all heads. "Are sixteen heads really better than one?", arXiv:1905.10650, equation 2.
Ablation: the loss with one head's gate at zero, minus the loss; a pass for each head, and no first-order guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.analysis.modules import attention_modules, evaluating, gated

Loss = Callable[[Any], Tensor]


def head_importance(model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """Gate probe of every head.

    Args:
        model: The model that `loss` calls.
        batches: What `loss` takes.
        loss: Mean loss of a batch. Rows of the attention's batch count as samples; where several of them (the sensors of a
            graph, say) make one sample of the loss, their shares are taken one by one.

    Returns:
        Name of each attention module -> importance [H] of its heads, in units of the loss. Zero for a module that is not called.
    """
    modules = attention_modules(model)
    total = {name: torch.zeros(module.num_heads) for name, module in modules.items()}
    gates: list[tuple[str, Tensor]] = []

    def gate(name: str, heads: Tensor) -> Tensor:
        xi = heads.new_ones(*heads.shape[:2], 1, 1, requires_grad=True)
        gates.append((name, xi))
        return heads * xi

    count = 0
    with evaluating(model), gated(modules, gate), torch.enable_grad():
        for batch in batches:
            gates.clear()
            value = loss(batch)
            found = torch.autograd.grad(value, [xi for _, xi in gates], allow_unused=True)
            for (name, _), share in zip(gates, found, strict=True):
                if share is not None:  # of a mean over the batch: the sum over rows is the mean over samples
                    total[name] += share.abs().sum((0, 2, 3)).float().cpu()
            count += 1
    return {name: value / max(count, 1) for name, value in total.items()}


@torch.no_grad()
def head_ablation(model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, Tensor]:
    """How much the loss rises without each head; arguments and result as in `head_importance`, negative where it falls."""
    modules, batches = attention_modules(model), list(batches)
    off: tuple[str, int] | None = None

    def gate(name: str, heads: Tensor) -> Tensor:
        if off is None or off[0] != name:
            return heads
        heads = heads.clone()
        heads[:, off[1]] = 0.0
        return heads

    def mean() -> float:
        return sum(float(loss(batch)) for batch in batches) / max(len(batches), 1)

    rise = {name: torch.zeros(module.num_heads) for name, module in modules.items()}
    with evaluating(model), gated(modules, gate):
        whole = mean()
        for name, module in modules.items():
            for head in range(module.num_heads):
                off = name, head
                rise[name][head] = mean() - whole
    return rise
