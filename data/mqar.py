"""Multi-query associative recall: made-up key-value pairs, asked back later in the sequence.

Source: "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv:2312.04927. Generated here as described there:
a sequence opens with `pairs` keys, each followed by its value; every key comes once more later on, mostly soon after the pairs, and
the model is asked for its value there. Everything else is random tokens (which may look like keys, as in the source).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import register_data
from data.base import SPLITS, DataError, SplitDataset, ZooData, check_at_least, hash_arrays
from data.sampler import BatchKey, derive_seed

_VERSION = "mqar-1"


@register_data("mqar")
class MqarData(ZooData):
    """Sequences of key-value pairs and later queries.

    Batches: ``tokens`` int64 [B, L], ``targets`` int64 [B, L] (the value where a key is asked, -100 elsewhere), ``index`` int64 [B].

    Args:
        vocabulary: Tokens; the lower half are keys, the upper half values. At least 4 times `pairs`.
        length: Tokens in a sequence, L; at least 4 times `pairs`.
        pairs: Key-value pairs in a sequence.
        power: Exponent a of the distance law p(gap) ~ gap^(a-1), > 0: small asks soon after the pairs.
        train_size: Training sequences.
        val_size: Validation sequences.
        test_size: Test sequences.
        common: Options of :class:`data.base.ZooData`; `split_seed` makes other sequences.
    """

    licence = "generated"
    kind = "recall"

    def __init__(
        self,
        *,
        vocabulary: int = 512,
        length: int = 64,
        pairs: int = 16,
        power: float = 0.01,
        train_size: int = 20000,
        val_size: int = 1000,
        test_size: int = 3000,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_at_least(1, pairs=pairs, train_size=train_size, val_size=val_size, test_size=test_size)
        if power <= 0:
            raise DataError(f"data.power={power} must be positive")
        for name, value in (("vocabulary", vocabulary), ("length", length)):
            if value < 4 * pairs:
                raise DataError(
                    f"data.{name}={value} is too small for {pairs} pairs: give at least {4 * pairs}"
                )
        self.vocabulary, self.length, self.pairs, self.power = vocabulary, length, pairs, power
        self.sizes = dict(zip(SPLITS, (train_size, val_size, test_size), strict=True))
        self._tokens: dict[str, Tensor] = {}
        self._targets: dict[str, Tensor] = {}

    def load(self) -> dict[str, Dataset]:
        """Generate each split from its own seed."""
        for i, split in enumerate(SPLITS):
            rng = np.random.default_rng(derive_seed(self.split_seed, i, 2312))
            tokens, targets = generate(
                rng, self.sizes[split], self.vocabulary, self.length, self.pairs, self.power
            )
            self._tokens[split], self._targets[split] = torch.from_numpy(tokens), torch.from_numpy(targets)
        return {split: SplitDataset(size, _Batches(self, split)) for split, size in self.sizes.items()}

    def batch(self, split: str, key: BatchKey) -> dict[str, Tensor]:
        index = torch.from_numpy(key.indices)
        return {
            "tokens": self._tokens[split][index],
            "targets": self._targets[split][index],
            "index": index,
        }

    def preprocessing(self) -> dict[str, Any]:
        """Size of the vocabulary and the largest length."""
        return {"kind": "tokens", "vocabulary": self.vocabulary, "length": self.length}

    def split_ids(self) -> dict[str, list[str]]:
        """Sequences have numbers only."""
        self.setup()
        return {split: [f"{split}-{i}" for i in range(size)] for split, size in self.sizes.items()}

    def data_hash(self) -> str:
        """Hash of the sequences and of the baselines' version."""
        self.setup()
        return hash_arrays(*(self._tokens[s] for s in SPLITS), _VERSION)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """A guess among all values, a guess among the values of this sequence, and looking up the last time the key occurred."""
        self.setup()
        tokens, targets = (t["test"].numpy() for t in (self._tokens, self._targets))
        rows, places = np.nonzero(targets >= 0)
        right = 0
        for row, place in zip(rows, places, strict=True):
            seen = np.flatnonzero(tokens[row, :place] == tokens[row, place])
            right += bool(len(seen)) and tokens[row, seen[-1] + 1] == targets[row, place]
        return {
            "any_value": {"accuracy": 1 / (self.vocabulary - self.vocabulary // 2)},
            "value_of_the_sequence": {"accuracy": 1 / self.pairs},
            "token_after_last_match": {"accuracy": float(right / len(rows))},
        }


def generate(
    rng: np.random.Generator, count: int, vocabulary: int, length: int, pairs: int, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences and targets, int64 [count, length] each; targets are -100 where nothing is asked.

    Distances from the end of the pairs are even numbers, drawn without repetition (largest keys of a Gumbel race).
    """
    half, context = vocabulary // 2, 2 * pairs
    # Token 0 is neither key nor value, as in the source.
    keys = 1 + rng.random((count, half - 1)).argpartition(pairs - 1, axis=1)[:, :pairs]
    values = half + rng.random((count, vocabulary - half)).argpartition(pairs - 1, axis=1)[:, :pairs]
    tokens = rng.integers(0, vocabulary, (count, length + 1))
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    slots = (length - context) // 2
    weight = power * np.arange(1, slots + 1) ** (power - 1.0)
    race = np.log(weight) + rng.gumbel(size=(count, slots))
    gap = np.argsort(-race, axis=1)[:, :pairs]
    place = context + 2 * gap
    np.put_along_axis(tokens, place, keys, 1)
    targets = np.full((count, length), -100)
    np.put_along_axis(targets, place, values, 1)
    return tokens[:, :length], targets


class _Batches:
    """Picklable ``key -> batch`` of one split."""

    def __init__(self, owner: MqarData, split: str) -> None:
        self.owner, self.split = owner, split

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        return self.owner.batch(self.split, key)
