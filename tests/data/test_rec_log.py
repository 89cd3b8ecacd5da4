"""Sequences and splits: ties, filters, leave-one-out, global time, windows, controls."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data import create_data
from data.errors import DataError
from data.rec_controls import ease, interaction_matrix
from data.rec_log import build_log, split_log
from data.sampler import BatchKey


def frame(rows: list[tuple]) -> pd.DataFrame:
    out = pd.DataFrame(rows, columns=["user", "item", "time"])
    return out.astype({"user": str, "item": str, "time": float})


def write_log(path: Path, users: int = 30, events: int = 14, items: int = 40, seed: int = 0) -> Path:
    """A chain with noise: item i is mostly followed by i + 1; half of the times tie."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        item, time = int(rng.integers(items)), 1_500_000_000 + user
        for _ in range(events):
            rows.append((user, f"i{item:02d}", time))
            item = (item + 1) % items if rng.random() < 0.9 else int(rng.integers(items))
            time += int(rng.integers(0, 2)) * 60
    pd.DataFrame(rows, columns=["user", "item", "timestamp"]).to_csv(path, index=False)
    return path


def test_order_ties_and_duplicates() -> None:
    log = build_log(frame([("a", "x", 2), ("a", "y", 1), ("a", "x", 2), ("b", "y", 5)]), tie_rule="file")
    assert log.users == ["a", "b"] and log.items == ["x", "y"]
    assert log.item.tolist() == [2, 1, 2] and log.offsets.tolist() == [0, 2, 3]
    assert log.notes["duplicates"] == 1


def test_tie_rule_is_fixed_by_its_seed() -> None:
    rows = frame([("a", f"{i:02d}", 7) for i in range(30)])
    orders = [build_log(rows, tie_rule="shuffle", tie_seed=s).item.tolist() for s in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert build_log(rows, tie_rule="file").item.tolist() == list(range(1, 31))
    assert build_log(rows[::-1], tie_rule="item").item.tolist() == list(range(1, 31))
    assert sorted(orders[0]) == list(range(1, 31))
    with pytest.raises(DataError, match="choose shuffle, file, item"):
        build_log(rows, tie_rule="random")


def test_filters_repeat_until_they_agree() -> None:
    # Without x (one event) user a falls below two events, and then y below two.
    rows = frame([("a", "x", 1), ("a", "y", 2), ("b", "y", 1), ("b", "z", 2), ("c", "z", 1), ("c", "z", 2)])
    log = build_log(rows, min_user_events=2, min_item_events=2)
    assert log.users == ["c"] and log.items == ["z"] and log.notes["rare"] == 4
    with pytest.raises(DataError, match="no event is left"):
        build_log(rows, min_user_events=9)


def test_leave_one_out_asks_the_last_events() -> None:
    rows = [("a", str(i), i) for i in range(5)] + [("b", "1", 1), ("b", "2", 2)] + [("c", "3", 1)]
    log = build_log(frame(rows))
    parts = split_log(log, "leave_one_out")
    assert parts.train_end.tolist() == [3, 7, 8]
    assert parts.samples["val"].tolist() == [3] and parts.samples["test"].tolist() == [4]
    assert parts.notes["users_too_short"] == 2
    assert parts.notes["test_targets_unseen_in_train"] == 1


def test_global_time_never_trains_on_later_events() -> None:
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{rng.integers(9)}", rng.integers(1000)) for u in range(40) for _ in range(12)]
    log = build_log(frame(rows))
    parts = split_log(log, "temporal_global", val_fraction=0.1, test_fraction=0.2)
    trained = np.concatenate([log.time[s:e] for s, e in zip(log.offsets[:-1], parts.train_end, strict=True)])
    assert trained.max() < parts.notes["val_from"] <= log.time[parts.samples["val"]].min()
    assert (
        log.time[parts.samples["val"]].max()
        < parts.notes["test_from"]
        <= log.time[parts.samples["test"]].min()
    )
    assert abs(len(trained) / len(log.item) - 0.7) < 0.02


def test_global_time_needs_times_and_names_the_way_out() -> None:
    rows = frame([("a", str(i), i) for i in range(5)]).drop(columns="time")
    rows.attrs["notes"] = {"no_time": "file order"}
    log = build_log(rows)
    with pytest.raises(DataError, match="leave_one_out"):
        split_log(log, "temporal_global")
    with pytest.raises(DataError, match="choose leave_one_out"):
        split_log(log, "random")


@pytest.fixture
def data(tmp_path: Path):
    out = create_data("interactions", path=str(write_log(tmp_path / "log.csv")), max_length=5, batch_size=8)
    out.setup()
    return out


def test_training_windows_never_contain_what_is_asked(data) -> None:
    log, parts = data.log, data.parts
    reach: set[tuple[int, ...]] = set()
    for epoch in range(6):
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        for batch in loader:
            items, targets = batch["items"], batch["targets"]
            assert items.shape[1] == 5 and (targets[items == 0] == 0).all()
            assert ((items[:, :-1] == 0) | (items[:, 1:] > 0)).all()  # padding is on the left
            assert torch.equal(items[:, 1:][targets[:, :-1] > 0], targets[:, :-1][targets[:, :-1] > 0])
            assert (batch["times"] <= 0).all()
            reach |= {tuple(t[t > 0].tolist()) for t in targets}
    trained = sum(parts.train_end - log.offsets[:-1])
    assert len(data.train_items()) == trained == len(log.item) - 2 * 30


def test_windows_are_a_function_of_seed_epoch_and_batch(data) -> None:
    key = BatchKey(np.arange(8), 3, 1)
    first, again = data.dataset("train")[key], data.dataset("train")[key]
    other = data.dataset("train")[BatchKey(np.arange(8), 4, 1)]
    assert torch.equal(first["items"], again["items"])
    assert not torch.equal(first["items"], other["items"])


def test_asked_history_is_everything_before(data) -> None:
    log = data.log
    batch = next(iter(data.test_dataloader()))
    for row in range(4):
        user = int(batch["user"][row])
        events = log.item[log.offsets[user] : log.offsets[user + 1]]
        assert batch["target"][row] == events[-1]
        assert batch["items"][row].tolist() == events[-6:-1].tolist()
        assert set(batch["seen"][row].tolist()) - {0} == set(events[:-1].tolist())


def test_split_is_stored_and_does_not_depend_on_the_seed(data, tmp_path: Path) -> None:
    record = data.split_record()
    other = create_data("interactions", path=data.path, max_length=5, seed=9)
    assert other.split_ids.__self__.dataset("test") and other.split_record() == record
    assert record["tie_rule"] == "shuffle" and record["counted"]["tied_times"] > 50
    moved = create_data("interactions", path=data.path, max_length=5, split_seed=1)
    moved.setup()
    assert moved.split_record()["sequence_sha256"] != record["sequence_sha256"]


def test_controls_find_the_chain(data) -> None:
    scores = data.compute_baselines()
    assert set(scores) == {"popularity", "item_knn", "ease", "markov", "ease_markov"}
    assert scores["markov"]["hr_at_5"] > scores["popularity"]["hr_at_5"]
    assert all(0 <= v <= 1 for row in scores.values() for v in row.values())


def test_interactions_are_those_of_training(data) -> None:
    log, matrix = data.log, interaction_matrix(data).toarray()
    for user, (start, end) in enumerate(zip(log.offsets[:-1], data.parts.train_end, strict=True)):
        assert set(matrix[user].nonzero()[0] + 1) == set(log.item[start:end]) and matrix[user].max() == 1


def test_ease_solves_its_least_squares_problem() -> None:
    torch.manual_seed(0)
    x = (torch.rand(40, 6) < 0.4).double()
    weights = ease((x.T @ x).float(), 3.0).double()
    assert weights.diagonal().abs().max() == 0
    for item in range(6):  # a ridge regression of each column on the others
        others = [i for i in range(6) if i != item]
        gram = x[:, others].T @ x[:, others] + 3.0 * torch.eye(5, dtype=torch.float64)
        expected = torch.linalg.solve(gram, x[:, others].T @ x[:, item])
        torch.testing.assert_close(weights[others, item], expected, atol=1e-5, rtol=1e-4)


def test_path_is_required() -> None:
    with pytest.raises(DataError, match="data.path=ratings.csv"):
        create_data("interactions")


def test_datasets_travel_to_worker_processes(data) -> None:
    import pickle

    for split in ("train", "test"):
        copy = pickle.loads(pickle.dumps(data.dataset(split)))
        key = BatchKey(np.arange(4), 0 if split == "train" else -1, 0)
        assert torch.equal(copy[key]["items"], data.dataset(split)[key]["items"])
