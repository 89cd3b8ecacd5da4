"""Full-batch quasi-Newton methods: L-BFGS, and dense BFGS and self-scaled Broyden with a strong-Wolfe line search.

Self-scaled Broyden: Al-Baali, Spedicato, Maggioni (2014), for PINNs Urban, Stefanou, Pons, arXiv:2501.16371. Every stop
has a reason in `exit_reason`; before giving up, the curvature history is cleared and steepest descent tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tasks.optimizers.symmetric import Update, multiply, scaled_identity
from zoo.errors import ConfigError, unknown

METHODS = ("lbfgs", "bfgs", "ssbroyden")
DENSE_LIMIT = 8000


class QuasiNewton(torch.optim.Optimizer):
    """One iteration per `step(closure)`; the objective must not change between steps.

    Args:
        params: All parameters, best in float64 (in float32 the line search sees round-off).
        method: "lbfgs", "bfgs" or "ssbroyden"; the dense ones take up to 8,000 numbers.
        history: Curvature pairs of L-BFGS.
        tolerance_grad: Largest gradient entry at which the search ends.
        tolerance_change: Relative decrease below which an iteration counts as stalled.
        patience: Stalled iterations before the end.
        max_evaluations: Loss evaluations of a line search.

    Attributes:
        exit_reason: None while running; else why it ended.
        evaluations: Closure calls so far.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        method: str = "ssbroyden",
        history: int = 50,
        tolerance_grad: float = 0.0,
        tolerance_change: float = 1e-12,
        patience: int = 20,
        max_evaluations: int = 25,
    ) -> None:
        if method not in METHODS:
            raise unknown("quasi-Newton method", method, METHODS)
        super().__init__(params, {"lr": 1.0})
        self._params = self.param_groups[0]["params"]
        self.size = sum(p.numel() for p in self._params)
        if method != "lbfgs" and self.size > DENSE_LIMIT:
            raise ConfigError(
                f"{method} keeps half of a {self.size} x {self.size} matrix ({self.size**2 * 4 / 2**20:.0f} MiB); up to "
                f"{DENSE_LIMIT} parameters are allowed: use second=lbfgs or a smaller model"
            )
        self.method, self.history = method, history
        self.tolerance_grad, self.tolerance_change, self.patience = tolerance_grad, tolerance_change, patience
        self.max_evaluations = max_evaluations
        self.exit_reason: str | None = None
        self.evaluations = 0

    @property
    def loss(self) -> Tensor:
        """Where the last iteration ended."""
        return self.state[self._params[0]]["loss"].clone()

    # ------------------------------------------------------------ flat views

    def _gather(self, name: str) -> Tensor:
        parts = [p.grad if name == "grad" else p.detach() for p in self._params]
        return torch.cat(
            [
                (torch.zeros_like(p) if x is None else x).reshape(-1)
                for p, x in zip(self._params, parts, strict=True)
            ]
        )

    @torch.no_grad()
    def _set(self, flat: Tensor) -> None:
        at = 0
        for p in self._params:
            p.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()

    def _evaluate(self, closure: Callable[[], Tensor], flat: Tensor) -> tuple[float, Tensor]:
        self._set(flat)
        with torch.enable_grad():
            loss = float(closure().detach())
        self.evaluations += 1
        return loss, self._gather("grad")

    # ------------------------------------------------------------ one iteration

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One iteration: direction, line search, update of the curvature; returns the loss reached."""
        state = self.state[self._params[0]]
        x = self._gather("data")
        if "loss" not in state:
            loss, g = self._evaluate(closure, x)
            state.update(loss=torch.tensor(loss, dtype=torch.float64), g=g, stalled=0, fresh="H" not in state)
        loss, g = float(state["loss"]), state["g"]
        if not torch.isfinite(g).all() or loss != loss:
            self.exit_reason = "loss or gradient is not finite at the start"
            return torch.tensor(loss)
        if float(g.abs().max()) <= self.tolerance_grad:
            self.exit_reason = "tolerance_grad: gradient is zero to tolerance"
            return torch.tensor(loss)
        if "H" in state and "Hg" not in state:
            state["Hg"] = self._curved(state, g)
        direction = self._direction(state, g)
        slope = float(g.dot(direction))
        if slope >= 0:
            self._forget(state)
            direction, slope = -g, -float(g.dot(g))
        alpha = min(1.0, 1.0 / float(g.abs().sum())) if state["fresh"] else 1.0
        found = line_search(
            lambda a: self._evaluate(closure, x + a * direction),
            loss,
            slope,
            direction,
            alpha,
            self.max_evaluations,
        )
        if found is None:
            self._set(x)
            if state["fresh"]:
                self.exit_reason = "line search failed along steepest descent: round-off, or a minimum"
            self._forget(state)
            return torch.tensor(loss)
        alpha, new_loss, new_g = found
        self._set(x + alpha * direction)
        self._learn(state, alpha * direction, new_g, g, alpha)
        gain = (loss - new_loss) / max(abs(loss), 1e-300)
        state["stalled"] = int(state["stalled"]) + 1 if gain < self.tolerance_change else 0
        if state["stalled"] >= self.patience:
            self.exit_reason = (
                f"tolerance_change: {self.patience} iterations gained less than {self.tolerance_change}"
            )
        state["loss"], state["g"] = torch.tensor(new_loss, dtype=torch.float64), new_g
        return torch.tensor(new_loss)

    def refresh(self) -> None:
        """Go on with a slightly changed objective (new points): a dense matrix is kept, single pairs are not."""
        state = self.state[self._params[0]]
        for key in ("loss", "g", "Hg", "s", "y"):
            state.pop(key, None)
        self.exit_reason = None

    @staticmethod
    def _forget(state: dict[str, Any]) -> None:
        for key in ("H", "Hg", "pending", "s", "y"):
            state.pop(key, None)
        state["fresh"] = True

    @staticmethod
    def _curved(state: dict[str, Any], g: Tensor) -> Tensor:
        """H g, with the update that the last iteration left over."""
        pending = state.pop("pending", None)
        return multiply(state["H"], g, None if pending is None else Update(*pending))

    def _direction(self, state: dict[str, Any], g: Tensor) -> Tensor:
        if "H" in state:
            return -state["Hg"]
        if "s" not in state:
            return -g
        q, used = g.clone(), []
        for s, y in zip(reversed(state["s"]), reversed(state["y"]), strict=True):
            a = s.dot(q) / y.dot(s)
            q.sub_(y, alpha=float(a))
            used.append(float(a))
        s, y = state["s"][-1], state["y"][-1]
        q.mul_(float(s.dot(y) / y.dot(y)))
        for s, y, a in zip(state["s"], state["y"], reversed(used), strict=True):
            q.add_(s, alpha=a - float(y.dot(q) / y.dot(s)))
        return -q

    def _learn(self, state: dict[str, Any], s: Tensor, new_g: Tensor, g: Tensor, alpha: float) -> None:
        y = new_g - g
        ys = float(y.dot(s))
        if ys <= 1e-14 * float(s.norm() * y.norm()):
            state.pop("Hg", None)
            return
        state["fresh"] = False
        if self.method == "lbfgs":
            state["s"] = [*state.get("s", []), s][-self.history :]
            state["y"] = [*state.get("y", []), y][-self.history :]
            return
        if "H" not in state:
            scale = ys / float(y.dot(y))
            state["H"] = scaled_identity(s, scale)
            state["Hg"], new_hg, tau, phi = g * scale, new_g * scale, 1.0, 1.0
        else:
            new_hg, tau = self._curved(state, new_g), None
        hy = new_hg - state["Hg"]
        yhy = float(y.dot(hy))
        if tau is None:
            tau, phi = self._scaling(yhy, ys, -alpha * float(s.dot(g)), len(s))
        # H <- (H - hy hy^T / yhy + phi yhy v v^T) / tau + s s^T / ys with v = s / ys - hy / yhy: a change of rank two.
        cross = -phi / (ys * tau)
        core = torch.tensor(
            [[(phi - 1.0) / (yhy * tau), cross], [cross, phi * yhy / (ys * ys * tau) + 1.0 / ys]],
            dtype=s.dtype,
            device=s.device,
        )
        both = torch.stack((hy, s), 1)
        state["pending"] = tuple(Update(1.0 / tau, both, core))
        state["Hg"] = new_hg / tau + both @ (core @ (both.T @ new_g))

    def _scaling(self, yhy: float, ys: float, sbs: float, n: int) -> tuple[float, float]:
        """Scaling tau and Broyden parameter phi of the inverse update."""
        if self.method == "bfgs":
            return 1.0, 1.0
        b, h = sbs / ys, yhy / ys
        a = max(b * h - 1.0, 1e-16)
        low = min(1.0, h * (1.0 - (a / (a + 1.0)) ** 0.5))
        theta = max((low - 1.0) / a, min(1.0 / low, (1.0 - b) / b))
        sigma = max(1.0 + a * theta, 1e-16)
        root = sigma ** (1.0 / (1.0 - n))
        first = min(1.0, 1.0 / b)
        tau = first * min(root, 1.0 / theta) if theta > 0 else min(first * root, sigma)
        return tau, (1.0 - theta) / sigma


def line_search(
    evaluate: Callable[[float], tuple[float, Tensor]],
    loss: float,
    slope: float,
    direction: Tensor,
    alpha: float,
    limit: int,
    c1: float = 1e-4,
    c2: float = 0.9,
) -> tuple[float, float, Tensor] | None:
    """A step that satisfies the strong Wolfe conditions, or the best decrease seen, or None without any.

    Bracketing and cubic interpolation as in Nocedal and Wright, algorithms 3.5 and 3.6.
    """
    best: tuple[float, float, Tensor] | None = None
    low = (0.0, loss, slope)
    high: tuple[float, float, float] | None = None
    for _ in range(limit):
        value, g = evaluate(alpha)
        d = float(g.dot(direction))
        good = value == value and abs(value) != float("inf") and d == d
        if good and value < loss and (best is None or value < best[1]):
            best = (alpha, value, g)
        if not good:
            high = (alpha, float("inf"), float("inf"))
        elif value > loss + c1 * alpha * slope or value >= low[1] and low[0] > 0:
            high = (alpha, value, d)
        elif abs(d) <= -c2 * slope:
            return alpha, value, g
        elif d >= 0 if high is None or high[0] > low[0] else d <= 0:
            high, low = low, (alpha, value, d)
        else:
            low = (alpha, value, d)
        if high is None:
            alpha = 2.0 * alpha
            continue
        width = abs(high[0] - low[0])
        if width < 1e-14:
            break
        alpha = _cubic(low, high)
        left, right = min(low[0], high[0]), max(low[0], high[0])
        if not left + 0.1 * width <= alpha <= right - 0.1 * width:
            alpha = left + 0.5 * width
    return best


def _cubic(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """Minimum of the cubic through two values and slopes; NaN where there is none."""
    (xa, fa, da), (xb, fb, db) = a, b
    if fb == float("inf"):
        return float("nan")
    d1 = da + db - 3 * (fa - fb) / (xa - xb)
    inside = d1 * d1 - da * db
    if inside < 0:
        return float("nan")
    d2 = inside**0.5 * (1.0 if xb > xa else -1.0)
    bottom = db - da + 2 * d2
    return float("nan") if bottom == 0 else xb - (xb - xa) * (db + d2 - d1) / bottom
