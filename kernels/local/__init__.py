"""Token-local helpers: rotary positions and depthwise convolutions along a sequence or over a grid.

B batch, H heads, N tokens, D head width, C channels. No folder of implementations: rotation, shift and mask are memory bound and torch.compile
fuses them with their neighbours, and the depthwise convolutions are cuDNN's and oneDNN's; there is nothing for a kernel of ours to win.
Plain torch, differentiable any number of times.

Source of the intervals: TIE, Time Interval Encoding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_frequencies(pairs: int, base: float = 10000.0, *, closed: bool = False) -> Tensor:
    """Angular frequencies of `pairs` rotary pairs, float32 [pairs].

    Args:
        pairs: Number of channel pairs.
        base: Ratio of the fastest to the slowest rotation.
        closed: Exponents run over [0, 1] with both ends (MALA); otherwise over [0, 1) (RoFormer).
    """
    steps = torch.linspace(0, 1, pairs) if closed else torch.arange(pairs) / pairs
    return base**-steps


def rope_angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Angles [..., N, A * pairs] for positions [..., N, A] on A axes; channels are split evenly among the axes."""
    return (positions[..., None].to(frequencies.dtype) * frequencies).flatten(-2)


def interval_gains(radii: Tensor, frequencies: Tensor, *, norm: str = "mean") -> Tensor:
    """Factors [..., N, pairs] that make a rotation at an interval's centre the mean rotation over the interval.

    ``sin(w r) / (w r)`` per frequency w and half length r; a key is rotated at its centre and its channel pairs multiplied by these.

    Args:
        radii: Half lengths of the intervals, [..., N].
        frequencies: [pairs].
        norm: Divide by the "mean" or the "rms" over the frequencies, so that long intervals keep their weight, or "none".
    """
    if norm not in ("mean", "rms", "none"):
        raise ValueError(f"interval_gains: norm {norm!r} is unknown; choose mean, rms or none")
    gains = torch.sinc(radii[..., None].to(frequencies.dtype) * frequencies / torch.pi)
    if norm == "mean":
        return gains / gains.mean(-1, keepdim=True)
    return gains / gains.square().mean(-1, keepdim=True).sqrt() if norm == "rms" else gains


def shift(x: Tensor, steps: int, *, key_mask: Tensor | None = None) -> Tensor:
    """Move tokens [B, N, C] ``steps`` places later (earlier if negative); zeros move in, as they do from masked tokens."""
    x = _kept(x, key_mask)
    length = x.shape[1]
    if abs(steps) >= length:
        return torch.zeros_like(x)
    return F.pad(x, (0, 0, steps, -steps))


def _kept(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Zeros, not even NaN, at masked tokens of [B, N, C]."""
    return x if key_mask is None else x.masked_fill(~key_mask[..., None], 0.0)


def grid_positions(shape: tuple[int, ...], prefix: int = 0, device: torch.device | None = None) -> Tensor:
    """Coordinates [prefix + prod(shape), A] of row-major tokens; prefix tokens sit at the origin."""
    axes = torch.meshgrid(*(torch.arange(s, device=device) for s in shape), indexing="ij")
    places = torch.stack(axes, -1).flatten(0, -2)
    return torch.cat((places.new_zeros(prefix, len(shape)), places))


def rotate(x: Tensor, angles: Tensor, *, layout: str = "interleaved") -> Tensor:
    """Rotate channel pairs.

    Args:
        x: [B, H, N, D], D even.
        angles: [N, D/2] or broadcastable to [B, H, N, D/2].
        layout: "interleaved" pairs channels (0, 1), (2, 3) ...; "half" pairs (0, D/2), (1, D/2 + 1) ...
    """
    if x.shape[-1] != 2 * angles.shape[-1]:
        raise ValueError(
            f"rotate: {angles.shape[-1]} angles need {2 * angles.shape[-1]} channels, got {x.shape[-1]}"
        )
    if layout not in ("interleaved", "half"):
        raise ValueError(f"rotate: layout {layout!r} is unknown; choose interleaved or half")
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = (x[..., ::2], x[..., 1::2]) if layout == "interleaved" else x.chunk(2, -1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    return torch.stack(turned, -1).flatten(-2) if layout == "interleaved" else torch.cat(turned, -1)


def depthwise_sequence(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution along tokens: x [B, N, C], weight [C, 1, K] -> [B, N, C].

    Args:
        causal: Token t sees t - K + 1 ... t; otherwise the window is centred.
        key_mask: Tokens to keep, bool [B, N]; others count as zeros.
    """
    x = _kept(x, key_mask)
    taps, channels = weight.shape[-1], x.shape[-1]
    left = taps - 1 if causal else (taps - 1) // 2
    padded = F.pad(x.transpose(1, 2), (left, taps - 1 - left))
    return F.conv1d(padded, weight, bias, groups=channels).transpose(1, 2)


def depthwise_grid(
    x: Tensor,
    shape: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None = None,
    prefix: int = 0,
    *,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Centred depthwise convolution over a grid: x [B, prefix + h*w, C], weight [C, 1, K, K] -> [B, h*w, C].

    Prefix tokens are left out of input and output; tokens outside ``key_mask``, bool [B, prefix + h*w], count as zeros.
    """
    h, w = shape
    if weight.shape[-1] % 2 == 0 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(
            f"depthwise_grid: a centred kernel needs the same odd side twice, got {tuple(weight.shape[-2:])}"
        )
    image = _kept(x, key_mask)[:, prefix:].transpose(1, 2).unflatten(-1, (h, w))
    out = F.conv2d(image, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
    return out.flatten(2).transpose(1, 2)


__all__ = [
    "depthwise_grid",
    "depthwise_sequence",
    "grid_positions",
    "interval_gains",
    "rope_angles",
    "rope_frequencies",
    "rotate",
    "shift",
]
