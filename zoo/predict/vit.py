"""Image files to class names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import DataError
from zoo.predict import Predictor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


class TaskPredictor(Predictor):
    """Classifies pictures given as paths or PIL images."""

    def inputs(self, arguments: list[str]) -> Iterator[str]:
        for item in super().inputs(arguments):
            if Path(item).suffix.lower() in SUFFIXES or item in arguments:
                yield item

    def preprocess(self, raw: Any) -> Tensor:
        """A path or PIL image to [1, channels, height, width], as the weights were trained."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        settings = self.preprocessing
        if isinstance(raw, (str, Path)):
            try:
                with Image.open(raw) as file:
                    image = ImageOps.exif_transpose(file)
                    image.load()
            except FileNotFoundError:
                raise DataError(f"no image at {raw}") from None
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
                raise DataError(f"cannot read image {raw}: {error}") from None
        else:
            image = raw
        image = _flatten(image, settings["channels"])
        if settings.get("background") == "dark" and _is_bright(image):
            image = ImageOps.invert(image)
        height, width = settings["size"]
        image = _resize(image, height, width, settings["crop_ratio"], settings["interpolation"])
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 255
        pixels = pixels.view(height, width, settings["channels"]).permute(2, 0, 1)
        mean = torch.tensor(settings["mean"]).view(-1, 1, 1)
        std = torch.tensor(settings["std"]).view(-1, 1, 1)
        return ((pixels - mean) / std)[None]

    @torch.no_grad()
    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"label", "confidence", "top": [[label, probability], ...]}`, five best classes."""
        probability, index = self.model(self.preprocess(raw)).softmax(-1)[0].sort(descending=True)
        top = [
            [self.labels[i], round(float(p), 4)] for p, i in zip(probability[:5], index[:5].tolist(), strict=True)
        ]
        return {"label": top[0][0], "confidence": top[0][1], "top": top}

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        others = ", ".join(f"{label} {p:.3f}" for label, p in prediction["top"][1:3])
        return f"{raw}: {prediction['label']} ({prediction['confidence']:.3f}; then {others})"


def _flatten(image: Any, channels: int) -> Any:
    """Grey or RGB without transparency: what is transparent becomes white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = image.point(lambda v: v / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _is_bright(image: Any) -> bool:
    """Whether the picture's border is bright: ink on paper."""
    width, height = image.size
    grey = image.convert("L")
    border = [grey.getpixel((x, y)) for x in range(width) for y in (0, height - 1)]
    border += [grey.getpixel((x, y)) for y in range(height) for x in (0, width - 1)]
    return sum(border) / len(border) > 127


def _resize(image: Any, height: int, width: int, crop_ratio: float, interpolation: str) -> Any:
    """Scale the shorter side to the target over `crop_ratio` and cut out the centre."""
    from PIL import Image

    method = {
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
        "nearest": Image.Resampling.NEAREST,
    }[interpolation]
    factor = max(round(height / crop_ratio) / image.height, round(width / crop_ratio) / image.width)
    size = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.resize(size, method)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
