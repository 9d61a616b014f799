"""Our own torch definitions of Stable Cascade's networks, written for export; keys are diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from cascade_rt.errors import CheckpointError

from .clip import build_image_encoder, build_text_encoder
from .denoiser import Context, Denoiser, StreamScales, timestep_embedding
from .denoiser_config import DenoiserConfig
from .effnet import EffNetConfig, SemanticEncoder
from .previewer import Previewer
from .stage_a import StageA, StageAConfig

__all__ = [
    "MODELS",
    "Context",
    "Denoiser",
    "DenoiserConfig",
    "EffNetConfig",
    "Previewer",
    "SemanticEncoder",
    "StageA",
    "StageAConfig",
    "StreamScales",
    "build_model",
    "timestep_embedding",
]

MODELS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "text_encoder": build_text_encoder,
    "image_encoder": build_image_encoder,
    "stage_c": lambda config: Denoiser(DenoiserConfig.from_dict(config)),
    "stage_b": lambda config: Denoiser(DenoiserConfig.from_dict(config)),
    "stage_a": lambda config: StageA(StageAConfig.from_dict(config)),
    "effnet": lambda config: SemanticEncoder(EffNetConfig.from_dict(config)),
    "previewer": lambda config: Previewer(),
}
"""Component of a checkpoint -> builder from its config."""


def build_model(component: str, config: dict[str, Any]) -> nn.Module:
    """The module of a component, in eval mode, with weights as torch initialises them.

    Raises:
        CheckpointError: the config does not describe such a module.
    """
    try:
        return MODELS[component](config).eval()
    except (TypeError, ValueError, RuntimeError, KeyError, ZeroDivisionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the config of {component} does not describe one: {error}") from error
