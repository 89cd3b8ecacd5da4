"""Scenes of Tux Paint's stamps, drawn and photographed objects with transparency, on textured noise.

Debian's package `tuxpaint-stamps-default` holds them; install it or unpack it anywhere (`dpkg -x`) and name that folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor

from data import register_data
from data.base import SPLITS, check_at_least
from data.errors import DataError
from data.scene_composer import ComposedScenes, Uniform

STAMPS = "usr/share/tuxpaint/stamps"
CLASSES = {
    "animal": "animals",
    "food": "food",
    "plant": "plants",
    "vehicle": "vehicles",
    "household": "household",
    "money": "symbols/money",
    "sign": "town/roadsigns",
    "clothes": "clothes",
}
_SIDE = 48  # longest side of a cut-out in memory, pixels


@register_data("stamps")
class StampsData(ComposedScenes):
    """Objects of eight kinds, 128x128 pixels. Classes are kinds of things, so unseen objects are hard by design.

    Split by file within each class, 70 / 15 / 15 %.

    Args:
        root: Folder that the package was unpacked in; the system's when left out.
        min_side: Smallest longest side of an object, pixels.
        max_side: Largest longest side.
        common: Options of :class:`data.scene_composer.ComposedScenes`.
    """

    licence = "GPL-2 (Tux Paint stamps)"
    coloured = True

    def __init__(
        self,
        *,
        root: str | None = None,
        min_side: float = 20.0,
        max_side: float = 65.0,
        image_size: int = 128,
        max_objects: int = 5,
        min_visible: float = 0.3,
        **common: Any,
    ) -> None:
        super().__init__(image_size=image_size, max_objects=max_objects, min_visible=min_visible, **common)
        check_at_least(4, min_side=min_side)
        check_at_least(min_side, max_side=max_side)
        check_at_least(int(max_side) + 1, image_size=image_size)
        self.root = root
        self.scale = (min_side / _SIDE, max_side / _SIDE)

    def fetch(self) -> None:
        """Nothing to fetch: the package is Debian's."""
        self._folder()

    def _folder(self) -> Path:
        folder = Path(self.root or "/").expanduser() / STAMPS
        if not folder.is_dir():
            raise DataError(
                f"data 'stamps': no folder {folder}; install the Debian package tuxpaint-stamps-default, or unpack it "
                "(dpkg -x) and give data.root=<that folder>"
            )
        return folder

    def read_objects(self) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
        """Cut-outs of every class, divided by file; pictures without a transparent part are skipped."""
        folder = self._folder()
        found: dict[str, list[tuple[Tensor, int]]] = {split: [] for split in SPLITS}
        order = np.random.RandomState(self.split_seed)
        for label, (name, place) in enumerate(CLASSES.items()):
            files = sorted((folder / place).rglob("*.png"))
            own = [(c, label) for f in files if (c := self._cutout(f)) is not None]
            if len(own) < 3:
                raise DataError(f"data 'stamps': {len(own)} usable pictures of {name} in {folder / place}")
            own = [own[i] for i in order.permutation(len(own))]
            part = max(1, round(0.15 * len(own)))
            for split, rows in zip(SPLITS, (own[2 * part :], own[:part], own[part : 2 * part]), strict=True):
                found[split] += rows
        objects = {
            split: (torch.stack([c for c, _ in rows]), torch.tensor([n for _, n in rows]))
            for split, rows in found.items()
        }
        return objects, list(CLASSES)

    def _cutout(self, path: Path) -> Tensor | None:
        """Colours times opacity, and opacity, [4, side, side], centred; None for a picture that is no cut-out."""
        try:
            with Image.open(path) as file:
                image = file.convert("RGBA")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            self.skipped[str(path)] = f"cannot read: {error}"
            return None
        solid = np.asarray(image)[..., 3] > 127
        if solid.all() or not solid.any():
            self.skipped[str(path)] = "no transparent part, or nothing else"
            return None
        rows, columns = (np.flatnonzero(solid.any(axis)) for axis in (1, 0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        factor = _SIDE / max(box[2] - box[0], box[3] - box[1])
        size = (max(1, round((box[2] - box[0]) * factor)), max(1, round((box[3] - box[1]) * factor)))
        # Pillow resamples with premultiplied alpha: transparent pixels' colours do not bleed in.
        small = np.asarray(image.crop(box).resize(size, Image.Resampling.BOX), dtype=np.float32) / 255
        out = torch.zeros(4, _SIDE, _SIDE)
        top, left = (_SIDE - size[1]) // 2, (_SIDE - size[0]) // 2
        pixels = torch.from_numpy(np.concatenate((small[..., :3] * small[..., 3:], small[..., 3:]), -1))
        out[:, top : top + size[1], left : left + size[0]] = pixels.permute(2, 0, 1)
        return out

    def paint(
        self, image: Tensor, base: Tensor, drawn: Tensor, uniform: Uniform, random: Generator
    ) -> Tensor:
        """Stamps in their own colours; see the base class."""
        for k in range(drawn.shape[1]):
            image = image * (1 - drawn[:, k, 3:]) + drawn[:, k, :3]
        return image

    def recipe(self) -> str:
        """Options that training scenes depend on."""
        return repr((self.scale, self.max_objects, self.texture, self.noise))
