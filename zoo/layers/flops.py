"""Counting the floating point operations of a forward pass from formulas.

torch's own counter sees nothing of the fused attention on CPU, and a mechanism's cost should not depend on how it is
computed; so attention modules state their cost, and the layers around them are counted by hooks. A module that multiplies
matrices by itself states them in a method `forward_flops(inputs, output)`, to which its layers inside add theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def count_flops(model: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> float:
    """FLOPs of one forward pass; a multiply-add counts two, norms and activations are left out."""
    total = 0.0

    def linear(module: nn.Linear, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * module.in_features

    def convolution(module: Any, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    def transposed(module: Any, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += 2 * inputs[0].numel() * module.weight[0].numel()

    def stated(module: Any, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        total += module.forward_flops(inputs, output)

    def attention(module: Attention, inputs: tuple, keywords: dict, output: Tensor) -> None:
        nonlocal total
        x = inputs[0]
        context = keywords.get("context", inputs[1] if len(inputs) > 1 else None)
        keys = x if context is None else context
        total += x.shape[0] * module.attend_cost(x.shape[1], keys.shape[1])[0]

    handles = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(linear))
        elif isinstance(module, _CONVOLUTIONS):
            handles.append(module.register_forward_hook(convolution))
        elif isinstance(module, _TRANSPOSED):
            handles.append(module.register_forward_hook(transposed))
        elif hasattr(module, "forward_flops"):
            handles.append(module.register_forward_hook(stated))
        elif isinstance(module, Attention):
            handles.append(module.register_forward_hook(attention, with_kwargs=True))
    training = model.training
    try:
        model.eval()
        model(*args, **(kwargs or {}))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return total
