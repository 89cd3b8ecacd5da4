"""Lists of recordings on disk: headers, defects, splits by speaker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.base import check_range
from data.errors import DataError
from data.speech_base import SpeechData
from data.speech_batches import Utterance
from zoo.audio import audio_info, read_audio
from zoo.errors import DataError as AudioError


class Row(NamedTuple):
    """One line of a list: what to say about a recording before it is looked at."""

    id: str
    path: Path
    text: str
    speaker: str = ""
    offset_s: float = 0.0
    duration_s: float | None = None


class SpeechFiles(SpeechData):
    """Base of modules that read recordings from disk.

    Args:
        check: "full" reads every recording once and leaves out those with NaN samples or no sound at all; "header" looks at
            headers only, so that such recordings are left out of their batches instead.
        val_share, test_share: Of the speakers (of the utterances where none is known), for lists without own splits.
        common: Options of `data.speech_base.SpeechData`.
    """

    def __init__(
        self, *, check: str = "header", val_share: float = 0.1, test_share: float = 0.1, **common: Any
    ) -> None:
        super().__init__(**common)
        if check not in ("full", "header"):
            raise DataError(f"data.check={check!r}: choose full or header")
        check_range(0, 0.5, val_share=val_share, test_share=test_share)
        self.check, self.val_share, self.test_share = check, val_share, test_share

    def usable(self, rows: Sequence[Row]) -> list[Utterance]:
        """The rows whose recordings exist and can be read; the others go into `skipped`."""
        found = []
        for row in rows:
            try:
                utterance = self._inspect(row)
            except AudioError as error:
                self.skip(row.id, str(error))
                continue
            if not self.rejected(utterance):
                found.append(utterance)
        return found

    def _inspect(self, row: Row) -> Utterance:
        if (
            "\ufffd" in row.text
        ):  # what a byte of another encoding was read as; normalising would drop it in silence
            raise AudioError(f"the text {row.text!r} is no UTF-8")
        length, _ = audio_info(row.path)
        rest = length - row.offset_s
        duration = rest if row.duration_s is None else min(row.duration_s, rest)
        if duration <= 0:
            raise AudioError(f"{row.path} holds no audio behind {row.offset_s} s")
        if self.check == "full" and duration <= self.max_s:
            read_audio(row.path, self.sample_rate, offset_s=row.offset_s, duration_s=duration)
        return Utterance(
            id=row.id,
            text=self.clean(row.text),
            duration_s=duration,
            speaker=row.speaker,
            path=str(row.path),
            offset_s=row.offset_s,
        )

    def divide(self, items: Sequence[Utterance], shares: dict[str, float]) -> dict[str, list[Utterance]]:
        """Split by speaker, so that no voice is in two splits; by utterance where fewer than three speakers are known.

        Args:
            items: Utterances.
            shares: Share of each split but "train", which gets the rest.
        """
        speakers = {u.speaker for u in items}
        key: Callable[[Utterance], str] = (lambda u: u.speaker) if len(speakers) >= 3 else (lambda u: u.id)
        groups = sorted({key(u) for u in items})
        order = np.random.RandomState(self.split_seed).permutation(len(groups))
        names, begin = {}, 0
        for split, share in shares.items():
            count = max(1, round(share * len(groups)))
            names.update({groups[i]: split for i in order[begin : begin + count]})
            begin += count
        found: dict[str, list[Utterance]] = {"train": [], **{split: [] for split in shares}}
        for u in items:
            found[names.get(key(u), "train")].append(u)
        return found

    def complete(self, found: dict[str, list[Utterance]]) -> dict[str, list[Utterance]]:
        """Cut missing validation and test splits from the training split."""
        shares = {"val": self.val_share, "test": self.test_share}
        missing = {split: share for split, share in shares.items() if not found.get(split)}
        return {**found, **self.divide(found.get("train", []), missing)} if missing else found


def existing_folder(name: str, root: str | None, what: str) -> Path:
    """The folder that a user named.

    Raises:
        DataError: Not given, or not there.
    """
    if not root:
        raise DataError(f"data {name!r}: give data.root=<{what}>")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"data {name!r}: no folder at data.root={folder}; {what} is expected there")
    return folder
