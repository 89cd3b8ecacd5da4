"""LibriSpeech and corpora laid out like it: <split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac and .trans.txt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import register_data
from data.errors import DataError
from data.speech_batches import Utterance
from data.speech_files import Row, SpeechFiles, existing_folder

_SUFFIXES = (".flac", ".wav", ".ogg")
_PREFIXES = {"train": "train", "val": "dev", "test": "test"}


@register_data("librispeech")
class LibriSpeechData(SpeechFiles):
    """A LibriSpeech tree; Mini LibriSpeech and LibriTTS trees with transcripts of this form too.

    Args:
        root: The folder that holds train-clean-100, dev-clean, test-clean ...
        train, val, test: Names of the splits' folders; None for all that start with train, dev, test. Where there are none
            for validation or test, speakers are set aside.
        common: Options of `data.speech_files.SpeechFiles`.
    """

    licence = "LibriSpeech: CC BY 4.0 (Panayotov et al., ICASSP 2015)"

    def __init__(
        self,
        *,
        root: str | None = None,
        train: Sequence[str] | None = None,
        val: Sequence[str] | None = None,
        test: Sequence[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = root
        self.folders = {"train": train, "val": val, "test": test}

    def utterances(self) -> dict[str, list[Utterance]]:
        """Read the transcripts, then the recordings' headers."""
        root = existing_folder(
            "librispeech", self.root, "folder with train-clean-100, dev-clean, test-clean ..."
        )
        present = sorted(p.name for p in root.iterdir() if p.is_dir())
        found = {}
        for split, wanted in self.folders.items():
            names = [n for n in present if n.startswith(_PREFIXES[split])] if wanted is None else list(wanted)
            for name in names:
                if name not in present:
                    raise DataError(
                        f"data.{split}: no folder {name!r} in {root}; there are {', '.join(present)}"
                    )
            found[split] = self.usable([row for name in names for row in self._rows(root / name)])
        if not found["train"]:
            raise DataError(
                f"no usable training utterance in {root}{self._first_reasons()}; folders there: {', '.join(present)}"
            )
        return self.complete(found)

    def _rows(self, folder: Path) -> list[Row]:
        rows = []
        for listing in sorted(folder.rglob("*.trans.txt")):
            for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
                name, _, text = line.strip().partition(" ")
                if name:
                    rows.append(Row(name, _recording(listing.parent, name), text, name.split("-")[0]))
        return rows


def _recording(folder: Path, name: str) -> Path:
    candidates = [folder / f"{name}{suffix}" for suffix in _SUFFIXES]
    return next((p for p in candidates if p.is_file()), candidates[0])
