"""What each engine computes, and the numbers of a checkpoint that its tensors are sized by.

`CALLS` maps a name of `cascade_rt.stages.ENGINES` to a function of the model and the named input tensors; names and
axes come from that table and are written nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from cascade_rt.errors import CheckpointError

from .models import Context, Denoiser, DenoiserConfig, EffNetConfig, StageA, StageAConfig
from .models.clip import encode_image, encode_text

Feeds = Mapping[str, Tensor]


def _context(model: nn.Module, x: Feeds) -> tuple[Tensor, ...]:
    assert isinstance(model, Denoiser)
    context = model.context(**x)
    maps = () if context.condition_map is None else (context.condition_map,)
    return (context.modulation, *context.kv, *maps)


def _step(model: nn.Module, x: Feeds) -> tuple[Tensor, ...]:
    assert isinstance(model, Denoiser)
    kv = tuple(x[f"kv_{level}"] for level in model.config.attention_levels)
    return (model.step(x["latents"], x["step"], Context(x["modulation"], kv, x.get("condition_map"))),)


def _decode(model: nn.Module, x: Feeds) -> tuple[Tensor, ...]:
    assert isinstance(model, StageA)
    return (model.decode(x["latents"]),)


def _encode(model: nn.Module, x: Feeds) -> tuple[Tensor, ...]:
    assert isinstance(model, StageA)
    return (model.encode(x["pixels"]),)


CALLS: dict[str, Callable[[nn.Module, Feeds], tuple[Tensor, ...]]] = {
    "text_encoder": lambda model, x: encode_text(model, x["input_ids"], x["attention_mask"]),
    "image_encoder": lambda model, x: (encode_image(model, x["pixel_values"]),),
    "stage_c.context": _context,
    "stage_c.step": _step,
    "stage_b.context": _context,
    "stage_b.step": _step,
    "stage_a.decode": _decode,
    "stage_a.encode": _encode,
    "effnet_encoder": lambda model, x: (model(x["pixels"]),),
    "previewer": lambda model, x: (model(x["latents"]),),
}


def dims_of(engine: str, config: dict[str, Any]) -> dict[str, int]:
    """Sizes of an engine's fixed axes for a model config; see `EngineSpec.resolve`.

    Raises:
        CheckpointError: the config is that of another kind of model.
    """
    stage = engine.partition(".")[0]
    if stage in ("stage_c", "stage_b"):
        return _denoiser_dims(stage, DenoiserConfig.from_dict(config))
    if stage == "stage_a":
        c = StageAConfig.from_dict(config)
        return {"latent_channels": c.latent_channels} | ({"granularity": c.compression} if "encode" in engine else {})
    if stage == "text_encoder":
        return {
            "max_length": config["max_position_embeddings"],
            "text_dim": config["hidden_size"],
            "pooled_dim": config["projection_dim"],
        }
    if stage == "image_encoder":
        return {"image_size": config["image_size"], "image_dim": config["projection_dim"]}
    if stage == "effnet_encoder":
        return {"latent_channels": EffNetConfig.from_dict(config).latent_channels, "granularity": 32}
    return {"latent_channels": 16}


def _denoiser_dims(stage: str, c: DenoiserConfig) -> dict[str, int]:
    if c.is_prior != (stage == "stage_c") or (c.effnet_in_channels is None) != (stage == "stage_c"):
        kind = "Stage C" if c.is_prior else "Stage B"
        raise CheckpointError(f"the config given for {stage} is that of a {kind}")
    if c.in_channels != c.out_channels:
        raise CheckpointError(f"the config of {stage} has {c.in_channels} channels in and {c.out_channels} out")
    dims = {
        "latent_channels": c.in_channels,
        "embedding_dim": c.timestep_ratio_embedding_dim,
        "pooled_dim": c.clip_text_pooled_in_channels,
        "modulation": c.modulation_size,
        "granularity": c.granularity,
        "grid": c.granularity // c.patch_size,
    }
    for level, (blocks, width) in c.attention_levels.items():
        dims |= {f"kv_{level}.blocks": blocks, f"kv_{level}.width": width}
    if c.clip_text_in_channels is not None and c.clip_image_in_channels is not None:
        return dims | {"text_dim": c.clip_text_in_channels, "image_dim": c.clip_image_in_channels}
    assert c.effnet_in_channels is not None  # checked above
    return dims | {
        "effnet_channels": c.effnet_in_channels,
        "map_width": c.block_out_channels[0],
        "condition_tokens": c.clip_seq,
    }
