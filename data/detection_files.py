"""Annotated image files: records of any format become batches of one size, with boxes and masks kept in step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.base import SPLITS, SplitDataset, check_at_least, check_range, hash_arrays
from data.detection_base import VOID, SceneData, coco_dictionary, confusion_scores, pad_objects
from data.detection_masks import paint_segments
from data.detection_records import Record, read_image
from data.detection_samples import MEAN, STD, augmentations, prepare
from data.errors import DataError
from data.sampler import BatchKey, global_seed


class FileScenes(SceneData):
    """Images on disk, scaled to fit a square and padded at the right and the bottom.

    Boxes and masks are those of the picture as it is shown, turned by its EXIF orientation; of the stored pixels where the height and
    width that the annotation gives say so, see `data.detection_records.read_image`.

    Args:
        root: Folder of the data.
        image_size: Side of the batches' images, pixels.
        flip: Probability of mirroring a training image.
        crop: Cut random windows that keep objects out of training images (SSD's IoU crop); needs boxes.
        photometric: Change brightness, contrast and colour of training images.
        val_fraction: Share of the training images for validation, where the data name none or hold out one split alone, which is
            the test split then, whether they call it val or test.
        test_fraction: Share of the training images for test, where the data hold out nothing.
        common: Options of :class:`data.base.ZooData`.
    """

    padded = True

    def __init__(
        self,
        *,
        root: str = "",
        image_size: int = 256,
        flip: float = 0.5,
        crop: bool = False,
        photometric: bool = False,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_at_least(1, image_size=image_size)
        check_range(0, 1, flip=flip, val_fraction=val_fraction, test_fraction=test_fraction)
        if val_fraction + test_fraction >= 1:
            raise DataError("data.val_fraction and data.test_fraction leave nothing to train on; lower them")
        self.root = Path(root).expanduser()
        self.given_root = root
        self._size = image_size
        self.flip, self.crop, self.photometric = flip, crop, photometric
        self.fractions = (val_fraction, test_fraction)
        self._records: dict[str, list[Record]] = {}

    def read(self) -> tuple[dict[str, list[Record]], list[str]]:
        """Records by split (only "train" where the data name no others) and the class names."""
        raise NotImplementedError

    @property
    def image_size(self) -> tuple[int, int]:
        return (self._size, self._size)

    def require(self, target: str, task: str) -> None:
        """As for all scenes; refuses crops around boxes that there are not."""
        super().require(target, task)
        if self.crop and "boxes" not in self.provides:
            raise DataError(
                f"data.crop=true needs boxes to cut around, which data {self.name!r} has not; leave it out"
            )

    def folder(self) -> Path:
        """The data's folder.

        Raises:
            DataError: None given, or it does not exist.
        """
        if not self.given_root:
            raise DataError(f"data {self.name!r} reads your files: give their folder as data.root=FOLDER")
        if not self.root.is_dir():
            raise DataError(f"data.root={self.given_root}: no such folder")
        return self.root

    def load(self) -> dict[str, Dataset]:
        records, self.labels = self.read()
        records = {split: self._existing(found) for split, found in records.items()}
        if records.get("val") and not records.get("test"):
            records["test"] = records.pop("val")  # what the data hold out is what its users compare
        missing = [s for s in SPLITS if not records.get(s)]
        if missing:
            records |= self._divide(records.get("train", []), missing)
        for split in SPLITS[1:]:
            twice = {r.path for r in records["train"]} & {r.path for r in records[split]}
            if twice:
                raise DataError(
                    f"data {self.name!r}: {len(twice)} pictures are in train and in {split}, {min(twice).name} among them"
                )
        self._records = records
        return {split: SplitDataset(len(records[split]), _Batches(self, split)) for split in SPLITS}

    def _existing(self, records: list[Record]) -> list[Record]:
        kept = []
        for record in records:
            lost = next((p for p in (record.path, record.mask) if p is not None and not p.is_file()), None)
            if lost is not None:
                self.skipped[str(record.path)] = f"no file {lost}"
            else:
                kept.append(record)
        return kept

    def _divide(self, records: list[Record], missing: Sequence[str]) -> dict[str, list[Record]]:
        """Take the missing splits from the training images, at least one image each."""
        if len(records) <= len(missing) - (0 if "train" not in missing else 1):
            why = (
                f"; skipped {len(self.skipped)}: {next(iter(self.skipped.values()))}" if self.skipped else ""
            )
            raise DataError(
                f"data {self.name!r}: {len(records)} usable training images are too few to make the splits "
                f"{', '.join(missing)} from{why}"
            )
        order = np.random.RandomState(self.split_seed).permutation(len(records))
        out, at = {}, 0
        for split, share in zip(SPLITS[1:], self.fractions, strict=True):
            if split in missing:
                count = max(1, round(share * len(records)))
                out[split] = [records[i] for i in order[at : at + count]]
                at += count
        out["train"] = [records[i] for i in order[at:]]
        return out

    # -- batches -----------------------------------------------------------------------------------------

    def batch(self, split: str, key: BatchKey) -> dict[str, Tensor]:
        """One batch; augmented when the key belongs to training (epoch >= 0)."""
        samples = []
        for place in key.indices.tolist():
            train = split == "train" and key.epoch >= 0
            with global_seed(self.seed, max(0, key.epoch), place):
                samples.append(self.sample(self._records[split][place], train=train))
        boxes, labels = pad_objects([s["boxes"] for s in samples], [s["labels"] for s in samples])
        out = {
            "image": torch.stack([s["image"] for s in samples]),
            "boxes": boxes,
            "labels": labels,
            "size": torch.stack([s["size"] for s in samples]),
            "index": torch.from_numpy(key.indices),
        }
        if "masks" in self.provides:
            out["mask"] = torch.stack([s["mask"] for s in samples])
            if key.epoch < 0:
                out["original_mask"] = [s["original_mask"] for s in samples]
        return out

    def sample(self, record: Record, *, train: bool) -> dict[str, Tensor]:
        """Image, boxes, labels, size and mask of one record, scaled and padded; with masks also `original_mask`, as the file has it."""
        image = read_image(record.path, tuple(record.size))
        height, width = image.shape[-2:]
        if (height, width) != tuple(record.size):
            raise DataError(
                f"{record.path} has {height} x {width} pixels, its annotation says {record.size[0]} x {record.size[1]}"
            )
        real = ~record.crowd
        mask = torch.from_numpy(self.pixel_classes(record)) if "masks" in self.provides else None
        out = prepare(
            image,
            torch.from_numpy(record.boxes[real]).float().reshape(-1, 4),
            torch.from_numpy(record.labels[real]),
            mask,
            side=self._size,
            steps=self._augmentations() if train else [],
        )
        return out if mask is None else {**out, "original_mask": mask}

    def _augmentations(self) -> list[Any]:
        boxes = "boxes" in self.provides
        return augmentations(flip=self.flip, crop=self.crop, photometric=self.photometric, boxes=boxes)

    def pixel_classes(self, record: Record) -> np.ndarray:
        """Class of every pixel of the file, uint8 [H, W]; crowds are void."""
        if record.mask is not None:
            return self.read_mask(record)
        try:
            return paint_segments(record.size, record.segments, record.labels, record.crowd, record.area)
        except DataError as error:
            raise DataError(f"annotation of {record.path}: {error}") from None

    def read_mask(self, record: Record) -> np.ndarray:
        """The mask file of a record as places in `mask_labels`."""
        raise NotImplementedError

    def mask_meaning(self) -> str:
        """Options that say what masks and polygons mean, for the hash."""
        return ""

    # -- records -----------------------------------------------------------------------------------------

    def original_size(self, split: str, index: int) -> tuple[int, int]:
        return self._records[split][index].size

    def ground_truth(self, split: str) -> dict[str, Any]:
        self.setup()
        records = self._records[split]
        return coco_dictionary(
            [r.size for r in records],
            [r.boxes for r in records],
            [r.labels for r in records],
            self.labels,
            areas=[r.area for r in records],
            crowds=[r.crowd for r in records],
        )

    def preprocessing(self) -> dict[str, Any]:
        """Scaled to fit, padded at the right and the bottom."""
        return {
            "kind": "scene",
            "channels": 3,
            "size": list(self.image_size),
            "mean": list(MEAN),
            "std": list(STD),
        }

    def split_ids(self) -> dict[str, list[str]]:
        """Paths relative to the root."""
        self.setup()
        return {
            split: [_name(r.path, self.root) for r in records] for split, records in self._records.items()
        }

    def data_hash(self) -> str:
        """Hash of names, sizes, annotations and what masks mean; pixels stand for themselves by their file's size."""
        self.setup()
        parts: list[Any] = ["2", repr((sorted(self.provides), self.has_background, self.mask_meaning()))]
        for split, records in self._records.items():
            for r in records:
                parts += [
                    f"{split} {_name(r.path, self.root)} {r.path.stat().st_size} {r.size} {_stamp(r.mask)}",
                    *(r.boxes, r.labels, r.crowd, r.area),
                ]
        return hash_arrays(*parts, *self.labels)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Constant answers: every class's mean box; the commonest class everywhere."""
        from data.detection_eval import coco_scores

        scores: dict[str, dict[str, float]] = {}
        if "boxes" in self.provides:
            rows = self._constant_boxes()
            scores["constant_boxes"] = coco_scores(self.ground_truth("test"), rows)
        if "masks" in self.provides:
            classes = len(self.mask_labels)
            train = self._class_counts("train")
            counts = np.zeros((classes, classes))
            counts[:, int(train.argmax())] = self._class_counts("test")
            scores["commonest_class"] = dict(confusion_scores(counts, self.has_background))
        return scores

    def _class_counts(self, split: str) -> np.ndarray:
        total = np.zeros(len(self.mask_labels), dtype=np.int64)
        for record in self._records[split]:
            classes = self.pixel_classes(record)
            total += np.bincount(classes[classes != VOID], minlength=len(total))[: len(total)]
        return total

    def _constant_boxes(self) -> np.ndarray:
        train = [(r.boxes / np.tile(r.size[::-1], 2), r.labels) for r in self._records["train"]]
        boxes = np.concatenate([b.reshape(-1, 4) for b, _ in train])
        labels = np.concatenate([n for _, n in train])
        rows = [
            [i, *(boxes[labels == c].mean(0) * np.tile(r.size[::-1], 2)), float((labels == c).mean()), c]
            for c in np.unique(labels)
            for i, r in enumerate(self._records["test"])
        ]
        return np.array(rows, dtype=float).reshape(-1, 7)


class _Batches:
    """Picklable ``key -> batch`` of one split."""

    def __init__(self, owner: FileScenes, split: str) -> None:
        self.owner = owner
        self.split = split

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        return self.owner.batch(self.split, key)


def _stamp(mask: Path | None) -> str:
    """Size and time of a mask file; masks drawn anew often have the size of the old ones."""
    return "" if mask is None else f"{mask.stat().st_size} {mask.stat().st_mtime_ns}"


def _name(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.name
