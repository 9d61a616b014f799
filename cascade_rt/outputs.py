"""What the pipelines return."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]


@dataclass(kw_only=True)
class PriorOutput:
    """What Stage C made. Matches: diffusers' ``StableCascadePriorPipelineOutput``.

    Attributes:
        image_embeddings: ``[B, 16, h, w]`` float32.
        prompt_embeds: ``[B, L, E]`` float32.
        prompt_embeds_pooled: ``[B, 1, P]`` float32.
        negative_prompt_embeds: like ``prompt_embeds``, or None without guidance.
        negative_prompt_embeds_pooled: like ``prompt_embeds_pooled``, or None without guidance.
        seeds: one for all pictures, or one for every picture.
        timings: seconds of each part; ``load`` is what loading engines took, and is in no other part.
    """

    image_embeddings: Array
    prompt_embeds: Array
    prompt_embeds_pooled: Array
    negative_prompt_embeds: Array | None
    negative_prompt_embeds_pooled: Array | None
    seeds: tuple[int, ...]
    timings: dict[str, float] = field(default_factory=dict)


@dataclass
class CascadeOutput:
    """Pictures.

    Attributes:
        images: list of PIL images; ``[B, H, W, 3]`` float32 in 0..1 for ``output_type="np"``; Stage B's latents
            ``[B, 4, H/4, W/4]`` float32 for ``"latent"``.
        seeds: one for all pictures, or one for every picture: the same request with them makes the same pictures.
        timings: seconds of each part; ``load`` is what loading engines took, and is in no other part.
    """

    images: list[Image.Image] | Array
    seeds: tuple[int, ...]
    timings: dict[str, float] = field(default_factory=dict)
