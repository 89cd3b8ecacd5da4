"""Scenes of handwritten digits on textured noise, with exact boxes and masks (from the carrier ``mnist``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import Dataset

from data import carriers, register_data
from data.base import SPLITS, SplitDataset, check_at_least, check_range, hash_arrays
from data.detection_base import SceneData, coco_dictionary
from data.errors import DataError
from data.mnist import MnistData
from data.sampler import BatchKey, generator

MEAN, STD = 0.5, 0.25
GENERATOR_VERSION = "1"  # part of hashes: raise it when a scene of equal seed looks different
POLARITIES = ("bright", "both")
_CANDIDATES = 12  # places tried for each digit
_CHUNK = 50  # evaluation scenes composed at a time


@register_data("scenes")
class ScenesData(SceneData):
    """One to four MNIST digits per scene, tinted, scaled, turned and pasted in painter's order on coloured noise.

    Split by digit image: a test scene shows digits that no training scene shows. Training scenes are composed anew
    for every batch from (seed, epoch, batch); validation and test scenes are fixed by `split_seed` and kept in memory.

    Args:
        image_size: Side of the square scenes, pixels.
        train_scenes: Scenes per epoch.
        val_scenes: Validation scenes.
        test_scenes: Test scenes.
        max_objects: Most digits in a scene; the number is uniform from 1.
        min_scale: Smallest size of a digit over MNIST's.
        max_scale: Largest size.
        rotate_deg: Largest rotation either way, degrees.
        texture: Strength of the background's smooth noise in units of the full brightness range.
        noise: Standard deviation of the pixel noise, same units.
        min_contrast: Least difference of brightness between a digit and the background's mean.
        polarity: "bright": digits are brighter than the background, as MNIST's; "both": brighter or darker.
        min_visible: Digits of which a smaller share stays visible are taken out of the scene.
        common: Options of :class:`data.base.ZooData`.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        train_scenes: int = 3200,
        val_scenes: int = 250,
        test_scenes: int = 500,
        max_objects: int = 4,
        min_scale: float = 0.8,
        max_scale: float = 1.4,
        rotate_deg: float = 10.0,
        texture: float = 0.15,
        noise: float = 0.06,
        min_contrast: float = 0.3,
        polarity: str = "bright",
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
        check_at_least(0.1, min_scale=min_scale)
        check_at_least(min_scale, max_scale=max_scale)
        check_at_least(int(24 * max_scale) + 1, image_size=image_size)
        check_range(0, 45, rotate_deg=rotate_deg)
        check_range(0, 1, texture=texture, noise=noise, min_visible=min_visible)
        check_range(0, 0.5, min_contrast=min_contrast)
        if polarity not in POLARITIES:
            raise DataError(f"data.polarity={polarity!r}: choose from {', '.join(POLARITIES)}")
        self._size = image_size
        self.counts = dict(zip(SPLITS, (train_scenes, val_scenes, test_scenes), strict=True))
        self.max_objects = max_objects
        self.scale = (min_scale, max_scale)
        self.rotate_deg, self.texture, self.noise = rotate_deg, texture, noise
        self.min_contrast, self.min_visible, self.polarity = min_contrast, min_visible, polarity
        self._digits: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._scenes: dict[str, dict[str, Tensor]] = {}

    @property
    def image_size(self) -> tuple[int, int]:
        return (self._size, self._size)

    def fetch(self) -> None:
        """Bring the carrier into the cache."""
        carriers.fetch("mnist")

    def read_digits(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Digit images [n, 28, 28] in 0 .. 1 and labels [n] of each split: the split of the data `mnist`."""
        mnist = MnistData(split_seed=self.split_seed)
        mnist.setup()
        return {
            split: (mnist._images[rows, 0], mnist._targets[rows]) for split, rows in mnist._splits.items()
        }

    def load(self) -> dict[str, Dataset]:
        """Read the digits; scenes are composed when they are asked for."""
        self.labels = [str(d) for d in range(10)]
        self._digits = {
            split: (images, labels, _ink(images)) for split, (images, labels) in self.read_digits().items()
        }
        for split, (images, _, _) in self._digits.items():
            if len(images) == 0:
                raise DataError(f"data 'scenes': no digit images for the {split} split")
        return {split: SplitDataset(count, _Batches(self, split)) for split, count in self.counts.items()}

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
        """Compose scenes of a split's digits, all at once.

        Args:
            split: Whose digits.
            count: Number of scenes B.
            random: Source of every choice.

        Returns:
            image float32 [B, 3, H, W] in 0 .. 1, boxes float32 [B, T, 4] (corners of the visible masks), labels
            int64 [B, T] (-1 for no object), mask int64 [B, H, W] (0 background, 1 + digit), area float32 [B, T].
        """
        images, classes, ink = self._digits[split]
        b, t, side = count, self.max_objects, self._size

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=random) * (high - low) + low

        present = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=random)
        which = torch.randint(len(images), (b, t), generator=random)
        scale = uniform(*self.scale, b, t)
        angle = uniform(-1, 1, b, t) * np.deg2rad(self.rotate_deg)
        centre, half = ink[which, :2], ink[which, 2:] * scale[..., None]
        place = _place(half, present, side, random)
        alpha = _render(images[which], centre, place, scale, angle, side) * present[..., None, None]

        number = torch.arange(1, t + 1)[:, None, None]
        solid = alpha > 0.5
        top = (solid * number).amax(1)  # [B, H, W]: number of the digit on top
        visible = (top[:, None] == number).sum((-2, -1))
        present = present & (visible >= self.min_visible * solid.sum((-2, -1))) & (visible > 0)
        alpha = alpha * present[..., None, None]
        top = ((alpha > 0.5) * number).amax(1)
        masks = top[:, None] == number

        labels = torch.where(present, classes[which], -1)
        digit = torch.cat((torch.full((b, 1), -1), labels), 1)
        return {
            "image": self._paint(alpha, uniform, random),
            "boxes": _tight_boxes(masks),
            "labels": labels,
            "mask": digit.gather(1, top.flatten(1)).view(b, side, side) + 1,
            "area": masks.sum((-2, -1)).float(),
        }

    def _paint(self, alpha: Tensor, uniform: Any, random: Generator) -> Tensor:
        """Coloured noise with tinted digits over it, [B, 3, H, W]."""
        b, t, side, _ = alpha.shape
        both = self.polarity == "both"
        base = uniform(0.2, 0.8 if both else 0.55, b, 1, 1, 1)
        image = base + uniform(-0.1, 0.1, b, 3, 1, 1)
        for cells, share in ((3, 0.5), (6, 0.3), (12, 0.2)):
            noise = torch.randn(b, 3, cells, cells, generator=random)
            image = image + self.texture * share * 2 * F.interpolate(noise, (side, side), mode="bilinear")
        gap = uniform(self.min_contrast, self.min_contrast + 0.25, b, t)
        brighter = base.view(b, 1) + gap
        darker = base.view(b, 1) - gap
        up = torch.rand(b, t, generator=random) < 0.5
        up = (up & (brighter <= 1.05)) | (darker < -0.05) | (not both)
        tint = torch.where(up, brighter, darker)[..., None] + uniform(-0.12, 0.12, b, t, 3)
        for k in range(t):
            a = alpha[:, k, None]
            image = image + a * (tint[:, k, :, None, None] - image)
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

    def data_hash(self) -> str:
        """Hash of the fixed scenes, the training digits and the version of the baselines."""
        from data import detection_baselines

        self.setup()
        fixed = [
            self.scenes(split)[key] for split in SPLITS[1:] for key in ("image", "boxes", "labels", "mask")
        ]
        options = repr(
            (self.scale, self.max_objects, self.texture, self.noise, self.min_contrast, self.polarity)
        )
        return hash_arrays(*fixed, self._digits["train"][0], options, detection_baselines.VERSION)

    def compute_baselines(self) -> dict[str, dict[str, float]]:
        """Constant answers, and background difference with a digit classifier."""
        from data import detection_baselines

        return detection_baselines.scene_baselines(self)


class _Batches:
    """Picklable ``key -> batch`` of one split."""

    def __init__(self, owner: ScenesData, split: str) -> None:
        self.owner = owner
        self.split = split

    def __call__(self, key: BatchKey) -> dict[str, Tensor]:
        return self.owner.batch(self.split, key)


def _ink(images: Tensor) -> Tensor:
    """Centre x, y and half width, height of each image's ink (alpha > 0.5), pixels, [n, 4]."""
    x1, y1, x2, y2 = _tight_boxes(images > 0.5).unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 2, (y2 - y1) / 2), -1)


def _tight_boxes(masks: Tensor) -> Tensor:
    """Smallest boxes around bool masks [..., H, W]: corners x1, y1, x2, y2 on pixel edges; zero when empty."""

    def ends(line: Tensor) -> tuple[Tensor, Tensor]:
        hit = line.int()
        return hit.argmax(-1), line.shape[-1] - hit.flip(-1).argmax(-1)

    columns, rows = masks.any(-2), masks.any(-1)
    (x1, x2), (y1, y2) = ends(columns), ends(rows)
    boxes = torch.stack((x1, y1, x2, y2), -1).float()
    return boxes * columns.any(-1, keepdim=True)


def _place(half: Tensor, present: Tensor, side: int, random: Generator) -> Tensor:
    """Centres [B, T, 2] of boxes with half sizes [B, T, 2] (x, y): of some candidates the one that overlaps least."""
    b, t, _ = half.shape
    low = half.clamp(max=side / 2)
    centres = torch.empty(b, t, 2)
    for k in range(t):
        room = (side - 2 * low[:, k]).clamp(min=0)
        tries = low[:, k, None] + torch.rand(b, _CANDIDATES, 2, generator=random) * room[:, None]  # [B, K, 2]
        cost = torch.zeros(b, _CANDIDATES)
        for j in range(k):
            reach = half[:, j, None] + half[:, k, None]
            overlap = (reach - (tries - centres[:, j, None]).abs()).clamp(min=0).prod(-1)
            cost = cost + overlap * present[:, j, None]
        centres[:, k] = tries[torch.arange(b), cost.argmin(1)]
    return centres


def _render(digits: Tensor, centre: Tensor, place: Tensor, scale: Tensor, angle: Tensor, side: int) -> Tensor:
    """Paste digits [B, T, h, w] on canvases so that the point `centre` lands on `place`; [B, T, side, side]."""
    b, t, h, w = digits.shape
    cos, sin = angle.cos() / scale, angle.sin() / scale  # canvas offset to digit offset
    fx, fy = 2 / w, 2 / h
    matrix = torch.stack(
        (
            torch.stack(
                (cos, sin, (cos * (side / 2 - place[..., 0]) + sin * (side / 2 - place[..., 1]))), -1
            ),
            torch.stack(
                (-sin, cos, (-sin * (side / 2 - place[..., 0]) + cos * (side / 2 - place[..., 1]))), -1
            ),
        ),
        -2,
    )  # [B, T, 2, 3] in pixels relative to the canvas centre
    matrix[..., 0, 2] += centre[..., 0] - w / 2
    matrix[..., 1, 2] += centre[..., 1] - h / 2
    matrix = matrix * torch.tensor([[side / 2, side / 2, 1.0]])
    matrix = matrix * torch.tensor([[fx], [fy]])
    grid = F.affine_grid(matrix.flatten(0, 1), [b * t, 1, side, side], align_corners=False)
    out = F.grid_sample(digits.reshape(b * t, 1, h, w), grid, padding_mode="zeros", align_corners=False)
    return out.view(b, t, side, side)
