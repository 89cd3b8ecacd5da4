"""PINNsFormer: PhysicsFormer's structure in the published sizes, with wavelet activations throughout.

Paper: Zhao et al., arXiv:2307.11833 (ICLR 2024); read in the authors' code: one encoder and one decoder layer without
norms or position code, feed-forward 32-256-256-32, head 32-512-512-F: 453,561 parameters for one field of (x, t).
Differs from the official code in: tokens live in the graph of their point and the field is the first token, so
derivatives are the true ones (the code sums them over the outputs of k independent leaves); losses on the other k - 1
tokens are left out with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zoo.attention.slots import AttentionFactory
from zoo.models.physicsformer import PhysicsFormer
from zoo.models.registry import register_model


@register_model
class PinnsFormer(PhysicsFormer):
    """Points [N, d] -> fields [N, F]; arguments as in `PhysicsFormer`."""

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        dim: int = 32,
        heads: int = 2,
        tokens: int = 5,
        step: float = 1e-3,
        axis: int = -1,
        encoder_layers: int = 1,
        decoder_layers: int = 1,
        hidden: Sequence[int] = (256, 256),
        head: Sequence[int] = (512, 512),
        act: str = "wavelet",
        lower: Sequence[float] = (-1.0, 0.0),
        upper: Sequence[float] = (1.0, 1.0),
        fields: int = 1,
        periods: Sequence[float | None] | None = None,
        harmonics: int = 1,
        mixed: int = 0,
        fourier: int = 0,
        fourier_scale: float = 1.0,
        ansatz: str = "none",
        ansatz_options: dict[str, Any] | None = None,
    ) -> None:
        own = {k: v for k, v in locals().items() if k not in ("self", "attention", "__class__")}
        super().__init__(attention, **own)
