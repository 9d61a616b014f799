"""The official sizes: architectures, where their weights are, and how they are sampled."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from cascade_rt.bundle import find_bundle
from cascade_rt.manifest import LoopDefaults, SamplerPreset
from cascade_rt.sampling import SamplerName
from cascade_rt.stages import Size

from .models import DenoiserConfig, EffNetConfig, PreviewerConfig, StageAConfig
from .models.denoiser_config import BLOCK_TYPES
from .networks import SchedulerConfig

PRIOR_REPO = "stabilityai/stable-cascade-prior"
DECODER_REPO = "stabilityai/stable-cascade"
OFFICIAL_LICENCE = "Stability AI non-commercial research community licence"
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
CONFIGS: dict[Size, dict[str, dict[str, Any]]] = {
    "big": {"stage_c": asdict(_PRIOR), "stage_b": asdict(_DECODER), **_SHARED},
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
        return CONFIGS[size][component]
    models = find_bundle(None).manifest.models
    return dict(models[component].config) if component in models else None


def default_sampling(
    latent_scale: float, prior: SchedulerConfig = PLAIN_SCHEDULER, decoder: SchedulerConfig = PLAIN_SCHEDULER
) -> dict[SamplerName, SamplerPreset]:
    """The authors' and diffusers' settings.

    Args:
        latent_scale: of the Stage A config. The authors decode with 0.43 where diffusers' config says 0.3764; a
            checkpoint with another value was trained with it, and both samplers use it.
        prior: Stage C's scheduler, which only the diffusers sampler follows.
        decoder: Stage B's.
    """
    authors = AUTHORS_LATENT_SCALE if latent_scale == DIFFUSERS_LATENT_SCALE else latent_scale
    return {
        "original": SamplerPreset(
            prior=LoopDefaults(num_inference_steps=20, guidance_scale=4.0, guidance_rescale=0.7, shift=2.0),
            decoder=LoopDefaults(num_inference_steps=10, guidance_scale=1.1, guidance_rescale=0.7),
            latent_scale=authors,
        ),
        "diffusers": SamplerPreset(
            prior=LoopDefaults(num_inference_steps=20, guidance_scale=4.0, scaler=prior.scaler, s=prior.s),
            decoder=LoopDefaults(num_inference_steps=10, guidance_scale=0.0, scaler=decoder.scaler, s=decoder.s),
            latent_scale=latent_scale,
        ),
    }
