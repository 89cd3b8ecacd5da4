"""COCO, VOC, YOLO and PNG masks: what is read, what is skipped, what is refused; boxes and masks move together."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# tests are no package: their helpers are found beside them
sys.path.insert(0, str(Path(__file__).parent))
from scene_standins import coco_folder, write_image

from data import create_data
from data.base import DataError
from data.detection_base import VOID
from data.detection_masks import decode_runs, segment_mask
from data.detection_records import read_image
from data.sampler import BatchKey
from zoo.predict._scenes import open_image


def all_records(data):
    data.setup()
    return {r.path.name: r for records in data._records.values() for r in records}


def key(count=1, epoch=-1):
    return BatchKey(np.arange(count), epoch, 0)


def test_coco_ids_crowds_and_boxes(tmp_path):
    data = create_data("coco", root=str(coco_folder(tmp_path)), image_size=64)
    records = all_records(data)
    assert data.labels == ["apple", "zebra"] and data.preprocessing()["category_ids"] == [3, 90]
    assert records["0.png"].labels.tolist() == [0] and records["0.png"].boxes.tolist() == [[5, 5, 15, 25]]
    assert records["1.png"].crowd.tolist() == [True]
    assert records["2.png"].boxes.tolist() == [
        [50, 30, 60, 40]
    ]  # cut to the image; the box without area is gone
    assert records["3.png"].boxes.shape == (0, 4)
    assert list(data.skipped) == ["annotations.json: annotation 3"]
    assert sum(len(data.split_ids()[s]) for s in ("train", "val", "test")) == 4
    assert (
        data.pixel_classes(records["0.png"])[10, 7] == 1 and data.pixel_classes(records["0.png"])[0, 0] == 0
    )
    assert (data.pixel_classes(records["1.png"])[:, :30] == VOID).all()


def test_coco_numbers_that_are_none_are_said(tmp_path):
    coco_folder(tmp_path, images=1)
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"][0]["height"] = "tall"
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="annotations.json is not a COCO instances file: .*'tall'"):
        create_data("coco", root=str(tmp_path)).setup()


def test_coco_polygons_that_are_none_name_their_picture(tmp_path):
    coco_folder(tmp_path)
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["annotations"][0]["segmentation"] = [[1, 2]]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    data = create_data("coco", root=str(tmp_path))
    with pytest.raises(DataError, match="annotation of .*0.png: a polygon needs three"):
        data.pixel_classes(all_records(data)["0.png"])


def test_coco_sample_is_scaled_and_padded(tmp_path):
    data = create_data("coco", root=str(coco_folder(tmp_path)), image_size=120)
    record = all_records(data)["0.png"]
    sample = data.sample(record, train=False)
    assert sample["image"].shape == (3, 120, 120) and sample["size"].tolist() == [80, 120]
    assert sample["boxes"].tolist() == [[10, 10, 30, 50]]
    assert (sample["image"][:, 80:] == 0).all() and (sample["mask"][80:] == VOID).all()
    assert (sample["mask"][12:48, 12:28] == 1).all()
    truth = data.ground_truth("train")
    assert truth["images"][0]["height"] == 40


@pytest.mark.parametrize("frame", ["shown", "stored"])
def test_orientation_of_photographs(tmp_path, frame):
    """A photograph stored on its side: its annotation's size says which picture the boxes are drawn on."""
    coco_folder(tmp_path)
    stored = np.zeros((40, 60, 3), dtype=np.uint8)
    stored[5:15, 20:50] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn to the right
    Image.fromarray(stored).save(tmp_path / "0.png", exif=exif)
    content = json.loads((tmp_path / "annotations.json").read_text())
    size, box = ((60, 40), [25, 20, 10, 30]) if frame == "shown" else ((40, 60), [20, 5, 30, 10])
    content["images"][0] |= {"height": size[0], "width": size[1]}
    content["annotations"] = [{"id": 1, "image_id": 10, "category_id": 3, "bbox": box, "segmentation": []}]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    data = create_data("coco", root=str(tmp_path), image_size=60)
    sample = data.sample(all_records(data)["0.png"], train=False)
    assert sample["size"].tolist() == list(size)
    x1, y1, x2, y2 = sample["boxes"][0].int().tolist()
    light = sample["image"][0] > 0.5
    assert light[y1:y2, x1:x2].all() and int(light.sum()) == (y2 - y1) * (x2 - x1)
    predicted = np.asarray(open_image(tmp_path / "0.png")).transpose(2, 0, 1)
    assert np.array_equal(read_image(tmp_path / "0.png"), predicted)


def test_augmentation_moves_boxes_with_masks(tmp_path):
    data = create_data("coco", root=str(coco_folder(tmp_path)), image_size=60, crop=True, photometric=True)
    record = all_records(data)["0.png"]
    moved = 0
    for seed in range(12):
        torch.manual_seed(seed)
        sample = data.sample(record, train=True)
        for x1, y1, x2, y2 in sample["boxes"].round().int().tolist():
            ys, xs = (sample["mask"] == 1).nonzero(as_tuple=True)
            assert abs(int(xs.min()) - x1) <= 1 and abs(int(xs.max()) + 1 - x2) <= 1
            assert abs(int(ys.min()) - y1) <= 1 and abs(int(ys.max()) + 1 - y2) <= 1
            moved += x1 != 5
    assert moved > 0


def test_training_batches_repeat(tmp_path):
    make = lambda: create_data("coco", root=str(coco_folder(tmp_path)), image_size=48, crop=True)
    first, again = (d.dataset("train")[key(2, epoch=1)] for d in (make(), make()))
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_masks_are_painted_for_those_who_ask_for_them(tmp_path):
    content = json.loads((coco_folder(tmp_path) / "annotations.json").read_text())
    content["categories"] += [{"id": i, "name": str(i)} for i in range(100, 400)]
    content["annotations"][0]["category_id"] = 390
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    data = create_data("coco", root=str(tmp_path), image_size=32)
    with pytest.raises(DataError, match="302 categories.*254"):
        data.require("masks", "segmentation")
    sample = data.sample(all_records(data)["0.png"], train=False)
    assert "mask" not in sample and sample["labels"].tolist() == [292]
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    content["categories"] = content["categories"][:2]
    content["annotations"] = content["annotations"][1:]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="'segmentation' trains on: no annotation has a segmentation"):
        create_data("coco", root=str(tmp_path)).require("masks", "segmentation")
    data = create_data("coco", root=str(coco_folder(tmp_path)))
    assert data.provides == {"boxes", "masks"}
    data.require("boxes", "detr")
    assert "mask" not in data.dataset("train")[key()]


def test_run_lengths_plain_and_compressed():
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 2:4] = True
    counts = [9, 2, 2, 2, 5]
    assert (decode_runs(counts, (4, 5)) == mask).all()
    text = _compress(counts)
    assert (decode_runs(text, (4, 5)) == mask).all() and (decode_runs(text.encode(), (4, 5)) == mask).all()
    with pytest.raises(DataError, match="add up to 3"):
        decode_runs([3], (4, 5))
    square = segment_mask([[1, 1, 4, 1, 4, 3, 1, 3]], (5, 6))
    assert square.sum() == 6 and square[1:3, 1:4].all()


def _compress(counts):
    out = ""
    for i, value in enumerate(counts):
        value -= counts[i - 2] if i > 2 else 0
        while True:
            bits, value = value & 31, value >> 5
            more = not (value == (-1 if bits & 16 else 0))
            out += chr(48 + (bits | (32 if more else 0)))
            if not more:
                break
    return out


def test_coco_errors_name_the_way_out(tmp_path):
    with pytest.raises(DataError, match="data.root=FOLDER"):
        create_data("coco").setup()
    with pytest.raises(DataError, match="no such folder"):
        create_data("coco", root=str(tmp_path / "no")).setup()
    with pytest.raises(DataError, match="data.train=FILE"):
        create_data("coco", root=str(tmp_path)).setup()
    bad = {"annotations": [{"id": 7, "image_id": 10, "category_id": 5, "bbox": [0, 0, 1, 1]}]}
    coco_folder(tmp_path, **bad)
    with pytest.raises(DataError, match="annotation 7 has category id 5.*3, 90"):
        create_data("coco", root=str(tmp_path)).setup()
    coco_folder(tmp_path, annotations=[{"id": 7, "image_id": 10, "category_id": 3}])
    with pytest.raises(DataError, match="annotations.json: an image, annotation or category has no 'bbox'"):
        create_data("coco", root=str(tmp_path)).setup()
    coco_folder(tmp_path)
    (tmp_path / "0.png").unlink()
    data = create_data("coco", root=str(tmp_path))
    data.setup()
    assert any("0.png" in reason for reason in data.skipped.values())
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="cannot read image"):
        data.sample(all_records(data)["1.png"], train=False)
    (tmp_path / "annotations.json").write_text("[]")
    with pytest.raises(DataError, match="not an object"):
        create_data("coco", root=str(tmp_path)).setup()


def voc_folder(root, box=(6, 6, 15, 25)):
    for i in range(3):
        write_image(root / "JPEGImages" / f"{i}.jpg", seed=i)
        xml = "<annotation><filename>%d.jpg</filename><size><width>60</width><height>40</height></size>%s</annotation>"
        item = "<object><name>cat</name><difficult>%d</difficult><bndbox><xmin>%s</xmin><ymin>%s</ymin><xmax>%s</xmax>"
        item += "<ymax>%s</ymax></bndbox></object>"
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{i}.xml").write_text(xml % (i, item % (i == 2, *box)))
    return root


def test_pictures_in_training_and_test_are_refused(tmp_path):
    root = str(coco_folder(tmp_path))
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = content["annotations"][:1]
    (tmp_path / "test.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="1 pictures are in train and in test, 0.png among them"):
        create_data("coco", root=root, test="test.json").setup()


def test_a_lone_validation_file_is_the_test_split(tmp_path):
    """Its scores are what its users compare; validation comes from the training images, as with imagefolder."""
    root = str(coco_folder(tmp_path))
    content = json.loads((tmp_path / "annotations.json").read_text())
    first, *others = content["images"]
    for name, images in (("train", others), ("held", [first])):
        ids = {image["id"] for image in images}
        kept = [a for a in content["annotations"] if a["image_id"] in ids]
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"images": images, "annotations": kept}))
    data = create_data("coco", root=root, train="train.json", val="held.json")
    ids = data.split_ids()
    assert len(ids["test"]) == 1 and ids["test"][0].endswith(first["file_name"])
    assert ids["val"] and not set(ids["val"]) & {*ids["train"], *ids["test"]}


def test_voc_counts_from_one(tmp_path):
    data = create_data("voc", root=str(voc_folder(tmp_path)), image_size=60)
    records = all_records(data)
    assert records["0.jpg"].boxes.tolist() == [[5, 5, 15, 25]] and data.labels == ["cat"]
    assert records["2.jpg"].crowd.tolist() == [True] and records["0.jpg"].crowd.tolist() == [False]
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, stem in (("train", "0"), ("val", "1"), ("test", "2\n9")):
        (lists / f"{split}.txt").write_text(stem)
    data = create_data("voc", root=str(tmp_path), image_size=60)
    assert data.split_ids()["test"] == ["JPEGImages/2.jpg"] and "9" in data.skipped
    with pytest.raises(DataError, match="'cat' is not among"):
        create_data("voc", root=str(tmp_path), classes=["dog"]).setup()
    (tmp_path / "Annotations" / "1.xml").write_text("<annotation><object/></annotation>")
    with pytest.raises(DataError, match="bndbox"):
        create_data("voc", root=str(tmp_path)).setup()


def test_yolo_lines(tmp_path):
    for i in range(3):
        write_image(tmp_path / "images" / f"{i}.png", seed=i)
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "labels" / "0.txt").write_text("1 0.5 0.5 0.5 0.25\n\n0 0.5 0.5 0 0.1\n")
    data = create_data("yolo", root=str(tmp_path), image_size=60)
    records = all_records(data)
    assert records["0.png"].boxes.tolist() == [[15, 15, 45, 25]] and records["0.png"].labels.tolist() == [1]
    assert records["1.png"].boxes.shape == (0, 4) and list(data.skipped) == ["0.txt:3"]
    assert "mask" not in data.dataset("train")[key()]
    for line, message in (("2 .5 .5 .1 .1", "outside 0 .. 1"), ("cat 1 1", "0.txt:1.*cx cy")):
        (tmp_path / "labels" / "0.txt").write_text(line)
        with pytest.raises(DataError, match=message):
            create_data("yolo", root=str(tmp_path)).setup()


def test_yolo_polygons_become_their_boxes(tmp_path):
    for i in range(3):
        write_image(tmp_path / "images" / f"{i}.png", seed=i)
    with pytest.raises(DataError, match="no label file .*labels"):
        create_data("yolo", root=str(tmp_path), classes=["cat"]).setup()
    (tmp_path / "labels").mkdir()
    lines = "0 0.25 0.5 0.5 0.25 0.75 0.5 0.5 0.75\n0 0.5 0.5 0.5 0.25 0.9\n"  # the second ends with a score
    (tmp_path / "labels" / "0.txt").write_text(lines)
    data = create_data("yolo", root=str(tmp_path), classes=["cat"])
    assert all_records(data)["0.png"].boxes.tolist() == [[15, 10, 45, 30], [15, 15, 45, 25]]
    (tmp_path / "labels" / "0.txt").write_text("0 0.5 0.5 0.5 0.25 0.9 0.1 0.3\n")
    with pytest.raises(DataError, match="0.txt:1.*polygon"):
        create_data("yolo", root=str(tmp_path), classes=["cat"]).setup()


def masks_folder(root, values, mode="P"):
    for i in range(3):
        write_image(root / "images" / f"{i}.jpg", 6, 8, seed=i)
        (root / "masks").mkdir(exist_ok=True)
        mask = Image.fromarray(np.resize(np.array(values, dtype=np.uint8), (6, 8)))
        if mode == "P":
            mask = mask.convert("L")
            mask.putpalette([v for k in range(256) for v in (k, 0, 255 - k)])
        mask.save(root / "masks" / f"{i}.png")
    return root


def test_png_masks_palette_void_and_mapping(tmp_path):
    root = str(masks_folder(tmp_path, [0, 1, 2, 255]))
    data = create_data("png_masks", root=root, image_size=16)
    batch = data.dataset("train")[key()]
    assert data.mask_labels == ["background", "class_1", "class_2"]
    assert batch["size"].tolist() == [[12, 16]] and set(batch["mask"].unique().tolist()) == {0, 1, 2, 255}
    data = create_data("png_masks", root=root, zero_is_void=True, background=False, classes=["a", "b"])
    mask = data.pixel_classes(all_records(data)["0.jpg"])
    assert mask[0, :4].tolist() == [255, 0, 1, 255]
    data = create_data("png_masks", root=root, mapping={1: 0, 2: 1}, background=False)
    assert data.pixel_classes(all_records(data)["0.jpg"])[0, :4].tolist() == [255, 0, 1, 255]
    with pytest.raises(DataError, match="0.png holds value 2, but there are 2 classes"):
        data = create_data("png_masks", root=root, classes=["background", "a"])
        data.pixel_classes(all_records(data)["0.jpg"])
    masks_folder(tmp_path / "binary", [0, 255])
    for options in ({}, {"classes": ["background", "lesion"]}):
        with pytest.raises(DataError, match=r"nothing but 0 and 255.*data.mapping=\{0: 0, 255: 1\}"):
            create_data("png_masks", root=str(tmp_path / "binary"), **options).setup()
    data = create_data("png_masks", root=str(tmp_path / "binary"), mapping={0: 0, 255: 1})
    assert data.pixel_classes(all_records(data)["0.jpg"])[0, :4].tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="data.crop=true needs boxes"):
        create_data("png_masks", root=root, crop=True).require("masks", "segmentation")
    with pytest.raises(DataError, match="data.mapping holds -1"):
        create_data("png_masks", root=root, mapping={-1: 0})
    Image.new("RGB", (8, 6)).save(tmp_path / "masks" / "1.png")
    with pytest.raises(DataError, match="RGB picture"):
        create_data("png_masks", root=root).setup()


def test_hashes_see_masks_and_what_they_mean(tmp_path):
    root = masks_folder(tmp_path / "png", [0, 1, 2, 255])
    found = [
        create_data("png_masks", root=str(root), mapping=m).data_hash() for m in (None, None, {1: 0, 2: 1})
    ]
    os.utime(root / "masks" / "0.png", (0, 0))  # drawn anew
    found.append(create_data("png_masks", root=str(root)).data_hash())
    assert found[0] == found[1] and len(set(found)) == 3
    crowds = []
    for crowd in (0, 1):
        folder = coco_folder(tmp_path / "coco")
        content = json.loads((folder / "annotations.json").read_text())
        content["annotations"][0]["iscrowd"] = crowd
        (folder / "annotations.json").write_text(json.dumps(content))
        crowds.append(create_data("coco", root=str(folder)).data_hash())
    assert crowds[0] != crowds[1]


def test_an_image_of_one_pixel(tmp_path):
    coco_folder(tmp_path, images=3)
    write_image(tmp_path / "0.png", 1, 1)
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"][0] |= {"height": 1, "width": 1}
    content["annotations"] = [{"id": 1, "image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1], "area": 1}]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    data = create_data("coco", root=str(tmp_path), image_size=32)
    sample = data.sample(all_records(data)["0.png"], train=False)
    assert sample["size"].tolist() == [32, 32] and sample["boxes"].tolist() == [[0, 0, 32, 32]]
