"""How original single files and ComfyUI's all-in-one files hold a component: which keys, and the config they imply.

The complete list of differences between original and diffusers keys (matches: diffusers'
``convert_stable_cascade_unet_single_file_to_diffusers``, ``StableCascade/modules``):

1. ``attention.attn.in_proj_{weight,bias}`` is to_q, to_k and to_v, one after the other.
2. ``attention.attn.out_proj`` is ``attention.to_out.0``; ComfyUI, once loaded, writes ``attention.out_proj``.
3. Stage B: ``clip_mapper`` is ``clip_txt_pooled_mapper``.
4. Stage A: ``vquantizer.codebook`` is ``vquantizer.embedding``.

Such files hold no config. What keys and shapes do not tell is refused, not guessed: see `_heads_of`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cascade_rt.errors import CheckpointError

from .models import ControlNetConfig, EffNetConfig, StageAConfig
from .models.controlnet import PUBLISHED_BLOCKS
from .models.denoiser_config import ATTN, BLOCK_TYPES
from .weights import Origin, Shape

Shapes = Mapping[str, Shape]


@dataclass(frozen=True, kw_only=True)
class OriginalKeys:
    """How single files hold a component.

    Attributes:
        prefixes: of its keys in ComfyUI's files, where they belong to no other component.
        marks: keys, without a prefix; a file that has one of them holds the component.
        rename: keys without prefix, each with its key in the file -> our keys and where each tensor comes from.
        config: (shapes under our keys, name of the file for messages) -> ``config.json``.
    """

    prefixes: tuple[str, ...] = ()
    marks: tuple[str, ...]
    rename: Callable[[Mapping[str, str]], dict[str, Origin]]
    config: Callable[[Shapes, str], dict[str, Any]]

    def is_in(self, keys: Collection[str]) -> bool:
        """Whether keys without a prefix are those of this component."""
        return any(mark in keys for mark in self.marks)


@dataclass(frozen=True)
class _Tensors:
    """Shapes of one component of a file, asked for by name."""

    component: str
    shapes: Shapes
    file: str

    def shape(self, name: str, axes: int) -> Shape:
        """The shape of a tensor.

        Raises:
            CheckpointError: there is none of this name with so many axes, all longer than 0.
        """
        found = self.shapes.get(name)
        if found is None:
            raise self.error(f"{name} is missing; the file is cut, or of another model")
        if len(found) != axes or 0 in found:
            raise self.error(f"{name} has the shape {found}; {axes} axes are needed")
        return found

    def numbers(self, pattern: str) -> set[int]:
        """What the group of ``pattern`` matches at the beginning of names."""
        return {int(match[1]) for name in self.shapes if (match := re.match(pattern, name))}

    def count(self, pattern: str) -> int:
        """How many numbers the group matches; they begin at 0.

        Raises:
            CheckpointError: one is missing.
        """
        found = self.numbers(pattern)
        if found != set(range(len(found))):
            raise self.error(f"the tensors {pattern} are numbered {sorted(found)[:5]} ...; the file is cut")
        return len(found)

    def error(self, what: str) -> CheckpointError:
        """The error of this component."""
        return CheckpointError(f"{self.file}: {self.component}: {what}")

    def heads_of(self, width: int, published: Mapping[int, int]) -> int:
        """Attention heads, which a single file does not record: those of the published network of this width.

        Raises:
            CheckpointError: none has this width. Another number of heads would be wrong without any other sign.
        """
        if width not in published:
            known = ", ".join(map(str, sorted(published)))
            raise self.error(
                f"attention is {width} channels wide, and a single file does not record its number of heads; known "
                f"are the published widths {known}. {USE_A_FOLDER}"
            )
        return published[width]


USE_A_FOLDER = "Use --checkpoint with a diffusers folder, whose config.json says it"

STAGE_C_HEADS = {2048: 32, 1536: 24}
STAGE_B_HEADS = {1280: 20, 1152: 18}
TEXT_HEADS = {1280: 20}
IMAGE_HEADS = {1024: 16}
"""Heads by width in the published networks; in each of them a head is 64 channels wide."""

UNSWITCHED = {((2048, 2048), (8, 24), (24, 8)), ((1536, 1536), (4, 12), (12, 4))}
"""Widths and layers (down, up) of the published Stage C's. A single file does not record whether their two levels have
the same size (``switch_level`` is false); in these they do."""


# -- the denoisers


def _unet_origins(keys: Mapping[str, str]) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    for name, key in keys.items():
        if match := re.fullmatch(r"(.*attention)\.attn\.in_proj_(weight|bias)", name):
            for index, target in enumerate(("to_q", "to_k", "to_v")):
                origins[f"{match[1]}.{target}.{match[2]}"] = Origin(key, part=(index, 3))
            continue
        ours = re.sub(r"attention\.(attn\.)?out_proj\.", "attention.to_out.0.", name)
        origins[re.sub(r"^clip_mapper\.", "clip_txt_pooled_mapper.", ours)] = Origin(key)
    return origins


def _stage_c_config(shapes: Shapes, file: str) -> dict[str, Any]:
    tensors = _Tensors("stage_c", shapes, file)
    return _unet_config(tensors, 16, STAGE_C_HEADS) | {
        "clip_text_in_channels": tensors.shape("clip_txt_mapper.weight", 2)[1],
        "clip_image_in_channels": tensors.shape("clip_img_mapper.weight", 2)[1],
        "effnet_in_channels": None,
        "pixel_mapper_in_channels": None,
    }


def _stage_b_config(shapes: Shapes, file: str) -> dict[str, Any]:
    tensors = _Tensors("stage_b", shapes, file)
    return _unet_config(tensors, 4, STAGE_B_HEADS) | {
        "clip_text_in_channels": None,
        "clip_image_in_channels": None,
        "effnet_in_channels": tensors.shape("effnet_mapper.0.weight", 4)[1],
        "pixel_mapper_in_channels": tensors.shape("pixels_mapper.0.weight", 4)[1],
    }


def _unet_config(tensors: _Tensors, in_channels: int, published_heads: Mapping[int, int]) -> dict[str, Any]:
    """What Stage C and Stage B have in common."""
    levels = tensors.count(r"down_blocks\.(\d+)\.")
    widths, heads, types, down, up = [], [], [], [], []
    for level in range(levels):
        stacks = (f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}")
        kinds_down, kinds_up = (_kinds(tensors, stack) for stack in stacks)
        pattern = _period(kinds_down)
        if not pattern or len(kinds_up) % len(pattern):
            raise tensors.error(f"level {level} has {len(kinds_down)} blocks down and {len(kinds_up)} up; it is cut")
        width = tensors.shape(f"{stacks[0]}.0.depthwise.weight", 4)[0]
        widths.append(width)
        heads.append(tensors.heads_of(width, published_heads) if ATTN in pattern else -1)
        types.append(pattern)
        down.append(len(kinds_down) // len(pattern))
        up.append(len(kinds_up) // len(pattern))
    pooled = tensors.shape("clip_txt_pooled_mapper.weight", 2)
    condition = [s[1] for n, s in tensors.shapes.items() if n.endswith("kv_mapper.1.weight") and len(s) == 2]
    if not condition or pooled[0] % condition[0]:
        raise tensors.error("no level attends to the prompt; its conditioning_dim cannot be known. " + USE_A_FOLDER)
    embedding = tensors.shape("embedding.1.weight", 4)
    patch_size = math.isqrt(embedding[1] // in_channels)
    if patch_size**2 * in_channels != embedding[1]:
        raise tensors.error(f"embedding.1.weight takes {embedding[1]} channels; no patches of {in_channels} give that")
    return {
        "in_channels": in_channels,
        "out_channels": in_channels,
        "timestep_ratio_embedding_dim": _timestep_width(tensors),
        "patch_size": patch_size,
        "conditioning_dim": condition[0],
        "block_out_channels": widths,
        "num_attention_heads": heads,
        "down_num_layers_per_block": down,
        "up_num_layers_per_block": up[::-1],
        "down_blocks_repeat_mappers": [
            1 + len(tensors.numbers(rf"down_repeat_mappers\.{i}\.(\d+)\.")) for i in range(levels)
        ],
        "up_blocks_repeat_mappers": [
            1 + len(tensors.numbers(rf"up_repeat_mappers\.{i}\.(\d+)\.")) for i in range(levels)
        ],
        "block_types_per_layer": types,
        "clip_text_pooled_in_channels": pooled[1],
        "clip_seq": pooled[0] // condition[0],
        "kernel_size": tensors.shape("down_blocks.0.0.depthwise.weight", 4)[-1],
        "dropout": 0.0,
        "self_attn": True,
        "timestep_conditioning_type": [
            name for name in ("sca", "crp") if any(f".mapper_{name}.weight" in key for key in tensors.shapes)
        ],
        "switch_level": _switch_level(tensors, (tuple(widths), tuple(down), tuple(up[::-1]))),
    }


def _timestep_width(tensors: _Tensors) -> int:
    found = next((s[1] for n, s in tensors.shapes.items() if n.endswith(".mapper.weight") and len(s) == 2), None)
    if found is None:
        raise tensors.error("it has no timestep block; the file is cut, or of another model")
    return found


def _switch_level(tensors: _Tensors, architecture: tuple[tuple[int, ...], ...]) -> list[bool] | None:
    """Whether levels halve the latents: None where strided convolutions do.

    Raises:
        CheckpointError: an interpolation may or may not do it, and the network is no published one.
    """
    levels = len(architecture[0])
    if not any(f"down_downscalers.{level}.1.blocks.0.weight" in tensors.shapes for level in range(1, levels)):
        return None
    if architecture not in UNSWITCHED:
        raise tensors.error(
            "a single file does not record whether its levels halve the latents (switch_level), and its widths and "
            f"layers {architecture} are not those of a published network. {USE_A_FOLDER}"
        )
    return [False] * (levels - 1)


def _kinds(tensors: _Tensors, stack: str) -> list[str]:
    """Block types of one level, in order."""
    marks = dict(zip(("depthwise.weight", "mapper.weight", "attention.to_q.weight"), BLOCK_TYPES, strict=True))
    kinds = []
    for index in range(tensors.count(rf"{re.escape(stack)}\.(\d+)\.")):
        kinds += [kind for mark, kind in marks.items() if f"{stack}.{index}.{mark}" in tensors.shapes]
    return kinds


def _period(kinds: list[str]) -> list[str]:
    """The block types of one layer: the shortest pattern that ``kinds`` repeats; empty where there are none."""
    for size in range(1, len(kinds) + 1):
        if len(kinds) % size == 0 and kinds == kinds[:size] * (len(kinds) // size):
            return kinds[:size]
    return []


# -- the others


def _stage_a_origins(keys: Mapping[str, str]) -> dict[str, Origin]:
    return {name.replace("vquantizer.codebook", "vquantizer.embedding"): Origin(key) for name, key in keys.items()}


def _clip_origins(keys: Mapping[str, str]) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    for name, key in keys.items():
        ours = re.sub(r"^(clip_g\.)?(transformer\.)?", "", name)
        if ours == "text_projection":  # a bare parameter there, applied from the right
            origins["text_projection.weight"] = Origin(key, transpose=True)
        else:
            origins[ours] = Origin(key)
    return origins


def _same_origins(keys: Mapping[str, str]) -> dict[str, Origin]:
    return {name: Origin(key) for name, key in keys.items()}


def _stage_a_config(shapes: Shapes, file: str) -> dict[str, Any]:
    tensors = _Tensors("stage_a", shapes, file)
    codebook = tensors.shape("vquantizer.embedding.weight", 2)
    blocks = 0
    while f"up_blocks.{blocks + 1}.gammas" in shapes:
        blocks += 1
    strided = sum(1 for n, s in shapes.items() if re.fullmatch(r"up_blocks\.\d+\.weight", n) and s[-1:] == (4,))
    return {
        "levels": strided + 1,
        "bottleneck_blocks": blocks,
        "embed_dim": _stage_a_width(tensors),
        "latent_channels": codebook[1],
        "num_vq_embeddings": codebook[0],
        "scale_factor": StageAConfig().scale_factor,
    }


def _stage_a_width(tensors: _Tensors) -> int:
    name = "up_blocks.0.0.weight"
    return tensors.shape(name, len(tensors.shapes.get(name, (0, 0))))[0]


def _text_config(shapes: Shapes, file: str) -> dict[str, Any]:
    tensors = _Tensors("text_encoder", shapes, file)
    words, width = tensors.shape("text_model.embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": tensors.shape("text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "projection_dim": tensors.shape("text_projection.weight", 2)[0],
        "num_hidden_layers": tensors.count(r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": tensors.heads_of(width, TEXT_HEADS),
        "max_position_embeddings": tensors.shape("text_model.embeddings.position_embedding.weight", 2)[0],
        "hidden_act": "gelu",
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": words - 1,
    }


def _image_config(shapes: Shapes, file: str) -> dict[str, Any]:
    tensors = _Tensors("image_encoder", shapes, file)
    patch = tensors.shape("vision_model.embeddings.patch_embedding.weight", 4)
    positions = tensors.shape("vision_model.embeddings.position_embedding.weight", 2)[0] - 1
    return {
        "hidden_size": patch[0],
        "intermediate_size": tensors.shape("vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "projection_dim": tensors.shape("visual_projection.weight", 2)[0],
        "num_hidden_layers": tensors.count(r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": tensors.heads_of(patch[0], IMAGE_HEADS),
        "image_size": math.isqrt(positions) * patch[-1],
        "patch_size": patch[-1],
        "hidden_act": "quick_gelu",
    }


def _previewer_config(shapes: Shapes, file: str) -> dict[str, Any]:
    hidden, in_channels, *_ = _Tensors("previewer", shapes, file).shape("blocks.0.weight", 4)
    return {"in_channels": in_channels, "hidden": hidden}


_FILTERS = {1: "canny", 3: "picture", 4: "inpainting", 16: "super_resolution"}
"""What a control picture shows, by its channels."""


def _control_config(shapes: Shapes, file: str) -> dict[str, Any]:
    """The config of a ControlNet: its backbone by its keys, its blocks if it is of the published form."""
    tensors = _Tensors("a ControlNet", shapes, file)
    outputs = tensors.count(r"projections\.(\d+)\.")
    if outputs != len(PUBLISHED_BLOCKS):
        raise tensors.error(
            f"it has {outputs} projections, and a single file does not record to which blocks of Stage C they belong; "
            f"known are the {len(PUBLISHED_BLOCKS)} of the published ControlNets. Use --checkpoint with a folder "
            "controlnet_canny, controlnet_inpainting, controlnet_super_resolution or controlnet_picture, whose "
            "config.json has proj_blocks"
        )
    config: dict[str, Any] = {
        "proj_blocks": list(PUBLISHED_BLOCKS),
        "projection_channels": tensors.shape("projections.0.2.weight", 4)[0],
    }
    if "backbone.0.0.weight" in shapes:
        stem, channels, *_ = tensors.shape("backbone.0.0.weight", 4)
        width = tensors.shape("projections.0.0.weight", 4)[1]
        config |= {"bottleneck": "effnet", "stem_channels": stem, "last_channels": width}
    elif "backbone.10.blocks.0.weight" in shapes:
        hidden, channels, *_ = tensors.shape("backbone.0.weight", 4)
        width = tensors.shape("backbone.2.weight", 4)[0]
        last = tensors.shape("projections.0.0.weight", 4)[1]
        config |= {"bottleneck": "large", "large_hidden": hidden, "large_channels": width, "last_channels": last}
    else:
        channels = tensors.shape("backbone.0.weight", 4)[1]
        config["bottleneck"] = "simple"
    if channels not in _FILTERS:
        known = ", ".join(f"{count} ({what})" for count, what in _FILTERS.items())
        raise tensors.error(f"its control picture has {channels} channels; known are {known}")
    return asdict(ControlNetConfig()) | config | {"in_channels": channels, "filter": _FILTERS[channels]}


STAGE_C = OriginalKeys(marks=("clip_txt_mapper.weight",), rename=_unet_origins, config=_stage_c_config)
STAGE_B = OriginalKeys(
    marks=("clip_mapper.weight", "effnet_mapper.0.weight"), rename=_unet_origins, config=_stage_b_config
)
STAGE_A = OriginalKeys(
    marks=("vquantizer.codebook.weight", "vquantizer.embedding.weight"),
    rename=_stage_a_origins,
    config=_stage_a_config,
)
TEXT_ENCODER = OriginalKeys(
    prefixes=("text_encoder.",),
    marks=("text_model.embeddings.token_embedding.weight",),
    rename=_clip_origins,
    config=_text_config,
)
IMAGE_ENCODER = OriginalKeys(
    prefixes=("clip_l_vision.",),
    marks=("vision_model.embeddings.patch_embedding.weight",),
    rename=_clip_origins,
    config=_image_config,
)
EFFNET = OriginalKeys(
    prefixes=("vae.encoder.",),
    marks=("backbone.0.0.weight",),
    rename=_same_origins,
    config=lambda shapes, file: asdict(EffNetConfig()),
)
PREVIEWER = OriginalKeys(
    prefixes=("vae.previewer.",), marks=("blocks.0.weight",), rename=_same_origins, config=_previewer_config
)
CONTROLNET = OriginalKeys(marks=("projections.0.2.weight",), rename=_same_origins, config=_control_config)
