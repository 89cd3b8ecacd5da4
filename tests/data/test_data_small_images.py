"""MNIST and digits: splits, batches, augmentation, baselines."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data import DataError, baselines, carriers, create_data, data_options, list_data
from data.sampler import BatchKey
from data.transforms import random_affine

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture(scope="module")
def mnist():
    try:
        carriers.fetch("mnist")
    except DataError as error:
        pytest.skip(f"MNIST is neither in the cache nor to be fetched: {error}")
    data = create_data("mnist")
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("name", ["mnist", "digits", "imagefolder"])
def test_yaml_lists_every_option_with_its_default(name):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert config.pop("name") == name
    assert config == data_options(name)
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    assert all("#" in line for line in lines if line.strip())


def test_names_and_options_are_checked():
    assert {"mnist", "digits", "imagefolder"} <= set(list_data())
    with pytest.raises(DataError, match="did you mean 'mnist'"):
        create_data("mnits")
    with pytest.raises(DataError, match="no option 'batchsize'; nearest: batch_size"):
        create_data("digits", batchsize=3)
    with pytest.raises(DataError, match="data.batch_size=0 is too small"):
        create_data("digits", batch_size=0)
    with pytest.raises(DataError, match="data.scale=1.5 is out of range"):
        create_data("digits", scale=1.5)


def test_mnist_is_complete_and_readable(mnist):
    assert mnist.split_record()["sizes"] == {"train": 3500, "val": 500, "test": 1000}
    seen = torch.cat([b["label"] for split in ("train", "val", "test") for b in mnist.loader(split)])
    assert torch.bincount(seen).tolist() == [500] * 10
    batch = next(iter(mnist.test_dataloader()))
    assert batch["image"].shape == (256, 1, 28, 28) and batch["image"].dtype == torch.float32
    assert batch["label"].dtype == batch["index"].dtype == torch.int64
    # Mean and deviation come from train: the whole train split is standardised, test only nearly so.
    train = torch.cat([b["image"] for b in mnist.loader("train")])
    assert abs(float(train.mean())) < 1e-4 and abs(float(train.std()) - 1) < 1e-4
    # Ones are the thinnest digits and zeros the fullest; a shifted label column would break this.
    test = mnist.loader("test")
    images, labels = (torch.cat([b[key] for b in test]) for key in ("image", "label"))
    ink = torch.stack([images[labels == digit].mean() for digit in range(10)])
    assert int(ink.argmin()) == 1 and int(ink.argmax()) == 0


def test_mnist_split_is_the_published_one(mnist):
    order = np.random.RandomState(0).permutation(5000)
    ids = mnist.split_ids()
    assert [int(i) for split in ("train", "val", "test") for i in ids[split]] == order.tolist()
    record = mnist.split_record()
    assert record["sha256"]["test"] == "eab22ff9da084e9ba74a98a74374df8c10ce25eef6d7c967eab8d8f38c4d4908"


def test_split_depends_on_split_seed_alone():
    first, again, other = (create_data("digits", seed=s, split_seed=p) for s, p in ((0, 0), (7, 0), (0, 1)))
    assert first.split_record() == again.split_record()
    assert first.split_record()["sha256"] != other.split_record()["sha256"]
    ids = first.split_ids()
    assert sum(map(len, ids.values())) == len(set().union(*ids.values())) == 1797  # disjoint and complete
    assert first.split_record()["sizes"] == {"train": 1257, "val": 180, "test": 360}


def test_evaluation_is_ordered_and_untouched():
    plain, distorted = create_data("digits", augment=False), create_data("digits")
    for split in ("val", "test"):
        a = torch.cat([b["image"] for b in distorted.loader(split)])
        assert torch.equal(a, torch.cat([b["image"] for b in plain.loader(split)]))
    index = torch.cat([b["index"] for b in distorted.test_dataloader()])
    assert index.tolist() == list(range(360))


def test_augmentation_changes_with_epoch_and_seed():
    def epoch(seed, number):
        loader = create_data("digits", seed=seed, batch_size=2000).train_dataloader()
        loader.set_epoch(number)
        batch = next(iter(loader))
        return batch["image"][batch["index"].argsort()]

    assert torch.equal(epoch(0, 1), epoch(0, 1))
    assert not torch.equal(epoch(0, 1), epoch(0, 2))
    assert not torch.equal(epoch(0, 1), epoch(1, 1))


def test_same_place_in_another_epoch_batch_or_process_is_distorted_differently():
    data = create_data("digits")
    indices = np.array(data.split_ids()["train"][:4], dtype=np.int64)

    def images(**place):
        return data.batch(indices, BatchKey(np.arange(4), **{"epoch": 1, "batch": 0, "rank": 0, **place}))[
            "image"
        ]

    assert torch.equal(images(), images())
    for place in ({"epoch": 2}, {"batch": 1}, {"rank": 1}):
        assert not torch.equal(images(), images(**place))


def test_baseline_penalty_is_chosen_on_val(monkeypatch):
    random = np.random.RandomState(0)
    target = np.arange(90) // 3 % 3 // 2  # a third of each part is 1
    features = random.randn(90, 3) + 4 * target[:, None]
    parts = [(features[i::3], target[i::3]) for i in range(3)]
    for name in ("LOGISTIC_C", "SVM_C"):
        monkeypatch.setattr(baselines, name, (1.0, 1e-9))  # the last one only sees the majority
    scores = {name: row["accuracy"] for name, row in baselines.classification_baselines(*parts).items()}
    assert scores["majority_class"] < 0.8 < 0.9 < min(scores["logistic_regression"], scores["svm_rbf"])


def test_random_affine_does_what_it_says():
    image = torch.zeros(400, 1, 21, 21)
    image[:, :, 10, 10] = 1.0
    gen = torch.Generator().manual_seed(0)
    assert torch.allclose(random_affine(image, gen), image, atol=1e-5)
    rows, cols = torch.meshgrid(torch.arange(21.0), torch.arange(21.0), indexing="ij")

    def centre(out):
        mass = out.sum((1, 2, 3))
        return torch.stack([(out[:, 0] * g).sum((1, 2)) / mass for g in (rows, cols)], -1) - 10

    moved = centre(random_affine(image, gen, shift_px=3.0))
    assert moved.abs().max() <= 3.01 and moved.std(0).min() > 1.2  # uniform on -3 .. 3 has 1.73
    off = torch.zeros(400, 1, 21, 21)
    off[:, :, 10, 15] = 1.0  # five pixels right of the centre
    turned = centre(random_affine(off, gen, rotate_deg=30.0))
    assert torch.allclose(turned.norm(dim=-1), torch.tensor(5.0), atol=0.3)
    angle = torch.atan2(turned[:, 0], turned[:, 1]).rad2deg()
    assert angle.abs().max() < 31.5 and angle.std() > 14
    high = torch.zeros(400, 1, 21, 21)
    high[:, :, 5, 10] = 1.0  # five pixels above the centre: shear moves it sideways, and only that
    leaned = centre(random_affine(high, gen, shear=0.4))
    assert leaned[:, 1].abs().max() < 2.1 and leaned[:, 1].std() > 0.8
    assert (leaned[:, 0] + 5).abs().max() < 0.2
    grown = centre(random_affine(off, gen, scale=0.2)).norm(dim=-1)
    assert grown.min() > 3.7 and grown.max() < 6.3 and grown.std() > 0.4


def test_baselines_are_computed_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    data = create_data("digits")
    scores = data.baselines()
    labels = {split: torch.cat([b["label"] for b in data.loader(split)]) for split in ("train", "test")}
    majority = labels["train"].bincount().argmax()
    assert scores["majority_class"]["accuracy"] == pytest.approx(
        float((labels["test"] == majority).float().mean())
    )
    assert 0.93 < scores["logistic_regression"]["accuracy"] < 1
    assert 0.95 < scores["svm_rbf"]["accuracy"] < 1
    (stored,) = (tmp_path / "baselines").iterdir()
    monkeypatch.setattr(type(data), "compute_baselines", lambda self: pytest.fail("computed twice"))
    assert create_data("digits", seed=9).baselines() == scores  # the cache is shared by all seeds
    stored.write_text("{")
    monkeypatch.setattr(type(data), "compute_baselines", lambda self: {"again": {"accuracy": 0.5}})
    assert data.baselines() == {"again": {"accuracy": 0.5}}  # a damaged file is replaced
    assert create_data("digits", split_seed=3).data_hash() != data.data_hash()


@pytest.mark.slow
def test_mnist_baselines(mnist):
    scores = mnist.baselines()
    assert scores["majority_class"]["accuracy"] == pytest.approx(0.1, abs=0.02)
    assert scores["logistic_regression"]["accuracy"] == pytest.approx(0.905, abs=0.01)
    assert scores["svm_rbf"]["accuracy"] == pytest.approx(0.956, abs=0.01)
