"""The loss of a physics-informed network: squared residuals and misfits, term by term and piece by piece."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from data.problems import Condition, Problem
from data.sampler import generator
from tasks.physics.points import CollocationPoints
from zoo.attention.base import Attention
from zoo.errors import CapabilityError, unknown
from zoo.layers.derivatives import Derivatives, choose_method, derivatives, key_of, points_mix
from zoo.layers.jet_algebra import Key
from zoo.layers.pieces import Piece, add_gradients, count_pieces, each_gradient

log = logging.getLogger("zoo.pinn")


class Objective:
    """Terms "residual" and, for each name among the conditions, their misfit.

    Args:
        model: Points [N, d] -> fields [N, F].
        unknowns: Coefficients to find, by name.
        problem: The equation.
        conditions: Prescribed values that the network does not fulfil by its form.
        method: Way to the derivatives, see `zoo.layers.derivatives`; "auto" picks one.
        chunk: Points whose derivatives are held at once.
    """

    def __init__(
        self,
        model: nn.Module,
        unknowns: Mapping[str, Tensor],
        problem: Problem,
        conditions: Sequence[Condition],
        method: str = "auto",
        chunk: int = 1024,
    ) -> None:
        self.model, self.unknowns, self.problem, self.chunk = model, unknowns, problem, chunk
        self.side_by_side = any(isinstance(m, Attention) for m in model.modules())
        self.conditions = list(conditions)
        for c in self.conditions:
            for f in c.fields:
                if f not in (*problem.fields, *problem.report_fields):
                    raise unknown(f"field of condition {c.name!r}", f, problem.fields)
        self.terms = ["residual", *dict.fromkeys(c.name for c in self.conditions)]
        self.wanted = self._keys((*problem.derivatives, *problem.report_derivatives))
        check_network(model, self._some_points(4))
        self.method = method
        if method == "auto":
            self.method, reason = choose_method(model, self._some_points(2), self.wanted)
            log.info("derivatives by %s: %s", self.method, reason)

    def _keys(self, names: Sequence[str]) -> list[Key]:
        return [key_of(by, self.problem.coordinates, self.problem.operators) for by in names]

    def _some_points(self, count: int) -> Tensor:
        low, high = (torch.tensor(v, dtype=self.dtype) for v in (self.problem.lower, self.problem.upper))
        return low + (high - low) * torch.rand(count, len(low), dtype=self.dtype, generator=generator(0))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; it changes from phase to phase."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.model.parameters()).device

    def parameters(self) -> list[Tensor]:
        """Weights and unknown coefficients."""
        return [*self.model.parameters(), *self.unknowns.values()]

    # ---------------------------------------------------------------- at points

    def fields(self, points: Tensor, wanted: Sequence[Key] | None = None) -> Derivatives:
        """Fields and derivatives at points [N, d]."""
        wanted = self.wanted if wanted is None else wanted
        table = derivatives(self.model, points.to(self.dtype), wanted, self.method)
        p = self.problem
        return Derivatives(table, p.fields, p.coordinates, p.operators)

    def residuals(self, d: Derivatives, points: Tensor) -> Tensor:
        """All equations' residuals at points [N, d] with fields `d`, [N, R]."""
        found = self.problem.residuals(d, points.to(self.dtype), dict(self.unknowns))
        return torch.stack(list(found.values()), 1)

    def squared_residual(self, points: Tensor) -> Tensor:
        """Sum of squared residuals at each point, chunk by chunk, [N]."""
        parts = points.split(self.chunk)
        return torch.cat([self.residuals(self.fields(p), p).square().sum(1) for p in parts])

    def reported(self, points: Tensor) -> Tensor:
        """The problem's reported fields at points [N, d], [N, F]."""
        return self.problem.report(self.fields(points, self._keys(self.problem.report_derivatives)))

    def misfit(self, c: Condition) -> Tensor:
        """Network minus prescribed value at a condition's points, [N, F]."""
        points, values = c.points.to(self.device), c.values.to(self.device, self.dtype)
        if all(f in self.problem.fields for f in c.fields):
            d = self.fields(points, self._keys([c.by] if c.by else []))
            return torch.stack([d(f, c.by) for f in c.fields], 1) - values
        columns = [self.problem.report_fields.index(f) for f in c.fields]
        return self.reported(points)[:, columns] - values

    # ---------------------------------------------------------------- terms

    def pieces(self, term: str, points: CollocationPoints) -> list[Piece]:
        """A term as functions whose sum it is, so that each one's graph can be freed."""
        if term != "residual":
            chosen = [c for c in self.conditions if c.name == term]
            return [partial(self._misfit_share, *part) for c in chosen for part in self.cut(c)]
        weights = points.weights().to(self.dtype)
        points.squares = torch.empty(len(weights), dtype=torch.float64, device=self.device)
        count = count_pieces(len(weights), self.chunk, self.device, self.side_by_side)

        def piece(at: Tensor, weight: Tensor, squares: Tensor) -> Tensor:
            square = self.squared_residual(at)
            squares.copy_(square.detach())
            return (weight * square).sum() / len(weights)

        cut = zip(*(t.tensor_split(count) for t in (points.at, weights, points.squares)), strict=True)
        return [partial(piece, *rows) for rows in cut]

    def cut(self, c: Condition) -> Iterator[tuple[Condition, int]]:
        """A condition's points in pieces, each with the number of all points.

        They may be longer than those of the residual: values need a fraction of the space of derivatives.
        """
        count = count_pieces(len(c.points), 4 * self.chunk, self.device, self.side_by_side)
        for points, values in zip(c.points.tensor_split(count), c.values.tensor_split(count), strict=True):
            yield replace(c, points=points, values=values), len(c.points)

    def _misfit_share(self, c: Condition, total: int) -> Tensor:
        return self.misfit(c).square().sum() / total

    def backward(self, balance: Mapping[str, Tensor], points: CollocationPoints) -> dict[str, Tensor]:
        """Adds up gradients of the sum of weighted terms, piece by piece; returns the plain terms."""
        work = [(term, piece) for term in self.terms for piece in self.pieces(term, points)]
        weights = {term: balance[term].to(self.dtype) for term in self.terms}
        found = add_gradients([p for _, p in work], self.parameters(), [weights[t] for t, _ in work])
        values = dict.fromkeys(self.terms, torch.zeros((), dtype=torch.float64, device=self.device))
        for (term, _), value in zip(work, found, strict=True):
            values[term] = values[term] + value.double()
        return values

    def gradient(self, pieces: Sequence[Piece]) -> Tensor:
        """Flat gradient of a sum, leaving `.grad` alone."""
        parameters = self.parameters()
        total = [torch.zeros_like(p) for p in parameters]
        for _, gradients in each_gradient(pieces, parameters):
            for t, g in zip(total, gradients, strict=True):
                if g is not None:
                    t += g
        return torch.cat([t.reshape(-1) for t in total])

    def kernel_trace(
        self, term: str, points: CollocationPoints, step: int = 0, draws: int = 4, most: int = 256
    ) -> Tensor:
        """Mean squared gradient of a term's entries, by random signs over at most `most` of all points.

        Evenly spaced ones: the first points are those of large residual, or those of the first side.
        """
        draw, traces = generator(step, self.terms.index(term)), []

        def some(rows: Tensor) -> Tensor:
            return rows[:: -(-len(rows) // most)]

        for _ in range(draws):
            if term == "residual":
                at = some(points.at)
                rows = self.residuals(self.fields(at), at)
            else:
                chosen = [c for c in self.conditions if c.name == term]
                rows = torch.cat([some(self.misfit(c)).reshape(-1, 1) for c in chosen])
            signs = torch.randint(0, 2, rows.shape, generator=draw).to(rows) * 2 - 1
            traces.append(self.gradient([(signs * rows).sum]).square().sum() / rows.numel())
        return torch.stack(traces).mean()


def check_network(model: nn.Module, points: Tensor) -> None:
    """Warn of attention that is not smooth or has a loss of its own, refuse networks whose points are not independent.

    Raises:
        CapabilityError: The output at one of `points` depends on the others.
    """
    attentive = [m for m in model.modules() if isinstance(m, Attention)]
    for name in sorted({m.name for m in attentive if not m.capabilities.smooth}):
        log.warning(
            "attention %r is not smooth (selection or rounding): its second derivatives miss the jumps", name
        )
    for name in sorted({m.name for m in attentive if type(m).auxiliary_loss is not Attention.auxiliary_loss}):
        log.warning(
            "attention %r has a loss of its own (routing balance ...), which a point network leaves out", name
        )
    if points_mix(model, points):
        names = ", ".join(sorted({repr(m.name) for m in attentive})) or type(model).__name__
        raise CapabilityError(
            f"attention {names} mixes collocation points (statistics over the batch), so derivatives at one point would "
            "silently contain the others; choose a variant that treats points separately, e.g. attention=softmax"
        )
