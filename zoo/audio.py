"""Reading recordings: wav, flac and ogg of any rate and channel count to mono float32 at the rate wanted."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from pathlib import Path

import numpy as np

from zoo.errors import DataError


def read_audio(
    path: str | Path, sample_rate: int, *, offset_s: float = 0.0, duration_s: float | None = None
) -> np.ndarray:
    """Read a recording, or a part of it.

    Args:
        path: A wav, flac, ogg or other file that libsndfile knows.
        sample_rate: Rate of the result, Hz.
        offset_s: Where to start, seconds.
        duration_s: How much to read, seconds; to the end when left out.

    Returns:
        Mono samples, float32 [S], channels averaged, resampled where the rates differ.

    Raises:
        DataError: The file is missing or unreadable, holds no sample, or holds NaN or infinite samples.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise DataError(f"no audio file at {path}")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            start = round(offset_s * rate)
            if start >= file.frames > 0:
                raise DataError(
                    f"{path}: offset {offset_s} s lies behind the end ({file.frames / rate:.2f} s)"
                )
            file.seek(start)
            count = -1 if duration_s is None else round(duration_s * rate)
            samples = file.read(count, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise DataError(f"{path} is not readable audio ({error})") from error
    return check_samples(resample(samples.mean(axis=1), rate, sample_rate), str(path))


def check_samples(samples: np.ndarray, name: str) -> np.ndarray:
    """Return `samples` if they are usable.

    Raises:
        DataError: None at all, or NaN or infinite ones.
    """
    if samples.size == 0:
        raise DataError(f"{name} holds no audio")
    if not np.isfinite(samples).all():
        raise DataError(f"{name} holds NaN or infinite samples")
    return samples


def audio_info(path: str | Path) -> tuple[float, int]:
    """Length in seconds and rate in Hz from the file's header, without decoding.

    Raises:
        DataError: The file is missing or its header is unreadable.
    """
    import soundfile

    if not Path(path).is_file():
        raise DataError(f"no audio file at {path}")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise DataError(f"{path} is not readable audio ({error})") from error
    return info.frames / info.samplerate, info.samplerate


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Band-limited resampling of mono float32 samples [S] from `rate` to `wanted` Hz: ceil(S * wanted / rate) samples."""
    if rate == wanted or samples.size == 0:
        return np.ascontiguousarray(samples, dtype=np.float32)
    common = gcd(rate, wanted)
    up, down = wanted // common, rate // common
    if up * down > _LARGEST_TABLE:
        from scipy.signal import resample_poly  # rates with next to no common factor

        return resample_poly(samples.astype(np.float32, copy=False), up, down).astype(np.float32)
    # Outputs come in blocks of `up` for `down` inputs with the same filters: one matrix product, and no import of
    # scipy.signal, which takes seconds in each process that renders or loads speech.
    table, width = _filters(up, down)
    count = -(-samples.size * up // down)
    blocks = -(-count // up)
    padded = np.zeros((blocks - 1) * down + len(table), dtype=np.float32)
    head = samples[: len(padded) - width]
    padded[width : width + len(head)] = head
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(table))[::down]
    return np.ascontiguousarray((windows @ table).reshape(-1)[:count])


_LARGEST_TABLE = 4_000_000
_ZERO_CROSSINGS = 16
_ROLL_OFF = 0.95


@lru_cache(maxsize=16)
def _filters(up: int, down: int) -> tuple[np.ndarray, int]:
    """Windowed-sinc low-pass filters, float32 [inputs of a block, up], and the inputs before the block's first."""
    cutoff = _ROLL_OFF * min(1.0, up / down)
    width = int(np.ceil(_ZERO_CROSSINGS / cutoff))
    at = np.arange(down + 2 * width)[:, None] - width - np.arange(up) * (down / up)
    window = np.where(np.abs(at) < width, np.cos(np.pi * at / (2 * width)) ** 2, 0.0)
    return (cutoff * np.sinc(cutoff * at) * window).astype(np.float32), width
