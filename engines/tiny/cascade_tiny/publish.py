"""Writes the trained averages as a checkpoint folder in diffusers' layout, for `cascade-export --checkpoint`.

Everything is named as diffusers names it. Three things are ours: `effnet/`, the semantic encoder; `controlnet_canny/`,
with the published keys; and the key `cascade_rt` in `model_index.json`, which says what the model is called and how it
is best sampled.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade_tiny import recipe
from cascade_tiny.previews import previews
from cascade_tiny.scenes import SIDE
from cascade_tiny.text import MAX_TOKENS, build_tokenizer
from cascade_tiny.weights import trained

# Measured on held-out captions; see the model card.
SAMPLING: dict[str, Any] = {
    "sampler": "original",
    "diffusers": {
        "prior_num_inference_steps": 20,
        "prior_guidance_scale": 1.2,
        "num_inference_steps": 10,
        "decoder_guidance_scale": 0.0,
    },
    "original": {
        "prior_num_inference_steps": 20,
        "prior_guidance_scale": 1.5,
        "num_inference_steps": 10,
        "decoder_guidance_scale": 1.0,
    },
    "lcm": {
        "prior_num_inference_steps": 4,
        "prior_guidance_scale": 1.0,
        "num_inference_steps": 10,
        "decoder_guidance_scale": 1.0,
    },
}
# the judge cannot tell the pictures of 10 + 5 steps from those of 20 + 10
DEFAULT_PRESET = "balanced"
PRESETS: dict[str, Any] = {
    "balanced": {"prior": {"num_inference_steps": 10}, "decoder": {"num_inference_steps": 5}},
    "fast": {"prior": {"num_inference_steps": 4}, "decoder": {"num_inference_steps": 2}},
}
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def publish(out: Path, target: Path) -> None:
    """Writes the checkpoint folder beside its place and renames it.

    Args:
        out: the training's folder, with every stage in it.
        target: the folder to write; an older one is replaced.

    Raises:
        TrainingError: a stage was not trained yet.
    """
    device = torch.device("cpu")
    a = trained(out, "a", device)["a"]
    prior = trained(out, "text-c", device)
    joint = trained(out, "joint", device)
    prompts = trained(out, "prompts", device)  # its Stage C makes the same of captions as text-c's
    control = trained(out, "canny", device)["control"]

    beside = target.with_name(target.name + ".part")
    if beside.exists():
        shutil.rmtree(beside)
    _write_model(beside / "prior", prompts["c"], "StableCascadeUNet", asdict(recipe.STAGE_C))
    _write_model(beside / "decoder", joint["b"], "StableCascadeUNet", asdict(recipe.STAGE_B))
    _write_model(beside / "vqgan", a, "PaellaVQModel", asdict(recipe.STAGE_A))
    _write_model(beside / "effnet", joint["encoder"], "SemanticEncoder", asdict(recipe.SEMANTIC))
    text_config = recipe.text_config().to_dict() | {"architectures": ["CLIPTextModelWithProjection"]}
    _write_model(beside / "text_encoder", prior["text"], None, text_config, "model.safetensors")
    image_config = recipe.image_config().to_dict() | {"architectures": ["CLIPVisionModelWithProjection"]}
    _write_model(beside / "image_encoder", prompts["encoder"], None, image_config, "model.safetensors")
    (beside / "feature_extractor").mkdir()
    _write_json(beside / "feature_extractor" / "preprocessor_config.json", _preprocessing())
    control_config = asdict(recipe.build_control().config)
    _write_model(beside / "controlnet_canny", control, "StableCascadeControlNet", control_config)
    (beside / "tokenizer").mkdir()
    build_tokenizer().save(str(beside / "tokenizer" / "tokenizer.json"))
    (beside / "scheduler").mkdir()
    _write_json(
        beside / "scheduler" / "scheduler_config.json",
        {"_class_name": "DDPMWuerstchenScheduler", "s": 0.008, "scaler": 1.0, "prediction_type": "v_prediction"},
    )
    _write_json(
        beside / "model_index.json",
        {
            "_class_name": "StableCascadeCombinedPipeline",
            "cascade_rt": {
                "name": "cascade-tiny",
                "size": "tiny",
                "licence": "Apache-2.0",
                "height": SIDE,
                "width": SIDE,
                "max_tokens": MAX_TOKENS,
                "sampling": SAMPLING,
                "default_preset": DEFAULT_PRESET,
                "presets": PRESETS,
                "previews": previews(a, joint["encoder"]),
            },
        },
    )
    old = target.with_name(target.name + ".old")
    if target.exists():
        target.replace(old)
    beside.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def _preprocessing() -> dict[str, Any]:
    """What is done to a picture for the image encoder, as transformers' ``CLIPImageProcessor`` reads it."""
    side = recipe.IMAGE_SIDE
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": list(recipe.CLIP_MEAN),
        "image_std": list(recipe.CLIP_STD),
    }


def _write_model(
    folder: Path, model: nn.Module, class_name: str | None, config: dict[str, Any], weights: str = _WEIGHTS
) -> None:
    folder.mkdir(parents=True)
    if class_name is not None:
        config = {"_class_name": class_name} | config
    _write_json(folder / "config.json", config)
    # the counter of seen batches is training state and, as the only integer, of no use to an engine
    state: dict[str, Tensor] = {
        k: v.detach().float().contiguous() for k, v in model.state_dict().items() if v.is_floating_point()
    }
    save_file(state, str(folder / weights), metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
