"""Random cascades on both sides: as diffusers saves them, and as we export them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import reference
from cascade_export.models import (
    ControlNet,
    ControlNetConfig,
    EffNetConfig,
    Previewer,
    PreviewerConfig,
    SemanticEncoder,
)
from cascade_rt import CascadePipeline

SMALL_EFFNET: dict[str, Any] = {
    "stages": [["fused", 1, 3, 2, 8, 2], ["fused", 4, 3, 2, 16, 2], ["mb", 4, 3, 2, 24, 2], ["mb", 6, 3, 2, 32, 2]],
    "stem_channels": 8,
    "last_channels": 40,
}


@dataclass
class Cascade:
    """One architecture on both sides.

    Attributes:
        name: key of `reference.SHAPES`.
        checkpoint: folder written by ``save_pretrained``.
        theirs: diffusers' combined pipeline, fp32.
        ours: our pipeline over the exported bundle, fp32 on the CPU.
    """

    name: str
    checkpoint: Path
    theirs: Any
    ours: CascadePipeline


def make_checkpoint(name: str, folder: Path) -> tuple[Path, Any]:
    """Write ``reference.SHAPES[name]`` as diffusers does."""
    theirs = reference.build(reference.SHAPES[name], folder)
    theirs.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint", theirs


def add_encoders(checkpoint: Path) -> None:
    """Put a CLIP image encoder, a semantic encoder and a previewer beside a cascade."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    generator = torch.Generator().manual_seed(9)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    vision = CLIPVisionModelWithProjection(config)
    reference.randomize(vision, generator)
    vision.save_pretrained(checkpoint / "image_encoder")
    for name, module, values in (
        ("effnet", SemanticEncoder(EffNetConfig.from_dict(SMALL_EFFNET)), SMALL_EFFNET),
        ("previewer", Previewer(PreviewerConfig()), {}),
    ):
        reference.randomize(module, generator)
        (checkpoint / name).mkdir()
        state = {k: v for k, v in module.state_dict().items() if v.is_floating_point()}
        save_file(state, checkpoint / name / "diffusion_pytorch_model.safetensors")
        (checkpoint / name / "config.json").write_text(json.dumps(values))


CONTROL_BLOCKS = [0, 2]
_CONTROLNET: dict[str, Any] = {"projection_channels": 32, "proj_blocks": CONTROL_BLOCKS}
SMALL_CONTROLNETS: dict[str, dict[str, Any]] = {
    "canny": {"in_channels": 1, "bottleneck": "effnet", **SMALL_EFFNET},
    "inpainting": {"in_channels": 4, "bottleneck": "simple"},
    "super_resolution": {
        "in_channels": 16,
        "bottleneck": "large",
        "large_hidden": 20,
        "large_channels": 12,
        "last_channels": 24,
    },
    "picture": {"in_channels": 3, "bottleneck": "simple"},
}
SMALL_CONTROLNETS = {kind: {**_CONTROLNET, "filter": kind, **row} for kind, row in SMALL_CONTROLNETS.items()}


def add_controlnets(checkpoint: Path) -> None:
    """Put a ControlNet of every kind beside a cascade whose Stage C has one level of 32 channels."""
    generator = torch.Generator().manual_seed(10)
    for kind, config in SMALL_CONTROLNETS.items():
        save_controlnet(checkpoint, kind, config, generator)
    place = checkpoint / "prior_prior" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"control_blocks": CONTROL_BLOCKS}))


def save_controlnet(checkpoint: Path, kind: str, config: dict[str, Any], generator: torch.Generator) -> None:
    """A ControlNet with random weights, in a folder of a checkpoint."""
    module = ControlNet(ControlNetConfig.from_dict(config))
    reference.randomize(module, generator)
    folder = checkpoint / f"controlnet_{kind}"
    folder.mkdir(parents=True)
    state = {k: v for k, v in module.state_dict().items() if v.is_floating_point()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "StableCascadeControlNet", **config}))


WIDE_STAGE_C: dict[str, Any] = {
    "_class_name": "StableCascadeUNet",
    "conditioning_dim": 32,
    "block_out_channels": [64, 64],
    "num_attention_heads": [2, 2],
    "down_num_layers_per_block": [1, 1],
    "up_num_layers_per_block": [1, 1],
    "clip_text_in_channels": 32,
    "clip_text_pooled_in_channels": 32,
    "clip_image_in_channels": 32,
    "switch_level": [False],
}
"""The smallest Stage C whose linear layers are wide enough for 8 bits."""

_DENOISER: dict[str, Any] = {"clip_text_pooled_in_channels": 12, "conditioning_dim": 16, "dropout": 0.0}
SMALL_CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {**reference.SHAPES["shallow"].text, "vocab_size": 99, "eos_token_id": 98, "pad_token_id": 98},
    "image_encoder": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "projection_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
    "stage_c": {
        **_DENOISER,
        "block_out_channels": [16, 24],
        "num_attention_heads": [2, 3],
        "down_num_layers_per_block": [1, 1],
        "up_num_layers_per_block": [1, 1],
        "clip_text_in_channels": 12,
        "clip_image_in_channels": 8,
        "switch_level": [False],
    },
    "stage_b": {
        **_DENOISER,
        **{k: v for k, v in reference.SHAPES["shallow"].decoder.items() if k != "conditioning_dim"},
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "effnet_in_channels": 16,
        "pixel_mapper_in_channels": 3,
    },
    "stage_a": {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 4},
    "effnet": SMALL_EFFNET,
    "previewer": {},
    **{f"controlnet_{kind}": config for kind, config in SMALL_CONTROLNETS.items()},
}
"""The smallest config of every component, for tests that only look at graphs."""
