"""What all networks on points share: scaled coordinates, periodic and random Fourier features, hard conditions.

Letters: N points, d coordinates, F fields, C width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, unknown
from zoo.layers.ansatz import get_ansatz
from zoo.layers.jet_functions import wave
from zoo.layers.jet_tensor import Jet


class Wavelet(nn.Module):
    """w1 sin x + w2 cos x with two learned numbers, both 1 at first.

    Source: PINNsFormer, arXiv:2307.11833.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if isinstance(x, Jet):
            return wave(x, self.weight)
        return self.weight[0] * x.sin() + self.weight[1] * x.cos()


class Sine(nn.Module):
    """sin x."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.sin(x)


ACTIVATIONS = {"wavelet": Wavelet, "tanh": nn.Tanh, "sin": Sine, "gelu": nn.GELU, "silu": nn.SiLU}


def activation(name: str) -> nn.Module:
    """A fresh smooth activation; ReLU and its kin have no second derivative and are left out."""
    if name not in ACTIVATIONS:
        raise unknown("smooth activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


class Features(nn.Module):
    """Coordinates [..., d] to network inputs [..., width].

    Coordinates are scaled to [-1, 1]; periodic ones become cosine and sine of their harmonics.

    Args:
        lower: Lowest value of each coordinate.
        upper: Highest value.
        periods: Period of each coordinate, None where it has none.
        harmonics: Harmonics per periodic coordinate.
        mixed: Highest harmonic of waves that run oblique to the periodic coordinates, cos and sin of k x + l y with k and l
            up to this number; 0 for none. Flows in a periodic box are few such waves.
        fourier: Number of random Fourier features of the scaled coordinates; 0 for none.
        fourier_scale: Standard deviation of their frequencies.
        seed: Draws the frequencies.
    """

    def __init__(
        self,
        lower: Sequence[float],
        upper: Sequence[float],
        periods: Sequence[float | None] | None = None,
        harmonics: int = 1,
        mixed: int = 0,
        fourier: int = 0,
        fourier_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(lower) != len(upper) or not all(a < b for a, b in zip(lower, upper, strict=True)):
            raise ConfigError(f"lower={list(lower)} must be below upper={list(upper)} in every coordinate")
        low, high = torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64)
        self.register_buffer("centre", ((low + high) / 2).to(torch.get_default_dtype()))
        self.register_buffer("half_range", ((high - low) / 2).to(torch.get_default_dtype()))
        periods = list(periods) if periods else [None] * len(lower)
        if len(periods) != len(lower):
            raise ConfigError(
                f"periods={periods} needs one entry per coordinate ({len(lower)}), null for none"
            )
        self.plain = [i for i, p in enumerate(periods) if p is None]
        self.periodic = [(i, 2 * math.pi / p) for i, p in enumerate(periods) if p is not None]
        waves = wave_numbers(len(self.periodic), harmonics, mixed)
        # Whole numbers, exact in any precision: a period times a rounded frequency would not close.
        self.register_buffer("waves", torch.tensor(waves).to(self.centre.dtype), persistent=False)
        self.width = len(self.plain) + 2 * len(waves)
        if fourier:
            draw = torch.Generator().manual_seed(seed)
            frequencies = torch.randn(fourier, self.width, generator=draw) * fourier_scale * math.pi
            self.register_buffer("frequencies", frequencies)
            self.width = 2 * fourier + self.width
        else:
            self.frequencies = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., width]."""
        scaled = (x - self.centre) * self.half_range.reciprocal()
        if self.periodic:
            angle = torch.cat([x[..., i : i + 1] * omega for i, omega in self.periodic], -1)
            angle = torch.nn.functional.linear(angle, self.waves)
            circles = torch.stack((torch.cos(angle), torch.sin(angle)), -1).flatten(-2)
            scaled = torch.cat([*(scaled[..., i : i + 1] for i in self.plain), circles], -1)
        if self.frequencies is None:
            return scaled
        angle = torch.nn.functional.linear(scaled, self.frequencies)
        return torch.cat((scaled, torch.cos(angle), torch.sin(angle)), -1)


def wave_numbers(dims: int, harmonics: int, mixed: int) -> list[tuple[int, ...]]:
    """Whole-number vectors: 1 .. `harmonics` along each axis, then oblique ones up to `mixed`, one of each +-pair."""
    if harmonics < 1 or mixed < 0:
        raise ConfigError(f"harmonics={harmonics} must be at least 1 and mixed={mixed} at least 0")
    along = [tuple(h * (a == b) for b in range(dims)) for a in range(dims) for h in range(1, harmonics + 1)]
    box = itertools.product(range(-mixed, mixed + 1), repeat=dims)
    zero = (0,) * dims
    return along + [k for k in box if k > zero and sum(map(bool, k)) > 1]


class PointNetwork(nn.Module):
    """Base of the PINN models: points [N, d] -> fields [N, F]; points never mix.

    Args:
        lower, upper: Box of the coordinates.
        fields: Number of fields F.
        periods, harmonics, mixed, fourier, fourier_scale: See `Features`.
        ansatz: Form that fulfils conditions exactly, see `zoo.layers.ansatz`.
        ansatz_options: Its keyword arguments.
    """

    def __init__(
        self,
        *,
        lower: Sequence[float],
        upper: Sequence[float],
        fields: int,
        periods: Sequence[float | None] | None = None,
        harmonics: int = 1,
        mixed: int = 0,
        fourier: int = 0,
        fourier_scale: float = 1.0,
        ansatz: str = "none",
        ansatz_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if fields < 1:
            raise ConfigError(f"fields={fields} must be at least 1")
        self.dims, self.num_fields = len(lower), fields
        self.features = Features(lower, upper, periods, harmonics, mixed, fourier, fourier_scale)
        self._ansatz, self._ansatz_options = get_ansatz(ansatz), dict(ansatz_options or {})

    def raw(self, points: Tensor) -> Tensor:
        """Points [N, d] -> unconstrained outputs [N, F]."""
        raise NotImplementedError

    def forward(self, points: Tensor) -> Tensor:
        """Points [N, d], or a jet of them -> fields [N, F]."""
        if points.dim() != 2 or points.shape[1] != self.dims:
            raise ConfigError(f"points must be [N, {self.dims}], got {list(points.shape)}")
        return self._ansatz(points, self.raw(points), **self._ansatz_options)


def init_linear(module: nn.Module, bias: float = 0.01) -> None:
    """Xavier-uniform matrices and small biases, as PINNsFormer starts."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.constant_(layer.bias, bias)
