"""Teaches cascade-tiny image prompts: a CLIP image encoder, and the mapper that makes tokens of its embedding.

    image    pictures -> embedding -> semantic latents, through a reader that is thrown away: the encoder alone
    prompts  pictures -> embedding -> four condition tokens -> semantic latents, through Stage C: encoder and mapper

The encoder is taught first because the mapper learns nothing from an embedding that says nothing. In the second stage
everything of Stage C is frozen but the weight of `clip_img_mapper`, which is multiplied with zeros where there is no
picture: what Stage C makes of captions alone stays the same, bit for bit. The encoder learns to write tokens that
Stage C understands already.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from cascade_export.models import Denoiser
from cascade_tiny import data, diffusion, recipe, scenes
from cascade_tiny.meaning import AT
from cascade_tiny.recipe import TextEncoder
from cascade_tiny.text import PAD_ID

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_PICTURE_NOISE = 0.04  # the largest standard deviation: pictures that the decoder drew are not as flat as drawn ones
_NO_CAPTION = 0.8  # share of empty captions: the others describe the same picture
_READER_WEIGHT = 0.3
_PLACE_WEIGHT = 40.0  # as for captions: two channels of sixteen say where the shape is


def image_config() -> CLIPVisionConfig:
    """The image encoder's architecture: CLIP's, four layers deep, for pictures of 64 x 64."""
    return CLIPVisionConfig(
        hidden_size=recipe.IMAGE_WIDTH,
        intermediate_size=3 * recipe.IMAGE_WIDTH,
        projection_dim=recipe.STAGE_C.clip_image_in_channels,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=recipe.IMAGE_SIDE,
        patch_size=8,
        hidden_act="gelu",
    )


class ImageEncoder(CLIPVisionModelWithProjection):  # type: ignore[misc]
    """The image encoder."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeds pictures.

        Args:
            pixels: float32 [B, 3, IMAGE_SIDE, IMAGE_SIDE] in 0..1.

        Returns:
            float32 [B, 1, clip_image_in_channels].
        """
        mean, std = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return self(pixel_values=(pixels - mean) / std).image_embeds[:, None].float()  # type: ignore[no-any-return]


def build_image_encoder() -> ImageEncoder:
    """The image encoder with CLIP's own first weights."""
    return ImageEncoder(image_config())


def build_reader() -> nn.Module:
    """Reads a scene's meaning from an embedding: float32 [B, clip_image_in_channels] -> [B, 16 * 6 * 6]."""
    embedding = recipe.STAGE_C.clip_image_in_channels or 0
    return nn.Sequential(nn.Linear(embedding, 512), nn.GELU(), nn.Linear(512, math.prod(recipe.LATENTS_C)))


def thumbnail(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shrinks a square picture uint8 [side, side, 3] as CLIP's preprocessing does: [IMAGE_SIDE, IMAGE_SIDE, 3]."""
    return np.asarray(Image.fromarray(picture).resize((recipe.IMAGE_SIDE,) * 2, Image.Resampling.BICUBIC))


def thumbnails(path: Path, count: int, quiet: bool) -> Tensor:
    """Training scenes 0..count-1 as the image encoder sees them, kept in a file: uint8 [count, 3, side, side]."""
    if path.is_file():
        kept: Tensor = torch.load(path, weights_only=True)
        if len(kept) >= count and kept.shape[-1] == recipe.IMAGE_SIDE:
            return kept[:count]
    drawn = tqdm(range(count), desc="small pictures", unit="picture", disable=quiet)
    small = np.stack([thumbnail(scenes.draw(data.scene(i))) for i in drawn])
    pictures = torch.from_numpy(small).permute(0, 3, 1, 2).contiguous()
    data.save(pictures, path)
    return pictures


def noisy_pixels(pictures: Tensor, noise: Tensor, strength: Tensor) -> Tensor:
    """Pictures uint8 [B, 3, S, S] with noise of each one's own strength [B] in 0..1: float32 in 0..1."""
    return (data.to_unit(pictures) + _PICTURE_NOISE * strength.view(-1, 1, 1, 1) * noise).clamp(0, 1)


def weighted(error: Tensor) -> Tensor:
    """The mean of squared errors [B, 16, 6, 6] of semantic latents, in which the shape's place counts more."""
    weight = error.new_ones(1, error.shape[1], 1, 1)
    weight[:, AT] = _PLACE_WEIGHT
    loss: Tensor = (error * weight).mean() / weight.mean()
    return loss


def reading_loss(reader: nn.Module, embedding: Tensor, meant: Tensor) -> Tensor:
    """How far the reader's answer to embeddings [B, 1, I] is from what the pictures mean, [B, 16, 6, 6]."""
    return F.mse_loss(reader(embedding.squeeze(1)).float().view(meant.shape), meant)


class Batch(NamedTuple):
    """The conditions and targets of one step of the second stage.

    Attributes:
        ids: int64 [B, L], captions; the empty one where only the picture says what is meant.
        pixels: float32 [B, 3, S, S] in 0..1.
        meant: float32 [B, 16, 6, 6].
    """

    ids: Tensor
    pixels: Tensor
    meant: Tensor


def freeze_all_but_images(stage_c: Denoiser) -> None:
    """Leaves gradients to that weight of Stage C alone which has no effect without a picture."""
    stage_c.requires_grad_(False)
    stage_c.clip_img_mapper.weight.requires_grad_(True)


def mostly_without(ids: Tensor, empty: Tensor, which: Tensor) -> Tensor:
    """Captions int64 [B, L], most of which, chosen by ``which`` [B] in 0..1, are replaced by the empty one [L]."""
    return torch.where(which[:, None] < _NO_CAPTION, empty, ids)


def prompt_loss(
    stage_c: Denoiser,
    text: TextEncoder,
    encoder: ImageEncoder,
    reader: nn.Module,
    batch: Batch,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """Stage C's error at times t [B], with the captions and pictures of a batch as conditions, and the reader's."""
    with torch.no_grad():
        hidden, pooled = text.conditions(batch.ids, (batch.ids != PAD_ID).long())
    image = encoder.embed(batch.pixels)
    noisy, velocity = diffusion.noised(batch.meant, noise, t)
    error = weighted((stage_c(noisy, t, pooled, hidden, image) - velocity) ** 2)
    return error + _READER_WEIGHT * reading_loss(reader, image, batch.meant)
