"""The one table of a cascade's components: how each is built, measured, called, sampled and found in checkpoints.

A row holds everything of a component that is not in the table of engines (`cascade_rt.stages.ENGINES`). A new
component is a row here, a row there, and its model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cascade_rt.errors import CheckpointError, shown
from cascade_rt.schema import validated
from cascade_rt.stages import CONTROLS, EngineSpec

from . import keys, samples
from .models import (
    Context,
    ControlNet,
    ControlNetConfig,
    Denoiser,
    DenoiserConfig,
    EffNetConfig,
    ImageEncoderConfig,
    Previewer,
    PreviewerConfig,
    SemanticEncoder,
    StageA,
    StageAConfig,
    TextEncoderConfig,
    build_image_encoder,
    build_text_encoder,
    encode_image,
    encode_text,
)

Config = Mapping[str, Any]
"""A component's ``config.json``, as diffusers or transformers write it."""

Feeds = Mapping[str, Tensor]
Call = Callable[[nn.Module, Feeds], tuple[Tensor, ...]]
Draw = Callable[[EngineSpec, Config, np.random.Generator], dict[str, NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One component of a cascade.

    Every function that takes a config raises `CheckpointError` where the config is not one of this component.

    Attributes:
        name: as `EngineSpec.model` and the manifest have it.
        build: config -> module, with weights as torch initialises them.
        dims: config -> the numbers that the formulas of its engines name.
        calls: name of an engine -> what it computes: (module, named inputs) -> outputs in the order of the table.
        samples: inputs for verification: (resolved engine, config, generator) -> named arrays on the host.
        is_config: whether the ``config.json`` of a folder that holds one model alone is of this component.
        folders: where diffusers' prior, decoder and combined pipelines save it; effnet and previewer: our own names.
        lite_folders: the same for ``--size small``, where it is saved beside the big one.
        root_files: names of the authors' files, without ``.safetensors``.
        lite_root_files: the same for ``--size small``.
        original: how the authors' and ComfyUI's single files hold it.
    """

    name: str
    build: Callable[[Config], nn.Module]
    dims: Callable[[Config], dict[str, int]]
    calls: Mapping[str, Call]
    samples: Draw
    is_config: Callable[[Config], bool]
    folders: tuple[str, ...]
    original: keys.OriginalKeys
    lite_folders: tuple[str, ...] = ()
    root_files: tuple[str, ...] = ()
    lite_root_files: tuple[str, ...] = ()


class _ClassNames(msgspec.Struct, frozen=True, kw_only=True):
    """How diffusers and transformers note the class of a model."""

    class_name: str | None = msgspec.field(name="_class_name", default=None)
    architectures: list[str] | None = None


def component_of(name: str) -> Component:
    """The row of a component.

    Raises:
        CheckpointError: there is none of that name.
    """
    try:
        return COMPONENTS[name]
    except KeyError:
        raise CheckpointError(f"there is no component {shown(name)}; known are {', '.join(COMPONENTS)}") from None


def build_model(name: str, config: Config) -> nn.Module:
    """The module of a component, in eval mode, with weights as torch initialises them.

    Raises:
        CheckpointError: the config does not describe such a module.
    """
    return component_of(name).build(config).eval()


def check_config(name: str, config: Config, where: str) -> None:
    """Refuse a config that does not describe a component.

    Args:
        name: of the component.
        config: its ``config.json``.
        where: the file, for the message.

    Raises:
        CheckpointError: it does not.
    """
    validated(dict(config), _ClassNames, where, CheckpointError)
    try:
        component_of(name).dims(config)
    except CheckpointError as error:
        message = f"{where}: {error}"
        raise CheckpointError(message, field=error.field, value=error.value, accepted=error.accepted) from None


def call_of(engine: EngineSpec) -> Call:
    """What an engine computes."""
    return COMPONENTS[engine.model].calls[engine.name]


# -- the denoisers


def _context(model: nn.Module, x: Feeds) -> tuple[Tensor, ...]:
    assert isinstance(model, Denoiser)
    context = model.context(**x)
    rest = (context.condition_map, context.control)
    return (context.modulation, *context.kv, *(tensor for tensor in rest if tensor is not None))


def _step(model: nn.Module, x: Feeds) -> tuple[Tensor, ...]:
    assert isinstance(model, Denoiser)
    kv = tuple(x[f"kv_{level}"] for level in model.config.attention_levels)
    context = Context(x["modulation"], kv, x.get("condition_map"), x.get("control"))
    return (model.step(x["latents"], x["step"], context),)


def _build_denoiser(config: Config) -> nn.Module:
    return Denoiser(DenoiserConfig.from_dict(config))


def _denoiser_dims(c: DenoiserConfig) -> dict[str, int]:
    dims = {
        "latent_channels": c.in_channels,
        "embedding_dim": c.timestep_ratio_embedding_dim,
        "pooled_dim": c.clip_text_pooled_in_channels,
        "modulation": c.modulation_size,
        "granularity": c.granularity,
        "patch_size": c.patch_size,
        "clip_seq": c.clip_seq,
    }
    for level, (blocks, width) in c.attention_levels.items():
        dims |= {f"kv_{level}.blocks": blocks, f"kv_{level}.width": width}
    return dims


def _stage_c_dims(config: Config) -> dict[str, int]:
    c = DenoiserConfig.from_dict(config)
    if c.clip_text_in_channels is None or c.clip_image_in_channels is None or c.effnet_in_channels is not None:
        raise CheckpointError("the config given for stage_c is that of a Stage B")
    own = {"text_dim": c.clip_text_in_channels, "image_dim": c.clip_image_in_channels}
    control = {"control_blocks": len(c.control_blocks), "stream_width": c.block_out_channels[0]}
    return _denoiser_dims(c) | own | (control if c.control_blocks else {})


def _stage_b_dims(config: Config) -> dict[str, int]:
    c = DenoiserConfig.from_dict(config)
    if c.effnet_in_channels is None or c.is_prior:
        raise CheckpointError("the config given for stage_b is that of a Stage C")
    return _denoiser_dims(c) | {"effnet_channels": c.effnet_in_channels, "map_width": c.block_out_channels[0]}


# -- the others


def _decode(model: nn.Module, x: Feeds) -> tuple[Tensor, ...]:
    assert isinstance(model, StageA)
    return (model.decode(x["latents"]),)


def _encode(model: nn.Module, x: Feeds) -> tuple[Tensor, ...]:
    assert isinstance(model, StageA)
    return (model.encode(x["pixels"]),)


def _stage_a_dims(config: Config) -> dict[str, int]:
    c = StageAConfig.from_dict(config)
    return {"latent_channels": c.latent_channels, "compression": c.compression}


def _effnet_dims(config: Config) -> dict[str, int]:
    c = EffNetConfig.from_dict(config)
    return {"latent_channels": c.latent_channels, "granularity": c.stride}


def _text_dims(config: Config) -> dict[str, int]:
    c = TextEncoderConfig.from_dict(config)
    return {"max_length": c.max_position_embeddings, "text_dim": c.hidden_size, "pooled_dim": c.projection_dim}


def _image_dims(config: Config) -> dict[str, int]:
    c = ImageEncoderConfig.from_dict(config)
    return {"image_size": c.image_size, "image_dim": c.projection_dim}


def _previewer_dims(config: Config) -> dict[str, int]:
    return {"latent_channels": PreviewerConfig.from_dict(config).in_channels}


def _controlnet_dims(config: Config) -> dict[str, int]:
    c = ControlNetConfig.from_dict(config)
    return {
        "control_channels": c.in_channels,
        "control_blocks": len(c.proj_blocks),
        "control_stride": c.pixels_per_residual,
        "stream_width": c.projection_channels,
    }


# -- configs of a folder that holds one model alone


def _is_unet(config: Config) -> bool:
    return config.get("_class_name") == "StableCascadeUNet"


def _class_is(name: str) -> Callable[[Config], bool]:
    return lambda config: config.get("_class_name") == name


def _architecture_is(name: str) -> Callable[[Config], bool]:
    return lambda config: config.get("architectures") == [name]


CONTROL = "control"
"""The feature of Stage C's engines that take a ControlNet's residuals."""
CONTROLNET_CLASS = "StableCascadeControlNet"


def _controlnet(kind: str) -> Component:
    def is_config(config: Config) -> bool:
        return config.get("_class_name") == CONTROLNET_CLASS and config.get("filter", "canny") == kind

    return Component(
        name=f"controlnet_{kind}",
        build=lambda config: ControlNet(ControlNetConfig.from_dict(config)),
        dims=_controlnet_dims,
        calls={f"controlnet.{kind}": lambda model, x: (model(x["control"]),)},
        samples=samples.draw_normal,
        is_config=is_config,
        folders=(f"controlnet_{kind}",),
        root_files=(f"controlnet/{kind}",),
        original=keys.CONTROLNET,
    )


COMPONENTS: dict[str, Component] = {
    row.name: row
    for row in (
        Component(
            name="text_encoder",
            build=lambda config: build_text_encoder(TextEncoderConfig.from_dict(config)),
            dims=_text_dims,
            calls={"text_encoder": lambda model, x: encode_text(model, x["input_ids"], x["attention_mask"])},
            samples=samples.draw_prompts,
            is_config=_architecture_is("CLIPTextModelWithProjection"),
            folders=("text_encoder", "prior_text_encoder"),
            original=keys.TEXT_ENCODER,
        ),
        Component(
            name="image_encoder",
            build=lambda config: build_image_encoder(ImageEncoderConfig.from_dict(config)),
            dims=_image_dims,
            calls={"image_encoder": lambda model, x: (encode_image(model, x["pixel_values"]),)},
            samples=samples.draw_normal,
            is_config=_architecture_is("CLIPVisionModelWithProjection"),
            folders=("image_encoder", "prior_image_encoder"),
            original=keys.IMAGE_ENCODER,
        ),
        Component(
            name="stage_c",
            build=_build_denoiser,
            dims=_stage_c_dims,
            calls={"stage_c.context": _context, "stage_c.step": _step},
            samples=samples.draw_conditions,
            is_config=lambda config: _is_unet(config) and not config.get("effnet_in_channels"),
            folders=("prior", "prior_prior"),
            lite_folders=("prior_lite",),
            root_files=("stage_c", "stage_c_bf16"),
            lite_root_files=("stage_c_lite", "stage_c_lite_bf16"),
            original=keys.STAGE_C,
        ),
        Component(
            name="stage_b",
            build=_build_denoiser,
            dims=_stage_b_dims,
            calls={"stage_b.context": _context, "stage_b.step": _step},
            samples=samples.draw_conditions,
            is_config=lambda config: _is_unet(config) and bool(config.get("effnet_in_channels")),
            folders=("decoder",),
            lite_folders=("decoder_lite",),
            root_files=("stage_b", "stage_b_bf16"),
            lite_root_files=("stage_b_lite", "stage_b_lite_bf16"),
            original=keys.STAGE_B,
        ),
        Component(
            name="stage_a",
            build=lambda config: StageA(StageAConfig.from_dict(config)),
            dims=_stage_a_dims,
            calls={"stage_a.decode": _decode, "stage_a.encode": _encode},
            samples=samples.draw_pictures,
            is_config=_class_is("PaellaVQModel"),
            folders=("vqgan",),
            root_files=("stage_a",),
            original=keys.STAGE_A,
        ),
        Component(
            name="effnet",
            build=lambda config: SemanticEncoder(EffNetConfig.from_dict(config)),
            dims=_effnet_dims,
            calls={"effnet_encoder": lambda model, x: (model(x["pixels"]),)},
            samples=samples.draw_pictures,
            is_config=_class_is("SemanticEncoder"),
            folders=("effnet",),
            root_files=("effnet_encoder",),
            original=keys.EFFNET,
        ),
        Component(
            name="previewer",
            build=lambda config: Previewer(PreviewerConfig.from_dict(config)),
            dims=_previewer_dims,
            calls={"previewer": lambda model, x: (model(x["latents"]),)},
            samples=samples.draw_normal,
            is_config=_class_is("Previewer"),
            folders=("previewer",),
            root_files=("previewer",),
            original=keys.PREVIEWER,
        ),
        *map(_controlnet, CONTROLS),
    )
}
