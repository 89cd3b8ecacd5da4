"""Pictures from files to model input, the same way in training's evaluation and in prediction."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from zoo.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# What Pillow raises for damaged files, depending on the format.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def open_image(path: str | Path) -> Image.Image:
    """Read an image file whole, upright, as ``L`` or ``RGB``; transparent parts are laid over white.

    Reads RGB, RGBA, LA, palette (with or without transparency), bilevel, greyscale, 16-bit and CMYK files.

    Raises:
        DataError: The file is missing, not an image, or cut short.
    """
    if not isinstance(path, (str, Path)):
        raise DataError(f"give a path or a PIL image, not {type(path).__name__}")
    try:
        with Image.open(path) as image:
            image.load()
            return flatten_modes(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DataError(f"no such image: {path}") from None
    except UNREADABLE as error:
        raise DataError(f"cannot read {path} as an image: {error}") from None


def probe_image(path: str | Path) -> None:
    """Read the header alone; raises DataError as :func:`open_image` does."""
    try:
        with Image.open(path):
            pass
    except UNREADABLE as error:
        raise DataError(f"cannot read {path} as an image: {error}") from None


def flatten_modes(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to ``L`` or ``RGB``, alpha over white."""
    if image.mode in ("L", "RGB"):
        if "transparency" not in image.info:  # a colour key of PNG
            return image
        image = image.convert("RGBA")
    elif image.mode.startswith("I") or image.mode == "F":
        # PIL clips 16-bit values at 255 on conversion, which turns photographs white.
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if image.mode != "F" else 1.0
        if image.mode == "F" and values.max(initial=0.0) > 1.0:
            top = 255.0
        return Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    elif image.mode == "1":
        return image.convert("L")
    if image.mode in ("LA", "La"):
        image = image.convert("LA")
        white = Image.new("L", image.size, 255)
        white.paste(image.getchannel("L"), mask=image.getchannel("A"))
        return white
    if image.mode in ("RGBA", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def resize_crop(
    image: Image.Image, size: tuple[int, int], crop_ratio: float, interpolation: str
) -> Image.Image:
    """Scale so that the short side fits ``size / crop_ratio``, then cut the centre; size is (height, width)."""
    height, width = size
    target_h, target_w = round(height / crop_ratio), round(width / crop_ratio)
    factor = max(target_w / image.width, target_h / image.height)
    scaled = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    if scaled != image.size:
        image = image.resize(scaled, RESAMPLING[interpolation])
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """Pixels of an ``L`` or ``RGB`` image as float32 [C, H, W] in 0 .. 1, with 1 or 3 channels."""
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array.copy()).reshape(image.height, image.width, channels).permute(2, 0, 1) / 255


def normalise(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Subtract the mean and divide by the deviation of each channel; images [..., C, H, W]."""
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def prepare_image(image: str | Path | Image.Image, preprocessing: dict[str, Any]) -> Tensor:
    """Turn an image file into model input exactly as the data module's evaluation does.

    Args:
        image: Path or PIL image.
        preprocessing: Record of the data module: channels, size, crop_ratio, interpolation, mean, std, and
            ``background`` ("dark": an image with a bright border, like ink on paper, is inverted first).

    Returns:
        [C, H, W], float32.
    """
    picture = flatten_modes(image) if isinstance(image, Image.Image) else open_image(image)
    picture = resize_crop(
        picture, tuple(preprocessing["size"]), preprocessing["crop_ratio"], preprocessing["interpolation"]
    )
    pixels = to_tensor(picture, preprocessing["channels"])
    if preprocessing.get("background") == "dark":
        border = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=-1)
        if border.median() > 0.5:
            pixels = 1 - pixels
    return normalise(pixels, preprocessing["mean"], preprocessing["std"])
