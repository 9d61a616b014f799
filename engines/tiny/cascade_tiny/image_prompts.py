"""Teaches cascade-tiny image prompts: a CLIP image encoder, and the mapper that makes tokens of its embedding.

    image    pictures -> embedding -> semantic latents, through a reader that is thrown away: the encoder alone
    prompts  pictures -> embedding -> four condition tokens -> semantic latents, through Stage C: encoder and mapper

The encoder is taught first because the mapper learns nothing from an embedding that says nothing. In the second stage
everything of Stage C is frozen but the weight of `clip_img_mapper`, which is multiplied with zeros where there is no
picture: what Stage C makes of captions alone stays the same, bit for bit. The encoder learns to write tokens that
Stage C understands already.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from cascade_export.models import Denoiser
from cascade_tiny import data, diffusion, recipe, scenes
from cascade_tiny.recipe import ImageEncoder, TextEncoder
from cascade_tiny.task import Task, semantic_loss
from cascade_tiny.text import PAD_ID, build_tokenizer, encode
from cascade_tiny.weights import trained

_PICTURE_NOISE = 0.04  # the largest standard deviation: pictures that the decoder drew are not as flat as drawn ones
_NO_CAPTION = 0.8  # share of empty captions; the others describe the same picture
_READER_WEIGHT = 0.3


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


def reading_loss(reader: nn.Module, embedding: Tensor, meant: Tensor) -> Tensor:
    """How far the reader's answer to embeddings [B, 1, I] is from what the pictures mean, [B, 16, 6, 6]."""
    return F.mse_loss(reader(embedding.squeeze(1)).float().view(meant.shape), meant)


class TrainImage(Task):
    """Pictures to semantic latents by way of the embedding, by squared error."""

    stage = "image"

    def prepare(self, out: Path, quiet: bool) -> None:  # noqa: D102
        self.pictures = thumbnails(out / "small-pictures.pt", recipe.SCENES_IMAGE, quiet).to(self.device)
        self.semantic = data.meanings(recipe.SCENES_IMAGE).to(self.device)

    def loss(self, step: int, rng: torch.Generator) -> Tensor:  # noqa: D102
        numbers = self.numbers(step, len(self.semantic)).to(self.device)
        embedding = self.embedding(numbers, rng)
        return reading_loss(self.networks["reader"], embedding, self.semantic[numbers].float())

    def embedding(self, numbers: Tensor, rng: torch.Generator) -> Tensor:
        """Embeddings of scenes' pictures, with noise: float32 [B, 1, I]."""
        pictures = self.pictures[numbers]
        strength = torch.rand(len(numbers), generator=rng, device=self.device)
        pixels = noisy_pixels(pictures, self.noise(pictures.shape, rng), strength)
        return cast("ImageEncoder", self.networks["encoder"]).embed(pixels)


class TrainPrompts(TrainImage):
    """Pictures to semantic latents through Stage C: the velocity, by squared error."""

    stage = "prompts"

    def prepare(self, out: Path, quiet: bool) -> None:  # noqa: D102
        super().prepare(out, quiet)
        self.ids = data.caption_ids(len(self.semantic)).to(self.device)
        self.empty = torch.from_numpy(encode(build_tokenizer(), [""])[0][0]).to(self.device)
        prior = trained(out, "text-c", self.device)
        self.text = cast("TextEncoder", prior["text"])
        if not (out / f"{self.stage}.pt").is_file():
            self.networks["c"].load_state_dict(prior["c"].state_dict())
            for name, network in trained(out, "image", self.device).items():
                self.networks[name].load_state_dict(network.state_dict())
        self.networks["c"].requires_grad_(False)
        cast("Denoiser", self.networks["c"]).clip_img_mapper.weight.requires_grad_(True)

    def loss(self, step: int, rng: torch.Generator) -> Tensor:  # noqa: D102
        numbers = self.numbers(step, len(self.semantic)).to(self.device)
        which, said, high, t = torch.rand(4, len(numbers), generator=rng, device=self.device)
        t = torch.where(high < 0.7, 0.85 + 0.15 * t, t)
        ids = self.ids[numbers, (said * recipe.CAPTIONS).long()]
        ids = torch.where(which[:, None] < _NO_CAPTION, self.empty, ids)
        with torch.no_grad():
            hidden, pooled = self.text.conditions(ids, (ids != PAD_ID).long())
        embedding = self.embedding(numbers, rng)
        x0 = self.semantic[numbers].float()
        noisy, velocity = diffusion.noised(x0, self.noise(x0.shape, rng), t)
        error = semantic_loss(self.networks["c"](noisy, t, pooled, hidden, embedding), velocity)
        return error + _READER_WEIGHT * reading_loss(self.networks["reader"], embedding, x0)
