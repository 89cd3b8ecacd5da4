"""One program of an exported model: what goes in, what comes out, which axes are free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Inputs = dict[str, Tensor]
BATCH, LENGTH = "batch", "length"


@dataclass(frozen=True)
class Part:
    """One program.

    Attributes:
        name: Part of the file's name; empty where a model is one program.
        module: Takes the inputs in order, returns the outputs in order.
        draw: Random inputs of a batch size and a length, as they occur in use.
        outputs: Names of the outputs.
        axes: Free axes of inputs: name -> axis -> "batch" or "length".
        lengths: Length of the traced example and a second one for the check; empty where nothing has a length.
        notes: What a user of the program must know besides the shapes.
    """

    name: str
    module: nn.Module
    draw: Callable[[int, int], Inputs]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    notes: str = ""

    def example(self, batch: int = 1) -> Inputs:
        """Inputs of the first length."""
        return self.draw(batch, self.lengths[0] if self.lengths else 0)

    @property
    def labels(self) -> list[str]:
        """Names of all free axes."""
        return list(dict.fromkeys(label for axes in self.axes.values() for label in axes.values()))


class Call(nn.Module):
    """A model under a function: `Call(model, lambda m, x: m(x).sigmoid())`."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.model, *inputs)
