"""Recordings to text with the time of each word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.audio import check_samples, read_audio, resample
from zoo.decoding import beam_search, ctc_greedy, greedy
from zoo.decoding.align import align_ctc, word_spans
from zoo.errors import ConfigError
from zoo.predict import Predictor

SILENCE = 1e-4  # largest sample of a stretch in which nothing is said
SHORTEST_S = 0.02
_SPECIAL = 3


class TaskPredictor(Predictor):
    """Transcribes recordings given as paths or as (samples, rate)."""

    suffixes = (".wav", ".flac", ".ogg", ".oga", ".aiff", ".aif", ".au", ".mp3", ".opus")

    def preprocess(self, raw: Any) -> Tensor:
        """A path, or a pair of samples [S] or [S, channels] and their rate, to [1, S] at the model's rate.

        Raises:
            DataError: Unreadable, empty, or with NaN samples.
        """
        rate = self.preprocessing["sample_rate"]
        if isinstance(raw, (str, Path)):
            samples = read_audio(raw, rate)
        else:
            wave, given = raw
            wave = np.asarray(wave, dtype=np.float32)
            wave = wave.mean(axis=1) if wave.ndim == 2 else wave
            samples = check_samples(resample(wave, int(given), rate), "the recording")
        return torch.from_numpy(samples)[None]

    @torch.no_grad()
    def predict(self, raw: Any, *, beam: int = 1, ctc_weight: float = 0.3) -> dict[str, Any]:
        """Transcribe; recordings longer than the training's are cut at quiet places.

        Args:
            raw: See `preprocess`.
            beam: Hypotheses kept; 1 is greedy.
            ctc_weight: Share of CTC scores when `beam` > 1.

        Returns:
            `{"text", "duration_s", "words": [{"word", "start_s", "end_s"}, ...], "chunks"}`.
        """
        audio = self.preprocess(raw)
        rate = self.preprocessing["sample_rate"]
        longest = round(self.preprocessing.get("chunk_s", self.preprocessing["max_s"]) * rate)
        words: list[dict[str, Any]] = []
        bounds = quiet_cuts(audio[0].numpy(), rate, longest)
        for begin, end in bounds:
            words += self._chunk(audio[:, begin:end], begin / rate, beam, ctc_weight)
        return {
            "text": " ".join(w["word"] for w in words),
            "duration_s": round(audio.shape[1] / rate, 3),
            "words": words,
            "chunks": len(bounds),
        }

    def _chunk(self, audio: Tensor, offset_s: float, beam: int, ctc_weight: float) -> list[dict[str, Any]]:
        rate = self.preprocessing["sample_rate"]
        if audio.shape[1] < SHORTEST_S * rate or float(audio.abs().max()) < SILENCE:
            return []
        memory, lengths = self.model.encode(audio, torch.tensor([audio.shape[1]]))
        if not self.model.has_decoder:
            tokens = ctc_greedy(self.model.ctc_logits(memory), lengths * self.model.ctc_per_place)[0]
        elif beam > 1:
            tokens = beam_search(self.model, memory, lengths, beam=beam, ctc_weight=ctc_weight).tokens[0]
        else:
            tokens = greedy(self.model, memory, lengths).tokens[0]
        pieces = [self.preprocessing["pieces"][t] for t in tokens if t >= _SPECIAL]
        place_s = self.model.front.hop * self.model.stem.factor / rate
        try:
            spans = align_ctc(self.model, memory, tokens)
        except ConfigError:  # more tokens than places: spread them evenly
            step = memory.shape[1] / max(1, len(tokens))
            spans = [(int(i * step), int((i + 1) * step)) for i in range(len(tokens))]
        return [
            {
                "word": word,
                "start_s": round(offset_s + first * place_s, 3),
                "end_s": round(offset_s + (last + 1) * place_s, 3),
            }
            for word, first, last in word_spans(pieces, spans)
        ]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        stamps = " ".join(f"{w['word']}[{w['start_s']:.2f}-{w['end_s']:.2f}]" for w in prediction["words"])
        name = raw if isinstance(raw, (str, Path)) else "recording"
        return f"{name}: {prediction['text'] or '(nothing said)'}" + (f"\n  {stamps}" if stamps else "")


def quiet_cuts(
    samples: np.ndarray, rate: int, longest: int, *, frame_s: float = 0.02
) -> list[tuple[int, int]]:
    """Cut a recording into parts of at most `longest` samples, each at the quietest place of its second half.

    Args:
        samples: float32 [S].
        rate: Hz.
        longest: Most samples in a part.
        frame_s: Length of the stretches whose loudness is compared.

    Returns:
        (begin, end) of each part, in order, without gaps.
    """
    frame = max(1, round(frame_s * rate))
    energy = np.add.reduceat(samples.astype(np.float64) ** 2, np.arange(0, len(samples), frame))
    smooth = np.convolve(energy, np.ones(5) / 5, mode="same")
    bounds, begin = [], 0
    while len(samples) - begin > longest:
        low, high = begin + longest // 2, begin + longest
        window = smooth[low // frame : max(high // frame, low // frame + 1)]
        # The last of equally quiet places, so that parts stay long.
        best = len(window) - 1 - int(np.argmin(window[::-1]))
        end = min(high, max(begin + 1, (low // frame + best) * frame + frame // 2))
        bounds.append((begin, end))
        begin = end
    return [*bounds, (begin, len(samples))]
