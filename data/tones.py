"""Strings of tone pairs: a recogniser's smallest task, generated in a second, for trials and tests without any fetch."""

from __future__ import annotations

from typing import Any

import numpy as np

from data import register_data
from data.base import check_at_least
from data.sampler import derive_seed
from data.speech_base import SpeechData
from data.speech_batches import Utterance

SYMBOLS = "abcdefghijkl"
LOW_HZ = (500, 650, 850, 1100)
HIGH_HZ = (1400, 1800, 2300)
GAP_S = 0.02


@register_data("tones")
class TonesData(SpeechData):
    """Each of 12 symbols is one of four low and one of three high tones sounding together for 60 to 120 ms.

    Args:
        train_size, val_size, test_size: Numbers of strings.
        shortest, longest: Symbols in a string.
        snr_db: Ratio of tones to white noise.
        common: Options of `data.speech_base.SpeechData`.
    """

    licence = "generated"

    def __init__(
        self,
        *,
        sample_rate: int = 8000,
        train_size: int = 512,
        val_size: int = 64,
        test_size: int = 64,
        shortest: int = 3,
        longest: int = 10,
        snr_db: float = 20.0,
        **common: Any,
    ) -> None:
        super().__init__(sample_rate=sample_rate, **common)
        check_at_least(1, train_size=train_size, val_size=val_size, test_size=test_size, shortest=shortest)
        check_at_least(shortest, longest=longest)
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.shortest, self.longest, self.snr_db = shortest, longest, snr_db
        self._waves: list[np.ndarray] = []

    def utterances(self) -> dict[str, list[Utterance]]:
        """Make every string and its sound."""
        self._waves = []
        taken: set[str] = set()
        found: dict[str, list[Utterance]] = {}
        for number, split in enumerate(("test", "val", "train")):
            rng = np.random.default_rng(derive_seed(self.split_seed, number))
            found[split] = []
            while len(found[split]) < self.sizes[split]:
                count = int(rng.integers(self.shortest, self.longest + 1))
                text = "".join(rng.choice(list(SYMBOLS), count))
                if text in taken and len(taken) < len(SYMBOLS) ** self.shortest // 2:
                    continue
                taken.add(text)
                wave, starts = self._sound(text, rng)
                name = f"{split}-{len(found[split]):05d}"
                found[split].append(
                    Utterance(
                        name, text, len(wave) / self.sample_rate, place=len(self._waves), word_starts_s=starts
                    )
                )
                self._waves.append(wave)
        return found

    def _sound(self, text: str, rng: np.random.Generator) -> tuple[np.ndarray, tuple[float, ...]]:
        gap = np.zeros(round(GAP_S * self.sample_rate))
        parts, start = [gap], GAP_S
        for symbol in text:
            seconds = rng.uniform(0.06, 0.12)
            t = np.arange(round(seconds * self.sample_rate)) / self.sample_rate
            low, high = divmod(SYMBOLS.index(symbol), len(HIGH_HZ))
            phases = rng.uniform(0, 2 * np.pi, 2)
            tone = np.sin(2 * np.pi * LOW_HZ[low] * t + phases[0]) + np.sin(
                2 * np.pi * HIGH_HZ[high] * t + phases[1]
            )
            parts += [0.2 * tone * np.hanning(len(t)) ** 0.25, gap]
        wave = np.concatenate(parts)
        noise = rng.standard_normal(len(wave)) * np.sqrt(np.mean(wave**2)) * 10 ** (-self.snr_db / 20)
        return (wave + noise).astype(np.float32), (start,)

    def samples(self, utterance: Utterance) -> np.ndarray:
        return self._waves[utterance.place]
