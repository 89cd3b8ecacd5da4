"""Images beside PNG masks with one class per pixel, as ADE20K, Cityscapes and VOC have them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data import register_data
from data.base import SPLITS
from data.detection_base import VOID
from data.detection_files import FileScenes
from data.detection_records import Record, image_size_of
from data.errors import DataError
from zoo.predict.images import SUFFIXES, UNREADABLE


@register_data("png_masks")
class PngMasksData(FileScenes):
    """`images/<split>/**` with masks of the same name under `masks/<split>/**`; or both without split folders.

    A mask is a grey or palette PNG; its pixel values are class numbers.

    Args:
        images: Folder of the images, relative to `root` ("leftImg8bit" in Cityscapes).
        masks: Folder of the masks, relative to `root` ("annotations" in ADE20K, "gtFine" in Cityscapes).
        image_suffix: End of an image's name that its mask replaces ("_leftImg8bit"); empty for equal names.
        mask_suffix: What the mask has there ("_gtFine_labelTrainIds").
        classes: Class names in order, or a file in `root` with one per line; numbered names when left out.
        background: The first class is background, which `miou_foreground` leaves out.
        zero_is_void: Value 0 does not count and the others move down by one, as in ADE20K.
        mapping: Class of each pixel value, where values are not classes already: {7: 0, 8: 1}; others are void.
        common: Options of :class:`data.detection_files.FileScenes`.
    """

    def __init__(
        self,
        *,
        images: str = "images",
        masks: str = "masks",
        image_suffix: str = "",
        mask_suffix: str = "",
        classes: list[str] | str | None = None,
        background: bool = True,
        zero_is_void: bool = False,
        mapping: dict[int, int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if zero_is_void and mapping:
            raise DataError("data.zero_is_void and data.mapping both say what values mean; give one")
        self.folders = (images, masks)
        self.suffixes = (image_suffix, mask_suffix)
        self.classes = classes
        self.has_background = background
        self.zero_is_void = zero_is_void
        self.mapping = {int(k): int(v) for k, v in (mapping or {}).items()}
        for value in (*self.mapping, *self.mapping.values()):
            if not 0 <= value <= 255:
                raise DataError(
                    f"data.mapping holds {value}; pixel values and classes are 0 .. 255, 255 is void"
                )

    @property
    def provides(self) -> frozenset[str]:
        return frozenset(("masks",))

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        from data.voc import class_names

        root = self.folder()
        top = root / self.folders[0]
        if not top.is_dir():
            raise DataError(f"no folder {top}; name it with data.images=FOLDER, relative to data.root")
        aliases = {"train": ("train", "training"), "val": ("val", "validation"), "test": ("test", "testing")}
        found = {s: top / n for s in SPLITS for n in aliases[s] if (top / n).is_dir()}
        records = {s: self._records_in(f) for s, f in (found or {"train": top}).items()}
        if not any(records.values()):
            why = (
                f"; skipped {len(self.skipped)}: {next(iter(self.skipped.values()))}" if self.skipped else ""
            )
            raise DataError(f"no image with a mask under {top}{why}")
        if not self.mapping:
            refuse_binary(r.mask for own in records.values() for r in own)
        names = class_names(self.classes, root)
        if names is None:
            highest = 0
            for record in (r for own in records.values() for r in own[:200]):
                values = self._translate(read_classes(record.mask), record.mask)
                highest = max(highest, int(values[values != VOID].max(initial=0)))
            names = [f"class_{i}" for i in range(highest + 1)]
        return records, names[1:] if self.has_background else names

    def _records_in(self, folder: Path) -> list[Record]:
        top, masks = (self.root / f for f in self.folders)
        records = []
        for file in sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES):
            if not file.stem.endswith(self.suffixes[0]):
                continue
            stem = file.stem[: len(file.stem) - len(self.suffixes[0])] + self.suffixes[1]
            mask = masks / file.parent.relative_to(top) / f"{stem}.png"
            if not mask.is_file():
                self.skipped[str(file)] = f"no mask {mask}"
                continue
            size, shown = image_size_of(mask), image_size_of(file)
            if size not in (shown, image_size_of(file, upright=False)):
                raise DataError(f"mask {mask} is {size}, its image {file.name} is {shown} (height, width)")
            records.append(Record(path=file, size=size, mask=mask))
        return records

    def _translate(self, values: np.ndarray, path: Path) -> np.ndarray:
        if self.mapping:
            table = np.full(256, VOID, dtype=np.uint8)
            for value, label in self.mapping.items():
                table[value] = label
            return table[values]
        if self.zero_is_void:
            return np.where((values == 0) | (values == VOID), VOID, values.astype(int) - 1).astype(np.uint8)
        return values

    def mask_meaning(self) -> str:
        return repr((self.zero_is_void, sorted(self.mapping.items())))

    def read_mask(self, record: Record) -> np.ndarray:
        values = self._translate(read_classes(record.mask), record.mask)
        return check_classes(values, len(self.mask_labels), record.mask)


def read_classes(path: Path, classes: int | None = None) -> np.ndarray:
    """Pixel values of a grey or palette PNG, uint8 [H, W].

    Raises:
        DataError: A file that cannot be read, a colour picture, or a value that is no class.
    """
    try:
        with Image.open(path) as file:
            mode, values = file.mode, np.array(file)
    except UNREADABLE as error:
        raise DataError(f"cannot read mask {path}: {error}") from None
    if mode not in ("P", "L", "1", "I", "I;16"):
        raise DataError(
            f"mask {path} is a {mode} picture; a mask has one channel, grey or palette, with class numbers"
        )
    if values.max(initial=0) > 255:
        raise DataError(f"mask {path} holds value {int(values.max())}; values go up to 254, and 255 is void")
    values = values.astype(np.uint8)
    return values if classes is None else check_classes(values, classes, path)


def refuse_binary(masks: Iterable[Path]) -> None:
    """Refuse masks of 0 and 255 alone: tools write 255 for an object, here it is void, and one class would be left.

    Raises:
        DataError: No mask has any other value, and some have 255.
    """
    void = None
    for path in masks:
        values = read_classes(path)
        if ((values != 0) & (values != VOID)).any():
            return
        void = path if void is None and (values == VOID).any() else void
    if void is not None:
        raise DataError(
            f"the masks, {void} among them, hold nothing but 0 and 255, and 255 is void; where it means a class, use "
            "data=png_masks with data.mapping={0: 0, 255: 1}"
        )


def check_classes(values: np.ndarray, classes: int, path: Path) -> np.ndarray:
    """The values, if all are classes or void.

    Raises:
        DataError: A value that is neither; the message names the file.
    """
    bad = values[(values >= classes) & (values != VOID)]
    if bad.size:
        raise DataError(
            f"mask {path} holds value {int(bad.max())}, but there are {classes} classes (0 .. {classes - 1}, 255 void); "
            "see data.classes, data.zero_is_void and data.mapping"
        )
    return values
