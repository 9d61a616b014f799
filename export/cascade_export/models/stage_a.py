"""Stage A: Paella's VQ autoencoder, used as a plain autoencoder (latents are not quantised at inference).

Matches: ``diffusers/pipelines/deprecated/wuerstchen/modeling_paella_vq_model.py`` and
``StableCascade/modules/stage_a.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from .blocks import Conv2d, ConvTranspose2d, Linear, Pointwise, layer_norm
from .config import Channels, Layers, Words, read_config


@dataclass(frozen=True)
class StageAConfig:
    """Architecture of a Stage A, in diffusers' ``PaellaVQModel`` words (its ``config.json``)."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    up_down_scale_factor: Annotated[int, Meta(ge=1, le=16)] = 2
    levels: Annotated[int, Meta(ge=1, le=6)] = 2
    bottleneck_blocks: Layers = 12
    embed_dim: Channels = 384
    latent_channels: Channels = 4
    num_vq_embeddings: Words = 8192
    scale_factor: Annotated[float, Meta(gt=0, le=1e6)] = 0.3764

    def check(self) -> None:
        """Refuse fields that contradict each other.

        Raises:
            ValueError: the width cannot be halved at every level, or a latent stands for more than 64 pixels.
        """
        if self.embed_dim % 2 ** (self.levels - 1):
            raise ValueError(f"embed_dim {self.embed_dim} cannot be halved {self.levels - 1} times for its levels")
        if self.compression > 64:
            raise ValueError(
                f"a latent would stand for {self.compression} x {self.compression} pixels; at most 64 x 64"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "the config of stage_a") -> StageAConfig:
        """Read diffusers' ``config.json``.

        Raises:
            CheckpointError: it does not describe a Stage A.
        """
        return read_config(cls, config, where)

    @property
    def compression(self) -> int:
        """Pixels a latent position stands for, along each side."""
        return int(self.up_down_scale_factor * 2 ** (self.levels - 1))


class MixingResidualBlock(nn.Module):
    """Depthwise 3 x 3 and an MLP, each behind a LayerNorm, mixed in by six learned scalars. ``[B, H, W, C]``."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        # index 0 was the padding in the original Sequential; the convolution's key is depthwise.1
        self.depthwise = nn.ModuleList([nn.Identity(), nn.Conv2d(channels, channels, 3, groups=channels)])
        self.channelwise = nn.Sequential(Linear(channels, hidden), nn.GELU(), Linear(hidden, channels))
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        g = self.gammas
        h = (layer_norm(x) * (1 + g[0]) + g[1]).permute(0, 3, 1, 2)
        h = self.depthwise[1](_repeat_edges(h))
        x = x + h.permute(0, 2, 3, 1) * g[2]
        y: Tensor = self.channelwise(layer_norm(x) * (1 + g[3]) + g[4])
        return x + y * g[5]


def _repeat_edges(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` with one more row and column on every side, in float32 where it is bfloat16.

    ONNX Runtime's CUDA provider has no Pad in bfloat16; in float16 and float32 it does.
    """
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return F.pad(wide, (1, 1, 1, 1), mode="replicate").to(x.dtype)


class _Latents(nn.Sequential):
    """Projection to the latents and their normalisation (BatchNorm), on ``[B, H, W, C]``."""

    def __init__(self, width: int, latent_channels: int) -> None:
        super().__init__(Pointwise(width, latent_channels, bias=False), nn.BatchNorm2d(latent_channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self[1](self[0](x).permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1)


class StageA(nn.Module):
    """Pixels <-> latents of 4 channels at a quarter of the size."""

    def __init__(self, config: StageAConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.embed_dim // 2**i for i in reversed(range(config.levels))]
        shuffle = config.up_down_scale_factor
        self.in_block = nn.Sequential(nn.PixelUnshuffle(shuffle), Pointwise(config.in_channels * shuffle**2, widths[0]))
        down: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level:
                down.append(Conv2d(widths[level - 1], width, kernel_size=4, stride=2, padding=1))
            down.append(MixingResidualBlock(width, width * 4))
        down.append(_Latents(widths[-1], config.latent_channels))
        self.down_blocks = nn.Sequential(*down)
        self.vquantizer = nn.ModuleDict({"embedding": nn.Embedding(config.num_vq_embeddings, config.latent_channels)})
        up: list[nn.Module] = [nn.Sequential(Pointwise(config.latent_channels, widths[-1]))]
        for level, width in enumerate(reversed(widths)):
            if level:
                up.append(ConvTranspose2d(widths[-level], width, kernel_size=4, stride=2, padding=1))
            up += [MixingResidualBlock(width, width * 4) for _ in range(1 if level else config.bottleneck_blocks)]
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(Pointwise(widths[0], config.out_channels * shuffle**2), nn.PixelShuffle(shuffle))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.in_block.parameters()).dtype

    def encode(self, pixels: Tensor) -> Tensor:
        """``[B, 3, H, W]`` float32 in [0, 1] -> unscaled latents ``[B, 4, H/4, W/4]`` float32."""
        unshuffle, project = self.in_block
        x = project(unshuffle(pixels.to(self.dtype)).permute(0, 2, 3, 1))
        y: Tensor = self.down_blocks(x)
        return y.permute(0, 3, 1, 2).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents ``[B, 4, H/4, W/4]`` float32 -> ``[B, 3, H, W]`` float32, not clamped."""
        x = self.up_blocks(latents.to(self.dtype).permute(0, 2, 3, 1))
        project, shuffle = self.out_block
        # float32 first: ONNX Runtime's CUDA provider has no DepthToSpace in bfloat16
        y: Tensor = shuffle(project(x).permute(0, 3, 1, 2).float())
        return y
