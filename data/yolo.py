"""YOLO folders: one text file per image, a line per box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data import register_data
from data.base import SPLITS
from data.detection_files import FileScenes
from data.detection_records import Record, clean_boxes, image_size_of
from data.errors import DataError
from data.voc import class_names
from zoo.predict.images import SUFFIXES


@register_data("yolo")
class YoloData(FileScenes):
    """`images/<split>/*.jpg` with `labels/<split>/*.txt`; lines `class cx cy w h`, relative to the image.

    A polygon, `class x1 y1 x2 y2 x3 y3 ...`, becomes the box around it; a score after a box is left out. Without split folders the
    images of `images/` are divided. An image without a text file has no objects.

    Args:
        classes: Class names in order, or a file with one per line; `classes.txt` by default.
        common: Options of :class:`data.detection_files.FileScenes`.
    """

    def __init__(self, *, classes: list[str] | str | None = "classes.txt", **common: Any) -> None:
        super().__init__(**common)
        self.classes = classes

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(("boxes",))

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        root = self.folder()
        names = class_names(self.classes, root)
        if names is None:
            raise DataError(
                "data.classes: YOLO files number their classes; give the names as a list or a file"
            )
        splits = {s: root / "images" / s for s in SPLITS if (root / "images" / s).is_dir()} or {
            "train": root / "images"
        }
        records = {}
        for split, folder in splits.items():
            files = sorted(f for f in folder.glob("*") if f.suffix.lower() in SUFFIXES)
            labels = root / "labels" / folder.relative_to(root / "images")
            if files and not any((labels / f"{f.stem}.txt").is_file() for f in files):
                raise DataError(
                    f"no label file of any image in {folder}: expected {labels / files[0].stem}.txt"
                )
            records[split] = [
                r for f in files if (r := self._record(f, labels / f"{f.stem}.txt", names)) is not None
            ]
        if not records.get("train"):
            raise DataError(f"data.root={root}: no image in {splits.get('train', root / 'images')}")
        return records, names

    def _record(self, image: Path, text: Path, names: list[str]) -> Record | None:
        try:
            size = image_size_of(image)
        except DataError as error:
            self.skipped[str(image)] = str(error)
            return None
        rows, where = [], []
        lines = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                label, *place = (float(v) for v in line.split())
                box = _corners(place)
            except ValueError:
                raise DataError(
                    f"{text}:{number}: expected `class cx cy w h` or a polygon `class x1 y1 x2 y2 x3 y3 ...`, found {line!r}"
                ) from None
            if not 0 <= label < len(names) or label != int(label):
                raise DataError(
                    f"{text}:{number}: class {label:g} is outside 0 .. {len(names) - 1}, see data.classes"
                )
            rows.append([label, *box])
            where.append(f"{text.name}:{number}")
        table = np.array(rows, dtype=float).reshape(-1, 5)
        corners = table[:, 1:] * np.tile(size[::-1], 2)
        boxes, good = clean_boxes(corners, size, where, self.skipped)
        return Record(
            path=image,
            size=size,
            boxes=boxes[good],
            labels=table[good, 0].astype(np.int64),
            crowd=np.zeros(int(good.sum()), dtype=bool),
            area=(boxes[good, 2:] - boxes[good, :2]).prod(1),
        )


def _corners(place: list[float]) -> tuple[float, float, float, float]:
    """Corners of a box `cx cy w h`, with or without a score, or around a polygon `x1 y1 x2 y2 x3 y3 ...`."""
    if len(place) in (4, 5):
        cx, cy, w, h = place[:4]
        return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    if len(place) < 6 or len(place) % 2:
        raise ValueError(f"{len(place)} numbers")
    x, y = place[0::2], place[1::2]
    return min(x), min(y), max(x), max(y)
