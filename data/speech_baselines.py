"""Answers without listening: what a recogniser has to beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data.speech_batches import Utterance


def edit_distance(a: Sequence, b: Sequence) -> int:
    """Fewest insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def error_rates(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus-level character and word error rates: all edits over all reference characters (words)."""
    cer = sum(edit_distance(h, r) for h, r in zip(hypotheses, references, strict=True))
    wer = sum(edit_distance(h.split(), r.split()) for h, r in zip(hypotheses, references, strict=True))
    return {
        "cer": cer / max(1, sum(map(len, references))),
        "wer": wer / max(1, sum(len(r.split()) for r in references)),
    }


def trivial_baselines(train: Sequence[Utterance], test: Sequence[Utterance]) -> dict[str, dict[str, float]]:
    """Scores of answers that ignore the sound, on test.

    empty: nothing. most_common_words: the commonest training word, as often as the length suggests.
    same_duration: the transcript of the training utterance of the nearest length.
    """
    references = [u.text for u in test]
    words = Counter(w for u in train for w in u.text.split())
    common = words.most_common(1)[0][0]
    durations = np.array([u.duration_s for u in train])
    rate = sum(len(u.text.split()) for u in train) / durations.sum()
    nearest = [train[int(np.abs(durations - u.duration_s).argmin())].text for u in test]
    return {
        "empty": error_rates([""] * len(test), references),
        "most_common_word": error_rates(
            [" ".join([common] * round(u.duration_s * rate)) for u in test], references
        ),
        "same_duration": error_rates(nearest, references),
    }
