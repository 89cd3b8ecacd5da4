"""Matched masks: every query answers for one class of the image or for none (MaskFormer's loss, as EoMT uses it).

Papers: Mask2Former, arXiv:2112.01527 (points of the masks instead of all pixels); EoMT, arXiv:2503.19108.
Letters: L predictions of one forward pass, B images, Q queries, K classes, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.detection_base import VOID
from tasks._matching import assign, mean_over_processes
from tasks.base import full_precision

OVERSAMPLE, IMPORTANT = (
    3,
    0.75,
)  # candidates per point, share of the points taken where the mask is least sure


@dataclass(frozen=True)
class MaskWeights:
    """Factors of the terms, alike in cost and loss."""

    classes: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1


def mask_set_losses(
    logits: Tensor, masks: Tensor, target: Tensor, weights: MaskWeights, *, points: int = 1024
) -> dict[str, Tensor]:
    """Losses of queries that are matched to the classes of each image.

    Args:
        logits: Class scores, [L, B, Q, K + 1]; the last class means none.
        masks: Mask scores, [L, B, Q, h, w], over the whole image at any resolution.
        target: Class of every pixel, int64 [B, H, W]; VOID pixels count nowhere.
        weights: Factors of the terms.
        points: Points P per mask; the matching draws its own.

    Returns:
        Terms `class`, `mask`, `dice`, summed over predictions. Images that are void everywhere have no part in them.
    """
    logits, masks = full_precision(logits), full_precision(masks)
    classes = logits.shape[-1] - 1
    number = torch.arange(classes, device=target.device)
    real = (target[:, None] == number[:, None, None]).flatten(2).any(-1)  # [B, K]
    with torch.autocast(masks.device.type, enabled=False):  # sums over a thousand points
        assigned = assign(_costs(logits, masks, target, weights, points), real)
    layer, image, query = (assigned >= 0).nonzero(as_tuple=True)
    wanted = assigned[layer, image, query]
    # Before any way out: every process takes part in this sum.
    count = mean_over_processes(real.sum().to(masks))
    if len(wanted) == 0:  # void everywhere
        zero = masks.sum() * 0
        return {"class": logits.sum() * 0, "mask": zero, "dice": zero}

    scale = logits.new_ones(classes + 1)
    scale[-1] = weights.no_object
    truth = torch.where(assigned >= 0, assigned, classes).masked_fill(~real.any(1)[:, None], -100)
    class_term = sum(
        F.cross_entropy(one.flatten(0, 1), own.flatten(), weight=scale)
        for one, own in zip(logits, truth, strict=True)
    )
    own_masks = masks[layer, image, query]  # [M, h, w]
    place = _uncertain_points(own_masks.detach(), points)
    found = _read(own_masks[:, None], place)[:, 0]
    seen = _classes_at(target[image], place)
    keep = (seen != VOID).to(found)
    inside = (seen == wanted[:, None]).to(found)
    entropy = F.binary_cross_entropy_with_logits(found, inside, reduction="none")
    share = found.sigmoid() * keep
    overlap = 1 - (2 * (share * inside).sum(-1) + 1) / (share.sum(-1) + (inside * keep).sum(-1) + 1)
    return {
        "class": weights.classes * class_term,
        "mask": weights.mask * ((entropy * keep).sum(-1) / keep.sum(-1).clamp(min=1)).sum() / count,
        "dice": weights.dice * overlap.sum() / count,
    }


@torch.no_grad()
def _costs(logits: Tensor, masks: Tensor, target: Tensor, weights: MaskWeights, points: int) -> Tensor:
    """Cost of every query for every class, [L, B, Q, K], from points that all masks of an image share."""
    layers, batch, queries = logits.shape[:3]
    place = torch.rand(batch, points, 2, device=masks.device)
    found = _read(masks.transpose(0, 1).flatten(1, 2), place)  # [B, L * Q, P]
    seen = _classes_at(target, place)
    keep = (seen != VOID).to(found)[:, None]
    number = torch.arange(logits.shape[-1] - 1, device=target.device)
    inside = (seen[:, None] == number[:, None]).to(found)  # [B, K, P]
    # softplus(x) - x t is the binary cross-entropy of logit x and target t.
    entropy = (F.softplus(found) * keep).sum(-1, keepdim=True) - found @ inside.mT
    entropy = entropy / keep.sum(-1, keepdim=True).clamp(min=1)
    share = found.sigmoid() * keep
    overlap = 1 - (2 * share @ inside.mT + 1) / (share.sum(-1, keepdim=True) + inside.sum(-1)[:, None] + 1)
    cost = weights.mask * entropy + weights.dice * overlap
    cost = cost.unflatten(1, (layers, queries)).transpose(0, 1)
    return cost - weights.classes * logits.softmax(-1)[..., :-1]


def _uncertain_points(masks: Tensor, points: int) -> Tensor:
    """Random places [M, P, 2] (x, y in 0 .. 1), most of them where masks [M, h, w] are least sure."""
    many = torch.rand(len(masks), OVERSAMPLE * points, 2, device=masks.device)
    sure = _read(masks[:, None], many)[:, 0].abs()
    count = int(IMPORTANT * points)
    best = sure.topk(count, dim=1, largest=False).indices
    chosen = many.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat((chosen, torch.rand(len(masks), points - count, 2, device=masks.device)), 1)


def _read(maps: Tensor, place: Tensor) -> Tensor:
    """Maps [N, C, h, w] at places [N, P, 2], bilinear; beyond the outermost centres their value: [N, C, P]."""
    where = 2 * place[:, :, None] - 1
    return F.grid_sample(maps, where, padding_mode="border", align_corners=False)[..., 0]


def _classes_at(target: Tensor, place: Tensor) -> Tensor:
    """Class of the pixel [N, H, W] at each place [N, P, 2]: [N, P]."""
    height, width = target.shape[1:]
    x, y = (place * place.new_tensor([width, height])).long().unbind(-1)
    return target.flatten(1).gather(1, y.clamp(max=height - 1) * width + x.clamp(max=width - 1))
