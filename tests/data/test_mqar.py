"""Associative recall: the generator's promises."""

import numpy as np
import pytest

from data import DataError, create_data
from data.mqar import generate
from data.sampler import BatchKey

SMALL = {"train_size": 40, "val_size": 10, "test_size": 20}


def test_sequences_are_pairs_then_each_key_once_more():
    tokens, targets = generate(np.random.default_rng(0), 50, 64, 40, 5, 0.01)
    for row, answer in zip(tokens, targets, strict=True):
        keys, values = row[0:10:2], row[1:10:2]
        assert len(set(keys)) == len(set(values)) == 5
        assert ((keys >= 1) & (keys < 32)).all() and ((values >= 32) & (values < 64)).all()
        places = np.flatnonzero(answer >= 0)
        assert len(places) == 5 and (places >= 10).all() and (places % 2 == 0).all()
        book = dict(zip(keys, values, strict=True))
        assert set(row[places]) == set(keys)
        assert all(book[row[p]] == answer[p] for p in places)


def test_queries_come_early_for_small_powers():
    early, even = (
        np.nonzero(generate(np.random.default_rng(0), 400, 64, 64, 4, a)[1] >= 0)[1].mean()
        for a in (0.01, 1.0)
    )
    assert early < even - 3


def test_splits_differ_and_depend_on_the_split_seed_alone():
    first, same, other = (
        create_data("mqar", seed=s, split_seed=t, **SMALL) for s, t in ((0, 0), (1, 0), (0, 1))
    )
    assert first.data_hash() == same.data_hash() != other.data_hash()
    rows = {s: {tuple(r.tolist()) for r in first._tokens[s]} for s in ("train", "val", "test")}
    assert not rows["train"] & rows["test"] and not rows["val"] & rows["test"]
    batch = first.dataset("train")[BatchKey(np.array([3, 1]), 0, 0)]
    assert batch["tokens"].shape == batch["targets"].shape == (2, 64)


def test_baselines_bound_what_can_be_learned():
    scores = create_data("mqar", **SMALL).compute_baselines()
    assert scores["any_value"]["accuracy"] < scores["value_of_the_sequence"]["accuracy"] == 1 / 16
    assert 0.8 < scores["token_after_last_match"]["accuracy"] <= 1


def test_sizes_that_cannot_be():
    with pytest.raises(DataError, match="too small for 16 pairs"):
        create_data("mqar", length=30)
    with pytest.raises(DataError, match="power"):
        create_data("mqar", power=0.0)
