"""From a detector's output to its losses and to boxes in pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks._matching import Weights, match, mean_over_processes, set_losses
from tasks.base import full_precision
from zoo.layers.boxes import to_cxcywh, to_xyxy


def relative_boxes(boxes: Tensor, size: Tensor) -> Tensor:
    """Corners in pixels [B, T, 4] to cxcywh relative to images of `size` [B, 2] (height, width)."""
    scale = torch.cat((size, size), 1).flip(1)[:, None].to(boxes)
    return to_cxcywh(boxes / scale)


def detection_losses(
    out: dict[str, Tensor],
    labels: Tensor,
    targets: Tensor,
    weights: Weights,
    *,
    kind: str = "focal",
    delta: bool = False,
    many_repeat: int = 6,
    many_weight: float = 1.0,
    no_object: float = 0.1,
    names: Sequence[object] | None = None,
) -> dict[str, Tensor]:
    """All losses of one forward pass: every decoder layer, the one-to-many group and the proposals.

    Args:
        out: What the model returned.
        labels: [B, T], -1 for no object.
        targets: cxcywh relative to the image, [B, T, 4].
        weights: Factors of the terms.
        kind: focal, mal or softmax.
        delta: L1 is taken between changes relative to the references.
        many_repeat: Queries per object in the one-to-many group.
        many_weight: Factor on that group.
        no_object: Weight of the no-object class with softmax.
        names: What to call the images in error messages.

    Returns:
        Terms `class`, `l1`, `giou`, and the same with `many_` and `proposal_`.
    """
    out = {name: full_precision(t) for name, t in out.items()}
    count = mean_over_processes((labels >= 0).sum().to(targets))
    groups: list[tuple[str, int, float]] = [("", 1, 1.0)]
    if "many_logits" in out:
        groups.append(("many_", many_repeat, many_weight))
    terms: dict[str, Tensor] = {}
    for prefix, repeat, factor in groups:
        logits, boxes = out[f"{prefix}logits"], out[f"{prefix}boxes"]
        references = out[f"{prefix}references"] if delta else None
        softmax = kind == "softmax"
        assigned = match(
            logits,
            boxes,
            labels,
            targets,
            weights,
            references=references,
            softmax=softmax,
            repeat=repeat,
            names=names,
        )
        parts = set_losses(
            logits,
            boxes,
            labels,
            targets,
            assigned,
            weights,
            references=references,
            kind=kind,
            boxes_total=count * repeat,
            no_object=no_object,
        )
        terms |= {prefix + k: factor * v for k, v in parts.items()}
    if "proposal_logits" in out:
        logits, boxes = out["proposal_logits"][None], out["proposal_boxes"][None]
        references = out["proposal_references"][None] if delta else None
        binary = labels.clamp(max=0)
        inside = out["proposal_inside"]
        assigned = match(
            logits, boxes, binary, targets, weights, references=references, allowed=inside, names=names
        )
        parts = set_losses(
            logits,
            boxes,
            binary,
            targets,
            assigned,
            weights,
            references=references,
            kind="focal",
            boxes_total=count,
            allowed=inside,
        )
        terms |= {f"proposal_{k}": v for k, v in parts.items()}
    return terms


def decode(
    logits: Tensor, boxes: Tensor, size: Tensor, *, limit: int = 100, softmax: bool = False
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The highest-scoring pairs of query and class of each image.

    Args:
        logits: [B, N, K].
        boxes: cxcywh relative to the image, [B, N, 4].
        size: Height and width that the boxes are scaled to, [B, 2].
        limit: Most detections per image.
        softmax: The last class means no object.

    Returns:
        Per image boxes [n, 4] (corners in pixels, clipped to the image), scores [n] and classes [n], best first.
    """
    logits, boxes = full_precision(logits), full_precision(boxes)
    scores = logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid()
    classes = scores.shape[-1]
    best, index = scores.flatten(1).topk(min(limit, scores[0].numel()), dim=1)
    corners = to_xyxy(boxes).clamp(0, 1) * torch.cat((size, size), 1).flip(1)[:, None].to(boxes)
    query = index // classes
    corners = corners.gather(1, query[..., None].expand(-1, -1, 4))
    return list(zip(corners, best, index % classes, strict=True))
