"""Scenes composed of cut-outs on textured noise, with exact boxes and masks: what `scenes` and `stamps` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import Dataset

from data.base import SPLITS, SplitDataset, check_at_least, check_range, hash_arrays
from data.detection_base import SceneData, coco_dictionary
from data.errors import DataError
from data.sampler import BatchKey, generator
from data.scene_geometry import ink, place_boxes, render, tight_boxes

MEAN, STD = 0.5, 0.25
GENERATOR_VERSION = "1"  # part of hashes: raise it when a scene of equal seed looks different
_CHUNK = 50  # evaluation scenes composed at a time

Uniform = Callable[..., Tensor]


class ComposedScenes(SceneData):
    """Cut-outs, scaled, turned and pasted in painter's order on coloured noise.

    Split by cut-out: a test scene shows objects that no training scene shows. Training scenes are composed anew
    for every batch from (seed, epoch, batch); validation and test scenes are fixed by `split_seed` and kept in memory.

    Args:
        image_size: Side of the square scenes, pixels.
        train_scenes: Scenes per epoch.
        val_scenes: Validation scenes.
        test_scenes: Test scenes.
        max_objects: Most objects in a scene; the number is uniform from 1.
        rotate_deg: Largest rotation either way, degrees.
        texture: Strength of the background's smooth noise in units of the full brightness range.
        noise: Standard deviation of the pixel noise, same units.
        min_visible: Objects of which a smaller share stays visible are taken out of the scene.
        common: Options of :class:`data.base.ZooData`.

    Attributes:
        scale: Least and largest size of an object over its cut-out's.
        brightness: Range of the background's mean.
        coloured: Cut-outs have colours of their own.
    """

    scale: tuple[float, float]
    brightness: tuple[float, float] = (0.2, 0.8)
    coloured = False

    def __init__(
        self,
        *,
        image_size: int = 64,
        train_scenes: int = 3200,
        val_scenes: int = 250,
        test_scenes: int = 500,
        max_objects: int = 4,
        rotate_deg: float = 10.0,
        texture: float = 0.15,
        noise: float = 0.06,
        min_visible: float = 0.5,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_at_least(
            1,
            train_scenes=train_scenes,
            val_scenes=val_scenes,
            test_scenes=test_scenes,
            max_objects=max_objects,
        )
        check_range(0, 45, rotate_deg=rotate_deg)
        check_range(0, 1, texture=texture, noise=noise, min_visible=min_visible)
        self._size = image_size
        self.counts = dict(zip(SPLITS, (train_scenes, val_scenes, test_scenes), strict=True))
        self.max_objects, self.min_visible = max_objects, min_visible
        self.rotate_deg, self.texture, self.noise = rotate_deg, texture, noise
        self._objects: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._scenes: dict[str, dict[str, Tensor]] = {}

    @property
    def image_size(self) -> tuple[int, int]:
        return (self._size, self._size)

    def read_objects(self) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
        """Cut-outs and class numbers [n] of each split, and the class names.

        A cut-out is its opacity in 0 .. 1, [n, h, w], or colours times opacity and opacity, [n, 4, h, w].
        """
        raise NotImplementedError

    def paint(
        self, image: Tensor, base: Tensor, drawn: Tensor, uniform: Uniform, random: Generator
    ) -> Tensor:
        """Put objects on a background.

        Args:
            image: Backgrounds, [B, 3, H, W].
            base: Their mean brightness, [B].
            drawn: Cut-outs in place, [B, T, H, W] or [B, T, 4, H, W].
            uniform: Draws numbers: (low, high, *shape).
            random: Source of every choice.
        """
        raise NotImplementedError

    def load(self) -> dict[str, Dataset]:
        """Read the cut-outs; scenes are composed when they are asked for."""
        objects, self.labels = self.read_objects()
        self._objects = {
            split: (images, labels, ink(self._opacity(images))) for split, (images, labels) in objects.items()
        }
        for split, (images, _, _) in self._objects.items():
            if len(images) == 0:
                raise DataError(f"data {self.name!r}: no cut-outs for the {split} split")
        return {split: SplitDataset(count, _Batches(self, split)) for split, count in self.counts.items()}

    def _opacity(self, cutouts: Tensor) -> Tensor:
        """[..., h, w] of cut-outs [..., h, w] or [..., 4, h, w]."""
        return cutouts[..., 3, :, :] if self.coloured else cutouts

    def batch(self, split: str, key: BatchKey) -> dict[str, Tensor]:
        """One batch: new scenes in training (epoch >= 0), the fixed ones otherwise."""
        if split == "train" and key.epoch >= 0:
            random = generator(self.seed, key.epoch, key.batch, key.rank)
            scenes = self.compose(split, len(key.indices), random)
        else:
            scenes = {k: v[torch.from_numpy(key.indices)] for k, v in self.scenes(split).items()}
        count = len(key.indices)
        return {
            "image": (scenes["image"] - MEAN) / STD,
            "boxes": scenes["boxes"],
            "labels": scenes["labels"],
            "size": torch.full((count, 2), self._size),
            "index": torch.from_numpy(key.indices),
            "mask": scenes["mask"],
        }

    def scenes(self, split: str) -> dict[str, Tensor]:
        """The fixed scenes of a split, composed at first use: image (0 .. 1), boxes, labels, mask, area."""
        self.setup()
        if split not in self._scenes:
            number = SPLITS.index(split)
            parts = [
                self.compose(
                    split, min(_CHUNK, self.counts[split] - at), generator(self.split_seed, 7919, number, at)
                )
                for at in range(0, self.counts[split], _CHUNK)
            ]
            self._scenes[split] = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}
        return self._scenes[split]

    def compose(self, split: str, count: int, random: Generator) -> dict[str, Tensor]:
        """Compose scenes of a split's cut-outs, all at once.

        Args:
            split: Whose cut-outs.
            count: Number of scenes B.
            random: Source of every choice.

        Returns:
            image float32 [B, 3, H, W] in 0 .. 1, boxes float32 [B, T, 4] (corners of the visible masks), labels
            int64 [B, T] (-1 for no object), mask int64 [B, H, W] (0 background, 1 + class), area float32 [B, T].
        """
        images, classes, inked = self._objects[split]
        b, t, side = count, self.max_objects, self._size

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=random) * (high - low) + low

        present = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=random)
        which = torch.randint(len(images), (b, t), generator=random)
        scale = uniform(*self.scale, b, t)
        angle = uniform(-1, 1, b, t) * np.deg2rad(self.rotate_deg)
        centre, half = inked[which, :2], inked[which, 2:] * scale[..., None]
        place = place_boxes(half, present, side, random)
        drawn = render(images[which], centre, place, scale, angle, side)
        alpha = self._opacity(drawn) * present[..., None, None]

        number = torch.arange(1, t + 1)[:, None, None]
        solid = alpha > 0.5
        top = (solid * number).amax(1)  # [B, H, W]: number of the object on top
        visible = (top[:, None] == number).sum((-2, -1))
        present = present & (visible >= self.min_visible * solid.sum((-2, -1))) & (visible > 0)
        shown = present.view(b, t, *(1,) * (drawn.ndim - 2))
        alpha = alpha * present[..., None, None]
        top = ((alpha > 0.5) * number).amax(1)
        masks = top[:, None] == number

        labels = torch.where(present, classes[which], -1)
        of_number = torch.cat((torch.full((b, 1), -1), labels), 1)
        return {
            "image": self._draw(drawn * shown, uniform, random),
            "boxes": tight_boxes(masks),
            "labels": labels,
            "mask": of_number.gather(1, top.flatten(1)).view(b, side, side) + 1,
            "area": masks.sum((-2, -1)).float(),
        }

    def _draw(self, drawn: Tensor, uniform: Uniform, random: Generator) -> Tensor:
        """Coloured noise with objects over it, [B, 3, H, W]."""
        b, side = len(drawn), self._size
        base = uniform(*self.brightness, b, 1, 1, 1)
        image = base + uniform(-0.1, 0.1, b, 3, 1, 1)
        for cells, share in ((3, 0.5), (6, 0.3), (12, 0.2)):
            noise = torch.randn(b, 3, cells, cells, generator=random)
            image = image + self.texture * share * 2 * F.interpolate(noise, (side, side), mode="bilinear")
        image = self.paint(image, base.view(b), drawn, uniform, random)
        image = image + self.noise * torch.randn(image.shape, generator=random)
        return image.clamp_(0, 1)

    def ground_truth(self, split: str) -> dict[str, Any]:
        scenes = self.scenes(split)
        keep = [row >= 0 for row in scenes["labels"]]
        pick = lambda key: [v[k].numpy() for v, k in zip(scenes[key], keep, strict=True)]  # noqa: E731
        return coco_dictionary(
            [self.image_size] * self.counts[split],
            pick("boxes"),
            pick("labels"),
            self.labels,
            areas=pick("area"),
        )

    def preprocessing(self) -> dict[str, Any]:
        """How a picture becomes model input: scaled to fit, no inversion."""
        return {
            "kind": "scene",
            "channels": 3,
            "size": list(self.image_size),
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
        }

    def split_ids(self) -> dict[str, list[str]]:
        """The generator's seeds: scenes are composed, not stored."""
        self.setup()
        return {
            split: [f"{GENERATOR_VERSION}-{self.split_seed}-{i}" for i in range(count)]
            for split, count in self.counts.items()
        }

    def recipe(self) -> str:
        """Options that training scenes depend on, for the hash."""
        raise NotImplementedError

    def data_hash(self) -> str:
        """Hash of the fixed scenes, the training cut-outs and the version of the baselines."""
        from data import detection_baselines

        self.setup()
        fixed = [
            self.scenes(split)[key] for split in SPLITS[1:] for key in ("image", "boxes", "labels", "mask")
        ]
        return hash_arrays(*fixed, self._objects["train"][0], self.recipe(), detection_baselines.VERSION)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Constant answers, and background difference with a classifier."""
        from data import detection_baselines

        return detection_baselines.scene_baselines(self)


class _Batches:
    """Picklable ``key -> batch`` of one split."""

    def __init__(self, owner: ComposedScenes, split: str) -> None:
        self.owner = owner
        self.split = split

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        return self.owner.batch(self.split, key)
