"""Set losses of DETR: cost of every pair of query and object, Hungarian matching, class and box losses.

Letters: G any leading dimensions (layers, batch), N queries, T objects, K classes. Rows of objects that do not exist
have label -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from zoo.errors import ZooError
from zoo.layers.boxes import delta_between, paired_giou, paired_iou, pairwise_giou, to_xyxy

ALPHA, GAMMA = 0.25, 2.0


@dataclass(frozen=True)
class Weights:
    """Factors of the terms, alike in cost and loss."""

    classes: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


def focal_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss of a positive minus that of a negative, for every query and object: [..., N, K], [..., T] to [..., N, T]."""
    p = logits.sigmoid()
    positive = ALPHA * (1 - p) ** GAMMA * -F.logsigmoid(logits)
    negative = (1 - ALPHA) * p**GAMMA * F.softplus(logits)
    index = labels.clamp(min=0)[..., None, :].expand(*logits.shape[:-1], -1)
    return (positive - negative).gather(-1, index)


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of each object's class, as in DETR."""
    index = labels.clamp(min=0)[..., None, :].expand(*logits.shape[:-1], -1)
    return -logits.softmax(-1).gather(-1, index)


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    targets: Tensor,
    weights: Weights,
    *,
    references: Tensor | None = None,
    softmax: bool = False,
    repeat: int = 1,
    allowed: Tensor | None = None,
    names: Sequence[object] | None = None,
) -> Tensor:
    """Which object each query answers for.

    Args:
        logits: [L, B, N, K].
        boxes: cxcywh, [L, B, N, 4].
        labels: [B, T], -1 for no object.
        targets: cxcywh, [B, T, 4].
        weights: Factors of the terms.
        references: Boxes that `boxes` are changes of; the L1 cost is then taken between changes. [L, B, N, 4].
        softmax: Class cost from softmax scores instead of focal ones.
        repeat: How many queries each object gets.
        allowed: Queries that may be matched, bool [B, N]; all when left out.
        names: What to call the images in error messages; their place in the batch when left out.

    Returns:
        Object of every query, -1 for none; int64 [L, B, N].

    Raises:
        ZooError: A cost that is not a number; the message names the image and the term.
    """
    layers = len(logits)
    labels_l = labels.expand(layers, -1, -1)
    targets_l = targets.expand(layers, -1, -1, -1)
    terms = {
        "class": (softmax_cost if softmax else focal_cost)(logits, labels_l),
        "l1": _pairwise_l1(boxes, targets_l, references),
        "giou": -pairwise_giou(to_xyxy(boxes), to_xyxy(targets_l)),
    }
    cost = weights.classes * terms["class"] + weights.l1 * terms["l1"] + weights.giou * terms["giou"]
    real = labels >= 0
    _check(terms, real, names)
    if allowed is not None:
        cost = cost.masked_fill(~allowed[:, :, None], 1e6)
    out = assign(cost, real, repeat)
    return out if allowed is None else out.masked_fill(~allowed, -1)


def assign(cost: Tensor, real: Tensor, repeat: int = 1) -> Tensor:
    """The cheapest assignment of every matrix.

    Args:
        cost: [L, B, N, T].
        real: Objects that exist, bool [B, T].
        repeat: How many queries each object gets.

    Returns:
        Object of every query, -1 for none; int64 [L, B, N].
    """
    values = cost.detach().cpu().numpy()
    assigned = np.full(values.shape[:3], -1, dtype=np.int64)
    for b, row in enumerate(real.cpu().numpy()):
        columns = np.tile(np.flatnonzero(row), repeat)
        if len(columns):
            for layer in range(len(values)):
                query, column = linear_sum_assignment(values[layer, b][:, columns])
                assigned[layer, b, query] = columns[column]
    return torch.from_numpy(assigned).to(cost.device)


def mean_over_processes(count: Tensor) -> Tensor:
    """Objects per process, averaged over all and at least 1, so that sharded training weighs every object alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


def _pairwise_l1(boxes: Tensor, targets: Tensor, references: Tensor | None) -> Tensor:
    if references is None:
        return (boxes[..., :, None, :] - targets[..., None, :, :]).abs().sum(-1)
    wanted = delta_between(references[..., :, None, :], targets[..., None, :, :])
    return (delta_between(references, boxes)[..., :, None, :] - wanted).abs().sum(-1)


def _check(terms: dict[str, Tensor], real: Tensor, names: Sequence[object] | None) -> None:
    for term, value in terms.items():
        bad = ~torch.isfinite(value) & real[:, None, :]
        if bool(bad.any()):
            layer, image = bad.nonzero()[0, :2].tolist()
            name = image if names is None else names[image]
            raise ZooError(
                f"matching: the {term} cost of image {name} is not a number in decoder layer {layer}; the image or its "
                "boxes hold bad values, or training diverged: try a smaller task.lr or trainer.gradient_clip_val"
            )


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    targets: Tensor,
    assigned: Tensor,
    weights: Weights,
    *,
    references: Tensor | None = None,
    kind: str = "focal",
    boxes_total: Tensor | float | None = None,
    allowed: Tensor | None = None,
    no_object: float = 0.1,
) -> dict[str, Tensor]:
    """Losses of matched sets, summed over layers.

    Args:
        logits: [L, B, N, K]; with `kind` "softmax" the last class means no object.
        boxes, labels, targets, references, allowed: As in `match`.
        assigned: Its result.
        weights: Factors of the terms.
        kind: "focal"; "mal", whose positives aim at the IoU of their box; "softmax", as DETR.
        boxes_total: What sums are divided by; the number of matched queries of a layer when left out.
        no_object: Weight of the no-object class with "softmax".

    Returns:
        Terms `class`, `l1`, `giou`.
    """
    layers = logits.shape[0]
    matched = assigned >= 0
    total = matched[0].sum() if boxes_total is None else boxes_total
    total = torch.as_tensor(total, device=logits.device, dtype=logits.dtype).clamp(min=1)
    index = assigned.clamp(min=0)
    own_labels = labels.expand(layers, -1, -1).gather(2, index)
    layer, image, query = matched.nonzero(as_tuple=True)
    found = boxes[layer, image, query]
    wanted = targets[image, assigned[layer, image, query]]

    if references is None:
        l1 = (found - wanted).abs().sum()
    else:
        own = references[layer, image, query]
        l1 = (delta_between(own, found) - delta_between(own, wanted)).abs().sum()
    giou = (1 - paired_giou(to_xyxy(found), to_xyxy(wanted))).sum()

    if kind == "softmax":
        classes = own_labels.masked_fill(~matched, logits.shape[-1] - 1)
        scale = logits.new_ones(logits.shape[-1])
        scale[-1] = no_object
        term = sum(
            F.cross_entropy(one.flatten(0, 1), want.flatten(), weight=scale)
            for one, want in zip(logits, classes, strict=True)
        )
    else:
        truth = torch.zeros_like(logits)
        quality = 1.0 if kind == "focal" else paired_iou(to_xyxy(found.detach()), to_xyxy(wanted))
        truth[layer, image, query, own_labels[layer, image, query]] = quality
        term = (_focal if kind == "focal" else _matchability)(logits, truth)
        if allowed is not None:
            term = term * allowed[:, :, None]
        term = term.sum() / total
    return {
        "class": weights.classes * term,
        "l1": weights.l1 * l1 / total,
        "giou": weights.giou * giou / total,
    }


def _focal(logits: Tensor, truth: Tensor) -> Tensor:
    """Sigmoid focal loss, arXiv:1708.02002."""
    p = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    closeness = p * truth + (1 - p) * (1 - truth)
    return (ALPHA * truth + (1 - ALPHA) * (1 - truth)) * loss * (1 - closeness) ** GAMMA


def _matchability(logits: Tensor, quality: Tensor, gamma: float = 1.5) -> Tensor:
    """Matchability-aware loss of DEIM, arXiv:2412.04234: positives aim at IoU ** gamma, negatives weigh p ** gamma."""
    aim = quality**gamma
    weight = torch.where(quality > 0, torch.ones_like(quality), logits.detach().sigmoid() ** gamma)
    return weight * F.binary_cross_entropy_with_logits(logits, aim, reduction="none")
