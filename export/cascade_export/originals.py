"""Original single files and ComfyUI's all-in-one files: which component a tensor belongs to, and the config.

The complete list of differences between original and diffusers keys (matches: diffusers'
``convert_stable_cascade_unet_single_file_to_diffusers``, ``StableCascade/modules``):

1. ``attention.attn.in_proj_{weight,bias}`` is to_q, to_k and to_v, one after the other.
2. ``attention.attn.out_proj`` is ``attention.to_out.0``; ComfyUI, once loaded, writes ``attention.out_proj``.
3. Stage B: ``clip_mapper`` is ``clip_txt_pooled_mapper``.
4. Stage A: ``vquantizer.codebook`` is ``vquantizer.embedding``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cascade_rt.errors import CheckpointError

from . import presets
from .models.denoiser_config import BLOCK_TYPES
from .weights import Origin, RenamedSource, Shape, TensorSource

HEAD_DIM = 64
"""Channels of an attention head in every Stable Cascade; a single file does not record it."""

_PREFIXES = (
    ("model.diffusion_model.", ""),
    ("vae.encoder.", "effnet:"),
    ("vae.previewer.", "previewer:"),
    ("vae.", ""),
    ("text_encoder.", "text_encoder:"),
    ("clip_l_vision.", "image_encoder:"),
)
Part = tuple[dict[str, Any], TensorSource]


def split_single_file(source: TensorSource, path: Path) -> dict[str, Part]:
    """Find the components of a single file.

    Returns:
        Component name -> its config and its tensors under diffusers' keys.

    Raises:
        CheckpointError: nothing in it is known, or its architecture cannot be read off its tensors.
    """
    groups: dict[str, dict[str, str]] = {}
    for key in source.shapes:
        prefix, group = next(((p, g) for p, g in _PREFIXES if key.startswith(p)), ("", ""))
        # the network and "vae" carry no name of what they are; their keys tell
        groups.setdefault(group or prefix, {})[key.removeprefix(prefix)] = key
    parts: dict[str, Part] = {}
    for group, keys in groups.items():
        component = group.removesuffix(":") if group.endswith(":") else _detect(keys)
        if component is None:
            continue
        origins = _RENAME[component](keys)
        renamed = RenamedSource(source, origins)
        parts[component] = (_CONFIG[component](renamed.shapes, path), renamed)
    if not parts:
        raise CheckpointError(
            f"{path.name} holds no part of a cascade: its first tensors are {', '.join(list(source.shapes)[:3])}"
        )
    return parts


def _detect(keys: Mapping[str, str]) -> str | None:
    if "clip_txt_mapper.weight" in keys:
        return "stage_c"
    if "clip_mapper.weight" in keys or "effnet_mapper.0.weight" in keys:
        return "stage_b"
    if "vquantizer.codebook.weight" in keys or "vquantizer.embedding.weight" in keys:
        return "stage_a"
    if "backbone.0.0.weight" in keys:
        return "effnet"
    if "blocks.0.weight" in keys:
        return "previewer"
    return None


def _unet(keys: Mapping[str, str]) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    for name, key in keys.items():
        if match := re.fullmatch(r"(.*attention)\.attn\.in_proj_(weight|bias)", name):
            for index, target in enumerate(("to_q", "to_k", "to_v")):
                origins[f"{match[1]}.{target}.{match[2]}"] = Origin(key, part=(index, 3))
            continue
        ours = re.sub(r"attention\.(attn\.)?out_proj\.", "attention.to_out.0.", name)
        origins[re.sub(r"^clip_mapper\.", "clip_txt_pooled_mapper.", ours)] = Origin(key)
    return origins


def _stage_a(keys: Mapping[str, str]) -> dict[str, Origin]:
    return {name.replace("vquantizer.codebook", "vquantizer.embedding"): Origin(key) for name, key in keys.items()}


def _clip(keys: Mapping[str, str]) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    for name, key in keys.items():
        ours = re.sub(r"^(clip_g\.)?(transformer\.)?", "", name)
        if ours == "text_projection":  # a bare parameter there, applied from the right
            origins["text_projection.weight"] = Origin(key, transpose=True)
        else:
            origins[ours] = Origin(key)
    return origins


def _plain(keys: Mapping[str, str]) -> dict[str, Origin]:
    return {name: Origin(key) for name, key in keys.items()}


_RENAME: dict[str, Callable[[Mapping[str, str]], dict[str, Origin]]] = {
    "stage_c": _unet,
    "stage_b": _unet,
    "stage_a": _stage_a,
    "text_encoder": _clip,
    "image_encoder": _clip,
    "effnet": _plain,
    "previewer": _plain,
}


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """1 + the largest number that ``pattern``'s group matches; 0 if none does."""
    found = [int(m[1]) for name in shapes if (m := re.match(pattern, name))]
    return max(found) + 1 if found else 0


def _denoiser_config(shapes: Mapping[str, Shape], path: Path) -> dict[str, Any]:
    """Everything but the number of heads can be read off keys and shapes."""
    levels = _count(shapes, r"down_blocks\.(\d+)\.")
    prior = "clip_txt_mapper.weight" in shapes
    in_channels = 16 if prior else 4
    widths, heads, types, down, up = [], [], [], [], []
    for level in range(levels):
        stacks = (f"down_blocks.{level}", f"up_blocks.{levels - 1 - level}")
        kinds = [_kinds(shapes, stack) for stack in stacks]
        pattern = _period(kinds[0], path)
        width = shapes[f"{stacks[0]}.0.depthwise.weight"][0]
        attends = BLOCK_TYPES[2] in pattern
        if attends and width % HEAD_DIM:
            raise CheckpointError(
                f"{path.name}: level {level} has {width} channels, which is no multiple of {HEAD_DIM}; a single file "
                "does not record its number of attention heads. Use the diffusers folder, whose config.json does"
            )
        widths.append(width)
        heads.append(width // HEAD_DIM if attends else -1)
        types.append(pattern)
        down.append(len(kinds[0]) // len(pattern))
        up.append(len(kinds[1]) // len(pattern))
    pooled = shapes["clip_txt_pooled_mapper.weight"]
    condition = [s[1] for n, s in shapes.items() if n.endswith("kv_mapper.1.weight")]
    conditions = [n for n in ("sca", "crp") if any(f".mapper_{n}.weight" in name for name in shapes)]
    first = "down_blocks.0.0.depthwise.weight"
    time = next(s[1] for n, s in shapes.items() if n.endswith(".mapper.weight"))
    switch = [f"down_downscalers.{i}.1.blocks.0.weight" in shapes for i in range(1, levels)]
    return {
        "in_channels": in_channels,
        "out_channels": in_channels,
        "timestep_ratio_embedding_dim": time,
        "patch_size": math.isqrt(shapes["embedding.1.weight"][1] // in_channels),
        "conditioning_dim": condition[0] if condition else pooled[0] // 4,
        "block_out_channels": widths,
        "num_attention_heads": heads,
        "down_num_layers_per_block": down,
        "up_num_layers_per_block": up[::-1],
        "down_blocks_repeat_mappers": [
            1 + _count(shapes, rf"down_repeat_mappers\.{i}\.(\d+)\.") for i in range(levels)
        ],
        "up_blocks_repeat_mappers": [1 + _count(shapes, rf"up_repeat_mappers\.{i}\.(\d+)\.") for i in range(levels)],
        "block_types_per_layer": types,
        "clip_text_in_channels": shapes["clip_txt_mapper.weight"][1] if prior else None,
        "clip_text_pooled_in_channels": pooled[1],
        "clip_image_in_channels": shapes["clip_img_mapper.weight"][1] if "clip_img_mapper.weight" in shapes else None,
        "clip_seq": pooled[0] // condition[0] if condition else 4,
        "effnet_in_channels": shapes["effnet_mapper.0.weight"][1] if "effnet_mapper.0.weight" in shapes else None,
        "pixel_mapper_in_channels": shapes["pixels_mapper.0.weight"][1] if "pixels_mapper.0.weight" in shapes else None,
        "kernel_size": shapes[first][-1],
        "dropout": 0.0,
        "self_attn": True,
        "timestep_conditioning_type": conditions,
        "switch_level": [False] * (levels - 1) if any(switch) else None,
    }


def _kinds(shapes: Mapping[str, Shape], stack: str) -> list[str]:
    """Block types of one level, in order."""
    marks = dict(zip(("depthwise.weight", "mapper.weight", "attention.to_q.weight"), BLOCK_TYPES, strict=True))
    kinds = []
    for index in range(_count(shapes, rf"{stack}\.(\d+)\.")):
        kinds += [kind for mark, kind in marks.items() if f"{stack}.{index}.{mark}" in shapes]
    return kinds


def _period(kinds: list[str], path: Path) -> list[str]:
    """The block types of one layer: the shortest pattern that ``kinds`` repeats."""
    for size in range(1, len(kinds) + 1):
        if len(kinds) % size == 0 and kinds == kinds[:size] * (len(kinds) // size):
            return kinds[:size]
    raise CheckpointError(f"{path.name}: a level of the network has no blocks; the file is cut or of another model")


def _stage_a_config(shapes: Mapping[str, Shape], _path: Path) -> dict[str, Any]:
    width = shapes["up_blocks.0.0.weight"][0]
    codebook = shapes["vquantizer.embedding.weight"]
    blocks = 0
    while f"up_blocks.{blocks + 1}.gammas" in shapes:
        blocks += 1
    strided = sum(1 for n, s in shapes.items() if re.fullmatch(r"up_blocks\.\d+\.weight", n) and s[-1] == 4)
    return {
        "levels": strided + 1,
        "bottleneck_blocks": blocks,
        "embed_dim": width,
        "latent_channels": codebook[1],
        "num_vq_embeddings": codebook[0],
        "scale_factor": presets.DIFFUSERS_LATENT_SCALE,
    }


def _text_config(shapes: Mapping[str, Shape], _path: Path) -> dict[str, Any]:
    words, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "projection_dim": shapes["text_projection.weight"][0],
        "num_hidden_layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": "gelu",
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": words - 1,
    }


def _image_config(shapes: Mapping[str, Shape], _path: Path) -> dict[str, Any]:
    patch = shapes["vision_model.embeddings.patch_embedding.weight"]
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
    return {
        "hidden_size": patch[0],
        "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        "projection_dim": shapes["visual_projection.weight"][0],
        "num_hidden_layers": _count(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, patch[0] // HEAD_DIM),
        "image_size": math.isqrt(positions) * patch[-1],
        "patch_size": patch[-1],
        "hidden_act": "quick_gelu",
    }


_CONFIG: dict[str, Callable[[Mapping[str, Shape], Path], dict[str, Any]]] = {
    "stage_c": _denoiser_config,
    "stage_b": _denoiser_config,
    "stage_a": _stage_a_config,
    "text_encoder": _text_config,
    "image_encoder": _image_config,
    "effnet": lambda shapes, path: presets.CONFIGS["big"]["effnet"],
    "previewer": lambda shapes, path: {},
}
