"""Batches depend on (seed, epoch, batch) alone, and an epoch can be continued at any batch."""

import random
import warnings

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from data import create_data
from data.sampler import EpochLoader, EpochSampler, derive_seed, global_seed


def batches_of(sampler):
    return [(key.epoch, key.batch, key.indices.tolist()) for key in sampler]


def test_order_is_a_function_of_seed_and_epoch():
    first, second = (EpochSampler(50, 8, shuffle=True, seed=3) for _ in range(2))
    torch.manual_seed(123)  # the global generator must not matter
    first.set_epoch(4)
    second.set_epoch(4)
    torch.rand(7)
    assert batches_of(first) == batches_of(second)
    second.set_epoch(5)
    other_epoch = batches_of(second)
    assert [i for *_, i in other_epoch] != [i for *_, i in batches_of(first)]
    assert sorted(i for *_, indices in other_epoch for i in indices) == list(range(50))
    other_seed = EpochSampler(50, 8, shuffle=True, seed=4)
    other_seed.set_epoch(4)
    assert [i for *_, i in batches_of(other_seed)] != [i for *_, i in batches_of(first)]


@pytest.mark.parametrize("start", [0, 1, 6, 7])
def test_start_batch(start):
    sampler = EpochSampler(50, 8, shuffle=True)
    sampler.set_epoch(2)
    whole = batches_of(sampler)
    sampler.set_epoch(2, start)
    assert batches_of(sampler) == whole[start:]
    assert len(sampler) == 7


@pytest.mark.parametrize(
    ("length", "drop_last", "expected"), [(50, False, 7), (50, True, 6), (5, True, 1), (48, True, 6)]
)
def test_length(length, drop_last, expected):
    sampler = EpochSampler(length, 8, shuffle=True, drop_last=drop_last)
    assert len(sampler) == len(batches_of(sampler)) == expected


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_an_epoch(world_size):
    ranks = [EpochSampler(50, 5, shuffle=True, rank=r, world_size=world_size) for r in range(world_size)]
    shapes = [[len(indices) for *_, indices in batches_of(sampler)] for sampler in ranks]
    assert shapes == [shapes[0]] * world_size  # unequal counts would hang gradient averaging
    seen = [i for sampler in ranks for *_, indices in batches_of(sampler) for i in indices]
    assert len(seen) == len(set(seen)) == 50 // world_size * world_size
    ordered = [EpochSampler(50, 4, shuffle=False, rank=r, world_size=world_size) for r in range(world_size)]
    seen = [i for sampler in ordered for *_, indices in batches_of(sampler) for i in indices]
    assert sorted(seen) == list(range(50))  # evaluation: each sample exactly once


@pytest.mark.parametrize("length, batch_size", [(9, 4), (9, 3), (5, 1), (4, 1), (2, 8)])
def test_evaluation_has_as_many_batches_in_every_process(length, batch_size):
    """With 9 samples in batches of 4, plain slices would give one process two batches and the other one."""
    ranks = [EpochSampler(length, batch_size, shuffle=False, rank=r, world_size=2) for r in range(2)]
    found = [batches_of(sampler) for sampler in ranks]
    assert len(found[0]) == len(found[1]) == len(ranks[0]) == len(ranks[1])
    assert all(indices for own in found for *_, indices in own), "an empty batch"
    assert sorted(i for own in found for *_, indices in own for i in indices) == list(range(length))


def test_too_few_samples_for_the_processes():
    with pytest.raises(ValueError, match="3 training samples cannot be shared among 4"):
        EpochSampler(3, 2, shuffle=True, world_size=4)
    with pytest.raises(ValueError, match="3 evaluation samples cannot be shared among 4"):
        EpochSampler(3, 2, shuffle=False, world_size=4)


def test_derived_seeds_differ():
    seeds = {derive_seed(a, b, c) for a in range(8) for b in range(8) for c in range(-1, 7)}
    assert len(seeds) == 8**3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_global_seed_repeats_and_restores():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    with global_seed(1, 2):
        first = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with pytest.raises(KeyError), global_seed(1, 2):
        assert draw() == first
        raise KeyError
    assert draw() == expected


def test_loader_continues_where_it_was_saved():
    data = create_data("digits", batch_size=100, seed=5)
    whole = data.train_dataloader()
    whole.set_epoch(3)
    expected = [batch["image"] for batch in whole]

    first = data.train_dataloader()
    first.set_epoch(3)
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    state = first.state_dict()
    assert state == {"epoch": 3, "batch": 4, "global_batch_size": 100}

    second = create_data("digits", batch_size=100, seed=5).train_dataloader()
    second.load_state_dict(state)
    iterator = iter(second)  # Lightning makes the iterator first and sets the epoch later
    second.set_epoch(3)
    rest = [batch["image"] for batch in iterator]
    assert len(rest) == len(expected) - 4
    assert all(torch.equal(a, b) for a, b in zip(rest, expected[4:], strict=True))
    assert len(list(second)) == len(expected)
    second.set_epoch(4)
    assert len(list(second)) == len(expected)  # the saved position counts once, and for its epoch only


def test_saved_position_of_another_epoch_is_not_used():
    loader = create_data("digits", batch_size=100).train_dataloader()
    loader.load_state_dict({"epoch": 3, "batch": 13, "global_batch_size": 100})
    loader.set_epoch(4)
    assert len(list(loader)) == len(loader)


def test_position_survives_another_batch_size_with_a_warning():
    loader = create_data("digits", batch_size=50).train_dataloader()
    loader.load_state_dict({"epoch": 0, "batch": 4, "global_batch_size": 100})
    with pytest.warns(UserWarning, match="does not replay"):
        assert len(list(loader)) == len(loader) - 8


def test_workers_give_the_same_batches():
    alone, helped = (create_data("digits", batch_size=400, num_workers=n).train_dataloader() for n in (0, 2))
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        for a, b in zip(alone, helped, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
    helped.load_state_dict({"epoch": 1, "batch": 2, "global_batch_size": 400})
    assert torch.equal(next(iter(helped))["image"], list(alone)[2]["image"])


def test_loader_leaves_the_global_generator_alone():
    loader = create_data("digits").train_dataloader()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(loader)
    assert torch.equal(torch.rand(3), expected)


class Probe(LightningModule):
    """A linear classifier that notes a checksum of every batch and its loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 10)
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])
        self.seen.append(
            (
                self.trainer.current_epoch,
                batch_idx,
                float(batch["image"].double().sum()),
                float(loss.detach()),
            )
        )
        return loss

    def validation_step(self, batch, batch_idx):
        self.log(
            "val_loss",
            torch.nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"]),
        )

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class SaveAt(Callback):
    """Saves a checkpoint after one step, as a run that is killed right after would leave behind."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [1, 6, 7, 10])  # first step, last of an epoch (with validation), later ones
def test_lightning_continues_with_the_same_batches(tmp_path, step):
    def trainer(**extra):
        return Trainer(
            accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path, **extra,
        )  # fmt: skip

    def data():
        return create_data("digits", batch_size=200, seed=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and log intervals
        whole = Probe()
        trainer(callbacks=[SaveAt(step, tmp_path / "at.ckpt")]).fit(whole, data())
        rest = Probe()
        trainer().fit(rest, data(), ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    assert len(whole.seen) == 3 * 7
    assert rest.seen == whole.seen[step:]


def test_lightning_finds_the_hooks():
    loader = create_data("digits").train_dataloader()
    assert isinstance(loader, EpochLoader)
    assert callable(loader.sampler.set_epoch)
