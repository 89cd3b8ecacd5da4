"""PhysicsFormer: an encoder-decoder transformer on the pseudo-sequence of a collocation point.

Paper: Barman, Chatterjee, Ray, arXiv:2601.03613. No official code is known; sizes are ours. A point (x, t) becomes the k
tokens (x, t + j dt). The tokens are made inside the graph from the point's own coordinates and the field is read from
the first token, so derivatives of the output are the field's true ones. Public PINNsFormer code differentiates by k
independent tiled coordinates instead, which sums over outputs.

Differs from PINNsFormer: cross attention reads the encoder from the first token alone, as nothing else is read out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.base import Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError
from zoo.layers.pointwise import PointNetwork, activation, init_linear
from zoo.models.registry import register_model


class FeedForward(nn.Sequential):
    """Linear layers with smooth activations between them."""

    def __init__(self, widths: Sequence[int], act: str) -> None:
        layers: list[nn.Module] = []
        for n, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [activation(act)] if n else []
            layers.append(nn.Linear(a, b))
        super().__init__(*layers)


class PreActivated(nn.Module):
    """h + attention(act(h)), then h + feed-forward(act(h)); cross attention where a memory is given."""

    def __init__(
        self, attention: AttentionFactory, dim: int, heads: int, hidden: Sequence[int], act: str, length: int
    ) -> None:
        super().__init__()
        self.act1, self.act2 = activation(act), activation(act)
        self.attn = attention(dim, heads, length=length)
        self.ffn = FeedForward((dim, *hidden, dim), act)

    def forward(self, h: Tensor, memory: Tensor | None = None) -> Tensor:
        """h [N, K, C], memory [N, M, C] -> [N, K, C]."""
        a = self.act1(h)
        h = h + (self.attn(a) if memory is None else self.attn(a, memory))
        return h + self.ffn(self.act2(h))


@register_model
class PhysicsFormer(PointNetwork):
    """Points [N, d] -> fields [N, F] through k tokens per point.

    Args:
        attention: Factories of the slots "encoder" and "cross".
        dim: Width C of a token.
        heads: Attention heads; must divide `dim`.
        tokens: Pseudo-sequence length k; 1 makes the attention an identity on its values.
        step: Shift between tokens as a fraction of the coordinate's range, > 0.
        axis: Coordinate that is shifted; -1 is the last (time where there is one).
        encoder_layers: Self-attention layers, >= 0.
        decoder_layers: Cross-attention layers, >= 1.
        hidden: Hidden widths of each feed-forward network.
        head: Hidden widths of the read-out.
        act: tanh, wavelet, sin, gelu or silu. With wavelets a small network bends between few points: on Burgers the
            held-out residual rose while the training residual fell.
        lower, upper, fields, periods, harmonics, mixed, fourier, fourier_scale, ansatz, ansatz_options: `PointNetwork`.
    """

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        dim: int = 16,
        heads: int = 2,
        tokens: int = 3,
        step: float = 0.02,
        axis: int = -1,
        encoder_layers: int = 1,
        decoder_layers: int = 1,
        hidden: Sequence[int] = (32,),
        head: Sequence[int] = (32,),
        act: str = "tanh",
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
        super().__init__(
            lower=lower,
            upper=upper,
            fields=fields,
            periods=periods,
            harmonics=harmonics,
            mixed=mixed,
            fourier=fourier,
            fourier_scale=fourier_scale,
            ansatz=ansatz,
            ansatz_options=ansatz_options,
        )
        if tokens < 1 or encoder_layers < 0 or decoder_layers < 1:
            raise ConfigError(
                f"tokens={tokens} and decoder_layers={decoder_layers} must be at least 1, encoder_layers={encoder_layers} "
                "at least 0"
            )
        if step <= 0 or not -self.dims <= axis < self.dims:
            raise ConfigError(
                f"step={step} must be positive and axis={axis} one of the {self.dims} coordinates"
            )
        offsets = torch.zeros(tokens, self.dims)
        offsets[:, axis] = torch.arange(tokens) * (step * (upper[axis] - lower[axis]))
        self.register_buffer("offsets", offsets, persistent=False)
        self.embed = nn.Linear(self.features.width, dim)
        build = (dim, heads, list(hidden), act, tokens)
        self.encoder = nn.ModuleList(
            PreActivated(attention["encoder"], *build) for _ in range(encoder_layers)
        )
        self.encoder_act = activation(act)
        self.decoder = nn.ModuleList(PreActivated(attention["cross"], *build) for _ in range(decoder_layers))
        self.decoder_act = activation(act)
        self.head = FeedForward((dim, *head, fields), act)
        init_linear(self)

    @classmethod
    def slots(cls, *, encoder_layers: int = 1, **options: Any) -> dict[str, Slot]:
        """Self-attention of the encoder, cross-attention of the decoder, both differentiated twice or more."""
        known = {"length_known": True, "double_backward": True}
        cross = {"cross": Slot(Pattern.CROSS, **known)}
        return {"encoder": Slot(Pattern.SELF, **known), **cross} if encoder_layers else cross

    def sequence(self, points: Tensor) -> Tensor:
        """Points [N, d] -> tokens [N, K, d], in the graph of the points."""
        return points.unsqueeze(1) + self.offsets

    def raw(self, points: Tensor) -> Tensor:
        e = self.embed(self.features(self.sequence(points)))
        memory = e
        for layer in self.encoder:
            memory = layer(memory)
        memory = self.encoder_act(memory)
        # Decoder tokens do not see each other, so the tokens that are not read need no computing.
        h = e[:, :1]
        for layer in self.decoder:
            h = layer(h, memory)
        return self.head(self.decoder_act(h[:, 0]))
