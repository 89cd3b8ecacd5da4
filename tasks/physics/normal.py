"""Normal equations of a physics-informed loss, which is a weighted sum of squares: J^T J and J^T f."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tasks.optimizers.gauss_newton import add_gram
from tasks.physics.objective import Objective
from tasks.physics.points import CollocationPoints
from zoo.errors import CapabilityError
from zoo.layers.point_jacobian import PointJacobian


class NormalEquations:
    """The loss of `objective` as least squares.

    Args:
        objective: Terms and their rows.
        balance: Weight of each term.
        points: Collocation points of the residual.

    Attributes:
        terms: Mean square of each term at the last evaluation.

    Raises:
        CapabilityError: The derivatives are not by Taylor mode, or the network has no rows point by point.
    """

    def __init__(
        self, objective: Objective, balance: Mapping[str, Tensor], points: CollocationPoints
    ) -> None:
        if objective.method != "taylor":
            raise CapabilityError(
                f"task.second=gauss_newton needs derivatives by Taylor mode, not {objective.method!r}; choose an "
                "attention that it can follow, or task.second=ssbroyden"
            )
        self.objective, self.balance, self.points = objective, balance, points
        self.jacobian = PointJacobian(objective.model, objective.parameters())
        self.terms: dict[str, Tensor] = {}
        self.checked = False

    def _rows(self) -> Iterator[tuple[str, Callable[[], Tensor], Tensor]]:
        """Term, its values [N, R] at some points, and each point's share of the term, [N]; chunk by chunk."""
        o, points = self.objective, self.points
        shares = points.weights().to(o.dtype) / len(points.at)
        for at, share in zip(points.at.split(o.chunk), shares.split(o.chunk), strict=True):
            yield "residual", lambda at=at: o.residuals(o.fields(at), at), share
        for c in o.conditions:
            for part, total in o.cut(c):
                share = part.points.new_full((len(part.points),), 1.0 / total, dtype=o.dtype).to(o.device)
                yield c.name, lambda part=part: o.misfit(part), share

    def _note(self, term: str, share: Tensor, values: Tensor) -> None:
        self.terms[term] = self.terms[term] + (share * values.square().sum(1)).sum().double()

    def _total(self) -> float:
        return float(sum(self.balance[t] * v for t, v in self.terms.items()))

    def _clear(self) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=self.objective.device)
        self.terms = dict.fromkeys(self.objective.terms, zero)

    @torch.no_grad()
    def loss(self) -> float:
        """Weighted sum of the terms."""
        self._clear()
        for term, values, share in self._rows():
            self._note(term, share, values())
        return self._total()

    @torch.no_grad()
    def normal(self) -> tuple[Tensor, Tensor, float]:
        """Lower triangle of J^T J [P, P], J^T f [P], and the loss f . f."""
        if not self.checked:
            at = self.points.at[:4]
            self.jacobian.check(lambda: self.objective.residuals(self.objective.fields(at), at))
            self.checked = True
        self._clear()
        size, like = self.jacobian.size, self.objective.parameters()[0]
        matrix, slope = like.new_zeros(size, size), like.new_zeros(size)
        for term, values, share in self._rows():
            found, jacobian = self.jacobian(values)
            self._note(term, share, found)
            root = (self.balance[term].to(share) * share).sqrt()
            rows = jacobian.mul_(root[:, None]).view(-1, size)
            slope += rows.T @ (found * root[:, None]).T.reshape(-1)
            add_gram(matrix, rows)
        return matrix, slope, self._total()
