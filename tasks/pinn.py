"""Physics-informed training: residuals by exact derivatives, balanced terms, first-order then quasi-Newton steps.

Optimisation is manual. Phase one (Adam or SOAP, float32) resamples points by residual; phase two (quasi-Newton, float64)
freezes them for rounds of
iterations, because a changing objective breaks curvature estimates. Validation is the residual loss at held-out points;
the reference grid is the test and is never looked at before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from data.problems.baselines import field_errors
from data.sampler import generator
from tasks.base import Batch, ZooTask
from tasks.engine.callbacks import load_checkpoint
from tasks.engine.folder import write_atomic
from tasks.optimizers.quasi_newton import METHODS as QUASI_NEWTON
from tasks.optimizers.quasi_newton import QuasiNewton
from tasks.optimizers.soap import Soap
from tasks.physics.balance import Balance
from zoo.attention.base import Attention
from zoo.errors import CapabilityError, ConfigError, ZooError, unknown
from zoo.layers.derivatives import METHODS, Derivatives, choose_method, derivatives, multi_index, points_mix

log = logging.getLogger("zoo.pinn")


class _Gathered(Metric):
    """Keeps what the whole split gave, to be scored at once (means of free fields need all of it)."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("found", "true", "rms", "extra"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, found: Tensor, true: Tensor | None, rms: Tensor, extra: Tensor) -> None:
        self.found.append(found)
        self.rms.append(rms)
        self.extra.append(extra)
        if true is not None:
            self.true.append(true)

    def compute(self) -> Tensor:
        return torch.cat(list(self.rms)).square().sum(1).mean()


class PinnTask(ZooTask):
    """Solver of one equation.

    Args:
        lr: Step size of phase one.
        decay: Factor on the rate every `decay_steps` steps.
        decay_steps: See `decay`; 0 for a cosine to zero over phase one.
        first: adam | soap.
        first_steps: Steps of phase one; the rest of the run is phase two.
        second: ssbroyden | bfgs | lbfgs | none.
        history: Curvature pairs of lbfgs.
        round_steps: Phase-two iterations on one frozen set of points; then a new set, curvature kept.
        second_points: Points of phase two over those of phase one.
        derivatives: auto | taylor | forward_reverse | jvp | reverse.
        chunk: Points whose derivatives are held at once.
        resample_every: Steps between new points in phase one; 0 keeps the first ones.
        adaptive: Share of points drawn by residual at each resampling, [0, 1].
        pool: Candidates per adaptive point.
        power: Exponent k of the residual in the density r^k / mean(r^k) + floor.
        floor: See `power`.
        balance: fixed | grad_norm | max_mean | ntk | relobralo.
        balance_every: Steps between updates of the weights.
        weights: First weights by term.
        causal: epsilon of the causal weights exp(-epsilon * earlier residuals); 0 for none.
        slabs: Time slabs of the causal weights.
        self_adaptive: Rate at which a point's weight grows with its squared residual; 0 for none.
        auxiliary_weight: Unused by point networks, kept for variants with losses of their own.
    """

    monitor = "loss"
    mode = "min"
    data_kind = "pinn"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        lr: float = 3e-3,
        decay: float = 0.9,
        decay_steps: int = 0,
        first: str = "soap",
        first_steps: int = 300,
        second: str = "ssbroyden",
        history: int = 100,
        round_steps: int = 100,
        second_points: int = 2,
        derivatives: str = "auto",
        chunk: int = 1024,
        resample_every: int = 100,
        adaptive: float = 0.5,
        pool: int = 4,
        power: float = 1.0,
        floor: float = 1.0,
        balance: str = "grad_norm",
        balance_every: int = 100,
        weights: dict[str, float] | None = None,
        causal: float = 0.0,
        slabs: int = 16,
        self_adaptive: float = 0.0,
        auxiliary_weight: float = 0.01,
    ) -> None:
        super().__init__(
            model, data, lr=lr, schedule="constant", weight_decay=0.0, auxiliary_weight=auxiliary_weight
        )
        self.automatic_optimization = False
        self.problem = p = data.problem
        for key, value, choices in (
            ("first", first, ("adam", "soap")),
            ("second", second, ("none", *QUASI_NEWTON)),
            ("derivatives", derivatives, ("auto", *METHODS)),
        ):
            if value not in choices:
                raise unknown(f"task.{key}", str(value), choices)
        if round_steps < 1 or second_points < 1:
            raise ConfigError(
                f"task.round_steps={round_steps} and task.second_points={second_points} must be at least 1"
            )
        if not 0 <= adaptive <= 1 or chunk < 1 or pool < 1 or causal < 0 or slabs < 1 or self_adaptive < 0:
            raise ConfigError(
                f"need adaptive={adaptive} in [0, 1], chunk={chunk}, pool={pool}, slabs={slabs} >= 1, "
                f"causal={causal}, self_adaptive={self_adaptive} >= 0"
            )
        if causal and p.coordinates[-1] != "t":
            raise ConfigError(
                f"task.causal needs a time coordinate, which problem {p.name!r} does not have; set it to 0"
            )
        self.first, self.first_steps, self.second, self.history = first, first_steps, second, history
        self.round_steps, self.second_points = round_steps, second_points
        self.decay, self.decay_steps, self.chunk = decay, decay_steps, chunk
        self.resample_every, self.adaptive, self.pool, self.power, self.floor = (
            resample_every, adaptive, pool, power, floor)  # fmt: skip
        self.causal, self.slabs, self.self_adaptive = causal, slabs, self_adaptive
        attentive = [m for m in model.modules() if isinstance(m, Attention)]
        for name in sorted({m.name for m in attentive if not m.capabilities.smooth}):
            log.warning(
                "attention %r is not smooth (selection or rounding): its second derivatives miss the jumps",
                name,
            )
        if points_mix(model, data.draw(4, 0).to(self.dtype_now)):
            names = ", ".join(sorted({repr(m.name) for m in attentive})) or type(model).__name__
            raise CapabilityError(
                f"attention {names} mixes collocation points (statistics over the batch), so derivatives at one point would "
                "silently contain the others; choose a variant that treats points separately, e.g. attention=softmax"
            )
        self.wanted = [multi_index(by, p.coordinates) for by in (*p.derivatives, *p.report_derivatives)]
        self.method = derivatives
        if derivatives == "auto":
            self.method, reason = choose_method(model, data.draw(2, 0).to(self.dtype_now), self.wanted)
            log.info("derivatives by %s: %s", self.method, reason)
        self.unknowns = nn.ParameterDict(
            {k: nn.Parameter(torch.tensor(float(v[0]))) for k, v in p.unknowns.items()}
        )
        self._load_conditions()
        self.balance = Balance(self.terms, balance, balance_every, start=weights)
        self.register_buffer("points", data.draw(data.interior, 0))
        self.register_buffer("point_weights", torch.ones(data.interior, dtype=torch.float64))
        self.register_buffer("slab_loss", torch.zeros(slabs, dtype=torch.float64))
        self.exit_reason = ""

    @classmethod
    def model_arguments(cls, data: Any) -> dict[str, Any]:
        p = data.problem
        arguments = {
            "lower": [float(v) for v in p.lower],
            "upper": [float(v) for v in p.upper],
            "fields": len(p.fields),
            "periods": list(p.periods) if p.periods else None,
        }
        if data.hard_conditions:
            arguments |= {"ansatz": p.ansatz, "ansatz_options": dict(p.ansatz_options)}
        return arguments

    def _load_conditions(self) -> None:
        """Prescribed values as tensors, those that the ansatz fulfils left out."""
        p = self.problem
        hard = p.hard if self.data.hard_conditions else [h for h in p.hard if p.ansatz == "none"]
        self.prescribed = [c for c in self.data.conditions() if c.name not in hard]
        for c in self.prescribed:
            for f in c.fields:
                if f not in (*p.fields, *p.report_fields):
                    raise unknown(f"field of condition {c.name!r}", f, p.fields)
        self.terms = ["residual", *dict.fromkeys(c.name for c in self.prescribed)]

    # ---------------------------------------------------------------- fields and losses

    @property
    def dtype_now(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def fields(self, points: Tensor, wanted: list | None = None) -> Derivatives:
        """Fields and derivatives at points [N, d]."""
        points = points.to(self.dtype_now)
        table = derivatives(self.model, points, self.wanted if wanted is None else wanted, self.method)
        return Derivatives(table, self.problem.fields, self.problem.coordinates)

    def squared_residual(self, points: Tensor) -> Tensor:
        """Sum of squared residuals at each point, [N]."""
        found = self.problem.residuals(self.fields(points), points.to(self.dtype_now), dict(self.unknowns))
        return sum(r.square() for r in found.values())

    def _weights_of_points(self) -> Tensor:
        weights = self.point_weights
        if self.causal:
            before = torch.cumsum(self.slab_loss, 0) - self.slab_loss
            weights = weights * torch.exp(-self.causal * before)[self._slab(self.points)]
        return weights.to(self.dtype_now)

    def _slab(self, points: Tensor) -> Tensor:
        low, high = self.problem.lower[-1], self.problem.upper[-1]
        return ((points[:, -1] - low) / (high - low) * self.slabs).long().clamp(0, self.slabs - 1)

    def parts(self, term: str) -> Iterator[Tensor]:
        """A term in pieces whose sum it is, so that each piece's graph can be freed."""
        if term == "residual":
            weights, squares = self._weights_of_points(), []
            for n, points in enumerate(self.points.split(self.chunk)):
                square = self.squared_residual(points)
                squares.append(square.detach())
                yield (weights[n * self.chunk : n * self.chunk + len(points)] * square).sum() / len(
                    self.points
                )
            self._last_squares = torch.cat(squares).double()
            return
        for c in self.prescribed:
            if c.name == term:
                yield self._misfit(c).square().sum(1).mean()

    def _misfit(self, c: Any) -> Tensor:
        points, values = c.points.to(self.points.device), c.values.to(self.points.device, self.dtype_now)
        wanted = [multi_index(c.by, self.problem.coordinates)] if c.by else []
        if all(f in self.problem.fields for f in c.fields):
            d = self.fields(points, wanted)
            return torch.stack([d(f, c.by) for f in c.fields], 1) - values
        d = self.fields(
            points, [multi_index(b, self.problem.coordinates) for b in self.problem.report_derivatives]
        )
        columns = [self.problem.report_fields.index(f) for f in c.fields]
        return self.problem.report(d)[:, columns] - values

    def _backward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the weighted sum, accumulated piece by piece; returns the sum and the plain terms."""
        values = {}
        for term in self.terms:
            weight = self.balance[term].to(self.dtype_now)
            total = torch.zeros((), dtype=torch.float64, device=self.points.device)
            for part in self.parts(term):
                (weight * part).backward()
                total += part.detach().double()
            values[term] = total
        return sum(self.balance[t] * v for t, v in values.items()), values

    def _trainable(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.unknowns.parameters()]

    def _gradient(self, pieces: Iterator[Tensor]) -> Tensor:
        parameters = self._trainable()
        total = [torch.zeros_like(p) for p in parameters]
        for piece in pieces:
            for t, g in zip(total, torch.autograd.grad(piece, parameters, allow_unused=True), strict=True):
                if g is not None:
                    t += g
        return torch.cat([t.reshape(-1) for t in total])

    def _kernel_trace(self, term: str, draws: int = 4, points: int = 256) -> Tensor:
        draw, traces = generator(self.global_step, self.terms.index(term)), []
        for _ in range(draws):
            if term == "residual":
                d = self.problem.residuals(
                    self.fields(self.points[:points]), self.points[:points], dict(self.unknowns)
                )
                rows = torch.stack(list(d.values()), 1)
            else:
                rows = torch.cat(
                    [self._misfit(c)[:points].reshape(-1, 1) for c in self.prescribed if c.name == term]
                )
            signs = torch.randint(0, 2, rows.shape, generator=draw).to(rows) * 2 - 1
            traces.append(self._gradient(iter([(signs * rows).sum()])).square().sum() / rows.numel())
        return torch.stack(traces).mean()

    # ---------------------------------------------------------------- training

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        step, optimizers = self.global_step, self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        second = self.second != "none" and step >= self.first_steps
        optimizer = optimizers[-1] if second else optimizers[0]
        if second:
            if self.dtype_now != torch.float64:
                self._enter_second()
            if (step - self.first_steps) % self.round_steps == 0:
                self._resample(step, self.second_points * self.data.interior)
                optimizer.optimizer.refresh()
        if not second:
            self._schedule(optimizer, step)
            if self.resample_every and step % self.resample_every == 0:
                self._resample(step, self.data.interior)
            if self.balance.due(step):
                self._rebalance()
        record: dict[str, Tensor] = {}

        def closure() -> Tensor:
            optimizer.zero_grad()
            total, record["terms"] = self._backward()
            record.setdefault("first", total)
            return total

        optimizer.step(closure)
        terms, total = record.get("terms", {}), record.get("first")
        if second:
            state = optimizer.optimizer.state[optimizer.optimizer._params[0]]
            total = state["loss"].clone()
            self._watch(optimizer.optimizer)
        elif self.causal or self.self_adaptive:
            self._reweigh()
        self.log("train/loss", total.float(), batch_size=1, prog_bar=True)
        logged = {f"train/{k}": v.float() for k, v in terms.items()}
        logged |= {f"weight/{t}": self.balance[t].float() for t in self.terms if len(self.terms) > 1}
        logged |= {f"unknown/{k}": v.detach().float() for k, v in self.unknowns.items()}
        self.log_dict(logged, batch_size=1)
        return {"loss": total}

    def _schedule(self, optimizer: Any, step: int) -> None:
        if self.decay_steps:
            rate = self.lr * self.decay ** (step / self.decay_steps)
        else:
            rate = self.lr * max(0.01, 0.5 * (1 + math.cos(math.pi * step / max(1, self.first_steps))))
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm

    @torch.no_grad()
    def _resample(self, step: int, count: int) -> None:
        """New points, a share of them where the residual is large (RAD, Wu et al., arXiv:2207.10289)."""
        fresh = self.data.draw(count, 1, step).to(self.points.device)
        chosen = int(self.adaptive * count) if step else 0
        if chosen:
            pool = self.data.draw(self.pool * chosen, 2, step).to(self.points.device)
            size = (
                torch.cat([self.squared_residual(p) for p in pool.split(self.chunk)]).double().sqrt()
                ** self.power
            )
            density = size / size.mean().clamp_min(1e-30) + self.floor
            if torch.isfinite(density).all():
                index = torch.multinomial(density.cpu(), chosen, generator=generator(self.data.seed, 3, step))
                fresh[:chosen] = pool[index.to(pool.device)]
        self.points = fresh
        self.point_weights = torch.ones(count, dtype=torch.float64, device=fresh.device)

    def _rebalance(self) -> None:
        losses = torch.stack([sum(p.detach().double() for p in self.parts(t)) for t in self.terms])
        self.balance.update(lambda t: self._gradient(self.parts(t)), self._kernel_trace, losses)

    @torch.no_grad()
    def _reweigh(self) -> None:
        if self.self_adaptive:
            self.point_weights += (
                self.self_adaptive * self._last_squares / self._last_squares.mean().clamp_min(1e-30)
            )
        if self.causal:
            slab = self._slab(self.points)
            total = torch.zeros_like(self.slab_loss).index_add_(0, slab, self._last_squares)
            self.slab_loss.copy_(total / torch.bincount(slab, minlength=self.slabs).clamp(min=1))

    def _enter_second(self) -> None:
        """Double precision; points, weights and objective stay as they are from here on."""
        self.model.double()
        self.unknowns.double()

    def _watch(self, optimizer: QuasiNewton) -> None:
        if optimizer.exit_reason and not self.exit_reason:
            self.exit_reason = optimizer.exit_reason
            log.info("%s ended at step %d: %s", self.second, self.global_step, self.exit_reason)
            print(f"{self.second} ended at step {self.global_step}: {self.exit_reason}", flush=True)
            self.trainer.should_stop = True

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parameters = self._trainable()
        cls = {"adam": torch.optim.Adam, "soap": Soap}[self.first]
        optimizers: list[torch.optim.Optimizer] = [cls(parameters, lr=self.lr)]
        if self.second != "none":
            optimizers.append(QuasiNewton(parameters, self.second, self.history))
        return optimizers

    def on_train_end(self) -> None:
        """The best checkpoint serves for its weights only: drop the dense curvature (8 bytes x parameters^2)."""
        for callback in self.trainer.checkpoint_callbacks:
            path = Path(getattr(callback, "best_model_path", "") or "")
            if path.name == "best.ckpt" and path.is_file() and self.trainer.is_global_zero:
                checkpoint = load_checkpoint(path)
                checkpoint["optimizer_states"] = []
                write_atomic(path, lambda p, c=checkpoint: torch.save(c, p))

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Takes the number of points from the checkpoint: phase two has more."""
        for name in ("points", "point_weights"):
            if name in state_dict:
                setattr(self, name, torch.empty_like(state_dict[name], device=self.points.device))
        return super().load_state_dict(state_dict, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if any(
            v.dtype == torch.float64 for k, v in checkpoint["state_dict"].items() if k.startswith("model.")
        ):
            self._enter_second()

    # ---------------------------------------------------------------- evaluation

    def make_metrics(self) -> MetricCollection:
        return MetricCollection({"gathered": _Gathered()})

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        p = self.problem
        # Reverse-mode derivatives need a graph, which inference mode would forbid.
        with torch.inference_mode(False), torch.set_grad_enabled(self.method == "reverse"):
            points = batch["points"].clone()
            found, rms, extra = [], [], []
            for part in points.split(self.chunk):
                d = self.fields(part)
                residual = p.residuals(d, part.to(self.dtype_now), dict(self.unknowns))
                rms.append(torch.stack(list(residual.values()), 1).detach().double())
                found.append(p.report(d).detach().double())
                more = p.extra_metrics(d)
                extra.append(
                    torch.stack(list(more.values()), 1).detach().double() if more else rms[-1][:, :0]
                )
        metrics["gathered"].update(torch.cat(found), batch.get("values"), torch.cat(rms), torch.cat(extra))

    def compute_metrics(self, split: str) -> dict[str, float]:
        p, kept = self.problem, self.metrics[split]["gathered"]
        rms = torch.cat(list(kept.rms))
        values = {"residual_rms": float(rms.square().sum(1).mean().sqrt())}
        extra = torch.cat(list(kept.extra)).square().mean(0).sqrt()
        with (
            torch.inference_mode(False),
            torch.no_grad() if self.method != "reverse" else torch.enable_grad(),
        ):
            misfits = {t: sum(float(self._misfit(c).detach().square().sum(1).mean()) for c in self.prescribed if c.name == t)
                       for t in self.terms[1:]}  # fmt: skip
        values["loss"] = values["residual_rms"] ** 2 + sum(misfits.values())
        values |= {f"{t}_mse": m for t, m in misfits.items()}
        for name, (_, true) in p.unknowns.items():
            values[name] = float(self.unknowns[name])
            values[f"{name}_error"] = abs(values[name] - true) / abs(true)
        if split == "test":
            found, true = torch.cat(list(kept.found)), torch.cat(list(kept.true))
            self._test_fields = (found.cpu(), true.cpu())
            values |= field_errors(found, true, tuple(p.report_fields), tuple(p.free_constant))
            if len(extra):
                names = list(p.extra_metrics(self.fields(self.points[:1])))
                values |= {f"{n}_rms": float(v) for n, v in zip(names, extra, strict=True)}
        if not all(math.isfinite(v) for v in values.values()) and split == "valid":
            raise ZooError(
                f"the residual is not finite at step {self.global_step}; best and last checkpoint are from before. Try a "
                f"smaller task.lr (now {self.lr}) or task.balance=fixed"
            )
        return values

    def figures(self, folder: Path) -> list[Path]:
        from tasks.physics.figures import draw

        return draw(self, folder)

    def example_inputs(self) -> tuple[tuple, dict]:
        return (self.points[:1].to(self.dtype_now),), {}

    def card(self) -> dict[str, Any]:
        found = {k: float(v) for k, v in self.unknowns.items()}
        return {
            "pinn": {
                **self.data.preprocessing(),
                "derivatives": self.method,
                "exit_reason": self.exit_reason,
                "unknowns": found,
            }
        }
