"""Physics-informed training: residuals by exact derivatives, balanced terms, first-order then quasi-Newton steps.

Optimisation is manual. Phase one (Adam or SOAP, float32) resamples points by residual; phase two (quasi-Newton, float64)
freezes them for rounds of iterations, because a changing objective breaks curvature estimates. For that reason it also runs the
network in evaluation mode: no dropout, and attention that changes from one training pass to the next (causal_vit) stays as it is.
Validation is the residual loss at held-out points; the reference grid is the test and is never looked at before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from tasks.base import Batch, ZooTask
from tasks.engine.callbacks import load_checkpoint
from tasks.engine.folder import write_atomic
from tasks.optimizers.gauss_newton import GaussNewton
from tasks.optimizers.quasi_newton import METHODS as QUASI_NEWTON
from tasks.optimizers.quasi_newton import QuasiNewton
from tasks.optimizers.soap import Soap
from tasks.physics.balance import Balance
from tasks.physics.normal import NormalEquations
from tasks.physics.objective import Objective
from tasks.physics.points import CollocationPoints
from tasks.physics.scores import Gathered, coefficients, evaluate, scores
from zoo.errors import ConfigError, ZooError, unknown
from zoo.layers.derivatives import METHODS

log = logging.getLogger("zoo.pinn")


class PinnTask(ZooTask):
    """Solver of one equation.

    Args:
        lr: Step size of phase one.
        decay: Factor on the rate every `decay_steps` steps.
        decay_steps: See `decay`; 0 for a cosine to zero over phase one.
        first: adam | soap.
        first_steps: Steps of phase one; the rest of the run is phase two.
        second: ssbroyden | bfgs | lbfgs | gauss_newton (small networks) | none.
        history: Curvature pairs of lbfgs.
        round_steps: Phase-two iterations on one frozen set of points; then a new set, curvature kept.
        second_points: Points of phase two over those of phase one.
        derivatives: auto | taylor | forward_reverse | jvp | reverse.
        chunk: Points whose derivatives are held at once.
        resample_every: Steps between new points in phase one; 0 keeps the first ones.
        adaptive, pool, power, floor, causal, slabs, self_adaptive: See `CollocationPoints`.
        balance: fixed | grad_norm | max_mean | ntk | relobralo.
        balance_every: Steps between updates of the weights.
        weights: First weights by term.
        auxiliary_weight: No effect: a variant's own loss (routing balance ...) is not part of the objective, and the run says so.
    """

    monitor = "loss"
    mode = "min"
    loss_split = None
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
        causal: float | Sequence[float] = 0.0,
        slabs: int = 16,
        self_adaptive: float = 0.0,
        auxiliary_weight: float = 0.01,
    ) -> None:
        super().__init__(
            model, data, lr=lr, schedule="constant", weight_decay=0.0, auxiliary_weight=auxiliary_weight
        )
        self.automatic_optimization = False
        for key, value, choices in (
            ("first", first, ("adam", "soap")),
            ("second", second, ("none", "gauss_newton", *QUASI_NEWTON)),
            ("derivatives", derivatives, ("auto", *METHODS)),
        ):
            if value not in choices:
                raise unknown(f"task.{key}", str(value), choices)
        for key, value, least in (
            ("round_steps", round_steps, 1),
            ("second_points", second_points, 1),
            ("chunk", chunk, 1),
            ("history", history, 1),
            ("first_steps", first_steps, 0),
            ("decay_steps", decay_steps, 0),
            ("resample_every", resample_every, 0),
        ):
            if value < least:
                raise ConfigError(f"task.{key}={value} must be at least {least}")
        if not 0 < decay <= 1:
            raise ConfigError(f"task.decay={decay} is outside (0, 1]")
        self.first, self.first_steps, self.second, self.history = first, first_steps, second, history
        self.round_steps, self.second_points, self.resample_every = round_steps, second_points, resample_every
        self.decay, self.decay_steps = decay, decay_steps
        self.problem = p = data.problem
        self.unknowns = nn.ParameterDict(
            {k: nn.Parameter(torch.tensor(float(v[0]))) for k, v in p.unknowns.items()}
        )
        hard = p.hard if data.hard_conditions else ()
        conditions, held_out = (
            [c for c in data.conditions(held_out=kept) if c.name not in hard] for kept in (False, True)
        )
        self.objective = Objective(model, self.unknowns, p, conditions, derivatives, chunk)
        self.held_out = held_out
        self.balance = Balance(self.objective.terms, balance, balance_every, start=weights)
        self.points = CollocationPoints(
            data,
            adaptive=adaptive,
            pool=pool,
            power=power,
            floor=floor,
            causal=causal,
            slabs=slabs,
            self_adaptive=self_adaptive,
        )
        least_squares = second == "gauss_newton"
        self.system = NormalEquations(self.objective, self.balance, self.points) if least_squares else None
        self.exit_reason = ""
        parts = [f"rel_l2_{f}" for f in p.report_fields] if len(p.report_fields) > 1 else []
        errors = [f"{name}_error" for name in p.unknowns]
        self.headline = ["rel_l2", *parts, *errors, *p.headline, "max_error", "residual_rms"]

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

    # ---------------------------------------------------------------- training

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        step, optimizers = self.global_step, self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        second = self.second != "none" and step >= self.first_steps
        optimizer = optimizers[-1] if second else optimizers[0]
        self.model.train(not second)  # a line search needs one function
        if second:
            self._prepare_second(optimizer.optimizer, step)
        else:
            self._prepare_first(optimizer, step)
        evaluations: list[dict[str, Tensor]] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            evaluations.append(self.objective.backward(self.balance, self.points))
            total = self._total(evaluations[-1])
            if not second:  # a line search takes care of itself
                self._check(total)
            return total

        optimizer.step(closure)
        if second:
            total = optimizer.optimizer.loss
            self._watch(optimizer.optimizer)
        else:
            total = self._total(evaluations[0])
            self.points.learn()
        terms = evaluations[-1] if evaluations else getattr(self.system, "terms", {})
        self.log("train/loss", total.float(), batch_size=1, prog_bar=True)
        logged = {f"train/{k}": v.float() for k, v in terms.items()}
        if len(self.balance) > 1:
            logged |= {f"weight/{t}": w.float() for t, w in self.balance.items()}
        logged |= {f"unknown/{k}": v.detach().float() for k, v in self.unknowns.items()}
        self.log_dict(logged, batch_size=1)
        return {"loss": total}

    def _total(self, terms: dict[str, Tensor]) -> Tensor:
        return sum(self.balance[t] * v for t, v in terms.items())

    def _prepare_first(self, optimizer: Any, step: int) -> None:
        """Rate, points and weights of a step of phase one."""
        if self.decay_steps:
            rate = self.lr * self.decay ** (step / self.decay_steps)
        else:
            rate = self.lr * max(0.01, 0.5 * (1 + math.cos(math.pi * step / max(1, self.first_steps))))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50)
        if self.resample_every and step % self.resample_every == 0:
            self.points.resample(step, self.data.interior, self.objective.squared_residual)
        if self.balance.due(step):
            self.rebalance()

    def _prepare_second(self, optimizer: QuasiNewton | GaussNewton, step: int) -> None:
        """Double precision, and a new set of points where a round begins; they stay as they are during a round."""
        self._to_double()
        if (step - self.first_steps) % self.round_steps == 0:
            self.points.resample(
                step, self.second_points * self.data.interior, self.objective.squared_residual
            )
            optimizer.refresh()

    def _to_double(self) -> None:
        if self.objective.dtype != torch.float64:
            self.model.double()
            self.unknowns.double()

    def rebalance(self) -> None:
        """New weights of the terms."""
        objective, points = self.objective, self.points
        losses = [sum(p().detach().double() for p in objective.pieces(t, points)) for t in objective.terms]
        self.balance.update(
            lambda t: objective.gradient(objective.pieces(t, points)),
            lambda t: objective.kernel_trace(t, points, self.global_step),
            torch.stack(losses),
        )

    def _watch(self, optimizer: QuasiNewton | GaussNewton) -> None:
        if optimizer.exit_reason and not self.exit_reason:
            self.exit_reason = optimizer.exit_reason
            log.info("%s ended at step %d: %s", self.second, self.global_step, self.exit_reason)
            print(f"{self.second} ended at step {self.global_step}: {self.exit_reason}", flush=True)
            self.trainer.should_stop = True

    def _check(self, loss: Any) -> None:
        if not math.isfinite(float(loss)):
            raise ZooError(
                f"the loss is not finite at step {self.global_step}; best.ckpt and last.ckpt are from before. Try a smaller "
                f"task.lr (now {self.lr}) or task.balance=fixed"
            )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parameters = self.objective.parameters()
        first = {"adam": partial(torch.optim.Adam, fused=True), "soap": Soap}[self.first]
        optimizers: list[torch.optim.Optimizer] = [first(parameters, lr=self.lr)]
        if self.system is not None:
            optimizers.append(GaussNewton(parameters, self.system))
        elif self.second != "none":
            optimizers.append(QuasiNewton(parameters, self.second, self.history))
        return optimizers

    def on_train_end(self) -> None:
        """The best checkpoint serves for its weights only: drop the dense curvature (4 bytes x parameters^2)."""
        for callback in self.trainer.checkpoint_callbacks:
            path = Path(getattr(callback, "best_model_path", "") or "")
            if path.name == "best.ckpt" and path.is_file() and self.trainer.is_global_zero:
                checkpoint = load_checkpoint(path)
                checkpoint["optimizer_states"] = []
                write_atomic(path, lambda p, c=checkpoint: torch.save(c, p))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = (v for k, v in checkpoint["state_dict"].items() if k.startswith("model."))
        if any(v.dtype == torch.float64 for v in weights):
            self._to_double()

    # ---------------------------------------------------------------- evaluation

    def make_metrics(self) -> MetricCollection:
        return MetricCollection({"gathered": Gathered()})

    def update_metrics(self, batch: Batch, metrics: MetricCollection, split: str) -> None:
        found = evaluate(self.objective, batch["points"])
        metrics["gathered"].update(**found, **({"true": batch["values"]} if "values" in batch else {}))

    def compute_metrics(self, split: str) -> dict[str, float]:
        kept = self.metrics[split]["gathered"].compute()
        values = scores(self.objective, self.held_out, kept)
        if split == "test":
            self._test_fields = (kept["found"].cpu(), kept["true"].cpu())
        else:
            self._check(values["loss"])
        return values

    def figures(self, folder: Path) -> list[Path]:
        from tasks.physics.figures import draw

        return draw(self, folder)

    def example_inputs(self) -> tuple[tuple, dict]:
        return (self.points.at[:1].to(self.objective.dtype),), {}

    def card(self) -> dict[str, Any]:
        return {
            "pinn": {
                **self.data.preprocessing(),
                "derivatives": self.objective.method,
                "exit_reason": self.exit_reason,
                "unknowns": coefficients(self.objective),
            }
        }
