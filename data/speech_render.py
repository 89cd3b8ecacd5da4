"""Speaking sentences with espeak-ng, through the shared library of the carrier `espeak`.

The synthesiser keeps state between calls: the same sentence twice gives slightly different waves, while a whole list
repeats exactly in a fresh process. So a corpus is cut into fixed shards, and each shard is one process that speaks its
list in order; how many run at once changes nothing. `python -m data.speech_render JOB.json OUT.npz` is that process.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data import carriers
from data.errors import DataError
from zoo.audio import resample

RATE_HZ = 22050  # what the synthesiser makes
SHARDS = 8  # part of the corpus's identity: a shard boundary resets the synthesiser
LONGEST_VOICE_PATH = 150  # the library keeps its paths in buffers of about 160 bytes
TAIL_S = 0.06  # silence kept behind the last sound
_QUIET = 64  # of 32767
_SYNCHRONOUS = 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_WORD, _END = 1, 5


@dataclass(frozen=True)
class Line:
    """One sentence to speak.

    Args:
        text: What the synthesiser reads.
        voice: Its voice, for example "en-us+f2".
        words_per_minute: Speaking rate, 80 .. 450.
        pitch: 0 .. 99.
        pitch_range: 0 .. 99; 50 is the voice's own, 0 monotone.
    """

    text: str
    voice: str
    words_per_minute: int = 160
    pitch: int = 50
    pitch_range: int = 50


@dataclass(frozen=True)
class Spoken:
    """A rendered sentence: int16 samples and where each word of the text starts, in seconds."""

    samples: np.ndarray
    word_starts_s: np.ndarray


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class Synthesiser:
    """The library, loaded once in a process."""

    def __init__(self, library: str, voices: str) -> None:
        self._chunks: list[np.ndarray] = []
        self._events: list[tuple[int, int]] = []
        self._library = ctypes.CDLL(library)
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, voices.encode(), 0)
        if rate != RATE_HZ:
            raise DataError(f"espeak-ng could not be started with the voices in {voices} (status {rate})")
        self._callback = _CALLBACK(self._receive)  # kept: the library holds only a pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: ctypes.POINTER, count: int, events: ctypes.POINTER) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events and events[i].type:
            if events[i].type == _WORD:
                self._events.append((events[i].text_position - 1, events[i].audio_position_ms))
            i += 1
        return 0

    def say(self, line: Line) -> Spoken:
        """Speak one line.

        Raises:
            DataError: A voice that does not exist (the library would silently keep the former one), or no sound.
        """
        self._chunks, self._events = [], []
        status = self._library.espeak_SetVoiceByName(line.voice.encode())
        if status:
            raise DataError(f"espeak-ng has no voice {line.voice!r} (status {status})")
        for parameter, value in (
            (_RATE, line.words_per_minute),
            (_PITCH, line.pitch),
            (_RANGE, line.pitch_range),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)
        text = line.text.encode() + b"\0"
        self._library.espeak_Synth(text, len(text), 0, 1, 0, 1, None, None)
        self._library.espeak_Synchronize()
        if not self._chunks:
            raise DataError(f"espeak-ng made no sound for {line.text!r} with voice {line.voice!r}")
        return Spoken(np.concatenate(self._chunks), self._word_starts(line.text))

    def _word_starts(self, text: str) -> np.ndarray:
        """First event within each word; a word without one (spoken together with the former) takes the former's."""
        starts, position, last = [], 0, 0
        for word in text.split():
            begin = text.index(word, position)
            position = begin + len(word)
            found = [ms for place, ms in self._events if begin <= place < position]
            last = found[0] if found else last
            starts.append(last / 1000)
        return np.asarray(starts, dtype=np.float32)


def library_paths() -> tuple[str, str]:
    """The shared library and the folder above its voices, unpacked from the carrier into the cache."""
    folder = carriers.cache_dir() / "espeak"
    if len(str(folder / "espeakng_loader" / "espeak-ng-data")) > LONGEST_VOICE_PATH:
        folder = Path(tempfile.gettempdir()) / f"espeak-ng-{os.getuid()}"
    files = carriers.unpack("espeak", "espeakng_loader/", folder)
    libraries = [p for p in files if p.name.startswith(("libespeak", "espeak-ng.dll")) and not p.is_dir()]
    libraries = [p for p in libraries if p.stat().st_size > 10_000] or libraries
    if not libraries:
        raise DataError("the carrier 'espeak' holds no shared library for this platform")
    return str(libraries[0]), str(folder / "espeakng_loader" / "espeak-ng-data")


def finish(spoken: Spoken, sample_rate: int) -> Spoken:
    """To the wanted rate, without the silence that the synthesiser leaves at the end."""
    wave = resample(spoken.samples.astype(np.float32), RATE_HZ, sample_rate)
    loud = np.flatnonzero(np.abs(wave) > _QUIET)
    end = int(loud[-1] + TAIL_S * sample_rate) if len(loud) else len(wave)
    return Spoken(np.clip(np.rint(wave[:end]), -32768, 32767).astype(np.int16), spoken.word_starts_s)


def render(
    lines: Sequence[Line], *, sample_rate: int = RATE_HZ, processes: int | None = None
) -> list[Spoken]:
    """Speak `lines`; the result depends on them and their order alone.

    Args:
        lines: What to say, in order.
        sample_rate: Of the result, Hz.
        processes: How many shards run at once; one per core when left out.
    """
    library, voices = library_paths()
    bounds = np.linspace(0, len(lines), SHARDS + 1).astype(int)
    with tempfile.TemporaryDirectory(prefix="zoo-render-") as scratch:
        jobs = []
        for i in range(SHARDS):
            part = lines[bounds[i] : bounds[i + 1]]
            if part:
                job = Path(scratch) / f"{i}.json"
                content = {
                    "library": library,
                    "voices": voices,
                    "sample_rate": sample_rate,
                    "lines": [asdict(x) for x in part],
                }
                job.write_text(json.dumps(content))
                jobs.append(job)
        with ThreadPoolExecutor(processes or os.cpu_count() or 1) as pool:
            return [spoken for part in pool.map(_run_shard, jobs) for spoken in part]


def _run_shard(job: Path) -> list[Spoken]:
    out = job.with_suffix(".npz")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-m", "data.speech_render", str(job), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode or not out.is_file():
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise DataError(f"rendering speech with espeak-ng failed: {lines[-1]}")
    with np.load(out) as arrays:
        samples = np.split(arrays["samples"], arrays["sample_ends"][:-1])
        starts = np.split(arrays["word_starts_s"], arrays["word_ends"][:-1])
    return [Spoken(s, w) for s, w in zip(samples, starts, strict=True)]


def _main(job: str, out: str) -> None:
    spec = json.loads(Path(job).read_text())
    voice = Synthesiser(spec["library"], spec["voices"])
    spoken = [finish(voice.say(Line(**line)), spec["sample_rate"]) for line in spec["lines"]]
    np.savez(
        out,
        samples=np.concatenate([s.samples for s in spoken]),
        sample_ends=np.cumsum([len(s.samples) for s in spoken]),
        word_starts_s=np.concatenate([s.word_starts_s for s in spoken]),
        word_ends=np.cumsum([len(s.word_starts_s) for s in spoken]),
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
