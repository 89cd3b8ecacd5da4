"""From samples to encoder tokens: log-mel features, masking of features, strided convolutions.

Everything here is a function of an utterance's own samples: padding behind the last sample changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError

_FLOOR = 1e-6


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """True at valid places, bool [B, size]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def padding_mask(lengths: Tensor, size: int) -> Tensor | None:
    """`length_mask`, or None where nothing is padded: attention is faster without a mask.

    On GPUs, which would have to be waited for, and while compiling there always is a mask.
    """
    look = lengths.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if look and bool((lengths >= size).all()) else length_mask(lengths, size)


class LogMel(nn.Module):
    """Log-mel features, normalised.

    A frame is centred on every `hop` samples; zeros stand before the first and behind the last sample, so that
    frames do not depend on how far a batch is padded.

    Args:
        sample_rate: Hz.
        n_mels: Number of mel bands.
        window_ms: Length of the Hann window.
        hop_ms: Distance of the frames.
        normalise: "utterance": mean and deviation of each band over the utterance's own frames; "global": over the
            training set, see `set_statistics`; "none".
    """

    def __init__(
        self,
        sample_rate: int,
        n_mels: int,
        *,
        window_ms: float = 25.0,
        hop_ms: float = 10.0,
        normalise: str = "utterance",
    ) -> None:
        super().__init__()
        if normalise not in ("utterance", "global", "none"):
            raise ConfigError(f"normalise={normalise!r}: choose utterance, global or none")
        from torchaudio.functional import melscale_fbanks

        self.sample_rate, self.normalise = sample_rate, normalise
        self.window = round(sample_rate * window_ms / 1000)
        self.hop = round(sample_rate * hop_ms / 1000)
        self.n_fft = 1 << (self.window - 1).bit_length()
        if self.hop < 1 or n_mels < 1 or n_mels > self.n_fft // 2:
            raise ConfigError(
                f"n_mels={n_mels}, hop_ms={hop_ms}: at least 1 sample a hop and at most {self.n_fft // 2} bands"
            )
        banks = melscale_fbanks(self.n_fft // 2 + 1, 0.0, sample_rate / 2, n_mels, sample_rate)
        self.register_buffer("banks", banks, persistent=False)
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)
        self.register_buffer("mean", torch.zeros(n_mels))
        self.register_buffer("std", torch.ones(n_mels))

    def frames(self, samples: Tensor) -> Tensor:
        """Number of frames of so many samples: one at each hop, the first at sample 0."""
        return torch.where(samples > 0, (samples - 1) // self.hop + 1, torch.zeros_like(samples))

    def raw(self, audio: Tensor) -> Tensor:
        """Log mel energies before normalisation, [B, S] -> [B, T, n_mels]."""
        half = self.n_fft // 2
        # The last frame is centred on the last multiple of the hop.
        right = (
            half
            if (audio.shape[1] - 1) % self.hop == 0
            else half - (audio.shape[1] - 1) % self.hop + self.hop
        )
        spectrum = torch.stft(
            F.pad(audio, (half, right)),
            self.n_fft,
            self.hop,
            self.window,
            self.hann,
            center=False,
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()
        power = power[..., : (audio.shape[1] - 1) // self.hop + 1].transpose(1, 2)
        return (power @ self.banks).clamp_min(_FLOOR).log()

    @torch.no_grad()
    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features, in float32 also under autocast: energies span ten orders of magnitude.

        Args:
            audio: Samples, [B, S], zeros (or anything) behind each utterance's end.
            lengths: Samples of each utterance, int [B].

        Returns:
            Features [B, T, n_mels], zeros at padding, and the number of valid frames, int [B].
        """
        audio = audio.float().masked_fill(~length_mask(lengths, audio.shape[1]), 0.0)
        if audio.shape[1] == 0:
            return audio.new_zeros(len(audio), 0, len(self.mean)), lengths
        with torch.autocast(audio.device.type, enabled=False):
            x, count = self.raw(audio), self.frames(lengths)
        mask = length_mask(count, x.shape[1])[..., None]
        if self.normalise == "utterance":
            n = count.clamp_min(1)[:, None, None]
            mean = (x * mask).sum(1, keepdim=True) / n
            x = x - mean
            std = ((x.square() * mask).sum(1, keepdim=True) / n).sqrt()
            x = x / (std + 1e-2)
        elif self.normalise == "global":
            x = (x - self.mean) / self.std
        return x.masked_fill(~mask, 0.0), count

    @torch.no_grad()
    def set_statistics(self, features: list[Tensor]) -> None:
        """Take mean and deviation of each band from raw features, a list of [T, n_mels]."""
        x = torch.cat(features)
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp_min(1e-2))


class SpecAugment(nn.Module):
    """Masks bands and stretches of time of training features with zeros, inside each utterance's own length.

    Paper: Park et al., "SpecAugment", arXiv:1904.08779. Differs in: no time warping; bands may be warped before, as a shorter or
    longer vocal tract would (Jaitly and Hinton, "Vocal tract length perturbation", 2013).

    Args:
        freq_masks: Number of band masks.
        freq_width: Largest number of bands in one.
        time_masks: Number of time masks.
        time_ratio: Largest share of the utterance in one, [0, 1].
        freq_warp: Band k is read at k times a factor drawn from 1 - freq_warp .. 1 + freq_warp, [0, 1).
    """

    def __init__(
        self,
        freq_masks: int = 2,
        freq_width: int = 10,
        time_masks: int = 4,
        time_ratio: float = 0.04,
        freq_warp: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= time_ratio <= 1 or not 0 <= freq_warp < 1:
            raise ConfigError(
                f"time_ratio={time_ratio} is outside [0, 1] or freq_warp={freq_warp} outside [0, 1)"
            )
        self.freq_warp = freq_warp
        self.freq_masks, self.freq_width = freq_masks, freq_width
        self.time_masks, self.time_ratio = time_masks, time_ratio

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, n_mels] -> the same with stretches set to zero; identity outside training."""
        if not self.training:
            return x
        b, t, f = x.shape
        if self.freq_warp:
            x = self._warped(x)
        drop = torch.zeros(b, t, f, dtype=torch.bool, device=x.device)
        if self.freq_masks and self.freq_width:
            drop |= self._stretches(x, self.freq_masks, lengths.new_full((b,), f), self.freq_width, f)[
                :, None
            ]
        if self.time_masks and self.time_ratio:
            widths = lengths * self.time_ratio
            drop |= self._stretches(x, self.time_masks, lengths, widths, t)[..., None]
        return x.masked_fill(drop, 0.0)

    def _warped(self, x: Tensor) -> Tensor:
        """Bands read between bands, one factor an utterance; [B, T, n_mels]."""
        place = torch.arange(x.shape[-1], device=x.device)
        factor = 1 + self.freq_warp * (2 * torch.rand(len(x), 1, device=x.device) - 1)
        wanted = (place * factor).clamp_max(x.shape[-1] - 1)  # [B, n_mels]
        return x @ (1 - (place[:, None] - wanted[:, None]).abs()).clamp_min(0)

    @staticmethod
    def _stretches(x: Tensor, count: int, lengths: Tensor, widest: Tensor | int, size: int) -> Tensor:
        """Union of `count` stretches of random width (up to `widest`) and place per row, bool [B, size]."""
        random = torch.rand(2, len(lengths), count, device=x.device)
        widest = torch.as_tensor(widest, device=x.device).reshape(-1, 1)
        width = (random[0] * (widest + 1)).floor()
        start = (random[1] * (lengths[:, None] - width + 1).clamp_min(0)).floor()
        place = torch.arange(size, device=x.device)
        inside = (place >= start[..., None]) & (place < (start + width)[..., None])
        return inside.any(1)


class ConvSubsampling(nn.Module):
    """Strided convolutions that shorten the frames 2, 4 or 8 times, then a linear map to the model's width and a norm.

    Padded frames are zeroed before each layer, so an utterance is encoded alike in every batch.

    Args:
        n_mels: Width of the features.
        dim: Width of the tokens.
        factor: 2, 4 or 8.
        kind: "conv2d" (3 x 3 over time and bands), "conv1d" (3 over time, bands as channels), or "depthwise" (the
            first layer 3 x 3, the others depth-wise 3 x 3 and point-wise, as FastConformer has).
        channels: Channels of the 2-D kinds.
    """

    def __init__(
        self, n_mels: int, dim: int, *, factor: int = 4, kind: str = "conv2d", channels: int = 32
    ) -> None:
        super().__init__()
        if factor not in (2, 4, 8):
            raise ConfigError(f"subsampling={factor}: choose 2, 4 or 8")
        if kind not in ("conv2d", "conv1d", "depthwise"):
            raise ConfigError(f"stem={kind!r}: choose conv2d, conv1d or depthwise")
        self.factor, self.kind = factor, kind
        layers: list[nn.Module] = []
        bands, width = n_mels, n_mels if kind == "conv1d" else 1
        for i in range(factor.bit_length() - 1):
            if kind == "conv1d":
                layers.append(nn.Conv1d(width, dim, 3, stride=2, padding=1))
                width = dim
                continue
            if kind == "depthwise" and i:
                layers.append(
                    nn.Sequential(
                        nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels),
                        nn.Conv2d(channels, channels, 1),
                    )
                )
            else:
                layers.append(nn.Conv2d(width, channels, 3, stride=2, padding=1))
            width, bands = channels, (bands + 1) // 2
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(width if kind == "conv1d" else channels * bands, dim)
        # Without it tokens start at a sixth of the size of the positions added to them, and learning is slow.
        self.norm = nn.LayerNorm(dim)

    def lengths(self, frames: Tensor) -> Tensor:
        """Number of tokens of so many frames."""
        for _ in self.layers:
            frames = (frames + 1) // 2
        return frames

    def forward(self, x: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, n_mels] and valid frames [B] -> tokens [B, M, dim] and their number [B]."""
        flat = self.kind == "conv1d"
        x = x.transpose(1, 2) if flat else x[:, None]
        for layer in self.layers:
            x = F.gelu(layer(x))
            frames = (frames + 1) // 2
            mask = length_mask(frames, x.shape[-1] if flat else x.shape[2])
            x = x * (mask[:, None] if flat else mask[:, None, :, None])
        x = x.transpose(1, 2) if flat else x.transpose(1, 2).flatten(2)
        return self.norm(self.out(x)), frames
