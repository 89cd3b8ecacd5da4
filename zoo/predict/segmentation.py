"""Image files to one class per pixel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from zoo.errors import ConfigError, unknown
from zoo.layers.windows import sliding_window
from zoo.predict import COMMON_OPTIONS, Predictor
from zoo.predict._scenes import fit, open_image, pixels_of
from zoo.predict.images import SUFFIXES


class TaskPredictor(Predictor):
    """Labels the pixels of pictures given as paths or PIL images.

    Pictures are scaled to the size that the model was trained on. With `--window PIXELS` they keep their resolution and
    are read in overlapping windows of that side (`--window train`: the training size).
    """

    suffixes = SUFFIXES
    window: tuple[int, int] | None = None

    def options(self, given: dict[str, str]) -> list[str]:
        given = dict(given)
        side = given.pop("window", None)
        if side == "train":
            self.window = tuple(self.preprocessing["size"])
        elif side is not None:
            if not side.isdecimal() or int(side) < 1:
                raise ConfigError(f"--window {side}: give a number of pixels, or train")
            self.window = (int(side), int(side))
        for name in given:
            raise unknown("option of predict:", f"--{name}", ("--window", *COMMON_OPTIONS))
        return []

    def preprocess(self, raw: Any) -> torch.Tensor:
        """A path or PIL image to [1, C, H, W]."""
        return fit(open_image(raw), self.preprocessing)[0]

    @torch.no_grad()
    def classes(self, raw: Any) -> torch.Tensor:
        """Class of every pixel of the picture in its own size, int64 [height, width]."""
        image = open_image(raw)
        if self.window:
            pixels = pixels_of(image, self.preprocessing)
            return sliding_window(self.model, pixels, self.window)[0].argmax(0)
        pixels, size = fit(image, self.preprocessing)
        height, width = size[0].tolist()
        logits = self.model(pixels)[..., :height, :width]
        logits = F.interpolate(logits, (image.height, image.width), mode="bilinear", align_corners=False)
        return logits[0].argmax(0)

    def predict(self, raw: Any) -> dict[str, Any]:
        """`{"size": [height, width], "shares": {label: share of the pixels}, "mask": rows of class numbers}`."""
        mask = self.classes(raw)
        counts = torch.bincount(mask.flatten(), minlength=len(self.labels)).tolist()
        shares = {n: round(c / mask.numel(), 4) for n, c in zip(self.labels, counts, strict=True) if c}
        return {"size": list(mask.shape), "shares": shares, "mask": mask.tolist()}

    def rows(self, prediction: dict[str, Any]) -> list[dict[str, Any]]:
        """One row per class that occurs."""
        return [{"label": label, "share": share} for label, share in prediction["shares"].items()]

    def format(self, raw: Any, prediction: dict[str, Any]) -> str:
        shares = sorted(prediction["shares"].items(), key=lambda item: -item[1])
        return f"{raw}: " + ", ".join(f"{label} {share:.1%}" for label, share in shares)
