"""ControlNet for Stage C: a control picture -> one residual for each of several blocks of Stage C.

A ControlNet runs once a picture: its residuals are the same for every step. Which blocks they belong to is not in a
published file but in its config (``proj_blocks``); ``Denoiser`` adds them (see ``DenoiserConfig.control_blocks``).
Keys are the published ones: ``backbone...`` and ``projections.{i}.{0,2}.weight``.
Matches: ``StableCascade/modules/controlnet.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from .config import Channels, read_config
from .effnet import EFFICIENTNET_V2_S, EffNetConfig, SemanticEncoder, StageRow

Bottleneck = Literal["effnet", "simple", "large"]
Filter = Literal["canny", "inpainting", "super_resolution", "picture"]
"""What a control picture shows: `cascade_rt.stages.CONTROLS`."""

PUBLISHED_BLOCKS = (0, 4, 8, 12, 51, 55, 59, 63)
_SLOPE = 0.2
_PIXEL_CHANNELS = 3
_CHANNELS: dict[str, tuple[int, ...]] = {
    "canny": (1,),
    "inpainting": (4,),
    "super_resolution": (16,),
    "picture": (1, 3),
}
_SIMPLE_FACTOR = 4  # the hidden width of "simple", in multiples of the input's
_LARGE_LAYERS = 8


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """Architecture of a ControlNet; the defaults are those of the published canny ControlNet.

    Attributes:
        in_channels: channels of the control picture: 1 canny, 4 inpainting (picture and mask), 16 latents of effnet.
        projection_channels: width of Stage C, which the residuals are added to.
        proj_blocks: for each residual the index of its residual block in Stage C, counted in the order of execution:
            down, then up; a block that is executed twice counts twice.
        filter: what its control picture shows.
        pixels_per_latent: pixels of a control picture, along each side, that a latent of Stage C stands for: at this
            size it was trained. 32: pictures of 768 pixels for 24 latents, as the authors' notebooks resize them.
        bottleneck: the backbone: "effnet" (EfficientNetV2 features, a residual stands for 32 pixels), "simple" (two
            convolutions) or "large" (a wide residual network); both of these keep the size.
        stages, stem_channels, last_channels: of "effnet", as in `EffNetConfig`.
        large_hidden, large_channels: of "large": the widths of its first layer and of its residual blocks.
    """

    in_channels: Channels = 1
    projection_channels: Channels = 2048
    proj_blocks: Annotated[tuple[Annotated[int, Meta(ge=0, le=4095)], ...], Meta(min_length=1, max_length=256)] = (
        PUBLISHED_BLOCKS
    )
    filter: Filter = "canny"
    pixels_per_latent: Annotated[float, Meta(ge=1, le=1024)] = 32.0
    bottleneck: Bottleneck = "effnet"
    stages: Annotated[tuple[StageRow, ...], Meta(min_length=1, max_length=16)] = EFFICIENTNET_V2_S
    stem_channels: Channels = 24
    last_channels: Channels = 1280
    large_hidden: Channels = 16384
    large_channels: Channels = 1024

    def check(self) -> None:
        """Refuse fields that contradict each other.

        Raises:
            ValueError: ``proj_blocks`` does not rise, or the backbone cannot be built.
        """
        if any(later <= earlier for earlier, later in zip(self.proj_blocks, self.proj_blocks[1:], strict=False)):
            raise ValueError(f"proj_blocks {list(self.proj_blocks)} does not rise; each residual has its own block")
        if self.in_channels not in _CHANNELS[self.filter]:
            wanted = " or ".join(map(str, _CHANNELS[self.filter]))
            raise ValueError(f"in_channels is {self.in_channels}; a ControlNet for {self.filter} has {wanted}")
        self.features.check()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "the config of a ControlNet") -> ControlNetConfig:
        """Read a ``config.json`` written from this dataclass.

        Raises:
            CheckpointError: it does not describe a ControlNet.
        """
        return read_config(cls, config, where)

    @property
    def features(self) -> EffNetConfig:
        """The config of the EfficientNetV2 features."""
        return EffNetConfig(stages=self.stages, stem_channels=self.stem_channels, last_channels=self.last_channels)

    @property
    def pixels_per_residual(self) -> int:
        """How many positions of the control picture, along each side, one position of a residual stands for."""
        return self.features.stride if self.bottleneck == "effnet" else 1

    @property
    def embedding_channels(self) -> int:
        """Width of the backbone's output."""
        return self.in_channels if self.bottleneck == "simple" else self.last_channels


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm with weights over the channels of ``[B, C, H, W]``; epsilon 1e-5, as published."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ControlResBlock(nn.Module):
    """Twice norm, GELU and a 3 x 3 convolution; residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            LayerNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            LayerNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.blocks(x)
        return y


class ControlNet(nn.Module):
    """A control picture -> residuals for Stage C.

    The last convolution of every projection begins at zero, so that an untrained ControlNet changes nothing.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = _BACKBONES[config.bottleneck](config)
        self.projections = nn.ModuleList([_projection(config) for _ in config.proj_blocks])

    def forward(self, control: Tensor) -> Tensor:
        """Compute the residuals.

        Args:
            control: ``[B, in_channels, H, W]`` float32: the control picture in 0..1, not normalised, or latents.

        Returns:
            ``[B, len(proj_blocks), h, w, projection_channels]`` float32. With "effnet", h is ``ceil(H / 32)``; where
            ``in_channels`` is not 3, the first convolution has no padding, and h may be one less if H is not a
            multiple of 32. With the other backbones h is H.
        """
        return self.project(self.backbone(control.to(next(self.parameters()).dtype)))

    def project(self, features: Tensor) -> Tensor:
        """The backbone's output ``[B, E, h, w]`` -> residuals as `forward` returns them."""
        residuals = torch.stack([projection(features) for projection in self.projections], dim=1)
        return residuals.permute(0, 1, 3, 4, 2).float()


def _projection(config: ControlNetConfig) -> nn.Sequential:
    width = config.embedding_channels
    last = nn.Conv2d(width, config.projection_channels, 1, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.LeakyReLU(_SLOPE), last)


def _effnet(config: ControlNetConfig) -> nn.Sequential:
    backbone = SemanticEncoder(config.features).backbone
    if config.in_channels != _PIXEL_CHANNELS:
        stem = backbone[0]
        assert isinstance(stem, nn.Sequential)
        # the published networks replace it by one without padding
        stem[0] = nn.Conv2d(config.in_channels, config.stem_channels, 3, stride=2, bias=False)
    return backbone


def _simple(config: ControlNetConfig) -> nn.Sequential:
    outer, inner = config.in_channels, _SIMPLE_FACTOR * config.in_channels
    return nn.Sequential(
        nn.Conv2d(outer, inner, 3, padding=1), nn.LeakyReLU(_SLOPE), nn.Conv2d(inner, outer, 3, padding=1)
    )


def _large(config: ControlNetConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(config.in_channels, config.large_hidden, 1),
        nn.LeakyReLU(_SLOPE),
        nn.Conv2d(config.large_hidden, config.large_channels, 1),
        *[ControlResBlock(config.large_channels) for _ in range(_LARGE_LAYERS)],
        nn.Conv2d(config.large_channels, config.last_channels, 1),
    )


_BACKBONES = {"effnet": _effnet, "simple": _simple, "large": _large}
