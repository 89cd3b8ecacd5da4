"""ImageFolder trees of genuine files in every mode, damaged ones among them."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, create_data
from zoo.predict.images import flatten_modes, open_image, prepare_image, probe_image

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 20)}


def picture(colour, seed, size=(24, 20)):
    noise = np.random.RandomState(seed).randint(-20, 21, (*size[::-1], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def make_tree(root, count=10, classes=COLOURS):
    for label, colour in classes.items():
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(colour, i).save(root / label / f"{i:03}.png")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_DATA", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "pictures")


def create(root, **options):
    return create_data("imagefolder", root=str(root), **{"image_size": 16, "batch_size": 8, **options})


# -- file formats ---------------------------------------------------------------------------------------


def half_transparent(mode):
    """Left half opaque black, right half transparent; over white that is black | white."""
    alpha = Image.new("L", (8, 4), 255)
    alpha.paste(0, (4, 0, 8, 4))
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
    image.putalpha(alpha)
    if mode == "P":  # palette with one transparent entry
        flat = Image.new("P", (8, 4), 0)
        flat.putpalette([0, 0, 0, 9, 9, 9])
        flat.paste(1, (4, 0, 8, 4))
        flat.info["transparency"] = 1
        return flat
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    half_transparent(mode).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == mode  # the file really is of that kind
    pixels = np.asarray(open_image(tmp_path / "a.png").convert("RGB"))
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == 255).all()


def test_colour_key_of_a_png_is_white(tmp_path):
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.paste((9, 9, 9), (2, 0, 4, 4))
    image.save(tmp_path / "a.png", transparency=(9, 9, 9))
    assert open_image(tmp_path / "a.png").convert("RGB").getpixel((3, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "a.png").convert("RGB").getpixel((0, 0)) == (1, 2, 3)


def test_sixteen_bit_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode.startswith("I")
    pixels = np.asarray(open_image(tmp_path / "a.png")).astype(int)
    assert np.abs(pixels[0] - np.linspace(0, 255, 32)).max() <= 1


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "png"),
        ("1", "png"),
        ("P", "png"),
        ("RGB", "jpg"),
        ("CMYK", "jpg"),
        ("RGB", "webp"),
        ("P", "gif"),
        ("L", "tif"),
    ],
)
def test_other_modes_keep_their_brightness(tmp_path, mode, suffix):
    image = Image.new("RGB", (16, 16), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 8, 16))
    image.convert(mode).save(tmp_path / f"a.{suffix}")
    result = open_image(tmp_path / f"a.{suffix}")
    assert result.mode in ("L", "RGB")
    pixels = np.asarray(result.convert("L")).astype(int)
    assert pixels[:, :6].max() < 30
    assert pixels[:, 10:].min() > 225


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (10, 20)


def test_float_images():
    assert np.asarray(flatten_modes(Image.fromarray(np.full((2, 2), 0.5, np.float32))))[0, 0] in (127, 128)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    picture((9, 99, 200), 0, (200, 200)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    probe_image(path)  # the header is fine: only decoding finds out
    with pytest.raises(DataError, match=f"cannot read .*a.{suffix} as an image"):
        open_image(path)


def test_missing_file():
    with pytest.raises(DataError, match="no such image: nowhere.png"):
        open_image("nowhere.png")
    with pytest.raises(DataError, match="give a path or a PIL image, not int"):
        open_image(3)


# -- trees ----------------------------------------------------------------------------------------------


def test_flat_tree_is_split_class_by_class(tree):
    data = create(tree, val_ratio=0.2, test_ratio=0.2)
    assert data.split_record()["sizes"] == {"train": 18, "val": 6, "test": 6}
    assert data.labels == sorted(COLOURS) and data.num_classes == 3
    ids = data.split_ids()
    assert len(set().union(*ids.values())) == 30
    for split, per_class in (("train", 6), ("val", 2), ("test", 2)):
        for label in COLOURS:
            assert sum(name.startswith(f"{label}/") for name in ids[split]) == per_class
    assert create(tree, val_ratio=0.2, test_ratio=0.2, seed=9).split_ids() == ids
    assert create(tree, val_ratio=0.2, test_ratio=0.2, split_seed=1).split_ids() != ids


def test_labels_belong_to_the_pictures(tree):
    data = create(tree, mean=[0, 0, 0], std=[1, 1, 1])
    for split in ("train", "val", "test"):
        for batch in data.loader(split):
            assert batch["image"].shape[1:] == (3, 16, 16) and batch["image"].dtype == torch.float32
            strongest = batch["image"].mean((2, 3)).argmax(1)  # red, green, blue
            assert strongest.tolist() == [
                {"red": 0, "green": 1, "blue": 2}[data.labels[i]] for i in batch["label"]
            ]


def test_evaluation_equals_prediction(tree):
    data = create(tree)
    name = data.split_ids()["test"][0]
    batch = next(iter(data.test_dataloader()))
    assert torch.equal(prepare_image(tree / name, data.preprocessing()), batch["image"][0])


def test_three_folders_are_the_splits(tmp_path):
    for part, count in (("train", 5), ("val", 2), ("test", 3)):
        make_tree(tmp_path / "set" / part, count)
    data = create(tmp_path / "set")
    assert data.split_record()["sizes"] == {"train": 15, "val": 6, "test": 9}
    assert all(name.startswith(f"{split}/") for split, names in data.split_ids().items() for name in names)


def test_a_lone_val_folder_becomes_the_test_split(tmp_path):
    make_tree(tmp_path / "set" / "train", 10)
    make_tree(tmp_path / "set" / "val", 2)
    ids = create(tmp_path / "set").split_ids()
    assert len(ids["test"]) == 6 and all(name.startswith("val/") for name in ids["test"])
    assert len(ids["val"]) == 3 and all(name.startswith("train/") for name in ids["val"])
    assert not set(ids["val"]) & set(ids["train"])


def test_deeper_folders_belong_to_their_class(tree):
    (tree / "red" / "dark" / "old").mkdir(parents=True)
    picture((120, 10, 10), 1).save(tree / "red" / "dark" / "old" / "x.png")
    data = create(tree)
    assert data.labels == sorted(COLOURS)
    assert "red/dark/old/x.png" in set().union(*data.split_ids().values())


def test_bad_files_are_skipped_counted_and_named(tree, caplog):
    path = tree / "red" / "000.png"
    path.write_bytes(path.read_bytes()[:200])
    (tree / "red" / "notes.txt").write_text("hello")
    (tree / "blue" / "fake.png").write_text("not a picture")
    (tree / "blue" / ".hidden").write_text("ignored")
    data = create(tree)
    data.setup()
    assert set(data.skipped) == {"red/000.png", "red/notes.txt", "blue/fake.png"}
    assert "not an image file" in data.skipped["red/notes.txt"]
    assert data.split_record()["skipped"] == 3
    assert "skipped 3 of the files" in caplog.text and "fake.png" in caplog.text
    assert not set(data.skipped) & set().union(*data.split_ids().values())
    for split in ("train", "val", "test"):
        list(data.loader(split))


def test_files_are_decoded_once_and_again_when_they_change(tree, monkeypatch):
    from data import folder_scan

    opened = []
    real = folder_scan.open_image
    monkeypatch.setattr(folder_scan, "open_image", lambda path: (opened.append(path.name), real(path))[1])
    create(tree).prepare_data()
    assert len(opened) == 30
    opened.clear()
    create(tree).setup()
    assert opened == []
    (tree / "red" / "003.png").write_text("broken now")
    data = create(tree)
    data.setup()
    assert opened == ["003.png"] and list(data.skipped) == ["red/003.png"]


def test_header_check_is_shallow_and_says_which_file_fails_later(tree):
    for path in sorted((tree / "red").glob("*.png")):
        path.write_bytes(path.read_bytes()[:-60])
    data = create(tree, validate="header")
    assert data.split_record()["skipped"] == 0
    with pytest.raises(DataError, match=r"cannot read .*red.*\.png"):
        list(data.train_dataloader())


def test_errors_name_the_way_out(tmp_path, tree):
    with pytest.raises(DataError, match="data.root is not set"):
        create_data("imagefolder").setup()
    with pytest.raises(DataError, match=r"data.root=/nope is not a folder; expected <root>/train/<class>"):
        create("/nope").prepare_data()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no class folders; expected"):
        create(tmp_path / "empty").setup()
    make_tree(tmp_path / "one", 4, {"red": COLOURS["red"]})
    with pytest.raises(DataError, match=r"one class only \('red'\)"):
        create(tmp_path / "one").setup()
    (tree / "violet").mkdir()
    with pytest.raises(DataError, match="class 'violet' .* has no readable image"):
        create(tree).setup()
    picture((90, 0, 90), 0).save(tree / "violet" / "a.png")
    with pytest.raises(DataError, match="class 'violet' has only 1 readable images, too few"):
        create(tree).setup()
    make_tree(tmp_path / "set" / "train", 3)
    make_tree(tmp_path / "set" / "test", 3, {"pink": (250, 150, 150)})
    with pytest.raises(DataError, match="lacks: pink"):
        create(tmp_path / "set").setup()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"channels": 4}, "data.channels=4 is none of 1, 3"),
        ({"validate": "no"}, "data.validate='no' is none of full, header"),
        ({"mean": [0.5]}, "data.mean has 1 values for 3 channels"),
        ({"std": [1, 0, 1]}, "must be positive"),
        ({"mixup": 0.8, "batch_size": 7}, "data.batch_size=7 must be even"),
        ({"val_ratio": 1.0}, "data.val_ratio=1.0 is out of range"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(DataError, match=text):
        create("unused", **options)


def test_ratios_that_leave_no_training_image(tree):
    with pytest.raises(DataError, match="leave no training image"):
        create(tree, val_ratio=0.5, test_ratio=0.5).setup()


# -- augmentation ---------------------------------------------------------------------------------------


def epoch_of(data, epoch):
    loader = data.train_dataloader()
    loader.set_epoch(epoch)
    return list(loader)


def test_augmentation_is_a_function_of_seed_epoch_and_sample(tree):
    first = epoch_of(create(tree), 2)
    torch.manual_seed(1), np.random.seed(1)
    again = epoch_of(create(tree), 2)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    whole = {int(i): x for b in first for i, x in zip(b["index"], b["image"], strict=True)}
    # The same sample in a batch of another size: its distortion is its own.
    other = {
        int(i): x
        for b in epoch_of(create(tree, batch_size=5), 2)
        for i, x in zip(b["index"], b["image"], strict=True)
    }
    assert all(torch.equal(whole[i], other[i]) for i in whole)
    later = {
        int(i): x for b in epoch_of(create(tree), 3) for i, x in zip(b["index"], b["image"], strict=True)
    }
    assert not any(torch.equal(whole[i], later[i]) for i in whole)
    assert not torch.equal(first[0]["image"], epoch_of(create(tree, seed=1), 2)[0]["image"])


def test_augmentation_off_equals_evaluation(tree):
    data = create(tree, augment=False, mixup=0.8)
    for batch in data.train_dataloader():
        assert "target" not in batch
        for index, image in zip(batch["index"], batch["image"], strict=True):
            assert torch.equal(
                image, prepare_image(tree / data.split_ids()["train"][index], data.preprocessing())
            )


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_gives_soft_targets(tree, options):
    still = {"auto_augment": "", "color_jitter": 0.0, "flip": 0.0, "erasing": 0.0, "crop_scale_min": 1.0}
    data = create(tree, mean=[0, 0, 0], std=[1, 1, 1], **still, **options)
    batches = epoch_of(data, 0) + epoch_of(data, 1)
    assert all(len(batch["image"]) == 8 for batch in batches)
    columns = [data.labels.index(label) for label in ("red", "green", "blue")]
    mixed = 0
    for batch in batches:
        target = batch["target"]
        assert target.shape == (8, 3) and torch.allclose(target.sum(1), torch.ones(8))
        hard = torch.nn.functional.one_hot(batch["label"], 3)
        mixed += int(((target - hard).abs() > 0.01).any(1).sum())
        # Each class is nearly one colour channel, so the share of a class is the share of its colour.
        colour = batch["image"].mean((2, 3))
        pure = torch.tensor(
            [[np.array(COLOURS[c])[k] / 255 for k in range(3)] for c in ("red", "green", "blue")]
        )
        expected = target[:, columns] @ pure.float()
        assert torch.allclose(colour, expected, atol=0.06)
    assert mixed > 0
    repeated = epoch_of(create(tree, mean=[0, 0, 0], std=[1, 1, 1], **still, **options), 0)
    assert torch.equal(repeated[1]["target"], batches[1]["target"])
    assert "target" not in next(iter(data.val_dataloader()))


def test_mixing_a_set_smaller_than_a_batch(tmp_path):
    make_tree(tmp_path / "few", 3, {"a": (0, 0, 0), "b": (9, 9, 9), "c": (250, 250, 250)})
    (batch,) = epoch_of(create(tmp_path / "few", mixup=0.8, batch_size=64), 0)
    assert len(batch["image"]) == len(batch["target"]) == len(batch["label"]) == len(batch["index"]) == 2


def test_grey_channel(tree):
    data = create(tree, channels=1)
    for loader in (data.train_dataloader(), data.test_dataloader()):
        assert next(iter(loader))["image"].shape[1:] == (1, 16, 16)
    assert len(data.preprocessing()["mean"]) == 1


def test_wide_pictures_are_cropped_not_squeezed():
    image = Image.new("L", (40, 10), 0)
    image.paste(255, (15, 0, 25, 10))  # the middle square
    record = {
        "channels": 1,
        "size": [10, 10],
        "crop_ratio": 1.0,
        "interpolation": "bilinear",
        "mean": [0.0],
        "std": [1.0],
    }
    assert prepare_image(image, record).min() == 1.0


def test_ink_on_paper_is_inverted_for_digits():
    record = create_data("digits").preprocessing()
    paper = Image.new("L", (80, 80), 255)
    paper.paste(0, (30, 10, 50, 70))
    board = Image.eval(paper, lambda value: 255 - value)
    assert torch.allclose(prepare_image(paper, record), prepare_image(board, record), atol=0.02)


def test_baselines_see_the_colours(tree):
    scores = create(tree, val_ratio=0.2, test_ratio=0.2).baselines()
    assert scores["majority_class"]["accuracy"] == pytest.approx(1 / 3)
    assert scores["logistic_regression"]["accuracy"] == 1.0
