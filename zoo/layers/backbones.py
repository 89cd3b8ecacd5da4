"""Backbones of detection and segmentation: our small stem, or any timm model with feature maps, by its name."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.errors import ConfigError, unknown
from zoo.layers.patch import as_pair
from zoo.layers.pyramid import PyramidStem


class TimmBackbone(nn.Module):
    """Feature maps of a timm model, the last one projected to the tokens' width.

    Padding enters as the pixels' mean. A foreign network has no key masks, so places whose receptive field touches
    padding depend on it a little; maps are zeroed there.

    Args:
        backbone: timm's name of the model, e.g. "resnet18" or "vit_tiny_patch16_224".
        in_channels: Channels of the image.
        dim: Channels of the last map.
        stride: Pixels per place of the last map; the model must have a map of that stride.
        image_size: Height and width that position tables are made for.
    """

    def __init__(
        self, backbone: str, in_channels: int, dim: int, *, stride: int, image_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.name, self.stride, self.in_channels = backbone, stride, in_channels
        self.body, strides, channels = self._build(image_size)
        kept = {s: i for i, s in enumerate(strides) if s <= stride}  # the last map of each stride
        if stride not in kept:
            raise ConfigError(
                f"model.backbone={backbone} has maps of stride {', '.join(map(str, sorted(set(strides))))}, none of "
                f"{stride}; set the model's stride (segmenter: patch_size) to one of them"
            )
        self.kept = tuple(kept.values())
        self.widths = (*(channels[i] for i in self.kept[:-1]), dim)
        self.project = nn.Sequential(
            nn.Conv2d(channels[self.kept[-1]], dim, 1), nn.GroupNorm(1, dim, eps=1e-6)
        )
        self.pretrained = False

    def _build(
        self, image_size: tuple[int, int] | None = None, **options: object
    ) -> tuple[nn.Module, list[int], list[int]]:
        """The network, and strides and channels of its maps."""
        try:
            import timm
        except ImportError:
            raise ConfigError("model.backbone needs the package timm: pip install timm") from None
        if not timm.is_model(self.name):
            raise unknown("model.backbone (timm)", self.name, timm.list_models(), "see timm.list_models()")
        common = {"features_only": True, "in_chans": self.in_channels, **options}
        try:  # transformers take the size of their position table, convolutional networks do not
            body = timm.create_model(self.name, img_size=image_size, dynamic_img_size=True, **common)
        except TypeError:
            body = timm.create_model(self.name, **common)
        return body, body.feature_info.reduction(), body.feature_info.channels()

    def load_pretrained(self) -> None:
        """timm's published weights (downloaded by timm); batch norms keep their statistics from now on.

        A later rebuild of this model from its card does not come here: it loads the trained weights.
        """
        grid = getattr(self.body, "model", None)
        size = getattr(getattr(grid, "patch_embed", None), "img_size", None)
        body, _, _ = self._build(size, pretrained=True)
        self.body.load_state_dict(body.state_dict())
        self.pretrained = True
        self.train(self.training)

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        if self.pretrained:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, images: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Maps from fine to coarse, as `PyramidStem.forward` gives them."""
        right, below = (-side % self.stride for side in reversed(images.shape[-2:]))
        if valid is not None:
            images = images * valid[:, None]
        maps = self.body(nn.functional.pad(images, (0, right, 0, below)))
        maps = [maps[i] for i in self.kept]
        maps[-1] = self.project(maps[-1])
        if valid is None:
            return maps
        valid = nn.functional.pad(valid, (0, right, 0, below))
        height, width = valid.shape[-2:]
        masks = (valid[:, None, :: height // m.shape[-2], :: width // m.shape[-1]] for m in maps)
        return [m * mask for m, mask in zip(maps, masks, strict=True)]


def make_backbone(
    backbone: str | None,
    in_channels: int,
    dim: int,
    *,
    stride: int,
    stem_width: int,
    image_size: int | tuple[int, int],
    stride_key: str = "stride",
) -> PyramidStem | TimmBackbone:
    """The backbone that a model's options describe.

    Args:
        backbone: timm's name of a model, or None for the convolutional stem.
        in_channels: Channels of the image.
        dim: Channels of the last map.
        stride: Pixels per token along each axis, a power of two from 2 on.
        stem_width: Channels of the stem's first stage; they double up to `dim`.
        image_size: Side in pixels, or (height, width).
        stride_key: What the model calls its stride, for messages.
    """
    stages = stride.bit_length() - 1
    if stride < 2 or 2**stages != stride:
        raise ConfigError(f"{stride_key}={stride} must be a power of two from 2 on")
    if backbone is not None:
        return TimmBackbone(backbone, in_channels, dim, stride=stride, image_size=as_pair(image_size))
    widths = [*(min(dim, stem_width << i) for i in range(stages - 1)), dim]
    return PyramidStem(in_channels, widths, refine=max(1, stages - 1))


def load_pretrained_backbone(model: nn.Module) -> None:
    """Published weights for a model's backbone.

    Raises:
        ConfigError: It has none that are published.
    """
    stem = getattr(model, "stem", None)
    if not isinstance(stem, TimmBackbone):
        raise ConfigError("task.pretrained_backbone=true needs a timm backbone: model.backbone=resnet18, say")
    stem.load_pretrained()
