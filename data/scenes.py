"""Scenes of handwritten digits on textured noise, with exact boxes and masks (from the carrier ``mnist``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from data import carriers, register_data
from data.base import check_at_least, check_range
from data.errors import DataError
from data.mnist import MnistData
from data.scene_composer import ComposedScenes, Uniform

POLARITIES = ("bright", "both")


@register_data("scenes")
class ScenesData(ComposedScenes):
    """One to four MNIST digits per scene, tinted; 64x64 pixels.

    Args:
        min_scale: Smallest size of a digit over MNIST's.
        max_scale: Largest size.
        min_contrast: Least difference of brightness between a digit and the background's mean.
        polarity: "bright": digits are brighter than the background, as MNIST's; "both": brighter or darker.
        common: Options of :class:`data.scene_composer.ComposedScenes`.
    """

    def __init__(
        self,
        *,
        min_scale: float = 0.8,
        max_scale: float = 1.4,
        min_contrast: float = 0.3,
        polarity: str = "bright",
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_at_least(0.1, min_scale=min_scale)
        check_at_least(min_scale, max_scale=max_scale)
        check_at_least(int(24 * max_scale) + 1, image_size=self._size)
        check_range(0, 0.5, min_contrast=min_contrast)
        if polarity not in POLARITIES:
            raise DataError(f"data.polarity={polarity!r}: choose from {', '.join(POLARITIES)}")
        self.scale = (min_scale, max_scale)
        self.min_contrast, self.polarity = min_contrast, polarity
        self.brightness = (0.2, 0.8 if polarity == "both" else 0.55)

    def fetch(self) -> None:
        """Bring the carrier into the cache."""
        carriers.fetch("mnist")

    def read_objects(self) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
        """Digits in the split of the data `mnist`."""
        mnist = MnistData(split_seed=self.split_seed)
        mnist.setup()
        digits = {
            split: (mnist._images[rows, 0], mnist._targets[rows]) for split, rows in mnist._splits.items()
        }
        return digits, [str(d) for d in range(10)]

    def paint(
        self, image: Tensor, base: Tensor, drawn: Tensor, uniform: Uniform, random: Generator
    ) -> Tensor:
        """Tinted digits; see the base class."""
        b, t = drawn.shape[:2]
        gap = uniform(self.min_contrast, self.min_contrast + 0.25, b, t)
        brighter, darker = base[:, None] + gap, base[:, None] - gap
        up = torch.rand(b, t, generator=random) < 0.5
        up = (up & (brighter <= 1.05)) | (darker < -0.05) | (self.polarity != "both")
        tint = torch.where(up, brighter, darker)[..., None] + uniform(-0.12, 0.12, b, t, 3)
        for k in range(t):
            image = image + drawn[:, k, None] * (tint[:, k, :, None, None] - image)
        return image

    def recipe(self) -> str:
        """Options that training scenes depend on."""
        return repr(
            (self.scale, self.max_objects, self.texture, self.noise, self.min_contrast, self.polarity)
        )
