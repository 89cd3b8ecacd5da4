"""Pictures of masks and boxes beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_pixels(image: Tensor, data: Any) -> np.ndarray:
    """A normalised image [C, H, W] back to [H, W, 3] in 0 .. 1."""
    settings = data.preprocessing()
    mean, std = (torch.tensor(settings[k]).view(-1, 1, 1) for k in ("mean", "std"))
    pixels = (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels


def palette(count: int) -> np.ndarray:
    """Colours of `count` classes, the first one dark; a last row, grey, is for void."""
    from matplotlib import colormaps

    colours = [colormaps["tab20"](i % 20)[:3] for i in range(max(0, count - 1))]
    return np.array([(0.05, 0.05, 0.05), *colours, (0.5, 0.5, 0.5)])


def draw_masks(path: Path, examples: Sequence[tuple[Tensor, Tensor, Tensor]], data: Any) -> None:
    """Image, truth and prediction, a row per example; void is grey in the truth."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = data.mask_labels
    colours = palette(len(names))
    figure = Figure(figsize=(6.4, 2 * max(1, len(examples)) + 0.8), layout="constrained")
    axes = figure.subplots(max(1, len(examples)), 3, squeeze=False)
    for row, (image, truth, predicted) in zip(axes, examples, strict=False):
        truth = truth.clamp(max=len(names)).numpy()
        for one, picture in zip(
            row, (to_pixels(image, data), colours[truth], colours[predicted.long().numpy()]), strict=True
        ):
            one.imshow(picture, interpolation="nearest")
    for one, title in zip(axes[0], ("image", "truth", "prediction"), strict=True):
        one.set_title(title)
    for one in axes.flat:
        one.axis("off")
    if len(names) <= 21:
        handles = [Patch(color=c, label=n) for c, n in zip(colours, names, strict=False)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(names)), fontsize=7)
    figure.savefig(path, dpi=110)


def draw_boxes(path: Path, examples: Sequence[dict[str, Any]], data: Any, *, threshold: float = 0.3) -> None:
    """Truth (dashed white) and detections above a score, on each image."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = 4
    rows = max(1, -(-len(examples) // columns))
    figure = Figure(figsize=(3 * columns, 3 * rows), layout="constrained")
    figure.suptitle(f"truth dashed, detections with score >= {threshold}")
    colours = palette(len(data.labels) + 1)[1:]
    axes = figure.subplots(rows, columns, squeeze=False)
    for one, item in zip(axes.flat, examples, strict=False):
        one.imshow(to_pixels(item["image"], data), interpolation="nearest")
        for x1, y1, x2, y2 in item["truth"].tolist():
            one.add_patch(
                Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, ls="--", lw=0.8, color="w")
            )
        for (x1, y1, x2, y2), score, label in zip(
            item["boxes"].tolist(), item["scores"].tolist(), item["labels"].tolist(), strict=True
        ):
            if score < threshold:
                continue
            colour = colours[label]
            one.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, lw=1.2, color=colour))
            one.text(
                x1, y1, f"{data.labels[label]} {score:.2f}", color="w", fontsize=6, backgroundcolor=colour
            )
    for one in axes.flat:
        one.axis("off")
    figure.savefig(path, dpi=110)


def draw_query_maps(
    path: Path,
    image: Tensor,
    maps: Tensor,
    grid: tuple[int, int],
    boxes: Tensor,
    titles: Sequence[str],
    data: Any,
) -> None:
    """Where each query looks: cross-attention of the last layer, mean over heads, over the image.

    Args:
        path: File to write.
        image: Normalised image, [C, H, W].
        maps: Attention of the queries to draw over the grid's tokens, [n, rows * columns].
        grid: Rows and columns.
        boxes: Their boxes in pixels, [n, 4].
        titles: Their captions.
        data: Data module, for undoing the normalisation.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    pixels = to_pixels(image, data)
    count = max(1, len(maps))
    figure = Figure(figsize=(2.6 * count, 2.9), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    height, width = pixels.shape[:2]
    for one, weights, (x1, y1, x2, y2), title in zip(axes, maps, boxes.tolist(), titles, strict=False):
        one.imshow(pixels, interpolation="nearest")
        one.imshow(
            weights.view(grid).numpy(),
            cmap="inferno",
            alpha=0.6,
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            interpolation="bilinear",
        )
        one.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, lw=1.2, color="w"))
        one.set_title(title, fontsize=8)
        one.axis("off")
    figure.savefig(path, dpi=110)
