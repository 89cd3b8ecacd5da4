"""Exact derivatives of a point-wise network in its coordinates, by whichever method is asked for.

All methods give the same numbers; they differ in cost. "taylor" pushes one jet through the network (see
`zoo.layers.jet_algebra`), after which the weights need a single backward. "forward_reverse" differentiates the reverse gradient
in forward mode, "jvp" nests forward mode, "reverse" nests `torch.autograd.grad` and is the independent check.

The network must treat points separately: `D u(point 3)` may not depend on point 7 (`tests` check every model).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import zoo.layers.jet_functions
import zoo.layers.jet_shapes  # noqa: F401  registers the rules
from zoo.errors import ConfigError, unknown
from zoo.layers.jet_algebra import Index, Key, Operator, algebra
from zoo.layers.jet_tensor import Jet

METHODS = ("taylor", "forward_reverse", "jvp", "reverse")
Network = Callable[[Tensor], Tensor]
Terms = Sequence[tuple[float, str]]  # sum of factor * derivative, e.g. ((1.0, "xx"), (1.0, "yy"))


class Derivatives:
    """Values and derivatives of named fields at N points.

    `d("u")` is the field, `d("u", "xx")` its second derivative in x, `d("u", "laplacian")` an operator, all [N].

    Args:
        table: For each multi-index or operator its value for all fields, [N, F].
        fields: Names of the fields.
        coordinates: One-letter names of the coordinates.
        operators: Operators by name, see `key_of`.
    """

    def __init__(
        self,
        table: Mapping[Key, Tensor],
        fields: Sequence[str],
        coordinates: Sequence[str],
        operators: Mapping[str, Terms] | None = None,
    ) -> None:
        self.table, self.fields, self.coordinates = table, tuple(fields), tuple(coordinates)
        self.operators = operators or {}

    def __call__(self, field: str, by: str = "") -> Tensor:
        if field not in self.fields:
            raise unknown("field", field, self.fields)
        key = key_of(by, self.coordinates, self.operators)
        if key not in self.table:
            raise ConfigError(f"derivative {by!r} was not asked for; add it to the problem's `derivatives`")
        return self.table[key][:, self.fields.index(field)]


def multi_index(by: str, coordinates: Sequence[str]) -> Index:
    """("xxt", ("x", "t")) -> (2, 1)."""
    for letter in by:
        if letter not in coordinates:
            raise unknown("coordinate", letter, coordinates)
    return tuple(by.count(c) for c in coordinates)


def key_of(by: str, coordinates: Sequence[str], operators: Mapping[str, Terms] | None = None) -> Key:
    """What `derivatives` computes for letters such as "xx", or for the name of an operator.

    Args:
        by: Letters of coordinates, or a name among `operators`.
        coordinates: One-letter names.
        operators: Sums of derivatives by name, e.g. {"heat": ((1.0, "t"), (-0.1, "xx"))}.
    """
    if operators and by in operators:
        return Operator(tuple((multi_index(b, coordinates), factor) for factor, b in operators[by]))
    return multi_index(by, coordinates)


def differentiate(equation: Any, network: Network, points: Tensor, method: str = "taylor") -> Derivatives:
    """What an equation's residuals need: `equation` has coordinates, fields, derivatives and operators."""
    names = equation.coordinates, equation.operators
    table = derivatives(network, points, [key_of(by, *names) for by in equation.derivatives], method)
    return Derivatives(table, equation.fields, *names)


def derivatives(
    network: Network, points: Tensor, wanted: Sequence[Key], method: str = "taylor"
) -> dict[Key, Tensor]:
    """Derivatives of all outputs at all points.

    Args:
        network: Points [N, d] -> fields [N, F]; points do not mix.
        points: [N, d].
        wanted: Multi-indices, e.g. (2, 0) for the second derivative in the first of two coordinates, and operators.
        method: One of `METHODS`.

    Returns:
        For each of `wanted`, and for the value, a tensor [N, F] that carries gradients of the weights.
    """
    if method not in METHODS:
        raise unknown("derivative method", method, METHODS)
    wanted = tuple(dict.fromkeys(((0,) * points.shape[1], *wanted)))
    plain = tuple(dict.fromkeys(i for key in wanted for i in _indices(key)))
    if max(map(sum, plain)) == 0:
        return {wanted[0]: network(points)}
    if method == "taylor":
        return _taylor(network, points, wanted)
    with _WrittenOut():
        table = _METHODS[method](network, points, plain)
    return {key: table[key] if key in table else _combined(table, key) for key in wanted}


def _indices(key: Key) -> list[Index]:
    return [index for index, _ in key.terms] if isinstance(key, Operator) else [key]


def _combined(table: dict[Index, Tensor], operator: Operator) -> Tensor:
    return sum(table[index] * factor for index, factor in operator.terms)


class _WrittenOut(TorchFunctionMode):
    """Computes layer norms from elementary operations.

    torch 2.14's fused one has a silently wrong jvp of jvp, and a silently wrong third derivative in reverse mode.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (F.layer_norm, torch.layer_norm):
            return written_out_layer_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def written_out_layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Layer norm that is right to any order."""
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    out = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@torch.no_grad()
def points_mix(network: torch.nn.Module, points: Tensor) -> bool:
    """Whether the output at one point depends on the others, as batch statistics make it.

    Derivatives by summing over points are silently wrong then. A copy is tried, so running statistics stay as they are.
    """
    points = points.double()
    moved = points.clone()
    moved[1:] = points[1:].flip(0) * 0.5 + 0.5 * points[:1]
    first, second = (copy.deepcopy(network).double()(p)[0] for p in (points, moved))
    return not torch.allclose(first, second, rtol=1e-10, atol=1e-10)


def choose_method(network: torch.nn.Module, points: Tensor, wanted: Sequence[Key]) -> tuple[str, str]:
    """The fastest method that serves this network, and why.

    Jets win over nested reverse mode with attention (2.5 times at equal threads, and far less memory), with several
    fields, each of which reverse mode goes through anew (perceptron 4 x 32, 768 points, float64: 3 fields 11.6 against
    32 ms, 5 fields 10 against 52 ms), and where an operator saves channels (Burgers, one field, 2,000 points, float32: 6.6
    against 8.8 ms). Operations that jets cannot follow show in a trial on two points.
    """
    try:
        with torch.no_grad():
            derivatives(network, points[:2], wanted, "taylor")
    except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
        return "reverse", f"Taylor mode cannot follow this network: {error}"
    return "taylor", "one pass for all fields and derivatives"


def seed_jet(points: Tensor, wanted: Sequence[Key]) -> Jet:
    """The coordinates themselves as jets: value and a unit slope each."""
    ring = algebra(points.shape[1], tuple(wanted))
    full = ring.polynomials
    c = points.new_zeros(full.size, *points.shape)
    c[0] = points
    for axis in range(points.shape[1]):
        number = full.number.get(tuple(int(axis == a) for a in range(points.shape[1])))
        if number is not None:
            c[number, :, axis] = 1.0
    return Jet(ring.project(c), ring)


def _taylor(network: Network, points: Tensor, wanted: Sequence[Key]) -> dict[Key, Tensor]:
    jet = seed_jet(points, wanted)
    out = network(jet)
    if not isinstance(out, Jet):
        raise ConfigError("the network's output does not depend on its coordinates")
    return {key: jet.ring.derivative(out.c, key) for key in wanted}


def _reverse(network: Network, points: Tensor, wanted: Sequence[Index]) -> dict[Index, Tensor]:
    # Inside torch.no_grad() the weights are not wanted, but the coordinates' graph still is.
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        out = network(leaf)
        columns = []
        for field in out.unbind(1):
            found = {(0,) * points.shape[1]: field}

            def get(index: Index, found: dict[Index, Tensor] = found) -> Tensor:
                if index not in found:
                    axis = next(a for a, order in enumerate(index) if order)
                    lower = get(tuple(o - (a == axis) for a, o in enumerate(index)))
                    (slopes,) = torch.autograd.grad(lower.sum(), leaf, create_graph=True)
                    for a in range(len(index)):
                        raised = tuple(o + (b == a) - (b == axis) for b, o in enumerate(index))
                        found.setdefault(raised, slopes[:, a])
                return found[index]

            columns.append({index: get(index) for index in wanted})
    table = {index: torch.stack([c[index] for c in columns], 1) for index in wanted}
    return table if keep else {k: v.detach() for k, v in table.items()}


def _push(function: Callable, direction: Tensor) -> Callable:
    """The directional derivative of `function`, as a function."""
    return lambda z: torch.func.jvp(function, (z,), (direction,))[1]


def _direction(points: Tensor, axis: int) -> Tensor:
    d = torch.zeros_like(points)
    d[:, axis] = 1.0
    return d


def _jvp(network: Network, points: Tensor, wanted: Sequence[Index]) -> dict[Index, Tensor]:
    table = {}
    for index in wanted:
        function = network
        for axis, order in enumerate(index):
            for _ in range(order):
                function = _push(function, _direction(points, axis))
        table[index] = function(points)
    return table


def _forward_reverse(network: Network, points: Tensor, wanted: Sequence[Index]) -> dict[Index, Tensor]:
    dims = points.shape[1]
    out = network(points)
    unit = [tuple(int(a == b) for b in range(dims)) for a in range(dims)]
    rests: dict[Index, list[Index]] = {}
    for index in wanted:
        if sum(index) == 0:
            continue
        # The axis of the highest order is left to the reverse gradient; equal rests share one pass.
        axis = max(range(dims), key=lambda a: index[a])
        rest = tuple(o - u for o, u in zip(index, unit[axis], strict=True))
        rests.setdefault(rest, []).append(index)
    columns: dict[Index, list[Tensor]] = {index: [] for index in wanted}
    for field in range(out.shape[1]):
        slope = torch.func.grad(lambda z, f=field: network(z)[:, f].sum())
        for rest, members in rests.items():
            function = slope
            for axis, order in enumerate(rest):
                for _ in range(order):
                    function = _push(function, _direction(points, axis))
            gradient = function(points)
            for index in members:
                axis = next(a for a in range(dims) if index[a] > rest[a])
                columns[index].append(gradient[:, axis])
        columns[wanted[0]].append(out[:, field])
    return {index: torch.stack(c, 1) for index, c in columns.items()}


_METHODS = {"reverse": _reverse, "jvp": _jvp, "forward_reverse": _forward_reverse}
