"""From a picture on disk to boxes and masks in its own pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.attention.slots import resolve_slots
from zoo.errors import ConfigError, DataError
from zoo.models import get_model
from zoo.predict import get_predictor

SETTINGS = {"kind": "scene", "channels": 3, "size": [64, 64], "mean": [0.5] * 3, "std": [0.25] * 3}


def predictor(task, name, labels, **options):
    cls = get_model(name)
    model = cls(resolve_slots(cls.slots(**options), {"name": "softmax"}), **options).eval()
    card = {"task": task, "labels": labels, "preprocessing": SETTINGS}
    return get_predictor(card)(model, card)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (50, 100, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("name", ["plain_detr", "detr"])
def test_boxes_are_in_pixels_of_the_picture(picture, name):
    own = predictor("detr", name, [str(i) for i in range(10)], dim=32, padded=True)
    pixels, size = own.preprocess(picture)
    assert pixels.shape == (1, 3, 64, 64) and size.tolist() == [[32, 64]]
    assert (pixels[:, :, 32:] == 0).all()
    own.threshold = 0.0
    found = own.predict(picture)["objects"]
    assert len(found) == 12
    for item in found:
        x1, y1, x2, y2 = item["box"]
        assert 0 <= x1 <= x2 <= 100 and 0 <= y1 <= y2 <= 50
    assert str(picture) in own.format(picture, own.predict(picture))
    own.threshold = 1.1
    assert "nothing found" in own.format(picture, own.predict(picture))


def test_masks_have_the_size_of_the_picture(picture):
    own = predictor("segmentation", "segmenter", ["background", *"0123456789"], dim=32, stem_width=8)
    found = own.predict(picture)
    assert found["size"] == [50, 100] and len(found["mask"]) == 50
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-2)
    assert torch.equal(own.classes(picture), torch.tensor(found["mask"]))
    assert "%" in own.format(picture, found)


def test_windows_keep_the_resolution(picture):
    own = predictor("segmentation", "segmenter", ["background", *"0123456789"], dim=32, stem_width=8)
    seen = []
    own.model.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape[-2:])))
    whole = own.classes(picture)
    assert own.options({"window": "train"}) == [] and own.window == (64, 64)
    assert own.classes(picture).shape == whole.shape == (50, 100)
    own.options({"window": "32"})
    own.classes(picture)
    assert seen == [(64, 64), (64, 64), (32, 32)]
    with pytest.raises(ConfigError, match="--window many"):
        own.options({"window": "many"})
    with pytest.raises(ConfigError, match="did you mean '--window'"):
        own.options({"windw": "32"})


def test_sixteen_bits_and_transparency_are_read_as_in_training(tmp_path):
    from data.detection_records import read_image
    from zoo.predict._scenes import open_image

    deep = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(6, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    clear = np.full((6, 8, 4), 10, dtype=np.uint8)
    clear[..., 3] = 0
    Image.fromarray(clear).save(tmp_path / "clear.png")
    for name in ("deep", "clear"):
        path = tmp_path / f"{name}.png"
        shown = np.asarray(open_image(path))
        assert np.array_equal(shown, read_image(path).permute(1, 2, 0).numpy())
        wanted = deep[..., None] / 257 if name == "deep" else 255
        assert np.abs(shown - wanted).max() <= 0.5, (
            "greys keep their share of the range, what is clear is white"
        )


def test_unreadable_pictures_are_named(tmp_path):
    own = predictor("segmentation", "segmenter", ["a"] * 11, dim=32, stem_width=8)
    with pytest.raises(DataError, match="no such image"):
        own.predict(tmp_path / "none.png")
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(DataError, match="cannot read"):
        own.predict(tmp_path / "bad.png")
