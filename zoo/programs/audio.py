"""The log-mel front end without a Fourier transform: free in the number of samples, and of operations that ONNX has."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.audio import LogMel


class ConvolvedLogMel(LogMel):
    """`LogMel` with its windowed transform as one strided convolution, equal up to rounding.

    Args:
        front: What to imitate, with its statistics.
    """

    def __init__(self, front: LogMel) -> None:
        nn.Module.__init__(self)
        self.normalise, self.n_fft, self.hop = front.normalise, front.n_fft, front.hop
        for name in ("banks", "mean", "std"):
            self.register_buffer(name, getattr(front, name))
        before = (front.n_fft - front.window) // 2
        window = F.pad(front.hann, (before, front.n_fft - front.window - before)).double()
        frequency = torch.arange(front.n_fft // 2 + 1)[:, None]
        # Products of whole numbers, reduced before the division: exact angles.
        angle = 2 * math.pi * (frequency * torch.arange(front.n_fft) % front.n_fft) / front.n_fft
        waves = torch.cat((angle.double().cos(), angle.double().sin())) * window
        self.register_buffer("waves", waves.float()[:, None])

    def raw(self, audio: Tensor) -> Tensor:
        half = self.n_fft // 2
        # With half - 1 zeros behind, the last frame is the one centred on the last multiple of the hop.
        padded = F.pad(audio, (half, half - 1))[:, None]
        real, imaginary = F.conv1d(padded, self.waves, stride=self.hop).chunk(2, dim=1)
        power = (real.square() + imaginary.square()).transpose(1, 2)
        return (power @ self.banks).clamp_min(1e-6).log()
