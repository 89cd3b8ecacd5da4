"""Pictures and texts that users of speech recognition look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.asr import SpeechToText


def draw(task: SpeechToText, folder: Path) -> list[Path]:
    """Write transcripts.txt, worst sentences first; returns the files."""
    from data.speech_baselines import edit_distance

    rows = sorted(task._examples, key=lambda r: -edit_distance(r[1], r[0]))
    path = folder / "transcripts.txt"
    path.write_text("".join(f"reference  {r}\ndecoder    {h}\nctc        {c}\n\n" for r, h, c in rows))
    return [path]
