"""The semantic compressor: EfficientNetV2 features and a projection to Stage C's 16 channels.

Written out here because torchvision is not a dependency; the keys of ``backbone`` are torchvision's
``efficientnet_v2_s().features``. Matches: ``torchvision/models/efficientnet.py``, ``StableCascade/modules/effnet.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from .config import Channels, Layers, read_config

Kind = Literal["fused", "mb"]
StageRow = tuple[
    Kind,
    Annotated[int, Meta(ge=1, le=16)],
    Annotated[int, Meta(ge=1, le=15)],
    Annotated[int, Meta(ge=1, le=2)],
    Channels,
    Layers,
]
"""(kind, expand ratio, kernel size, stride, output channels, number of layers)"""

EFFICIENTNET_V2_S: tuple[StageRow, ...] = (
    ("fused", 1, 3, 1, 24, 2),
    ("fused", 4, 3, 2, 48, 4),
    ("fused", 4, 3, 2, 64, 4),
    ("mb", 4, 3, 2, 128, 6),
    ("mb", 6, 3, 1, 160, 9),
    ("mb", 6, 3, 2, 256, 15),
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PIXELS_PER_LATENT = 32
BATCH_NORM_EPS = 1e-3  # torchvision's value for the V2 family


@dataclass(frozen=True)
class EffNetConfig:
    """Architecture of a semantic compressor; the defaults are Stable Cascade's (EfficientNetV2-S)."""

    stages: Annotated[tuple[StageRow, ...], Meta(min_length=1, max_length=16)] = EFFICIENTNET_V2_S
    stem_channels: Channels = 24
    last_channels: Channels = 1280
    latent_channels: Channels = 16

    def check(self) -> None:
        """Refuse what does not give the latents of Stage C.

        Raises:
            ValueError: a kernel is even, or a latent does not stand for 32 pixels.
        """
        if even := [kernel for _, _, kernel, *_ in self.stages if kernel % 2 == 0]:
            raise ValueError(f"a kernel of {even[0]} is even; convolutions that keep the size need an odd one")
        if self.stride != PIXELS_PER_LATENT:
            raise ValueError(f"a latent would stand for {self.stride} pixels; Stage C's stand for {PIXELS_PER_LATENT}")

    @property
    def stride(self) -> int:
        """Pixels a latent stands for, along each side; the stem halves once."""
        return 2 * math.prod(stride for _, _, _, stride, _, _ in self.stages)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "the config of effnet") -> EffNetConfig:
        """Read a ``config.json`` written from this dataclass.

        Raises:
            CheckpointError: it does not describe a semantic compressor.
        """
        return read_config(cls, config, where)


class ConvNormAct(nn.Sequential):
    """Convolution, BatchNorm and SiLU (or nothing)."""

    def __init__(
        self, source: int, target: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(source, target, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(target, eps=BATCH_NORM_EPS),
        ]
        super().__init__(*layers, *([nn.SiLU()] if act else []))


class SqueezeExcitation(nn.Module):
    """Channel gates from the mean over the picture."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeeze, 1), nn.Conv2d(squeeze, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        y: Tensor = x * gate.sigmoid()
        return y


class MBConv(nn.Module):
    """An inverted residual, fused (one k x k convolution) or depthwise with squeeze-and-excitation."""

    def __init__(self, kind: Kind, expand: int, kernel: int, stride: int, source: int, target: int) -> None:
        super().__init__()
        wide = _multiple_of_8(source * expand)
        layers: list[nn.Module]
        if kind == "fused" and wide == source:
            layers = [ConvNormAct(source, target, kernel, stride)]
        elif kind == "fused":
            layers = [ConvNormAct(source, wide, kernel, stride), ConvNormAct(wide, target, 1, act=False)]
        else:
            layers = [] if wide == source else [ConvNormAct(source, wide, 1)]
            layers += [
                ConvNormAct(wide, wide, kernel, stride, groups=wide),
                SqueezeExcitation(wide, max(1, source // 4)),
                ConvNormAct(wide, target, 1, act=False),
            ]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and source == target

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.residual else y


class SemanticEncoder(nn.Module):
    """Pixels -> the latents that Stage C makes and Stage B is conditioned on."""

    def __init__(self, config: EffNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.stem_channels
        layers: list[nn.Module] = [ConvNormAct(3, channels, 3, stride=2)]
        for kind, expand, kernel, stride, target, count in config.stages:
            blocks = []
            for index in range(count):
                blocks.append(MBConv(kind, expand, kernel, stride if index == 0 else 1, channels, target))
                channels = target
            layers.append(nn.Sequential(*blocks))
        layers.append(ConvNormAct(channels, config.last_channels, 1))
        self.backbone = nn.Sequential(*layers)
        self.mapper = nn.Sequential(
            nn.Conv2d(config.last_channels, config.latent_channels, 1, bias=False),
            nn.BatchNorm2d(config.latent_channels, affine=False),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float32 in [0, 1] -> latents ``[B, 16, ceil(H/32), ceil(W/32)]`` float32."""
        # by numbers, not by a tensor of them: a tensor made here would be a fake one while the module is traced
        channels = zip(pixels.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
        x = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
        x = x.to(next(self.mapper.parameters()).dtype)
        y: Tensor = self.mapper(self.backbone(x))
        return y.float()


def _multiple_of_8(channels: int) -> int:
    """Torchvision's ``_make_divisible``: nearest multiple of 8, never more than 10 % below."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
