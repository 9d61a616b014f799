"""Our own torch definitions of Stable Cascade's networks, written for export; keys are diffusers'."""

from .clip import (
    ImageEncoderConfig,
    TextEncoderConfig,
    build_image_encoder,
    build_text_encoder,
    encode_image,
    encode_text,
)
from .controlnet import ControlNet, ControlNetConfig
from .denoiser import Context, Control, Denoiser, StreamScales, timestep_embedding
from .denoiser_config import DenoiserConfig
from .effnet import EffNetConfig, SemanticEncoder
from .previewer import Previewer, PreviewerConfig
from .stage_a import StageA, StageAConfig

__all__ = [
    "Context",
    "Control",
    "ControlNet",
    "ControlNetConfig",
    "Denoiser",
    "DenoiserConfig",
    "EffNetConfig",
    "ImageEncoderConfig",
    "Previewer",
    "PreviewerConfig",
    "SemanticEncoder",
    "StageA",
    "StageAConfig",
    "StreamScales",
    "TextEncoderConfig",
    "build_image_encoder",
    "build_text_encoder",
    "encode_image",
    "encode_text",
    "timestep_embedding",
]
