"""Image files to model input, scaled to fit a square and padded, as detection and segmentation train on them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def open_image(raw: Any) -> Any:
    """A path or PIL image as an RGB PIL image; see `zoo.predict.images.open_image`."""
    from PIL import Image

    from zoo.predict import images

    picture = images.flatten_modes(raw) if isinstance(raw, Image.Image) else images.open_image(raw)
    return picture.convert("RGB")


def fit(image: Any, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Pixels [1, C, H, W], normalised, and the size [1, 2] of the part that is no padding."""
    from PIL import Image

    height, width = settings["size"]
    factor = min(height / image.height, width / image.width)
    size = (max(1, round(image.height * factor)), max(1, round(image.width * factor)))
    if size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return F.pad(pixels_of(image, settings), (0, width - size[1], 0, height - size[0])), torch.tensor([size])


def pixels_of(image: Any, settings: dict[str, Any]) -> Tensor:
    """Normalised pixels [1, C, height, width] of a PIL image, at its own resolution."""
    if settings["channels"] == 1:
        image = image.convert("L")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
    pixels = pixels.view(image.height, image.width, settings["channels"]).permute(2, 0, 1)
    mean, std = (torch.tensor(settings[k]).view(-1, 1, 1) for k in ("mean", "std"))
    return ((pixels - mean) / std)[None]
