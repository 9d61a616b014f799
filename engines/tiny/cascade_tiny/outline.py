"""Teaches the mapper of Stage B's semantic condition what lies where, before Stage B itself is trained.

The distance to the nearest outline is a function of the semantic latents at one position alone. A plain regression on
single points learns it in minutes; in the midst of its noise Stage B did not: it drew every kind of shape as a disc for
its first 4,800 steps. Trained on with the rest, the mapper forgot stars and crosses again (the outlines' squared error
went from 0.04 to 0.27), so Stage B's training leaves it as it is taught here.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cascade_tiny import data, recipe, scenes
from cascade_tiny.meaning import AT, COLOUR, SHAPE_COLOUR
from cascade_tiny.scenes import Array, Scene

_SOFT = 1.5  # latents: beyond this distance only the side of the outline counts
_COLOUR_WEIGHT = 0.1  # colours pass through unchanged; outlines have to be worked out
_HARD_KINDS = ("star", "cross")  # the most corners for their size
_HARD_WEIGHT = 3.0


def outlines(scene: Scene, side: int) -> Array:
    """Soft signed distance to the nearest outline at Stage A's latents: [side, side], -1..1, negative inside."""
    at: Array = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)
    nearest = np.full((side, side), np.inf, np.float32)
    for shape in scene.shapes:
        dx, dy = (at[None, :] - shape.x) / shape.radius, (at[:, None] - shape.y) / shape.radius
        cos, sin = np.cos(shape.angle), np.sin(shape.angle)
        own_x, own_y = (cos * dx + sin * dy).astype(np.float32), (cos * dy - sin * dx).astype(np.float32)
        away = scenes.distance(shape.kind, own_x, own_y) * np.float32(shape.radius * side)
        nearest = np.minimum(nearest, away)
    soft: Array = np.tanh(nearest / np.float32(_SOFT))
    return soft


def points() -> tuple[Tensor, Tensor]:
    """Positions of Stage B's grid, chosen where outlines are.

    Returns:
        inputs float32 [N, 16], the semantic latents stretched as Stage B stretches them, and targets float32 [N, 10]:
        the soft distances at the position's 2 x 2 latents, and the two colours there.
    """
    side, patch = recipe.LATENTS_B[1], recipe.STAGE_B.patch_size
    rng = torch.Generator().manual_seed(recipe.SEED)
    count = recipe.SCENES_OUTLINE
    latents = data.meanings(count).float()
    stretched = F.interpolate(latents, size=(side // patch,) * 2, mode="bilinear", align_corners=True)
    inputs = stretched.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    shown = [data.scene(i) for i in range(count)]
    drawn = torch.from_numpy(np.stack([outlines(s, side) for s in shown]))
    distances = F.pixel_unshuffle(drawn[:, None], patch).permute(0, 2, 3, 1).reshape(-1, patch**2)
    hard = torch.tensor([any(s.kind in _HARD_KINDS for s in scene.shapes) for scene in shown])
    close = ((distances.abs() < 0.98) | (distances < 0)).any(dim=1)
    positions = (side // patch) ** 2
    weight = torch.where(close, 1.0, 0.06) * torch.where(hard, _HARD_WEIGHT, 1.0).repeat_interleave(positions)
    # by inverting the cumulated weights: torch.multinomial stops at 2^24 points
    cumulated = weight.double().cumsum(0)
    drawn_at = torch.rand(2 * int(close.sum()), generator=rng, dtype=torch.float64) * cumulated[-1]
    chosen = torch.searchsorted(cumulated, drawn_at).clamp(max=len(weight) - 1)
    inputs = inputs[chosen]
    return inputs, torch.cat([distances[chosen], inputs[:, COLOUR], inputs[:, SHAPE_COLOUR]], dim=1)


def teach(mapper: nn.Module, device: torch.device, quiet: bool) -> None:
    """Trains the mapper, with a linear reader that is thrown away, and freezes it."""
    rng = torch.Generator().manual_seed(recipe.SEED)
    inputs, targets = (x.to(device) for x in points())
    # what Stage C makes is not exact; an outline follows its coordinates faithfully all the same
    spread = torch.full((inputs.shape[1],), recipe.OUTLINE_NOISE, device=device)
    spread[AT] = 0.0
    near = recipe.STAGE_B.patch_size**2
    reader = nn.Linear(recipe.STAGE_B.block_out_channels[0], targets.shape[1]).to(device)
    optimizer = torch.optim.Adam([*mapper.parameters(), *reader.parameters()], lr=0.0, betas=(0.9, 0.99))
    bar = tqdm(range(recipe.OUTLINE_STEPS), desc="outlines", unit="step", disable=quiet, mininterval=2)
    for step in bar:
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 50) * (1 - step / recipe.OUTLINE_STEPS)
        chosen = torch.randint(len(inputs), (recipe.OUTLINE_BATCH,), generator=rng).to(device)
        noise = torch.randn(len(chosen), inputs.shape[1], generator=rng).to(device)
        error = (reader(mapper(inputs[chosen] + spread * noise)) - targets[chosen]) ** 2
        loss = error[:, :near].mean() + _COLOUR_WEIGHT * error[:, near:].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 500 == 0:
            bar.set_postfix(outlines=f"{float(error[:, :near].mean().detach()):.4f}", refresh=False)
    mapper.requires_grad_(False)
