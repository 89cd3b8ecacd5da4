"""Changes of training recordings: noise, speed, loudness; a function of a key alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.errors import DataError
from data.sampler import derive_seed
from zoo.audio import resample


class WaveAugment:
    """Plays faster or slower, adds noise, changes loudness.

    Args:
        sample_rate: Hz.
        noise_snr_db: Signal to noise ratio, drawn from [low, high]; None: no noise.
        noise_share: Share of recordings that get noise.
        speeds: Factors of speed, one drawn for each recording; pitch moves along.
        gain_db: Largest change of loudness either way.
    """

    def __init__(
        self,
        sample_rate: int,
        *,
        noise_snr_db: Sequence[float] | None = None,
        noise_share: float = 0.5,
        speeds: Sequence[float] = (1.0,),
        gain_db: float = 0.0,
    ) -> None:
        if noise_snr_db is not None and (len(noise_snr_db) != 2 or noise_snr_db[0] > noise_snr_db[1]):
            raise DataError(f"data.noise_snr_db={noise_snr_db}: give [low, high] in dB, or null")
        if not speeds or not all(0.5 <= s <= 2 for s in speeds):
            raise DataError(f"data.speeds={list(speeds)}: give factors between 0.5 and 2")
        if not 0 <= noise_share <= 1 or gain_db < 0:
            raise DataError(
                f"data.noise_share={noise_share} must lie in [0, 1], data.gain_db={gain_db} be at least 0"
            )
        self.sample_rate, self.noise_snr_db, self.noise_share = sample_rate, noise_snr_db, noise_share
        self.speeds, self.gain_db = list(speeds), gain_db

    @property
    def active(self) -> bool:
        """Whether anything can change."""
        return self.noise_snr_db is not None or self.speeds != [1.0] or self.gain_db > 0

    @property
    def stretch(self) -> float:
        """Longest that a recording can become, over its length; at least 1, and as `__call__` rounds speeds."""
        return max(1.0, *(100 / round(100 * s) for s in self.speeds))

    def __call__(self, wave: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
        """Samples float32 [S] and a key such as (seed, epoch, index) -> new samples."""
        if not self.active or not wave.size:
            return wave
        rng = np.random.default_rng(derive_seed(*key))
        speed = self.speeds[rng.integers(len(self.speeds))]
        if speed != 1.0:
            # Resampled to fewer samples and played at the old rate: 1/100 steps keep the filter small.
            wave = resample(wave, round(100 * speed), 100)
        if self.noise_snr_db is not None and rng.random() < self.noise_share:
            wave = wave + self._noise(wave, rng)
        if self.gain_db:
            wave = wave * np.float32(10 ** (rng.uniform(-self.gain_db, self.gain_db) / 20))
        return np.ascontiguousarray(wave, dtype=np.float32)

    def _noise(self, wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        noise = rng.standard_normal(len(wave), dtype=np.float32)
        if rng.random() < 0.5:  # brown: most of its power at low frequencies, as hum and traffic have
            spectrum = np.fft.rfft(noise)
            noise = np.fft.irfft(spectrum / np.maximum(1, np.arange(len(spectrum)) / 4), len(wave))
        snr = rng.uniform(*self.noise_snr_db)
        scale = np.sqrt(np.mean(wave**2) / (np.mean(noise**2) + 1e-12)) * 10 ** (-snr / 20)
        return (noise * scale).astype(np.float32)
