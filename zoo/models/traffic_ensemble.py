"""A deep ensemble of forecasters: several networks of one kind, each with its own start, whose forecasts are averaged.

Paper: "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", arXiv:1612.01474, NeurIPS 2017.
Differs from it in: members see the same windows in the same order, forecast values instead of distributions, and there
are no adversarial examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError, unknown
from zoo.models.registry import build_model, model_slots, register_model

NETWORKS = ("gman", "staeformer", "stid", "tgatv2")


@register_model
class TrafficEnsemble(nn.Module):
    """`members` networks side by side. In training every member answers for itself, so that they stay independent.

    Args:
        attention: Factories for the slots of the network; every member builds its own attention from them.
        network: Model of the members.
        members: How many.
        options: Options of that model, such as {"dropout": 0.2}.
        num_sensors: N.
        slots_per_day: Steps in 24 hours.
        history_steps: P.
        horizon_steps: Q.
        lag_steps: Distance in steps of each earlier look that the data give.
    """

    name: ClassVar[str]

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        network: str = "staeformer",
        members: int = 4,
        options: Mapping[str, Any] | None = None,
        num_sensors: int = 21,
        slots_per_day: int = 24,
        history_steps: int = 12,
        horizon_steps: int = 12,
        lag_steps: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if members < 1:
            raise ConfigError(f"model.members={members} must be at least 1")
        of_data = {
            "num_sensors": num_sensors,
            "slots_per_day": slots_per_day,
            "history_steps": history_steps,
            "horizon_steps": horizon_steps,
            "lag_steps": list(lag_steps),
        }
        _check(network, options or {}, of_data)
        self.networks = nn.ModuleList(
            build_model(network, attention, **of_data, **(options or {})) for _ in range(members)
        )

    @classmethod
    def slots(
        cls, *, network: str = "staeformer", options: Mapping[str, Any] | None = None, **others: Any
    ) -> dict[str, Slot]:
        _check(network, options or {})
        return model_slots(network, **(options or {}))

    def forward(
        self,
        history: Tensor,
        history_seen: Tensor,
        clock: Tensor,
        known: Tensor | None = None,
        known_seen: Tensor | None = None,
    ) -> Tensor:
        """Forecast; arguments as of the members' model.

        Returns:
            Readings: in evaluation the members' mean, [B, Q, N]; in training each member's, [B, k, Q, N].
        """
        inputs = (history, history_seen, clock, known, known_seen)
        forecasts = torch.stack([network(*inputs) for network in self.networks], dim=1)
        return forecasts if self.training else forecasts.mean(dim=1)


def _check(network: str, options: Mapping[str, Any], taken: Mapping[str, Any] = ()) -> None:
    if network not in NETWORKS:
        raise unknown("network of model 'traffic_ensemble':", network, NETWORKS)
    for name in options:
        if name in taken:
            raise ConfigError(f"model.options.{name} comes from the data; leave it out")
