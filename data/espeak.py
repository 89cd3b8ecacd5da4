"""Synthetic speech: sentences with names, numbers and spelled strings, spoken by espeak-ng (from the carrier ``espeak``).

The corpus is rendered once, in a fixed order, into the cache: int16 samples at the wanted rate, and their hash, which results record.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from data import carriers, register_data, speech_text
from data.asterisk import AsteriskData, prompts
from data.base import check_at_least
from data.carriers import cache_dir, write_atomic
from data.errors import DataError
from data.speech_base import SpeechData
from data.speech_batches import Utterance
from data.speech_render import SHARDS, Line, render

VERSION = 5  # raise it when the texts, the voices or the treatment of the samples change
ACCENTS = ("en-us", "en-gb-x-rp", "en-us-nyc")
# Left out: f2, f3, f5, Alicia, sandro, victor, whose breath noise differs from run to run.
TRAIN_VARIANTS = (
    "m1 m2 m3 m4 m6 m7 f1 Alex Andrea Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario Michael "
    "Mike Reed Storm adam anika antonio belinda benjamin boris caleb david edward gustave ian john linda max michel miguel "
    "pablo paul pedro robert steph"
).split()
LONGEST_REAL_S = 12.0
TEST_VARIANTS = "m5 m8 f4 Andy Gene2 marcelo quincy rob shelby travis".split()  # never heard in training


@register_data("espeak")
class EspeakData(SpeechData):
    """Unseen sentences by heard voices for validation, unseen sentences by unseen voices for the test.

    Args:
        batch_size: Utterances per step and process.
        train_size: Training utterances.
        val_size: Validation utterances.
        test_size: Test utterances.
        rates: Slowest and fastest speaking rate, words per minute.
        real_root: Where Asterisk's prompts were unpacked, see `data.asterisk`; None looks in the system's place. Where they are
            found they become a further test split, "real".
        common: Options of `data.speech_base.SpeechData`.
    """

    licence = "generated with espeak-ng (GPL-3.0); the recordings are the user's own"

    def __init__(
        self,
        *,
        batch_size: int = 16,
        train_size: int = 10000,
        val_size: int = 200,
        test_size: int = 400,
        rates: tuple[int, int] = (105, 165),
        real_root: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **common)
        check_at_least(1, train_size=train_size, val_size=val_size, test_size=test_size)
        if len(rates) != 2 or not 80 <= rates[0] <= rates[1] <= 450:
            raise DataError(f"data.rates={list(rates)}: give slowest and fastest, 80 .. 450 words per minute")
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.rates = (int(rates[0]), int(rates[1]))
        self.real_root = real_root
        self._store = np.empty(0, dtype=np.int16)
        self._ends = np.empty(0, dtype=np.int64)

    def lines(self) -> dict[str, list[tuple[str, Line]]]:
        """Transcript and what to say, by split; test voices and test sentences occur nowhere else."""
        rng = random.Random(1000 + self.split_seed)
        taken: set[str] = set()
        plan = {}
        for number, split in enumerate(
            ("test", "val", "train")
        ):  # test first: its texts depend on no other size
            variants = TEST_VARIANTS if split == "test" else TRAIN_VARIANTS
            texts = speech_text.sentences(self.sizes[split], 10 * self.split_seed + number, taken)
            plan[split] = [
                (
                    written,
                    Line(
                        said,
                        f"{rng.choice(ACCENTS)}+{variants[i % len(variants)]}",
                        rng.randint(*self.rates),
                        rng.randint(30, 70),
                        rng.randint(30, 70),
                    ),
                )
                for i, (written, said) in enumerate(texts)
            ]
        return plan

    def _paths(self) -> tuple[Path, Path, str]:
        plan = self.lines()
        digest = hashlib.sha256(
            json.dumps(
                [VERSION, SHARDS, self.sample_rate, sorted(carriers.source("espeak").files.values())]
                + [[w, line.__dict__] for split in ("train", "val", "test") for w, line in plan[split]]
            ).encode()
        ).hexdigest()[:16]
        folder = cache_dir() / "espeak-corpus"
        return folder / f"{digest}.npy", folder / f"{digest}.json", digest

    def fetch(self) -> None:
        """Render the corpus into the cache, unless it is there."""
        samples, index, _ = self._paths()
        try:
            samples.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(samples.with_suffix(".lock")):
                if not (samples.is_file() and index.is_file()):
                    self._render(samples, index)
        except OSError as error:
            raise DataError(
                f"data {self.name!r}: cannot write to the cache {cache_dir()} ({error}); set ZOO_DATA to a folder "
                "with free space that you may write to"
            ) from error

    def _render(self, samples: Path, index: Path) -> None:
        plan = self.lines()
        entries = [(split, *entry) for split in ("train", "val", "test") for entry in plan[split]]
        spoken = render([line for _, _, line in entries], sample_rate=self.sample_rate)
        store = np.concatenate([s.samples for s in spoken])
        rows = [
            {
                "split": split,
                "text": written,
                "voice": line.voice,
                "rate": line.words_per_minute,
                "word_starts_s": [round(float(t), 3) for t in s.word_starts_s],
            }
            for (split, written, line), s in zip(entries, spoken, strict=True)
        ]
        scratch = samples.with_name(f".{samples.stem}-writing.npy")
        np.save(scratch, store)
        scratch.replace(samples)
        content = {
            "ends": np.cumsum([len(s.samples) for s in spoken]).tolist(),
            "sha256": hashlib.sha256(store.tobytes()).hexdigest(),
            "rows": rows,
        }
        write_atomic(index, json.dumps(content).encode())

    def utterances(self) -> dict[str, list[Utterance]]:
        """Open the rendered corpus."""
        self.fetch()
        samples, index, digest = self._paths()
        try:
            content = json.loads(index.read_text())
            self._store = np.load(samples, mmap_mode="r")
            self._ends = np.asarray(content["ends"], dtype=np.int64)
            if len(self._store) != self._ends[-1]:
                raise ValueError(f"{len(self._store)} samples, {self._ends[-1]} expected")
        except (OSError, ValueError) as error:
            raise DataError(
                f"the rendered corpus {samples} is damaged ({error}); delete it to render it again"
            ) from error
        self.source = f"espeak-ng corpus {digest}, samples {content['sha256'][:16]}"
        found: dict[str, list[Utterance]] = {"train": [], "val": [], "test": [], **self._real()}
        begins = np.concatenate(([0], self._ends[:-1]))
        for place, (row, begin, end) in enumerate(zip(content["rows"], begins, self._ends, strict=True)):
            found[row["split"]].append(
                Utterance(
                    id=f"{place:06d}-{row['voice']}",
                    text=self.clean(row["text"]),
                    duration_s=float(end - begin) / self.sample_rate,
                    speaker=row["voice"],
                    place=place,
                    word_starts_s=tuple(row["word_starts_s"]),
                )
            )
        return found

    def _real(self) -> dict[str, list[Utterance]]:
        rows = prompts(self.real_root)
        if rows is None:
            if self.real_root:
                raise DataError(
                    f"data.real_root={self.real_root}: no Asterisk prompts there, see data/asterisk.py"
                )
            return {}
        reader = AsteriskData(sample_rate=self.sample_rate, normaliser=self.normaliser)
        items = reader.usable(rows)
        self.skipped.update(reader.skipped)
        return {"real": [u for u in items if u.duration_s <= LONGEST_REAL_S]}

    def samples(self, utterance: Utterance) -> np.ndarray:
        if utterance.place < 0:
            return super().samples(utterance)
        begin = self._ends[utterance.place - 1] if utterance.place else 0
        return self._store[begin : self._ends[utterance.place]].astype(np.float32) / 32768
