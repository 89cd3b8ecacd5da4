"""Real speech: the English prompts of the telephone exchange Asterisk, one female speaker, 8 kHz, 25 minutes.

Debian packages `asterisk-core-sounds-en-wav` (recordings) and `asterisk-core-sounds-en` (transcripts) hold them; install these or
unpack them anywhere (`dpkg -x`) and name that folder.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from data import register_data
from data.base import check_at_least
from data.errors import DataError
from data.speech_batches import Utterance
from data.speech_files import Row, SpeechFiles

SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"


def prompts(root: str | None) -> list[Row] | None:
    """Recordings with transcripts of at least two words below `root` (the system's own place when None); None if absent."""
    folder = Path(root or "/").expanduser()
    listing = folder / TEXTS
    if not listing.is_file() or not (folder / SOUNDS).is_dir():
        return None
    rows = []
    with gzip.open(listing, "rt", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, colon, text = line.strip().partition(":")
            if not colon or line.startswith(";") or text.strip().startswith("["):
                continue
            path = folder / SOUNDS / f"{key.strip()}.wav"
            if path.is_file() and len(text.split()) >= 2:
                rows.append(Row(key.strip(), path, text.strip(), "allison"))
    return rows


@register_data("asterisk")
class AsteriskData(SpeechFiles):
    """Split by prompt: the same text is never in two splits; the speaker is.

    Args:
        root: Folder that the packages were unpacked in; None for the system's.
        train_size, val_size: Prompts for training and validation, the rest is test.
        common: Options of `data.speech_files.SpeechFiles`.
    """

    licence = "CC BY-SA 3.0, recorded by Allison Smith (Asterisk core sounds)"

    def __init__(
        self,
        *,
        root: str | None = None,
        train_size: int = 240,
        val_size: int = 40,
        max_s: float = 12.0,
        **common: Any,
    ) -> None:
        super().__init__(max_s=max_s, **common)
        check_at_least(1, train_size=train_size, val_size=val_size)
        self.root, self.train_size, self.val_size = root, train_size, val_size

    def utterances(self) -> dict[str, list[Utterance]]:
        """Read transcripts and headers; shuffle texts with the split's seed."""
        rows = prompts(self.root)
        if not rows:
            raise DataError(
                "data 'asterisk': no prompts found; install the Debian packages asterisk-core-sounds-en-wav and "
                "asterisk-core-sounds-en, or unpack them (dpkg -x) and give data.root=<that folder>"
            )
        found = self.usable(rows)
        texts = sorted({u.text for u in found})
        order = np.random.RandomState(self.split_seed).permutation(len(texts))
        place = {texts[i]: n for n, i in enumerate(order)}
        bounds = (self.train_size, self.train_size + self.val_size)
        split: dict[str, list[Utterance]] = {"train": [], "val": [], "test": []}
        for u in found:
            n = place[u.text]
            split["train" if n < bounds[0] else "val" if n < bounds[1] else "test"].append(u)
        return split
