"""Random cascades as diffusers writes them: the reference side of every parity test. It runs none of our code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore", module="diffusers")
warnings.filterwarnings("ignore", module="transformers")

CONV = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
ATTN = (*CONV, "SDCascadeAttnBlock")


@dataclass(frozen=True)
class Shape:
    """One architecture: the arguments of diffusers' classes."""

    text: dict[str, Any]
    prior: dict[str, Any]
    decoder: dict[str, Any]
    vqgan: dict[str, Any]
    prior_scheduler: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)


def _text(width: int, projection: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": projection,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "max_position_embeddings": 24,
        "hidden_act": "gelu",
    }


SHAPES: dict[str, Shape] = {
    # four levels, attention at two, repeat mappers 2 and 3, odd head counts
    "four-level": Shape(
        _text(32, 24, 4),
        {
            "conditioning_dim": 48,
            "block_out_channels": (40, 40),
            "num_attention_heads": (5, 5),
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
            "switch_level": (False,),
        },
        {
            "conditioning_dim": 32,
            "block_out_channels": (16, 24, 36, 40),
            "num_attention_heads": (-1, -1, 9, 5),
            "down_num_layers_per_block": (1, 1, 2, 1),
            "up_num_layers_per_block": (1, 2, 1, 1),
            "down_blocks_repeat_mappers": (1, 1, 1, 1),
            "up_blocks_repeat_mappers": (3, 3, 2, 2),
            "block_types_per_layer": (CONV, CONV, ATTN, ATTN),
            "self_attn": True,
            "dropout": (0.0, 0.0, 0.1, 0.1),
        },
        {"embed_dim": 24, "bottleneck_blocks": 2, "num_vq_embeddings": 8},
    ),
    # attention at three of four levels, repeats on the way down, no self-attention at one level, channels that the
    # heads do not divide, schedulers that differ
    "three-attention": Shape(
        _text(24, 40, 3),
        {
            "conditioning_dim": 40,
            "block_out_channels": (48, 36),
            "num_attention_heads": (3, 9),
            "down_num_layers_per_block": (2, 1),
            "up_num_layers_per_block": (1, 2),
            "down_blocks_repeat_mappers": (2, 1),
            "up_blocks_repeat_mappers": (1, 2),
            "switch_level": (False,),
            "clip_seq": 2,
        },
        {
            "conditioning_dim": 24,
            "block_out_channels": (12, 20, 28, 35),
            "num_attention_heads": (0, 5, 7, 3),
            "down_num_layers_per_block": (1, 1, 1, 2),
            "up_num_layers_per_block": (1, 1, 2, 1),
            "down_blocks_repeat_mappers": (1, 2, 1, 1),
            "up_blocks_repeat_mappers": (2, 1, 3, 2),
            "block_types_per_layer": (CONV, ATTN, ATTN, ATTN),
            "self_attn": (True, True, False, True),
            "dropout": (0.0, 0.0, 0.0, 0.0),
            "clip_seq": 3,
        },
        {"embed_dim": 32, "bottleneck_blocks": 1, "num_vq_embeddings": 8, "scale_factor": 0.5},
        {"scaler": 1.5},
        {"s": 0.03, "scaler": 0.8},
    ),
    # one level in the prior, two in the decoder, three in Stage A, a kernel of 5, another timestep width
    "shallow": Shape(
        _text(16, 16, 2),
        {
            "conditioning_dim": 16,
            "block_out_channels": (32,),
            "num_attention_heads": (4,),
            "down_num_layers_per_block": (2,),
            "up_num_layers_per_block": (1,),
            "down_blocks_repeat_mappers": (1,),
            "up_blocks_repeat_mappers": (1,),
            "block_types_per_layer": (ATTN,),
            "self_attn": True,
            "dropout": (0.1,),
            "timestep_ratio_embedding_dim": 33,
        },
        {
            "conditioning_dim": 16,
            "block_out_channels": (16, 32),
            "num_attention_heads": (1, 7),
            "down_num_layers_per_block": (1, 2),
            "up_num_layers_per_block": (2, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (CONV, ATTN),
            "self_attn": True,
            "dropout": (0.0, 0.0),
            "kernel_size": 5,
        },
        {"embed_dim": 16, "levels": 3, "bottleneck_blocks": 1, "num_vq_embeddings": 4},
    ),
}


def clip_tokenizer(folder: Path, length: int) -> Any:
    """CLIP's tokenizer with a vocabulary of single bytes: vocab.json and merges.txt, as the published ones."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{x}</w>" for x in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights with which every part matters: torch's own start leaves norms, gates and biases at nought."""
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith(("gamma", "beta", "gammas")) or parameter.ndim < 2:
                parameter.normal_(0, 0.3, generator=generator)
                if name.endswith("weight"):  # of a norm; around nought it would leave nothing of the signal
                    parameter.add_(1)
            else:
                parameter.normal_(0, (parameter[0].numel()) ** -0.5, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)


def build(shape: Shape, folder: Path, seed: int = 0) -> Any:
    """A random ``StableCascadeCombinedPipeline``."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeCombinedPipeline
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    generator = torch.Generator().manual_seed(seed)
    tokenizer = clip_tokenizer(folder / "vocabulary", shape.text["max_position_embeddings"])
    ids = {"vocab_size": len(tokenizer), "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1}
    text_config = CLIPTextConfig(**shape.text, **ids, pad_token_id=len(tokenizer) - 1)
    text = CLIPTextModelWithProjection(text_config)
    pooled = shape.text["projection_dim"]
    prior = StableCascadeUNet(
        clip_text_in_channels=shape.text["hidden_size"],
        clip_text_pooled_in_channels=pooled,
        clip_image_in_channels=20,
        **shape.prior,
    )
    decoder = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        clip_text_pooled_in_channels=pooled,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        timestep_conditioning_type=("sca",),
        **shape.decoder,
    )
    vqgan = PaellaVQModel(**shape.vqgan)
    for module in (text, prior, decoder, vqgan):
        randomize(module, generator)
        module.eval()
    pipe = StableCascadeCombinedPipeline(
        tokenizer=tokenizer,
        text_encoder=text,
        decoder=decoder,
        scheduler=DDPMWuerstchenScheduler(**shape.scheduler),
        vqgan=vqgan,
        prior_prior=prior,
        prior_text_encoder=text,
        prior_tokenizer=tokenizer,
        prior_scheduler=DDPMWuerstchenScheduler(**shape.prior_scheduler),
    )
    for part in (pipe, pipe.prior_pipe, pipe.decoder_pipe):
        part.set_progress_bar_config(disable=True)
    # the progress bar setter of the combined pipeline answers for both parts; the parts themselves draw it
    return pipe


def original_state_dict(state: dict[str, torch.Tensor], stage_b: bool = False) -> dict[str, torch.Tensor]:
    """A denoiser's weights under the original repository's keys (written from its modules, not from our reader)."""
    out: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if ".attention.to_q." in key:
            parts = [state[key.replace("to_q", name)] for name in ("to_q", "to_k", "to_v")]
            out[key.replace("to_q.", "attn.in_proj_")] = torch.cat(parts)
        elif ".attention.to_k." in key or ".attention.to_v." in key:
            continue
        elif ".attention.to_out.0." in key:
            out[key.replace("to_out.0", "attn.out_proj")] = value
        elif stage_b and key.startswith("clip_txt_pooled_mapper."):
            out[key.replace("clip_txt_pooled_mapper", "clip_mapper")] = value
        else:
            out[key] = value
    return {k: v.contiguous() for k, v in out.items()}


def psnr(made: np.ndarray, wanted: np.ndarray) -> float:
    """dB at peak 1, in float64; NaN is refused."""
    a, b = made.astype(np.float64), wanted.astype(np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    mean = float(np.mean((a - b) ** 2))
    return float("inf") if mean == 0 else float(-10 * np.log10(mean))


def rel_l2(made: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference, in float64; NaN is refused."""
    a, b = made.astype(np.float64), wanted.astype(np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    assert np.isfinite(a).all()
    assert np.isfinite(b).all()
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def conv(
    x: torch.Tensor, w: dict[str, torch.Tensor], key: str, stride: int = 1, groups: int = 1, act: bool = True
) -> Any:
    """A convolution, BatchNorm (eps 1e-3) and SiLU by torchvision's keys."""
    weight = w[f"{key}.0.weight"]
    x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
    norm = (w[f"{key}.1.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
    x = F.batch_norm(x, *norm, False, 0.0, 1e-3)
    return F.silu(x) if act else x


@torch.no_grad()
def effnet(w: dict[str, torch.Tensor], stages: Sequence[Any], pixels: torch.Tensor) -> Any:
    """EfficientNetV2's blocks from the paper's tables, read off torchvision's keys; torchvision is not needed."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = conv((pixels - mean[:, None, None]) / std[:, None, None], w, "backbone.0", 2)
    channels = len(w["backbone.0.0.weight"])
    for stage, (kind, expand, _, stride, target, count) in enumerate(stages, 1):
        for index in range(count):
            step, key = (stride if index == 0 else 1), f"backbone.{stage}.{index}.block"
            if kind == "fused" and expand == 1:
                y = conv(x, w, f"{key}.0", step)
            elif kind == "fused":
                y = conv(conv(x, w, f"{key}.0", step), w, f"{key}.1", act=False)
            else:
                y = conv(x, w, f"{key}.0")
                y = conv(y, w, f"{key}.1", step, groups=y.shape[1])
                gate = F.silu(F.conv2d(y.mean((2, 3), True), w[f"{key}.2.fc1.weight"], w[f"{key}.2.fc1.bias"]))
                y = y * torch.sigmoid(F.conv2d(gate, w[f"{key}.2.fc2.weight"], w[f"{key}.2.fc2.bias"]))
                y = conv(y, w, f"{key}.3", act=False)
            x = x + y if step == 1 and channels == target else y
            channels = target
    x = F.conv2d(conv(x, w, f"backbone.{len(stages) + 1}"), w["mapper.0.weight"])
    return F.batch_norm(x, w["mapper.1.running_mean"], w["mapper.1.running_var"], eps=1e-5)
