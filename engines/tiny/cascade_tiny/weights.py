"""What a training's folder holds: the networks of every stage, and which weights they were trained from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cascade_tiny import recipe

STAGES = ("a", "text-c", "b", "semantic", "joint", "image", "prompts", "canny")

_STARTS_FROM = {"joint": ("b", "semantic"), "prompts": ("text-c", "image"), "canny": ("text-c",)}


class TrainingError(Exception):
    """A request that cannot be done; the message says what to do instead."""


def build(stage: str) -> nn.ModuleDict:
    """The networks that a stage trains, with their first weights."""
    if stage == "a":
        return nn.ModuleDict({"a": recipe.build_stage_a()})
    if stage == "semantic":
        return nn.ModuleDict({"encoder": recipe.build_semantic_encoder()})
    if stage == "text-c":
        return nn.ModuleDict({"text": recipe.build_text_encoder(), "c": recipe.build_denoiser(recipe.STAGE_C)})
    if stage in ("image", "prompts"):
        networks = nn.ModuleDict({"encoder": recipe.build_image_encoder(), "reader": recipe.build_image_reader()})
        if stage == "prompts":
            networks["c"] = recipe.build_denoiser(recipe.STAGE_C)
        return networks
    if stage == "canny":
        return nn.ModuleDict({"control": recipe.build_control(), "reader": recipe.build_control_reader()})
    stage_b = recipe.build_denoiser(recipe.STAGE_B)
    return nn.ModuleDict({"b": stage_b} | ({"encoder": recipe.build_semantic_encoder()} if stage == "joint" else {}))


def trained(out: Path, stage: str, device: torch.device) -> nn.ModuleDict:
    """The averaged networks of a stage, frozen.

    Args:
        out: the training's folder.
        stage: one of `STAGES`.
        device: where they shall lie.

    Raises:
        TrainingError: the stage was not trained in this folder, or from other weights than lie there now.
    """
    path = out / f"{stage}.pt"
    if not path.is_file():
        raise TrainingError(
            f"{path} is not there; train it first: python -m cascade_tiny.train --out {out} --stage {stage}"
        )
    networks = build(stage)
    state = torch.load(path, map_location="cpu", weights_only=True)
    check_origin(state, out, stage)
    networks.load_state_dict(state["average"])
    return networks.to(device).eval().requires_grad_(False)


def origin(out: Path, stage: str) -> str:
    """A digest of the weights from which a stage's training starts; empty where it starts from none."""
    before = _STARTS_FROM.get(stage, ())
    return "".join(fingerprint(trained(out, name, torch.device("cpu"))) for name in before)


def check_origin(state: Mapping[str, object], out: Path, stage: str) -> None:
    """Refuse a stage's state that was trained from other weights than lie in the folder now.

    Raises:
        TrainingError: with the commands that train it again.
    """
    if state.get("origin", "") != origin(out, stage):
        path = out / f"{stage}.pt"
        raise TrainingError(
            f"{path} was trained from other weights than {' and '.join(f'{name}.pt' for name in _STARTS_FROM[stage])} "
            "hold now; train it again: "
            f"rm {path} && python -m cascade_tiny.train --out {out} --stage {stage}"
        )


def fingerprint(networks: nn.Module) -> str:
    """A digest of all weights: two networks with the same digest make the same files."""
    digest = hashlib.sha256()
    for value in networks.state_dict().values():
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
