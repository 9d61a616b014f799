"""Colours of tiny's latents: the matrices that show a running loop without a network, fitted by least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade_tiny import data

SCENES = 256


def fit(latents: Tensor, pictures: Tensor) -> dict[str, Any]:
    """The matrix and offset that come nearest to the pictures' colours.

    Args:
        latents: float32 [B, C, h, w].
        pictures: float32 [B, 3, H, W] in 0..1; they are shrunk to h x w.

    Returns:
        ``factors`` (red, green, blue of every channel) and ``offset``, as `cascade_rt.manifest.PreviewFactors`.
    """
    colours = F.interpolate(pictures, size=latents.shape[2:], mode="bilinear", antialias=True)
    wanted = colours.permute(0, 2, 3, 1).reshape(-1, 3).double()
    seen = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).double()
    one = torch.ones(len(seen), 1, dtype=torch.float64)
    found = np.round(torch.linalg.lstsq(torch.cat([seen, one], 1), wanted).solution.numpy(), 4).tolist()
    return {"factors": found[:-1], "offset": found[-1]}


@torch.inference_mode()
def previews(a: Any, encoder: Any, latent_scale: float = 1.0) -> dict[str, dict[str, Any]]:
    """The matrices of Stage C's (``prior``) and Stage B's (``decoder``) latents.

    Args:
        a: Stage A, with its weights.
        encoder: the semantic encoder, with its weights.
        latent_scale: Stage A decodes Stage B's latents times this.
    """
    drawn = data.to_unit(data.pictures([data.scene(number) for number in range(SCENES)]))
    parts = drawn.split(32)
    semantic = torch.cat([encoder(data.for_semantic(part)) for part in parts])
    pixels = torch.cat([a.encode(part) for part in parts]) / latent_scale
    return {"prior": fit(semantic, drawn), "decoder": fit(pixels, drawn)}
