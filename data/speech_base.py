"""Utterances with transcripts: what every speech data module shares."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from data.base import SPLITS, SplitDataset, ZooData, check_at_least, check_range, hash_arrays
from data.errors import DataError
from data.sampler import BatchKey, EpochLoader, EpochSampler
from data.speech_augment import WaveAugment
from data.speech_batches import Batches, ByLength, NamingLoader, Utterance, pad_audio, pad_tokens
from data.speech_bucketing import Bucket, BucketSampler, make_buckets
from data.speech_tokenisers import PLAIN_CHARACTERS, BpeTokeniser, CharTokeniser, Tokeniser, normalise
from zoo.audio import read_audio
from zoo.errors import DataError as AudioError

BASELINES_VERSION = "1"


class SpeechData(ZooData):
    """Base of speech data modules; a subclass implements `utterances`.

    Batches: ``audio`` float32 [B, S] (zeros behind the end), ``audio_length`` int64 [B], ``tokens`` int64 [B, L] (no start
    or end token, 0 behind the end), ``token_length`` int64 [B], ``index`` int64 [B] (place in the split).

    Args:
        sample_rate: Of the batches, Hz; recordings are resampled.
        normaliser: Of transcripts: plain-1, lower-1 or none; see `data.speech_tokenisers.normalise`.
        tokeniser: "char" or "bpe".
        bpe_size: Number of pieces for "bpe".
        characters: Alphabet; None for letters, apostrophe and space under plain-1, else what the training texts hold.
        min_s, max_s: Utterances of other lengths are left out and counted.
        duration_buckets: Buckets of like duration for training; 0 shuffles without buckets.
        token_buckets: Buckets of like transcript length in each.
        batch_s: Seconds of padded audio in a batch; sets each bucket's batch size instead of `batch_size`. None: off.
        noise_snr_db: Training audio gets white or brown noise at a ratio drawn from [low, high]; None: off.
        noise_share: Share of the utterances that get it.
        speeds: Factors that training audio is played faster by, drawn at random.
        gain_db: Largest change of loudness either way in training.
        common: Options of `data.base.ZooData`.
    """

    kind: ClassVar[str] = "speech"
    licence: ClassVar[str | None] = None

    def __init__(
        self,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        sample_rate: int = 16000,
        normaliser: str = "plain-1",
        tokeniser: str = "char",
        bpe_size: int = 256,
        characters: str | None = None,
        min_s: float = 0.1,
        max_s: float = 20.0,
        duration_buckets: int = 12,
        token_buckets: int = 2,
        batch_s: float | None = None,
        noise_snr_db: Sequence[float] | None = None,
        noise_share: float = 0.5,
        speeds: Sequence[float] = (1.0,),
        gain_db: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **common)
        check_at_least(1000, sample_rate=sample_rate)
        check_at_least(0, min_s=min_s, duration_buckets=duration_buckets)
        check_at_least(1, token_buckets=token_buckets)
        check_at_least(min_s, max_s=max_s)
        if tokeniser not in ("char", "bpe"):
            raise DataError(f"data.tokeniser={tokeniser!r}: choose char or bpe")
        if batch_s is not None:
            check_range(1, 1e6, batch_s=batch_s)
        normalise("", normaliser)
        self.sample_rate, self.normaliser = sample_rate, normaliser
        self.tokeniser_kind, self.bpe_size, self.characters = tokeniser, bpe_size, characters
        self.min_s, self.max_s = min_s, max_s
        self.duration_buckets, self.token_buckets, self.batch_s = duration_buckets, token_buckets, batch_s
        self.wave_augment = WaveAugment(
            sample_rate, noise_snr_db=noise_snr_db, noise_share=noise_share, speeds=speeds, gain_db=gain_db
        )
        # One for each bucket, set by a search against a memory limit.
        self.batch_sizes: list[int] | None = None
        self._buckets: list[Bucket] | None = None
        self._splits: dict[str, list[Utterance]] = {}
        self._tokens: dict[str, list[list[int]]] = {}
        self._unusable: dict[str, set[int]] = defaultdict(set)  # found while batches were read
        self._tokeniser: Tokeniser | None = None

    # -- to be implemented -------------------------------------------------------------------------------

    def utterances(self) -> dict[str, list[Utterance]]:
        """All usable utterances by split; what is unusable goes into `skipped` with its reason."""
        raise NotImplementedError

    def samples(self, utterance: Utterance) -> np.ndarray:
        """Samples of an utterance at `sample_rate`, float32 [S].

        Raises:
            DataError: The recording cannot be used.
        """
        try:
            return read_audio(
                utterance.path,
                self.sample_rate,
                offset_s=utterance.offset_s,
                duration_s=utterance.duration_s if utterance.offset_s or utterance.duration_s else None,
            )
        except AudioError as error:
            raise DataError(str(error)) from error

    # -- texts -------------------------------------------------------------------------------------------

    def clean(self, text: str) -> str:
        """The transcript as the model shall write it."""
        return normalise(text, self.normaliser)

    def load(self) -> dict[str, Dataset]:
        """Collect utterances, build the tokeniser from the training texts, drop what cannot be used."""
        found = self.utterances()
        self._tokeniser = self._build_tokeniser([u.text for u in found.get("train", [])])
        for split in dict.fromkeys((*SPLITS, *found)):
            self._splits[split], self._tokens[split] = [], []
            for utterance in found.get(split, []):
                self._take(split, utterance)
        self.labels = list(self.tokeniser.pieces)
        return {
            split: SplitDataset(len(items), Batches(self, split)) for split, items in self._splits.items()
        }

    def _take(self, split: str, utterance: Utterance) -> None:
        if self.rejected(utterance):
            return
        try:
            tokens = self.tokeniser.encode(utterance.text)
        except DataError as error:
            self.skip(utterance.id, str(error))
            return
        self._splits[split].append(utterance)
        self._tokens[split].append(tokens)

    def rejected(self, utterance: Utterance) -> bool:
        """Whether length or text rule an utterance out; the reason goes into `skipped`."""
        length, alphabet = utterance.duration_s, self._fixed_alphabet()
        foreign = sorted(set(utterance.text) - set(alphabet)) if alphabet else []
        if not self.min_s <= length <= self.max_s:
            self.skip(utterance.id, f"lasts {length:.2f} s, outside {self.min_s} .. {self.max_s} s")
        elif not utterance.text:
            self.skip(utterance.id, "has no text")
        elif foreign:
            self.skip(utterance.id, f"characters {' '.join(map(repr, foreign))} are not in the vocabulary")
        else:
            return False
        return True

    def _fixed_alphabet(self) -> str | None:
        """The alphabet, where it does not depend on the training texts."""
        return self.characters or (PLAIN_CHARACTERS if self.normaliser == "plain-1" else None)

    def skip(self, name: str, reason: str) -> None:
        """Leave an utterance out, remembering why."""
        self.skipped[name] = reason

    def _build_tokeniser(self, texts: Sequence[str]) -> Tokeniser:
        if not texts:
            raise DataError(f"data {self.name!r}: no usable training utterance{self._first_reasons()}")
        alphabet = self._fixed_alphabet() or "".join(sorted(set("".join(texts))))
        if self.tokeniser_kind == "bpe":
            known = set(alphabet)
            return BpeTokeniser([t for t in texts if set(t) <= known], self.bpe_size, alphabet)
        return CharTokeniser(alphabet)

    def _first_reasons(self) -> str:
        reasons = Counter(self.skipped.values())
        return "".join(f"; {count} skipped: {reason}" for reason, count in reasons.most_common(3))

    @property
    def tokeniser(self) -> Tokeniser:
        """The tokeniser, built from the training texts."""
        if self._tokeniser is None:
            self.setup()
        assert self._tokeniser is not None
        return self._tokeniser

    def split(self, name: str) -> list[Utterance]:
        """The utterances of a split, in order; further test splits than "test" may exist."""
        self.setup()
        return self._splits.get(name, [])

    def further_splits(self) -> list[str]:
        """Names of test splits besides "test"."""
        self.setup()
        return [split for split, items in self._splits.items() if split not in SPLITS and items]

    def token_lists(self, split: str) -> list[list[int]]:
        """Token numbers of each transcript of a split."""
        self.setup()
        return self._tokens[split]

    # -- batches -----------------------------------------------------------------------------------------

    def batch(self, split: str, key: BatchKey) -> dict[str, Tensor]:
        """One batch; augmented when the key belongs to training. Recordings that cannot be read are left out.

        A batch of which nothing is left is empty.
        """
        kept, waves = [], []
        for i in key.indices.tolist():
            wave = self._read(split, i)
            if wave is None:
                continue
            if split == "train" and key.epoch >= 0:
                wave = self.wave_augment(wave, (self.seed, key.epoch, i))
            kept.append(i)
            waves.append(wave)
        tokens = [self._tokens[split][i] for i in kept]
        return {**pad_audio(waves), **pad_tokens(tokens), "index": torch.tensor(kept, dtype=torch.long)}

    def _read(self, split: str, i: int) -> np.ndarray | None:
        """Samples of an utterance; None where its recording cannot be used, which is noted."""
        utterance = self._splits[split][i]
        try:
            return self.samples(utterance)
        except DataError as error:
            self.skip(utterance.id, str(error))
            self._unusable[split].add(i)
            return None

    def _lose(self, split: str, lost: list[int]) -> None:
        """Note recordings that were found unusable, maybe by a worker process.

        Raises:
            DataError: None is left in the split.
        """
        for i in set(lost) - self._unusable[split]:
            self._read(split, i)
        if len(self._unusable[split]) == len(self._splits[split]):
            raise DataError(
                f"data {self.name!r}: none of the {len(self._splits[split])} recordings of split {split} can be used"
                + self._first_reasons()
            )

    def loader(self, split: str, *, shuffle: bool = False) -> EpochLoader:
        """Buckets for training; evaluation in order of length, so that batches pad little."""
        dataset = self.dataset(split)
        parallel = dist.is_available() and dist.is_initialized()
        place = {
            "rank": dist.get_rank() if parallel else 0,
            "world_size": dist.get_world_size() if parallel else 1,
        }
        if shuffle and self.duration_buckets:
            sampler = BucketSampler(*self.buckets(), seed=self.seed, **place)
        else:
            sampler = EpochSampler(
                len(dataset),
                self.batch_size if shuffle else self.eval_batch_size,
                shuffle=shuffle,
                seed=self.seed,
                **place,
            )
            if not shuffle:
                sampler.order = ByLength(sampler, self.durations(split))
        lost = partial(self._lose, split)
        return NamingLoader(dataset, sampler, num_workers=self.num_workers, lost=lost)

    def buckets(self) -> tuple[list[Bucket], list[int]]:
        """Training buckets and their batch sizes."""
        if self._buckets is None:  # a loader is made, and its length asked for, more than once an epoch
            self._buckets = make_buckets(
                self.durations("train"),
                [len(t) for t in self._tokens["train"]],
                buckets=self.duration_buckets,
                token_buckets=self.token_buckets,
            )
        found = self._buckets
        if self.batch_sizes is not None:
            return found, self.batch_sizes
        if self.batch_s is None:
            return found, [self.batch_size] * len(found)
        return found, [max(1, int(self.batch_s / self.longest_s(b))) for b in found]

    def longest_s(self, bucket: Bucket) -> float:
        """Longest that training audio of a bucket gets, at the slowest of `speeds`."""
        return bucket.max_duration_s * self.wave_augment.stretch

    def durations(self, split: str) -> np.ndarray:
        """Lengths in seconds, float64 [N]."""
        return np.array([u.duration_s for u in self.split(split)])

    # -- records -----------------------------------------------------------------------------------------

    def preprocessing(self) -> dict[str, Any]:
        """What a recording has to become, and how token numbers become text."""
        return {
            "kind": "speech",
            "sample_rate": self.sample_rate,
            "max_s": self.max_s,
            # Longest sound that the model has seen; longer recordings are transcribed in parts.
            "chunk_s": float(self.durations("train").max()),
            "normaliser": self.normaliser,
            "pieces": list(self.tokeniser.pieces),
        }

    def split_ids(self) -> dict[str, list[str]]:
        """Names of the utterances."""
        self.setup()
        return {split: [u.id for u in items] for split, items in self._splits.items()}

    def data_hash(self) -> str:
        """Hash of names, texts, lengths and split."""
        self.setup()
        lines = [
            f"{split}\t{u.id}\t{u.text}\t{u.duration_s:.4f}" for split in SPLITS for u in self._splits[split]
        ]
        return hash_arrays(BASELINES_VERSION, *lines)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Nothing at all, the sentence of the training set that fits test best on average, and the nearest length."""
        from data.speech_baselines import trivial_baselines

        return trivial_baselines(self._splits["train"], self._splits["test"])
