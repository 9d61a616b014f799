"""Teaches cascade-tiny ControlNets: Stage C is frozen, and residuals are learned that make it follow a control picture.

    canny       edges of a scene, 1 channel -> that scene, in the colours of the caption
    inpainting  a scene with a part painted white, and the mask of that part, 4 channels -> the whole scene

A canny ControlNet sees shapes, places and sizes, but no colours: these have to come from the caption.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from cascade_export.models import Control, ControlNet, Denoiser
from cascade_tiny import data, diffusion, recipe, scenes
from cascade_tiny.edges import CANNY_SIDE, control_edges
from cascade_tiny.image_prompts import weighted
from cascade_tiny.meaning import AT
from cascade_tiny.recipe import TextEncoder
from cascade_tiny.text import PAD_ID

ControlStage = Literal["canny", "inpainting"]
CHANNELS: dict[ControlStage, int] = {"canny": 1, "inpainting": 4}

_SHAPE = tuple(range(AT.start, recipe.LATENTS_C[0]))  # places, radius and kind: what edges say of the latents
_NO_CAPTION = 0.25  # share of empty captions: the control picture alone must say where and what


def build_control(stage: ControlStage) -> ControlNet:
    """A ControlNet that adds nothing yet."""
    width = recipe.STAGE_C.block_out_channels[0]
    return ControlNet(replace(recipe.CONTROL, in_channels=CHANNELS[stage], projection_channels=width))


def build_reader() -> nn.Module:
    """Reads shapes from a backbone's features: float32 [B, E, h, w] -> [B, 10, h, w]."""
    return nn.Conv2d(recipe.CONTROL.embedding_channels, len(_SHAPE), 1)


def kept_edges(path: Path, count: int, quiet: bool) -> NDArray[np.uint8]:
    """Edges of training scenes 0..count-1, eight pixels a byte, kept in a file: uint8 [count, 224, 28]."""
    if path.is_file():
        kept: NDArray[np.uint8] = np.load(path)
        if len(kept) >= count:
            return kept[:count]
    drawn = tqdm(range(count), desc="edges", unit="picture", disable=quiet)
    packed = np.stack([np.packbits(control_edges(scenes.draw(data.scene(i))), axis=1) for i in drawn])
    beside = path.with_name("part-" + path.name)
    np.save(beside, packed)
    beside.replace(path)
    return packed


def edge_pictures(packed: NDArray[np.uint8]) -> Tensor:
    """Packed edges uint8 [B, 224, 28] as a ControlNet sees them: float32 [B, 1, SIDE, SIDE] in 0..1."""
    edges = torch.from_numpy(np.unpackbits(packed, axis=-1, count=CANNY_SIDE))[:, None].float()
    return F.interpolate(edges, size=(scenes.SIDE,) * 2, mode="bilinear", align_corners=False)


def masked_pictures(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures with a rectangle painted white, and that rectangle.

    Args:
        pictures: uint8 [B, 3, SIDE, SIDE].
        rng: for the rectangles: a third to the whole of the side, anywhere.

    Returns:
        float32 [B, 4, SIDE, SIDE] in 0..1: red, green, blue, and the mask, 1 where the picture is to be made.
    """
    side = pictures.shape[-1]
    mask = torch.zeros(len(pictures), 1, side, side)
    for row in mask:
        height, width = (int(v * side) for v in rng.uniform(1 / 3, 1, 2))
        top, left = int(rng.integers(0, side - height + 1)), int(rng.integers(0, side - width + 1))
        row[:, top : top + height, left : left + width] = 1
    return torch.cat([torch.where(mask > 0, 1.0, data.to_unit(pictures)), mask], dim=1)


class Batch(NamedTuple):
    """The conditions and targets of one step.

    Attributes:
        ids: int64 [B, L], captions.
        control: float32 [B, C, SIDE, SIDE] in 0..1, the control pictures.
        meant: float32 [B, 16, 6, 6].
    """

    ids: Tensor
    control: Tensor
    meant: Tensor


def without_some(ids: Tensor, empty: Tensor, which: Tensor) -> Tensor:
    """Captions int64 [B, L], a share of which, chosen by ``which`` [B] in 0..1, are replaced by the empty one [L]."""
    return torch.where(which[:, None] < _NO_CAPTION, empty, ids)


def control_loss(
    stage_c: Denoiser,
    text: TextEncoder,
    network: ControlNet,
    reader: nn.Module,
    batch: Batch,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """Stage C's error at times t [B], with the residuals of a batch's control pictures, and the reader's.

    What Stage C's error says to the backbone comes through a frozen network and much noise. The reader's says it
    directly: which shape is where. It is thrown away afterwards.
    """
    with torch.no_grad():
        hidden, pooled = text.conditions(batch.ids, (batch.ids != PAD_ID).long())
    image = hidden.new_zeros(len(hidden), 1, recipe.STAGE_C.clip_image_in_channels or 0)
    features = network.backbone(batch.control)
    control = Control(network.project(features), network.config.proj_blocks)
    noisy, velocity = diffusion.noised(batch.meant, noise, t)
    error = weighted((stage_c(noisy, t, pooled, hidden, image, control=control) - velocity) ** 2)
    read = F.interpolate(reader(features).float(), size=batch.meant.shape[2:], mode="bilinear", align_corners=True)
    return error + F.mse_loss(read, batch.meant[:, _SHAPE])


def frozen(network: nn.Module) -> nn.Module:
    """The network without gradients of its own weights; those of its inputs remain."""
    return network.eval().requires_grad_(False)
