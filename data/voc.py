"""Pascal VOC folders: one XML file per image with boxes, and PNG masks where there are some."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from data import register_data
from data.base import SPLITS
from data.detection_base import VOID
from data.detection_files import FileScenes
from data.detection_records import Record, clean_boxes, image_size_of
from data.errors import DataError
from data.png_masks import read_classes, refuse_binary


@register_data("voc")
class VocData(FileScenes):
    """`Annotations/*.xml`, `JPEGImages/`, and `SegmentationClass/*.png` with `masks`.

    Splits are read from `ImageSets/Main/{train,val,test}.txt` where they exist. Objects marked `difficult` count as
    crowds: neither objects nor mistakes.

    Args:
        classes: Class names in order, or None for those that occur, sorted; or a file with one name per line.
        masks: Masks instead of boxes: the class per pixel of `SegmentationClass`, 0 background, 255 void.
        common: Options of :class:`data.detection_files.FileScenes`.
    """

    def __init__(self, *, classes: list[str] | str | None = None, masks: bool = False, **common: Any) -> None:
        super().__init__(**common)
        self.classes, self.masks = classes, masks

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(("masks",) if self.masks else ("boxes",))

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        root = self.folder()
        names = class_names(self.classes, root)
        if self.masks:
            return self._read_masks(root, names)
        files = sorted((root / "Annotations").glob("*.xml"))
        if not files:
            raise DataError(f"data.root={root}: no XML file in {root / 'Annotations'}")
        parsed = {f.stem: _parse(f) for f in files}
        if names is None:
            names = sorted({name for _, _, objects in parsed.values() for name, _, _ in objects})
        number = {name: i for i, name in enumerate(names)}
        records = {}
        for stem, (file, size, objects) in parsed.items():
            for name, _, _ in objects:
                if name not in number:
                    raise DataError(
                        f"{root / 'Annotations' / (stem + '.xml')}: class {name!r} is not among data.classes: "
                        f"{', '.join(names)}"
                    )
            path = root / "JPEGImages" / file
            if size is None:
                size = image_size_of(path) if path.is_file() else (1, 1)
            boxes, good = clean_boxes(
                np.array([b for _, b, _ in objects]),
                size,
                [f"{stem}.xml: object {i}" for i in range(len(objects))],
                self.skipped,
            )
            kept = [o for o, g in zip(objects, good, strict=True) if g]
            records[stem] = Record(
                path=path,
                size=size,
                boxes=boxes[good],
                labels=np.array([number[n] for n, _, _ in kept], dtype=np.int64),
                crowd=np.array([d for _, _, d in kept], dtype=bool),
                area=(boxes[good, 2:] - boxes[good, :2]).prod(1),
            )
        return self._by_split(root, "Main", records), names

    def _read_masks(self, root: Path, names: list[str] | None) -> tuple[dict[str, list[Record]], list[str]]:
        files = sorted((root / "SegmentationClass").glob("*.png"))
        files = files or sorted((root / "SegmentationClassPNG").glob("*.png"))
        if not files:
            raise DataError(f"data.root={root}: no PNG in {root / 'SegmentationClass'}")
        records = {}
        for mask in files:
            path = next(
                (
                    p
                    for e in (".jpg", ".jpeg", ".png")
                    if (p := root / "JPEGImages" / (mask.stem + e)).is_file()
                ),
                root / "JPEGImages" / (mask.stem + ".jpg"),
            )
            records[mask.stem] = Record(path=path, size=image_size_of(mask), mask=mask)
        refuse_binary(files)
        if names is None:
            top = max(int(v) for m in files for v in np.unique(read_classes(m)) if v != VOID)
            names = [f"class_{i}" for i in range(1, top + 1)]
        names = [n for n in names if n not in ("__ignore__", "_background_", "background")]
        return self._by_split(root, "Segmentation", records), names

    def _by_split(self, root: Path, kind: str, records: dict[str, Record]) -> dict[str, list[Record]]:
        lists = {s: root / "ImageSets" / kind / f"{s}.txt" for s in SPLITS}
        if not lists["train"].is_file():
            return {"train": list(records.values())}
        out = {}
        for split, path in lists.items():
            if path.is_file():
                stems = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
                for stem in stems:
                    if stem not in records:
                        self.skipped[stem] = f"in {path.name} but without annotation"
                out[split] = [records[s] for s in stems if s in records]
        return out

    def read_mask(self, record: Record) -> np.ndarray:
        return read_classes(record.mask, classes=len(self.mask_labels))


def class_names(given: list[str] | str | None, root: Path) -> list[str] | None:
    """Class names from a list, or from a file with one per line; `class_names.txt` in the root where none are given."""
    if isinstance(given, list):
        return [str(n) for n in given]
    path = root / given if given else root / "class_names.txt"
    if path.is_file():
        return [n.strip() for n in path.read_text(encoding="utf-8").splitlines() if n.strip()]
    if given:
        raise DataError(f"data.classes={given}: no such file in {root}; give a list of names or a file")
    return None


def _parse(path: Path) -> tuple[str, tuple[int, int] | None, list[tuple[str, list[float], bool]]]:
    """File name, (height, width) and objects (class, corners, difficult) of an XML file."""
    try:
        tree = ElementTree.parse(path).getroot()
        size = tree.find("size")
        height, width = (
            (int(float(size.findtext(k))) for k in ("height", "width")) if size is not None else (0, 0)
        )
        objects = []
        for item in tree.iter("object"):
            box = item.find("bndbox")
            # VOC counts pixels from 1 and includes the last one.
            corners = [
                float(box.findtext(k)) - (k in ("xmin", "ymin")) for k in ("xmin", "ymin", "xmax", "ymax")
            ]
            objects.append(
                (item.findtext("name").strip(), corners, item.findtext("difficult", "0").strip() == "1")
            )
        file = (tree.findtext("filename") or f"{path.stem}.jpg").strip()
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f"cannot read {path}: {error}; every object needs a name and a bndbox with four numbers"
        ) from None
    return file, ((height, width) if height and width else None), objects
