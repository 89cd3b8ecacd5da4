"""Plain-DETR: detection with one scale, global cross-attention and a bias that knows the boxes.

Paper: "DETR does not need multi-scale or locality design", arXiv:2308.01904. Official code: impiga/Plain-DETR, MIT.
Kept from it: BoxRPB, mixed selection, two stages, hybrid matching, iterative boxes whose gradients look forward
twice, boxes as changes relative to their reference.
Differs from it in: a convolutional stem of stride 8 (or a timm model) and few narrow layers, for small images; optional
encoder layers; proposals from that one scale; padding is hidden with -inf instead of -100.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.base import Attention, Grid, Pattern
from zoo.attention.slots import AttentionFactory, Slot
from zoo.errors import ConfigError, unknown
from zoo.layers.backbones import make_backbone
from zoo.layers.blocks import TransformerBlock
from zoo.layers.box_rpb import BoxRPB
from zoo.layers.boxes import apply_delta, inverse_sigmoid, to_xyxy
from zoo.layers.bvr import BridgeRepresentations
from zoo.layers.detr_blocks import BoxHead, QueryBlock, grid_anchors
from zoo.layers.patch import as_pair
from zoo.layers.position import sine_positions, sine_positions_2d
from zoo.layers.pyramid import tokens_of, valid_pixels
from zoo.models.registry import register_model

BOX_FORMS = ("delta", "sigmoid")


@register_model
class PlainDetr(nn.Module):
    """Stem, encoder over the grid, decoder over a set of box queries.

    Args:
        attention: Factories for slots "encoder" (with encoder layers), "decoder" and "cross".
        image_size: Side in pixels, or (height, width), of the batches.
        in_channels: Channels of the image.
        num_classes: Number of object classes.
        padded: Images may be smaller than the batch; attention then gets key masks.
        backbone: timm's name of a model whose maps replace the stem; None for the stem.
        stem_width: Channels of the stem's first stage; they double up to `dim`.
        stride: Pixels per token along each axis, a power of two from 2 on.
        dim: Width C, divisible by 4.
        encoder_depth: Encoder layers; 0 for none, as in the paper.
        decoder_depth: Decoder layers.
        num_heads: Heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLPs over `dim`.
        queries: Queries of the one-to-one group.
        many_queries: Queries of the one-to-many group, in training only; 0 for none.
        two_stage: References come from the best proposals on the grid; otherwise they are learned.
        anchor_size: Side of a proposal's box before its change, as a share of the image.
        box_rpb: Bias the cross-attention by BoxRPB.
        box_hidden: Hidden width of its MLPs.
        box_offsets: "log" or "linear", see `zoo.layers.box_rpb`.
        box_form: "delta": boxes are changes relative to their reference, also in loss and matching; "sigmoid":
            changes add to the reference's logits.
        bvr_proposals: Proposals whose corners and centres the image tokens look at before decoding (RelationNet++);
            0 for none. Needs two stages.
        dropout: Dropout after projections and inside MLPs.
    """

    name: ClassVar[str]

    def __init__(
        self,
        attention: Mapping[str, AttentionFactory],
        *,
        image_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        num_classes: int = 10,
        padded: bool = False,
        backbone: str | None = None,
        stem_width: int = 24,
        stride: int = 8,
        dim: int = 96,
        encoder_depth: int = 2,
        decoder_depth: int = 3,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        queries: int = 12,
        many_queries: int = 24,
        two_stage: bool = True,
        anchor_size: float = 0.3,
        box_rpb: bool = True,
        box_hidden: int = 32,
        box_offsets: str = "log",
        box_form: str = "delta",
        bvr_proposals: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise ConfigError(f"dim={dim} must be divisible by 4 and by num_heads={num_heads}")
        if queries < 1 or many_queries < 0 or decoder_depth < 1:
            raise ConfigError(
                f"queries={queries} and decoder_depth={decoder_depth} must be at least 1, many_queries >= 0"
            )
        if box_form not in BOX_FORMS:
            raise unknown("box_form", box_form, BOX_FORMS)
        if bvr_proposals < 0 or (bvr_proposals and not two_stage):
            raise ConfigError(f"bvr_proposals={bvr_proposals} must not be negative and needs two_stage=true")
        height, width = as_pair(image_size)
        self.grid = Grid((-(-height // stride), -(-width // stride)))
        most = max(queries, many_queries, bvr_proposals)
        if two_stage and most > self.grid.tokens:
            raise ConfigError(
                f"{most} queries need as many grid points, the grid has {self.grid.tokens}: lower queries or "
                "many_queries or bvr_proposals, or set two_stage=false"
            )
        self.num_classes, self.in_channels, self.stride, self.dim = num_classes, in_channels, stride, dim
        self.queries, self.many_queries, self.padded = queries, many_queries, padded
        self.two_stage, self.anchor_size, self.box_form = two_stage, anchor_size, box_form

        self.stem = make_backbone(
            backbone,
            in_channels,
            dim,
            stride=stride,
            stem_width=stem_width,
            image_size=image_size,
        )
        self.encoder = nn.ModuleList(
            TransformerBlock(
                attention["encoder"],
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                length=self.grid.tokens,
                grid=self.grid,
            )
            for _ in range(encoder_depth)
        )
        self.bridge = (
            BridgeRepresentations(attention["bvr"], dim, num_heads, proposals=bvr_proposals)
            if bvr_proposals
            else None
        )
        self.memory_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder = nn.ModuleList(
            QueryBlock(
                attention["decoder"],
                attention["cross"],
                dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                queries=None if many_queries else queries,
                grid=self.grid,
            )
            for _ in range(decoder_depth)
        )
        self.rpb = (
            nn.ModuleList(
                BoxRPB(num_heads, hidden=box_hidden, offsets=box_offsets) for _ in range(decoder_depth)
            )
            if box_rpb
            else None
        )
        self.content = nn.Parameter(torch.empty(queries + many_queries, dim))
        self.anchors = None if two_stage else nn.Parameter(torch.empty(queries + many_queries, 4))
        self.box_position = nn.Sequential(nn.Linear(2 * dim, dim), nn.LayerNorm(dim, eps=1e-6))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.classify = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(decoder_depth))
        self.regress = nn.ModuleList(BoxHead(dim) for _ in range(decoder_depth))
        if two_stage:
            self.proposal_score = nn.Linear(dim, 1)
            self.proposal_box = BoxHead(dim)
        table = sine_positions_2d(*self.grid.shape, dim)
        self.register_buffer("positions", table[None], persistent=False)
        self.reset_parameters()

    @classmethod
    def slots(
        cls,
        *,
        encoder_depth: int = 2,
        many_queries: int = 24,
        box_rpb: bool = True,
        padded: bool = False,
        bvr_proposals: int = 0,
        **options: Any,
    ) -> dict[str, Slot]:
        """Encoder over the grid; queries are a set; the cross-attention takes BoxRPB's factors as bias."""
        slots = {
            "decoder": Slot(Pattern.SELF, ordered=False, length_known=not many_queries),
            "cross": Slot(
                Pattern.CROSS,
                key_mask=padded,
                bias="factors" if box_rpb else None,
                ordered=False,
                grid_dims=2,
                length_known=True,
            ),
        }
        if bvr_proposals:
            slots["bvr"] = Slot(Pattern.CROSS, bias="full", ordered=False, length_known=True)
        if encoder_depth:
            slots = {"encoder": Slot(Pattern.SELF, key_mask=padded, grid_dims=2, length_known=True), **slots}
        return slots

    def reset_parameters(self) -> None:
        """Xavier for projections, boxes at their reference, class scores at a prior of 0.01."""
        own = [self.stem, *(m for m in self.modules() if isinstance(m, Attention))]
        foreign = {id(layer) for module in own for layer in module.modules()}
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and id(layer) not in foreign:
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.content)
        prior = -math.log(99.0)
        if self.bridge is not None:
            self.bridge.reset_parameters()
        for head in self.classify:
            nn.init.constant_(head.bias, prior)
        for head in self.regress:
            head.reset_last()
        if self.two_stage:
            nn.init.constant_(self.proposal_score.bias, prior)
            self.proposal_box.reset_last()
        else:
            nn.init.uniform_(self.anchors[:, :2], -1.5, 1.5)
            nn.init.constant_(self.anchors[:, 2:], math.log(self.anchor_size / (1 - self.anchor_size)))

    def encode(self, images: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Grid]:
        """Image tokens with positions and without, [B, M, C], their key mask and grid."""
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ConfigError(
                f"images must be [B, {self.in_channels}, height, width], got {list(images.shape)}; in_channels sets "
                "the channels"
            )
        height, width = images.shape[-2:]
        valid = valid_pixels(size, height, width) if self.padded else None
        last = self.stem(images, valid)[-1]
        shape = tuple(last.shape[-2:])
        grid = Grid(shape)
        table = (
            self.positions if shape == self.grid.shape else sine_positions_2d(*shape, self.dim)[None].to(last)
        )
        key_mask = None
        if valid is not None:
            key_mask = valid[:, :: self.stride, :: self.stride].flatten(1)
        x = tokens_of(last) + table
        for block in self.encoder:
            x = block(x, key_mask=key_mask, grid=grid)
        x = self.memory_norm(x)
        return x + table, x, key_mask, grid

    def forward(self, images: Tensor, size: Tensor | None = None) -> dict[str, Tensor]:
        """Detect.

        Args:
            images: [B, channels, height, width].
            size: Height and width of each image without padding, [B, 2]; the whole picture when left out.

        Returns:
            "logits" [L, B, N, K] and "boxes" [L, B, N, 4] of every decoder layer, boxes cxcywh relative to the
            unpadded image; "references" [L, B, N, 4], what the boxes are changes of. In training with
            `many_queries` the same with the prefix "many_", and with two stages "proposal_logits" [B, M, 1],
            "proposal_boxes", "proposal_references" [B, M, 4] and "proposal_inside" [B, M].
        """
        if size is None:
            size = torch.tensor(images.shape[-2:], device=images.device).expand(images.shape[0], 2)
        keys, memory, key_mask, grid = self.encode(images, size)
        if self.bridge is not None:
            table = keys - memory
            memory = self._bridge(memory, size, grid)
            keys = memory + table
        groups = [self.queries, self.many_queries] if self.training and self.many_queries else [self.queries]
        out: dict[str, Tensor] = {}
        reference = self._references(memory, size, grid, groups, out)
        x = self.content[: sum(groups)].expand(images.shape[0], -1, -1)
        cells = (
            torch.cat((size, size), 1).flip(1)[:, None].to(memory) / self.stride
        )  # w, h, w, h in grid cells
        logits, boxes, references = [], [], []
        start = reference
        for i, block in enumerate(self.decoder):
            fixed = reference.detach()
            bias = self.rpb[i](to_xyxy(fixed) * cells, grid.shape) if self.rpb is not None else None
            x = block(
                x,
                self._position(fixed),
                keys,
                memory,
                groups=groups,
                key_mask=key_mask,
                bias=bias,
                grid=grid,
            )
            y = self.norm(x)
            delta = self.regress[i](y)
            references.append(fixed)
            reference = self._change(fixed, delta)
            logits.append(self.classify[i](y))
            # Looking forward twice: the loss on this layer's box also moves the layer before.
            boxes.append(self._change(start, delta))
            start = reference
        for name, parts in (("logits", logits), ("boxes", boxes), ("references", references)):
            whole = torch.stack(parts)
            out[name] = whole[:, :, : self.queries]
            if len(groups) > 1:
                out[f"many_{name}"] = whole[:, :, self.queries :]
        return out

    def _bridge(self, memory: Tensor, size: Tensor, grid: Grid) -> Tensor:
        """Image tokens that have looked at the best proposals' key points, [B, M, C]."""
        anchors, inside = grid_anchors(grid.shape, self.stride, size, self.anchor_size)
        score = self.proposal_score(memory).detach()[..., 0].masked_fill(~inside, -torch.inf)
        best = self._top(score, self.bridge.proposals)[..., None].expand(-1, -1, 4)
        boxes = self._change(anchors, self.proposal_box(memory).detach()).gather(1, best)
        return self.bridge(memory, anchors[..., :2], boxes, size, self.stride, grid.shape)

    @staticmethod
    def _top(score: Tensor, count: int) -> Tensor:
        """Places of the `count` best scores, [B, count]; repeated where a small picture has fewer."""
        index = score.topk(min(count, score.shape[1]), dim=1).indices
        return index[:, torch.arange(count, device=index.device) % index.shape[1]]

    def _references(
        self, memory: Tensor, size: Tensor, grid: Grid, groups: list[int], out: dict[str, Tensor]
    ) -> Tensor:
        """First reference boxes, [B, N, 4]: the best proposals, or learned ones."""
        if not self.two_stage:
            return self.anchors[: sum(groups)].sigmoid().expand(memory.shape[0], -1, -1)
        anchors, inside = grid_anchors(grid.shape, self.stride, size, self.anchor_size)
        score = self.proposal_score(memory)
        boxes = self._change(anchors, self.proposal_box(memory))
        out |= {
            "proposal_logits": score,
            "proposal_boxes": boxes,
            "proposal_references": anchors,
            "proposal_inside": inside,
        }
        ranked = score.detach()[..., 0].masked_fill(~inside, -torch.inf)
        best = [self._top(ranked, count) for count in groups]
        index = torch.cat(best, 1)[..., None].expand(-1, -1, 4)
        return boxes.gather(1, index).detach()

    def _change(self, reference: Tensor, delta: Tensor) -> Tensor:
        if self.box_form == "delta":
            return apply_delta(reference, delta)
        return (inverse_sigmoid(reference) + delta).sigmoid()

    def _position(self, boxes: Tensor) -> Tensor:
        """Query positions [B, N, C] from boxes cxcywh."""
        table = sine_positions(boxes * (2 * math.pi), self.dim // 2, base=100.0)
        return self.box_position(table.flatten(-2))

    @property
    def no_weight_decay(self) -> set[str]:
        return {"content", "anchors"}
