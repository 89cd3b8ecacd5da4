"""Derivatives of single points in the weights: the rows that a Gauss-Newton step needs.

At one point, the gradient of a linear layer's matrix is what comes back times what went in. The sum over points that
autograd forms is thus left out, and one backward per column of values gives the rows of all points at once. Numbers that
are in no linear layer (coefficients of an equation, an activation's weights) get their columns by central differences.

Letters: N points, R values a point, P numbers in all parameters, C channels of a jet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from zoo.errors import CapabilityError
from zoo.layers.jet_tensor import Jet

ELSEWHERE = 64  # numbers outside linear layers: two evaluations each
STEP = 1e-5  # of the central differences, times the number where it is above 1


class PointJacobian:
    """Jacobian of values at points in a network's parameters; best in float64.

    Args:
        network: Treats points separately; linear layers see them on their first axis.
        parameters: Columns of the Jacobian, in this order.

    Raises:
        CapabilityError: Too many of the parameters are outside linear layers.
    """

    def __init__(self, network: nn.Module, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        self.places: dict[int, slice] = {}
        self.elsewhere: list[tuple[Tensor, slice]] = []
        self.size = 0
        for p in self.parameters:
            place = slice(self.size, self.size + p.numel())
            self.size = place.stop
            if id(p) in inside:
                self.places[id(p)] = place
            else:
                self.elsewhere.append((p, place))
        count = sum(p.numel() for p, _ in self.elsewhere)
        if count > ELSEWHERE:
            raise CapabilityError(
                f"{count} of the network's numbers are outside linear layers, {ELSEWHERE} can be: choose another "
                "model or attention, or task.second=ssbroyden"
            )

    def __call__(self, values: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Values [N, R] of a function that runs the network, and their Jacobian [R, N, P].

        Raises:
            CapabilityError: A linear layer does not have the points on its first axis.
        """
        seen: list[tuple[nn.Linear, Tensor | Jet, Tensor | Jet]] = []

        def note(layer: nn.Linear, inputs: tuple, output: Tensor | Jet) -> None:
            seen.append((layer, inputs[0], output))

        handles = [layer.register_forward_hook(note) for layer in self.layers]
        try:
            with torch.enable_grad():
                found = values()
                sums = found.sum(0).unbind()
        finally:
            for handle in handles:
                handle.remove()
        count, columns = found.shape
        jacobian = found.new_zeros(columns, count, self.size)
        outputs = [y.c if isinstance(y, Jet) else y for _, _, y in seen]
        for number, slope in enumerate(sums):
            slopes = torch.autograd.grad(slope, outputs, retain_graph=number + 1 < columns, allow_unused=True)
            for (layer, x, _), g in zip(seen, slopes, strict=True):
                if g is not None:
                    self._add(jacobian[number], layer, _channels(x), g if isinstance(x, Jet) else g[None])
        with torch.no_grad():
            for p, place in self.elsewhere:
                for n in range(p.numel()):
                    jacobian[:, :, place.start + n] = _difference(values, p, n).T
        return found.detach(), jacobian

    def check(self, values: Callable[[], Tensor]) -> None:
        """Compare the sum of the rows with the gradient that autograd gives.

        Raises:
            CapabilityError: They differ: a layer's numbers are used outside its call.
        """
        _, jacobian = self(values)
        with torch.enable_grad():
            expected = torch.autograd.grad(values().sum(), self.parameters, allow_unused=True)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for p, g in zip(self.parameters, expected, strict=True)
            ]
        )
        if not torch.allclose(jacobian.sum((0, 1)), flat, rtol=1e-5, atol=1e-6 * float(flat.abs().max())):
            raise CapabilityError(
                "single points' gradients do not add up to the whole one: numbers of a linear layer are used outside its "
                "call; choose another attention, or task.second=ssbroyden"
            )

    def _add(self, rows: Tensor, layer: nn.Linear, x: Tensor, g: Tensor) -> None:
        """A layer's part of the rows [N, P], from its input and the gradient of its output, [C, N, ..., width]."""
        count = len(rows)
        if x.dim() < 3 or x.shape[1] != count:
            raise CapabilityError(
                f"a linear layer sees {list(x.shape[1:])}, not {count} points on its first axis, so that single points' "
                "gradients are unknown; choose another attention, or task.second=ssbroyden"
            )
        if id(layer.weight) in self.places:
            left, right = (t.transpose(0, 1).reshape(count, -1, t.shape[-1]) for t in (g, x))
            rows[:, self.places[id(layer.weight)]] += torch.bmm(left.mT, right).view(count, -1)
        if layer.bias is not None and id(layer.bias) in self.places:
            rows[:, self.places[id(layer.bias)]] += g[0].reshape(count, -1, g.shape[-1]).sum(1)


def _channels(x: Tensor | Jet) -> Tensor:
    return x.c.detach() if isinstance(x, Jet) else x.detach()[None]


def _difference(values: Callable[[], Tensor], p: Tensor, n: int) -> Tensor:
    """Derivative of the values in number n of a parameter."""
    flat, before = p.view(-1), p.view(-1)[n].clone()
    step = STEP * max(1.0, abs(float(before)))
    flat[n] = before + step
    above = values()
    flat[n] = before - step
    below = values()
    flat[n] = before
    return (above - below) / (2 * step)
