"""Image classification on the user's own pictures, one folder a class."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data import baselines, register_data
from data.base import SPLITS, SplitDataset, ZooData, check_at_least, check_range, hash_arrays
from data.errors import DataError
from data.folder_scan import LAYOUT, Folder, scan_folder
from data.sampler import BatchKey, global_seed
from zoo.predict.images import RESAMPLING, normalise, open_image, prepare_image, to_tensor

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
THUMBNAIL = 16  # side of the pictures that the classical baselines see, pixels
BASELINE_TRAIN, BASELINE_VAL, BASELINE_TEST, BASELINE_CLASSES = 5000, 2000, 20000, 200


@register_data("imagefolder")
class ImageFolderData(ZooData):
    """Class folders of images in any common format; see :func:`data.folder_scan.scan_folder` for the layouts.

    Transparent pictures are laid over white; palette, greyscale, 16-bit and CMYK files are converted. Files that
    cannot be decoded are left out, counted and named in ``skipped``. What a training sample looks like depends on
    (seed, epoch, sample) alone.

    Batches: ``image`` float32 [B, C, H, W] (normalised), ``label`` int64 [B], ``index`` int64 [B] (place in the
    split), and with mixup or cutmix in training ``target`` float32 [B, K]: soft labels without smoothing, which
    is the loss's business.

    Args:
        root: Folder of the images.
        image_size: Side of the square that the model sees, pixels.
        channels: 3 for colour, 1 for grey.
        validate: "full" decodes every file once before training (the result is cached), "header" trusts a good header.
        val_ratio: Share of each class for validation, where the tree has no such folder.
        test_ratio: Share of each class for test, where the tree has no such folder.
        augment: Random crops, flips, colours, erasing and mixing in training.
        crop_scale_min: Smallest share of the picture that a random crop keeps.
        flip: Probability of a left-right flip.
        color_jitter: Strength of colour changes; unused while ``auto_augment`` is on.
        auto_augment: timm's policy string, or empty.
        erasing: Probability of erasing a random rectangle.
        mixup: Beta parameter of mixup, 0 for none.
        cutmix: Beta parameter of cutmix, 0 for none.
        mix_prob: Probability that a batch is mixed.
        mix_switch_prob: Share of cutmix where both are on.
        interpolation: How pictures are scaled.
        crop_ratio: Share of the scaled picture's side that the evaluation crop keeps.
        mean: Mean of each channel on a 0 .. 1 scale; the default is ImageNet's.
        std: Deviation of each channel.
        common: Options of :class:`data.base.ZooData`.
    """

    kind = "images"

    def __init__(
        self,
        *,
        root: str | None = None,
        image_size: int = 224,
        channels: int = 3,
        validate: str = "full",
        val_ratio: float = 0.1,
        test_ratio: float = 0.1,
        augment: bool = True,
        crop_scale_min: float = 0.08,
        flip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str = "rand-m9-mstd0.5-inc1",
        erasing: float = 0.25,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        mix_switch_prob: float = 0.5,
        interpolation: str = "bicubic",
        crop_ratio: float = 0.875,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_at_least(8, image_size=image_size)
        check_at_least(0, mixup=mixup, cutmix=cutmix, color_jitter=color_jitter)
        check_range(0, 1, flip=flip, erasing=erasing, mix_prob=mix_prob, mix_switch_prob=mix_switch_prob)
        check_range(0.01, 0.8, val_ratio=val_ratio, test_ratio=test_ratio)
        check_range(0.01, 1, crop_scale_min=crop_scale_min, crop_ratio=crop_ratio)
        for key, value, allowed in (
            ("channels", channels, (1, 3)),
            ("validate", validate, ("full", "header")),
            ("interpolation", interpolation, tuple(RESAMPLING)),
        ):
            if value not in allowed:
                raise DataError(f"data.{key}={value!r} is none of {', '.join(map(str, allowed))}")
        self.mean = _per_channel("mean", mean, IMAGENET_MEAN, channels)
        self.std = _per_channel("std", std, IMAGENET_STD, channels)
        if min(self.std) <= 0:
            raise DataError(f"data.std={self.std} must be positive")
        self.mixing = augment and mix_prob > 0 and (mixup > 0 or cutmix > 0)
        if self.mixing and self.batch_size % 2:
            raise DataError(f"data.batch_size={self.batch_size} must be even for mixup and cutmix")
        self.root = root
        self.size, self.channels, self.validate = image_size, channels, validate
        self.val_ratio, self.test_ratio = val_ratio, test_ratio
        self.augment, self.interpolation, self.crop_ratio = augment, interpolation, crop_ratio
        self.crop_scale_min, self.flip, self.color_jitter = crop_scale_min, flip, color_jitter
        self.auto_augment, self.erasing = auto_augment, erasing
        self.mixup, self.cutmix = mixup, cutmix
        self.mix_prob, self.mix_switch_prob = mix_prob, mix_switch_prob
        self._folder: Folder | None = None
        self._augmentation: Any = None

    def _scan(self) -> Folder:
        if not self.root:
            raise DataError(
                f"data.root is not set: name your image folder with data.root=FOLDER; expected {LAYOUT}"
            )
        return scan_folder(
            Path(self.root).expanduser(),
            val_ratio=self.val_ratio,
            test_ratio=self.test_ratio,
            split_seed=self.split_seed,
            validate=self.validate,
        )

    def fetch(self) -> None:
        """Check all files, so that the result is in the cache for every process."""
        self._scan()

    def load(self) -> dict[str, Dataset]:
        """Scan and split the folder."""
        self._folder = self._scan()
        self.labels, self.skipped = self._folder.labels, self._folder.skipped
        if self.skipped:
            some = "; ".join(f"{name}: {reason}" for name, reason in list(self.skipped.items())[:3])
            log.warning("%s: skipped %d of the files (%s)", self.root, len(self.skipped), some)
        return {
            split: SplitDataset(len(items), _Batches(self, split))
            for split, items in self._folder.files.items()
        }

    @property
    def drop_last(self) -> bool:
        """Mixing needs even batches."""
        return self.mixing

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the batches' images."""
        return self.size, self.size

    @property
    def in_channels(self) -> int:
        """Channels of the batches' images."""
        return self.channels

    def preprocessing(self) -> dict[str, Any]:
        """What evaluation does to a picture."""
        return {
            "kind": "image",
            "channels": self.channels,
            "size": [self.size, self.size],
            "crop_ratio": self.crop_ratio,
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "background": None,
        }

    def split_ids(self) -> dict[str, list[str]]:
        """Paths of the samples relative to the root."""
        self.setup()
        return {split: [name for name, _ in items] for split, items in self._folder.files.items()}

    def data_hash(self) -> str:
        """Hash of names, sizes, time stamps, classes, split and preparation; the pixels are not read for it."""
        self.setup()
        rows = [
            f"{split}/{n}/{c}/{self._folder.sizes[n]}"
            for split in SPLITS
            for n, c in self._folder.files[split]
        ]
        prepared = repr({**self.preprocessing(), "size": THUMBNAIL})
        return hash_arrays(*self.labels, *rows, prepared, str(self.split_seed), baselines.VERSION)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Majority class, and classical models on 16 x 16 pictures.

        At most 5,000 training and 2,000 validation pictures (drawn with ``split_seed``) are used, and all of the
        test split; with over 20,000 test pictures or 200 classes only the majority class is reported.
        """
        targets = {split: np.array([c for _, c in self._folder.files[split]]) for split in SPLITS}
        if len(targets["test"]) > BASELINE_TEST or len(self.labels) > BASELINE_CLASSES:
            majority = np.bincount(targets["train"]).argmax()
            return {"majority_class": {"accuracy": float((targets["test"] == majority).mean())}}
        small = {**self.preprocessing(), "size": [THUMBNAIL, THUMBNAIL]}
        parts = []
        for split, limit in zip(SPLITS, (BASELINE_TRAIN, BASELINE_VAL, BASELINE_TEST), strict=True):
            chosen = np.sort(np.random.RandomState(self.split_seed).permutation(len(targets[split]))[:limit])
            features = [prepare_image(self._path(split, i), small).flatten() for i in chosen]
            parts.append((torch.stack(features).numpy(), targets[split][chosen]))
        return baselines.classification_baselines(*parts)

    def _path(self, split: str, index: int) -> Path:
        return self._folder.root / self._folder.files[split][index][0]

    def batch(self, split: str, key: BatchKey) -> dict[str, Tensor]:
        """One batch; augmented when the key belongs to training (epoch >= 0)."""
        distort = self.augment and key.epoch >= 0
        indices = key.indices
        mix = distort and self.mixing and len(indices) > 1
        if mix:  # a set smaller than a batch may come as one odd batch
            indices = indices[: len(indices) // 2 * 2]
        make = self._distorted if distort else self._plain
        image = torch.stack([make(split, int(index), key.epoch) for index in indices])
        label = torch.tensor([self._folder.files[split][int(index)][1] for index in indices])
        batch = {
            "image": image,
            "label": label,
            "index": torch.from_numpy(np.asarray(indices, dtype=np.int64)),
        }
        if mix:
            with global_seed(self.seed, key.epoch, key.batch, key.rank, 1):
                batch["image"], batch["target"] = self._transforms()[3](image, label)
        elif distort and self.mixing:
            batch["target"] = torch.nn.functional.one_hot(label, len(self.labels)).float()
        return batch

    def _plain(self, split: str, index: int, epoch: int) -> Tensor:
        return prepare_image(self._path(split, index), self.preprocessing())

    def _distorted(self, split: str, index: int, epoch: int) -> Tensor:
        geometry, colours, erase, _ = self._transforms()
        picture = open_image(self._path(split, index)).convert("RGB")
        with global_seed(self.seed, epoch, index):
            picture = colours(geometry(picture))
            return erase(normalise(to_tensor(picture, self.channels), self.mean, self.std))

    def _transforms(self) -> tuple[Any, Any, Any, Any]:
        """timm's augmentations, made on first use: geometry, colours, erasing, mixing."""
        if self._augmentation is None:
            from timm.data import Mixup, create_transform
            from timm.data.random_erasing import RandomErasing

            try:
                geometry, colours, _ = create_transform(
                    self.size,
                    is_training=True,
                    scale=(self.crop_scale_min, 1.0),
                    hflip=self.flip,
                    color_jitter=self.color_jitter or None,
                    auto_augment=self.auto_augment or None,
                    interpolation=self.interpolation,
                    mean=tuple(self.mean) if self.channels == 3 else (self.mean[0],) * 3,
                    separate=True,
                )
            except (AssertionError, ValueError, KeyError) as error:  # timm's, of a policy string
                raise DataError(f"data.auto_augment={self.auto_augment!r}: {error}") from error
            erase = RandomErasing(self.erasing, mode="pixel", device="cpu")
            mix = None
            if self.mixing:
                mix = Mixup(
                    mixup_alpha=self.mixup,
                    cutmix_alpha=self.cutmix,
                    prob=self.mix_prob,
                    switch_prob=self.mix_switch_prob,
                    label_smoothing=0.0,
                    num_classes=len(self.labels),
                )
            self._augmentation = geometry, colours, erase, mix
        return self._augmentation


class _Batches:
    """Picklable ``key -> batch`` of one split."""

    def __init__(self, owner: ImageFolderData, split: str) -> None:
        self.owner = owner
        self.split = split

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        return self.owner.batch(self.split, key)


def _per_channel(
    name: str, given: list[float] | None, default: tuple[float, ...], channels: int
) -> list[float]:
    values = list(default) if given is None else [float(value) for value in given]
    if given is None and channels == 1:
        values = [sum(default) / len(default)]
    if len(values) != channels:
        raise DataError(f"data.{name} has {len(values)} values for {channels} channels")
    return values
