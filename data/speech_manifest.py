"""Lists of recordings: JSON lines as NeMo writes them, CSV and TSV tables as Common Voice has them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data import register_data
from data.errors import DataError
from data.speech_batches import Utterance
from data.speech_files import Row, SpeechFiles

_PATH_KEYS = ("audio_filepath", "audio", "path", "audio_path", "file", "wav", "filename")
_TEXT_KEYS = ("text", "sentence", "transcription", "transcript")
_SPEAKER_KEYS = ("speaker", "client_id", "speaker_id")


@register_data("speech_manifest")
class SpeechManifestData(SpeechFiles):
    """Manifests: .jsonl or .json (one object a line), .csv, .tsv.

    Paths of recordings are relative to their manifest (or to `audio_root`). Recognised keys: audio_filepath, audio, path, file,
    wav; text, sentence, transcription, transcript; duration, offset; speaker, client_id.

    Args:
        train: Manifest of the training split.
        val, test: Manifests of the others; None sets speakers of the training manifest aside.
        audio_root: Folder that relative paths start from; None for the manifest's folder (and its "clips" folder).
        common: Options of `data.speech_files.SpeechFiles`.
    """

    def __init__(
        self,
        *,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        audio_root: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.files = {"train": train, "val": val, "test": test}
        self.audio_root = audio_root

    def utterances(self) -> dict[str, list[Utterance]]:
        """Read the manifests, then the recordings' headers."""
        if not self.files["train"]:
            raise DataError("data 'speech_manifest': give data.train=<manifest .jsonl, .csv or .tsv>")
        found = {
            split: self.usable(list(self._rows(Path(file).expanduser()))) if file else []
            for split, file in self.files.items()
        }
        if not found["train"]:
            raise DataError(f"no usable utterance in {self.files['train']}{self._first_reasons()}")
        return self.complete(found)

    def _rows(self, manifest: Path) -> Iterator[Row]:
        if not manifest.is_file():
            raise DataError(f"no manifest at {manifest}")
        folder = Path(self.audio_root).expanduser() if self.audio_root else manifest.parent
        for number, entry in enumerate(_entries(manifest), 1):
            name = f"{manifest.name}:{number}"
            if isinstance(entry, str):
                self.skip(name, entry)
                continue
            row = self._row(name, entry, folder)
            if row is not None:
                yield row

    def _row(self, name: str, entry: Mapping[str, Any], folder: Path) -> Row | None:
        path, text = _first(entry, _PATH_KEYS), _first(entry, _TEXT_KEYS)
        if path is None or text is None:
            missing = "an audio path" if path is None else "a text"
            self.skip(name, f"has no {missing} (keys: {', '.join(map(str, entry))})")
            return None
        try:
            offset = float(entry.get("offset") or 0)
            duration = float(entry["duration"]) if entry.get("duration") else None
        except (TypeError, ValueError):
            self.skip(
                name, f"offset or duration is no number ({entry.get('offset')!r}, {entry.get('duration')!r})"
            )
            return None
        file = folder / str(path)
        if not file.is_file() and (folder / "clips" / str(path)).is_file():
            file = folder / "clips" / str(path)
        return Row(name, file, str(text), str(_first(entry, _SPEAKER_KEYS) or ""), offset, duration)


def _entries(manifest: Path) -> Iterator[Mapping[str, Any] | str]:
    """Entries of a manifest; a reason instead of an entry where a line is malformed."""
    if manifest.suffix in (".jsonl", ".json", ".ndjson"):
        with manifest.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    yield f"is no JSON ({error})"
                    continue
                yield entry if isinstance(entry, dict) else "is no JSON object"
    elif manifest.suffix in (".csv", ".tsv", ".txt"):
        with manifest.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            delimiter = "," if manifest.suffix == ".csv" else "\t"
            # Common Voice's tables hold bare quotation marks.
            quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
            yield from csv.DictReader(lines, delimiter=delimiter, quoting=quoting)
    else:
        raise DataError(f"{manifest}: unknown kind of manifest; known: .jsonl, .csv, .tsv")


def _first(entry: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((entry[k] for k in keys if entry.get(k) not in (None, "")), None)
