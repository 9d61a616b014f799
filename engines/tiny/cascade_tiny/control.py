"""Teaches cascade-tiny a canny ControlNet: residuals that make a frozen Stage C follow the edges of a picture.

Edges show shapes, places and sizes, but no colours: these have to come from the caption.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cascade_export.models import Control, ControlNet
from cascade_tiny import data, diffusion, recipe, scenes
from cascade_tiny.edges import CANNY_SIDE, control_edges
from cascade_tiny.recipe import TextEncoder
from cascade_tiny.task import Task, semantic_loss
from cascade_tiny.text import PAD_ID, build_tokenizer, encode
from cascade_tiny.weights import trained

_NO_CAPTION = 0.25  # share of empty captions: the edges alone must say where and what


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


class TrainCanny(Task):
    """Edges to semantic latents: Stage C's velocity, by squared error, and what a reader sees in the features.

    What Stage C's error says to the backbone comes through a frozen network and much noise. The reader's says it
    directly: which shape is where. The reader is thrown away afterwards.
    """

    stage = "canny"

    def prepare(self, out: Path, quiet: bool) -> None:  # noqa: D102
        self.edges = kept_edges(out / "edges.npy", recipe.SCENES_C, quiet)
        self.semantic = data.meanings(len(self.edges)).to(self.device)
        self.ids = data.caption_ids(len(self.edges)).to(self.device)
        self.empty = torch.from_numpy(encode(build_tokenizer(), [""])[0][0]).to(self.device)
        # image prompts change nothing of Stage C that is seen without a picture, so either Stage C will do
        prior = trained(out, "text-c", self.device)
        self.text, self.stage_c = cast("TextEncoder", prior["text"]), prior["c"]

    def loss(self, step: int, rng: torch.Generator) -> Tensor:  # noqa: D102
        numbers = self.numbers(step, len(self.edges))
        edges = edge_pictures(self.edges[numbers.numpy()]).to(self.device)
        numbers = numbers.to(self.device)
        which, said, high, t = torch.rand(4, len(numbers), generator=rng, device=self.device)
        t = torch.where(high < 0.7, 0.85 + 0.15 * t, t)
        ids = self.ids[numbers, (said * recipe.CAPTIONS).long()]
        ids = torch.where(which[:, None] < _NO_CAPTION, self.empty, ids)
        with torch.no_grad():
            hidden, pooled = self.text.conditions(ids, (ids != PAD_ID).long())
        network = cast("ControlNet", self.networks["control"])
        features = network.backbone(edges)
        control = Control(network.project(features), network.config.proj_blocks)
        x0 = self.semantic[numbers].float()
        noisy, velocity = diffusion.noised(x0, self.noise(x0.shape, rng), t)
        image = x0.new_zeros(len(x0), 1, recipe.STAGE_C.clip_image_in_channels or 0)
        error = semantic_loss(self.stage_c(noisy, t, pooled, hidden, image, control=control), velocity)
        read = self.networks["reader"](features).float()
        read = F.interpolate(read, size=x0.shape[2:], mode="bilinear", align_corners=True)
        return error + F.mse_loss(read, x0[:, recipe.EDGES_SAY])
