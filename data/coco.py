"""COCO annotation files: boxes, polygons, run lengths, crowds, category ids with gaps."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from data import register_data
from data.carriers import sha256_of
from data.detection_base import VOID
from data.detection_files import FileScenes
from data.detection_records import Record, clean_boxes
from data.errors import DataError


@register_data("coco")
class CocoData(FileScenes):
    """Images with a COCO JSON file for each split.

    Class numbers are places in the file's list of categories, sorted by id, so ids may have gaps; the ids are kept
    in the weights' card. Masks come from the segmentations; crowd regions are void there, and neither objects nor
    mistakes for AP.

    Args:
        train: Annotation file of the training images, relative to `root`.
        val: The same for validation; left out, images are taken from the training file.
        test: The same for test.
        images: Folder of the images, relative to `root`; by default that of the annotation file, or `root`.
        common: Options of :class:`data.detection_files.FileScenes`.
    """

    def __init__(
        self,
        *,
        train: str = "annotations.json",
        val: str | None = None,
        test: str | None = None,
        images: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.files = {"train": train, "val": val, "test": test}
        self.images = images
        self.category_ids: list[int] = []

    @property
    def provides(self) -> frozenset[str]:
        """Boxes, and masks where there are any; a task on boxes spares their painting."""
        return frozenset(("boxes",) if self.target == "boxes" or self._why_no_masks() else ("boxes", "masks"))

    def require(self, target: str, task: str) -> None:
        """As for all scenes; says why there are no masks."""
        if target == "masks" and (reason := self._why_no_masks()):
            raise DataError(f"data {self.name!r} has no masks, which task {task!r} trains on: {reason}")
        super().require(target, task)

    def _why_no_masks(self) -> str:
        self.setup()
        if len(self.labels) >= VOID:
            return f"{len(self.labels)} categories, a mask tells {VOID - 1} classes and void apart"
        if not any(s for records in self._records.values() for r in records for s in r.segments or ()):
            return "no annotation has a segmentation"
        return ""

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """Records of every file that is named."""
        root = self.folder()
        records, names = {}, None
        for split, file in self.files.items():
            if file is None:
                continue
            try:
                found, categories = self._read_file(root / file)
            except DataError:
                raise
            except KeyError as error:
                raise DataError(f"{root / file}: an image, annotation or category has no {error}") from None
            except (TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{root / file} is not a COCO instances file: {error}") from None
            if names is not None and categories != names:
                raise DataError(f"{root / file}: its categories differ from those of {self.files['train']}")
            records[split], names = found, categories
        self.category_ids = [i for i, _ in names]
        return records, [name for _, name in names]

    def _read_file(self, path: Path) -> tuple[list[Record], list[tuple[int, str]]]:
        content = read_json(path)
        for key in ("images", "annotations", "categories"):
            if not isinstance(content.get(key), list):
                raise DataError(f"{path} has no list {key!r}: it is not a COCO instances file")
        categories = sorted((int(c["id"]), str(c["name"])) for c in content["categories"])
        number = {i: k for k, (i, _) in enumerate(categories)}
        if len(number) != len(categories):
            raise DataError(f"{path}: a category id occurs twice")
        by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        known = {image["id"] for image in content["images"]}
        for annotation in content["annotations"]:
            name = f"{path.name}: annotation {annotation.get('id')}"
            if annotation.get("category_id") not in number:
                raise DataError(
                    f"{name} has category id {annotation.get('category_id')!r}, which `categories` does not list; ids "
                    f"there: {', '.join(map(str, list(number)[:20]))}"
                )
            if annotation.get("image_id") not in known:
                self.skipped[name] = f"no image with id {annotation.get('image_id')!r}"
            else:
                by_image[annotation["image_id"]].append(annotation)
        folder = self.root / self.images if self.images is not None else None
        records = []
        for image in content["images"]:
            own = by_image[image["id"]]
            candidates = [folder] if folder else [path.parent, self.root]
            file = next(
                (f for c in candidates if (f := c / image["file_name"]).is_file()),
                candidates[0] / image["file_name"],
            )
            records.append(
                self._record(file, (int(image["height"]), int(image["width"])), own, number, path.name)
            )
        return records, categories

    def _record(
        self,
        file: Path,
        size: tuple[int, int],
        own: list[dict[str, Any]],
        number: dict[int, int],
        source: str,
    ) -> Record:
        xywh = np.array([a["bbox"] for a in own], dtype=float).reshape(-1, 4)
        corners = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1)
        names = [f"{source}: annotation {a.get('id')}" for a in own]
        boxes, good = clean_boxes(corners, size, names, self.skipped)
        own = [a for a, keep in zip(own, good, strict=True) if keep]
        sides = (boxes[good, 2:] - boxes[good, :2]).prod(1)
        return Record(
            path=file,
            size=size,
            boxes=boxes[good],
            labels=np.array([number[a["category_id"]] for a in own], dtype=np.int64),
            crowd=np.array([bool(a.get("iscrowd", 0)) for a in own], dtype=bool),
            area=np.array([float(a.get("area", s)) for a, s in zip(own, sides, strict=True)]),
            segments=[a.get("segmentation") for a in own],
        )

    def mask_meaning(self) -> str:
        """The annotation files, which hold the polygons."""
        return repr([sha256_of(self.root / file) for file in self.files.values() if file is not None])

    @property
    def mask_labels(self) -> list[str]:
        # A file that lists its own background class (id 0 in some exports) still gets one of ours in front.
        return ["background", *self.labels]

    def preprocessing(self) -> dict[str, Any]:
        """As for all files, with the category ids of the annotation file."""
        return {**super().preprocessing(), "category_ids": list(self.category_ids)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DataError: It is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"no annotation file {path}; name it with data.train=FILE, relative to data.root"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content
