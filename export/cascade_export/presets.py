"""The official sizes: architectures, where their weights are, and how they are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from msgspec.structs import replace as replaced

from cascade_rt.bundle import find_bundle
from cascade_rt.manifest import (
    LoopDefaults,
    LoopOverrides,
    Preset,
    PresetName,
    PreviewFactors,
    PreviewName,
    Rgb,
    SamplerDefaults,
)
from cascade_rt.sampling import SamplerName
from cascade_rt.stages import Size

from .models import ControlNetConfig, DenoiserConfig, EffNetConfig, PreviewerConfig, StageAConfig
from .models.denoiser_config import BLOCK_TYPES
from .networks import SchedulerConfig

AUTHORS_LATENT_SCALE = 0.43
DIFFUSERS_LATENT_SCALE = 0.3764
PLAIN_SCHEDULER = SchedulerConfig()

_CONV_BLOCKS = BLOCK_TYPES[:2]
_PRIOR = DenoiserConfig(clip_text_in_channels=1280, clip_image_in_channels=768, switch_level=(False,))
_DECODER = DenoiserConfig(
    in_channels=4,
    out_channels=4,
    patch_size=2,
    conditioning_dim=1280,
    block_out_channels=(320, 640, 1280, 1280),
    num_attention_heads=(-1, -1, 20, 20),
    down_num_layers_per_block=(2, 6, 28, 6),
    up_num_layers_per_block=(6, 28, 6, 2),
    down_blocks_repeat_mappers=(1, 1, 1, 1),
    up_blocks_repeat_mappers=(3, 3, 2, 2),
    block_types_per_layer=(_CONV_BLOCKS, _CONV_BLOCKS, BLOCK_TYPES, BLOCK_TYPES),
    effnet_in_channels=16,
    pixel_mapper_in_channels=3,
    dropout=(0.0, 0.0, 0.1, 0.1),
    self_attn=(True, True, True, True),
    timestep_conditioning_type=("sca",),
)
CLIP_G: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
_CLIP_L_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
_SHARED: dict[str, dict[str, Any]] = {
    "text_encoder": CLIP_G,
    "image_encoder": _CLIP_L_VISION,
    "stage_a": asdict(StageAConfig()),
    "effnet": asdict(EffNetConfig()),
    "previewer": asdict(PreviewerConfig()),
}
_CONTROLNETS = (
    ControlNetConfig(),
    ControlNetConfig(filter="inpainting", in_channels=4),
    ControlNetConfig(filter="super_resolution", in_channels=16, bottleneck="large"),
)
"""The published ControlNets, which are for the big Stage C."""
CONFIGS: dict[Size, dict[str, dict[str, Any]]] = {
    "big": {
        "stage_c": asdict(_PRIOR),
        "stage_b": asdict(_DECODER),
        **_SHARED,
        **{f"controlnet_{row.filter}": asdict(row) for row in _CONTROLNETS},
    },
    "small": {
        "stage_c": asdict(
            replace(
                _PRIOR,
                conditioning_dim=1536,
                block_out_channels=(1536, 1536),
                num_attention_heads=(24, 24),
                down_num_layers_per_block=(4, 12),
                up_num_layers_per_block=(12, 4),
            )
        ),
        "stage_b": asdict(
            replace(
                _DECODER,
                block_out_channels=(320, 576, 1152, 1152),
                num_attention_heads=(-1, 9, 18, 18),
                down_num_layers_per_block=(2, 4, 14, 4),
                up_num_layers_per_block=(4, 14, 4, 2),
                up_blocks_repeat_mappers=(2, 2, 2, 2),
            )
        ),
        **_SHARED,
    },
}
"""Component configs of the official sizes (facts: the published ``config.json`` files)."""


def config_of(size: Size, component: str) -> dict[str, Any] | None:
    """The config of a component, None if the size has no such component.

    The tiny cascade's architecture is written in its shipped bundle and nowhere else.
    """
    if size != "tiny":
        return CONFIGS[size].get(component)
    models = find_bundle(None).manifest.models
    return dict(models[component].config) if component in models else None


def default_sampling(
    latent_scale: float, prior: SchedulerConfig = PLAIN_SCHEDULER, decoder: SchedulerConfig = PLAIN_SCHEDULER
) -> dict[SamplerName, SamplerDefaults]:
    """The authors' and diffusers' settings.

    Args:
        latent_scale: of the Stage A config. The authors decode with 0.43 where diffusers' config says 0.3764; a
            checkpoint with another value was trained with it, and both samplers use it.
        prior: Stage C's scheduler, which only the diffusers sampler follows.
        decoder: Stage B's.
    """
    authors = AUTHORS_LATENT_SCALE if latent_scale == DIFFUSERS_LATENT_SCALE else latent_scale
    return {
        "original": SamplerDefaults(
            prior=LoopDefaults(num_inference_steps=20, guidance_scale=4.0, guidance_rescale=0.7, shift=2.0),
            decoder=LoopDefaults(num_inference_steps=10, guidance_scale=1.1, guidance_rescale=0.7),
            latent_scale=authors,
        ),
        "lcm": SamplerDefaults(
            prior=LoopDefaults(num_inference_steps=4, guidance_scale=1.0, shift=2.0),
            decoder=LoopDefaults(num_inference_steps=10, guidance_scale=1.1, guidance_rescale=0.7),
            latent_scale=authors,
        ),
        "diffusers": SamplerDefaults(
            prior=LoopDefaults(num_inference_steps=20, guidance_scale=4.0, scaler=prior.scaler, s=prior.s),
            decoder=LoopDefaults(num_inference_steps=10, guidance_scale=0.0, scaler=decoder.scaler, s=decoder.s),
            latent_scale=latent_scale,
        ),
    }


def default_presets() -> dict[PresetName, Preset]:
    """Trades of quality against time for the published cascades.

    ``balanced`` keeps the steps, guides Stage C in the middle half of them, where guidance counts, and does not guide
    Stage B, whose scale of 1.1 doubles its cost; ``fast`` takes half of the steps too.
    """
    prior = LoopOverrides(guidance_start=0.25, guidance_end=0.75)
    decoder = LoopOverrides(guidance_scale=1.0)
    return {
        "balanced": Preset(prior=prior, decoder=decoder),
        "fast": Preset(prior=replaced(prior, num_inference_steps=10), decoder=replaced(decoder, num_inference_steps=5)),
    }


def _halved(rows: Sequence[Rgb]) -> PreviewFactors:
    """Factors that give colours in -1..1, as factors that give them in 0..1."""
    return PreviewFactors(factors=tuple((r / 2, g / 2, b / 2) for r, g, b in rows), offset=(0.5, 0.5, 0.5))


PUBLISHED_PREVIEWS: dict[PreviewName, PreviewFactors] = {
    "prior": _halved(
        [
            (-0.0326, -0.0204, -0.0127),
            (-0.1592, -0.0427, 0.0216),
            (0.0873, 0.0638, -0.0020),
            (-0.0602, 0.0442, 0.1304),
            (0.0800, -0.0313, -0.1796),
            (-0.0810, -0.0638, -0.1581),
            (0.1791, 0.1180, 0.0967),
            (0.0740, 0.1416, 0.0432),
            (-0.1745, -0.1888, -0.1373),
            (0.2412, 0.1577, 0.0928),
            (0.1908, 0.0998, 0.0682),
            (0.0209, 0.0365, -0.0092),
            (0.0448, -0.0650, -0.1728),
            (-0.1658, -0.1045, -0.1308),
            (0.0542, 0.1545, 0.1325),
            (-0.0352, -0.1672, -0.2541),
        ]
    ),
    "decoder": _halved(
        [
            (0.1121, 0.2006, 0.1023),
            (-0.2093, -0.0222, -0.0195),
            (-0.3087, -0.1535, 0.0366),
            (0.0290, -0.1574, -0.4078),
        ]
    ),
}
"""Colours of the published cascade's latents (figures: ComfyUI's ``latent_formats.py``, ``SC_Prior`` and ``SC_B``)."""
