"""Teaches Stage B's first layers where outlines run, before Stage B itself is trained.

The distance to the nearest outline is a function of the semantic latents at one position alone. A plain regression on
single points learns it in two minutes; in the midst of its noise Stage B did not, and drew every kind of shape as a
disc for its first 4,800 steps.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from cascade_tiny import data, recipe, scenes
from cascade_tiny.scenes import Array, Scene

_SOFT = 1.5  # latents: beyond this distance only the side of the outline counts
_POINTS = 2048


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


def teach(mapper: nn.Module, device: torch.device, quiet: bool) -> None:
    """Trains the mapper of Stage B's semantic condition, with a linear reader that is thrown away."""
    side, patch = recipe.LATENTS_B[1], recipe.STAGE_B.patch_size
    rng = torch.Generator().manual_seed(recipe.SEED)
    latents = data.meanings(recipe.SCENES_OUTLINE).float()
    stretched = F.interpolate(latents, size=(side // patch,) * 2, mode="bilinear", align_corners=True)
    inputs = stretched.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    drawn = np.stack([outlines(data.scene(i), side) for i in range(recipe.SCENES_OUTLINE)])
    targets = F.pixel_unshuffle(torch.from_numpy(drawn)[:, None], patch).permute(0, 2, 3, 1).reshape(-1, patch**2)
    near = ((targets.abs() < 0.98) | (targets < 0)).any(dim=1) | (torch.rand(len(targets), generator=rng) < 0.06)
    inputs, targets = inputs[near].to(device), targets[near].to(device)

    reader = nn.Linear(recipe.STAGE_B.block_out_channels[0], patch**2).to(device)
    optimizer = torch.optim.AdamW([*mapper.parameters(), *reader.parameters()], lr=0.0, weight_decay=0.0)
    for step in tqdm(range(recipe.OUTLINE_STEPS), desc="outlines", unit="step", disable=quiet):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 50) * (1 - step / recipe.OUTLINE_STEPS)
        chosen = torch.randint(len(inputs), (_POINTS,), generator=rng).to(device)
        loss = F.mse_loss(reader(mapper(inputs[chosen])), targets[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
