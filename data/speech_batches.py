"""Utterances and how they become batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.sampler import BatchKey, EpochLoader, EpochSampler


@dataclass(frozen=True)
class Utterance:
    """One recording, or a part of one, and its transcript.

    Args:
        id: Unique name.
        text: Normalised transcript.
        duration_s: Length.
        speaker: Who speaks, "" if unknown.
        path: Audio file; "" when the module holds the samples itself.
        offset_s: Where the utterance starts in the file.
        place: Number of the samples in the module's own store, -1 for files.
        word_starts_s: Where each word starts, if known.
    """

    id: str
    text: str
    duration_s: float
    speaker: str = ""
    path: str = ""
    offset_s: float = 0.0
    place: int = -1
    word_starts_s: tuple[float, ...] = field(default=(), compare=False)


class Batches:
    """Picklable ``key -> batch`` of one split; ``lost`` names what the key asked for and the batch lacks."""

    def __init__(self, owner: Any, split: str) -> None:
        self.owner, self.split = owner, split

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        batch = self.owner.batch(self.split, key)
        return {**batch, "lost": torch.from_numpy(np.setdiff1d(key.indices, batch["index"].numpy()))}


class NamingLoader(EpochLoader):
    """Tells the data which recordings a batch has lost: worker processes keep what they find to themselves.

    Args:
        lost: Gets their numbers.
        arguments, options: Of `data.sampler.EpochLoader`.
    """

    def __init__(self, *arguments: Any, lost: Callable[[list[int]], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.lost = lost

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = super().__iter__()
        try:
            for batch in batches:
                self.lost(batch.pop("lost").tolist())
                yield batch
        finally:
            batches.close()


class ByLength:
    """Picklable order of evaluation: shortest first, every sample once."""

    def __init__(self, sampler: EpochSampler, durations: np.ndarray) -> None:
        self.own = np.argsort(durations, kind="stable")[sampler.rank :: sampler.world_size]

    def __call__(self) -> np.ndarray:
        return self.own


def pad_audio(waves: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """``audio`` float32 [B, S], zeros behind the end, and ``audio_length`` int64 [B]."""
    lengths = [len(w) for w in waves]
    audio = torch.zeros(len(waves), max(lengths, default=0))
    for row, wave in zip(audio, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    return {"audio": audio, "audio_length": torch.tensor(lengths, dtype=torch.int64)}


def pad_tokens(tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """``tokens`` int64 [B, L], 0 behind the end, and ``token_length`` int64 [B]."""
    lengths = [len(t) for t in tokens]
    out = torch.zeros(len(tokens), max(lengths, default=0), dtype=torch.int64)
    for row, item in zip(out, tokens, strict=True):
        row[: len(item)] = torch.tensor(item)
    return {"tokens": out, "token_length": torch.tensor(lengths, dtype=torch.int64)}
