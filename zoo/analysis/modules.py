"""The attention modules of a model, and forward passes that are watched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from zoo.attention.base import Attention
from zoo.errors import ConfigError


def attention_modules(model: nn.Module) -> dict[str, Attention]:
    """Name in the model -> module.

    Raises:
        ConfigError: The model has none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no attention of the zoo, so there is nothing to analyse"
        )
    return found


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every module's mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def gated(modules: dict[str, Attention], gate: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the mixed heads [B, H, N, E] of each module pass through `gate(name, heads)` on their way to the projection."""

    def through(name: str, output: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def gated_output(heads: Tensor, *rest: Any) -> Tensor:
            return output(gate(name, heads), *rest)

        return gated_output

    for name, module in modules.items():
        module.output = through(name, module.output)  # on the instance: before the class's own
    try:
        yield
    finally:
        for module in modules.values():
            del module.output
