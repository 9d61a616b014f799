"""Every size and every number of the training: the networks, their first weights, and how long each is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from cascade_export.models import (
    ControlNet,
    ControlNetConfig,
    Denoiser,
    DenoiserConfig,
    EffNetConfig,
    SemanticEncoder,
    StageA,
    StageAConfig,
)
from cascade_tiny import text
from cascade_tiny.meaning import AT, CHANNELS, GRID

_RES, _TIME, _ATTN = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"

TEXT_WIDTH = 128
LATENTS_B = (4, 64, 64)
LATENTS_C = (CHANNELS, GRID, GRID)
SEMANTIC_SIDE = 192  # 256 x 3/4: Stage B was trained the same way, which makes 42.67 pixels of a latent's 32

# The codebook is kept because the file format has one; latents are never quantised, so one entry is enough.
STAGE_A = StageAConfig(bottleneck_blocks=2, embed_dim=64, num_vq_embeddings=1, scale_factor=1.0)

# The last stage sees far: every point of the grid must know the nearest shape, wherever it lies.
SEMANTIC = EffNetConfig(
    stages=(
        ("fused", 1, 3, 2, 32, 1),
        ("fused", 2, 3, 2, 64, 2),
        ("mb", 2, 3, 2, 96, 2),
        ("mb", 2, 5, 2, 128, 3),
    ),
    stem_channels=16,
    last_channels=192,
)

# Few and wide blocks: on a CPU a block costs about the same whether it has 128 channels or 160.
STAGE_C = DenoiserConfig(
    in_channels=16,
    out_channels=16,
    timestep_ratio_embedding_dim=32,
    conditioning_dim=TEXT_WIDTH,
    block_out_channels=(160, 160),
    num_attention_heads=(5, 5),
    down_num_layers_per_block=(1, 2),
    up_num_layers_per_block=(2, 1),
    down_blocks_repeat_mappers=(1, 1),
    up_blocks_repeat_mappers=(1, 1),
    block_types_per_layer=((_RES, _TIME, _ATTN), (_RES, _TIME, _ATTN)),
    clip_text_in_channels=TEXT_WIDTH,
    clip_text_pooled_in_channels=TEXT_WIDTH,
    clip_image_in_channels=64,
    dropout=(0.0, 0.0),
    self_attn=(True, True),
    switch_level=(False,),
    control_blocks=(0, 1, 3, 5),
)

# Most channels where there are few positions: the 32 x 32 level has one block each way.
STAGE_B = DenoiserConfig(
    in_channels=4,
    out_channels=4,
    timestep_ratio_embedding_dim=32,
    patch_size=2,
    conditioning_dim=TEXT_WIDTH,
    block_out_channels=(64, 96, 160),
    num_attention_heads=(0, 0, 5),
    down_num_layers_per_block=(1, 1, 2),
    up_num_layers_per_block=(2, 1, 1),
    down_blocks_repeat_mappers=(1, 1, 1),
    up_blocks_repeat_mappers=(1, 1, 1),
    block_types_per_layer=((_RES, _TIME), (_RES, _TIME), (_RES, _TIME, _ATTN)),
    clip_text_pooled_in_channels=TEXT_WIDTH,
    effnet_in_channels=16,
    pixel_mapper_in_channels=3,
    dropout=(0.0, 0.0, 0.0),
    self_attn=(True, True, True),
    timestep_conditioning_type=("sca",),
)

IMAGE_SIDE = 64
IMAGE_WIDTH = 96
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EDGES_SAY = tuple(range(AT.start, CHANNELS))  # channels of the semantic latents: place, radius and kind, but no colour

# Every number of the backbone is small: edges are simpler than pictures, and it sees 256 x 256 of them.
CONTROL = ControlNetConfig(
    in_channels=1,
    projection_channels=STAGE_C.block_out_channels[0],
    proj_blocks=STAGE_C.control_blocks,
    pixels_per_latent=42.67,  # pictures of 256 pixels for 6 latents
    stages=(
        ("fused", 1, 3, 2, 16, 1),
        ("fused", 4, 3, 2, 32, 2),
        ("mb", 4, 3, 2, 64, 2),
        ("mb", 4, 5, 2, 96, 3),
    ),
    stem_channels=8,
    last_channels=128,
)


def text_config() -> CLIPTextConfig:
    """The text encoder's architecture: CLIP's, two layers deep."""
    return CLIPTextConfig(
        vocab_size=text.build_tokenizer().get_vocab_size(),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=text.MAX_TOKENS,
        hidden_act="gelu",
        pad_token_id=text.PAD_ID,
        bos_token_id=text.BEGIN_ID,
        eos_token_id=text.END_ID,
    )


class TextEncoder(CLIPTextModelWithProjection):  # type: ignore[misc]
    """The text encoder, answering with just what the denoisers are conditioned on."""

    def conditions(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes captions.

        Args:
            ids: int64 [B, L], from `text.encode`.
            mask: int64 [B, L], 1 at tokens and 0 at padding.

        Returns:
            hidden float32 [B, L, TEXT_WIDTH], before the final norm as Stable Cascade uses it, and pooled
            float32 [B, 1, TEXT_WIDTH].
        """
        out = self(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return out.hidden_states[-1].float(), out.text_embeds[:, None].float()


def image_config() -> CLIPVisionConfig:
    """The image encoder's architecture: CLIP's, four layers deep, for pictures of 64 x 64."""
    return CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=3 * IMAGE_WIDTH,
        projection_dim=STAGE_C.clip_image_in_channels,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=8,
        hidden_act="gelu",
    )


class ImageEncoder(CLIPVisionModelWithProjection):  # type: ignore[misc]
    """The image encoder."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeds pictures.

        Args:
            pixels: float32 [B, 3, IMAGE_SIDE, IMAGE_SIDE] in 0..1.

        Returns:
            float32 [B, 1, clip_image_in_channels].
        """
        mean, std = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        return self(pixel_values=(pixels - mean) / std).image_embeds[:, None].float()  # type: ignore[no-any-return]


def build_denoiser(config: DenoiserConfig) -> Denoiser:
    """A denoiser with first weights that train well: it starts as the identity of its embedding and answers zero."""
    model = Denoiser(config)
    for name, parameter in model.named_parameters():
        if ".mapper" in name or name in ("clf.1.weight", "clf.1.bias"):  # timestep blocks start as the identity
            nn.init.zeros_(parameter)
        elif name.endswith("channelwise.4.weight") or name.endswith("to_out.0.weight"):
            with torch.no_grad():
                parameter.mul_(0.5)  # keeps the sum of the residuals near the size of the stream
    return model


def build_stage_a() -> StageA:
    """A Stage A whose residual branches start small instead of shut, which saves the first hundreds of steps."""
    model = StageA(STAGE_A)
    for name, parameter in model.named_parameters():
        if name.endswith("gammas"):
            with torch.no_grad():
                parameter[2] = parameter[5] = 0.3
    return model


def build_semantic_encoder() -> SemanticEncoder:
    """The semantic encoder with torch's own first weights."""
    return SemanticEncoder(SEMANTIC)


def build_text_encoder() -> TextEncoder:
    """The text encoder with CLIP's own first weights."""
    return TextEncoder(text_config())


def build_image_encoder() -> ImageEncoder:
    """The image encoder with CLIP's own first weights."""
    return ImageEncoder(image_config())


def build_image_reader() -> nn.Module:
    """Reads a scene's meaning from an embedding: float32 [B, clip_image_in_channels] -> [B, 16 * 6 * 6]."""
    embedding = STAGE_C.clip_image_in_channels or 0
    return nn.Sequential(nn.Linear(embedding, 512), nn.GELU(), nn.Linear(512, math.prod(LATENTS_C)))


def build_control() -> ControlNet:
    """The canny ControlNet; it adds nothing yet."""
    return ControlNet(replace(CONTROL, projection_channels=STAGE_C.block_out_channels[0]))


def build_control_reader() -> nn.Module:
    """Reads shapes from a ControlNet's features: float32 [B, E, h, w] -> [B, len(EDGES_SAY), h, w]."""
    return nn.Conv2d(CONTROL.embedding_channels, len(EDGES_SAY), 1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one stage is trained.

    Attributes:
        steps: optimizer steps by default.
        batch: pictures a step.
        rate: the peak learning rate; it rises over the first 100 steps and falls to nothing over the second half.
        ema: decay of the average of the weights that is published, once warmed up.
    """

    steps: int
    batch: int
    rate: float
    ema: float = 0.998


# Two trainings by one recipe. The shipped weights took the first one's steps, not all in its order (see the
# model card); the second was written for a GPU and never run.
# Image prompts and the canny ControlNet were not trained to the end: the shipped weights took 3,616 steps of "image",
# 3,260 of "prompts" and 314 of "canny".
TRAININGS: dict[str, dict[str, Training]] = {
    "cpu": {
        "a": Training(steps=1500, batch=16, rate=2e-3, ema=0.99),
        "text-c": Training(steps=9000, batch=32, rate=1e-3),
        "b": Training(steps=20_000, batch=8, rate=1.5e-3),
        "semantic": Training(steps=12_000, batch=16, rate=1e-3, ema=0.99),
        "joint": Training(steps=4000, batch=8, rate=3e-4),
        "image": Training(steps=4500, batch=64, rate=1e-3, ema=0.995),
        "prompts": Training(steps=4000, batch=32, rate=1e-3, ema=0.995),
        "canny": Training(steps=3500, batch=16, rate=1.5e-3, ema=0.995),
    },
    "cuda": {
        "a": Training(steps=6000, batch=32, rate=2e-3),
        "text-c": Training(steps=12_000, batch=512, rate=1.5e-3, ema=0.999),
        "b": Training(steps=12_000, batch=192, rate=1.2e-3, ema=0.999),
        "semantic": Training(steps=8000, batch=64, rate=1e-3),
        "joint": Training(steps=4000, batch=96, rate=3e-4, ema=0.999),
        "image": Training(steps=12_000, batch=256, rate=1e-3, ema=0.999),
        "prompts": Training(steps=8000, batch=256, rate=1e-3, ema=0.999),
        "canny": Training(steps=8000, batch=128, rate=1.5e-3, ema=0.999),
    },
}
SEED = 1
SCENES_B = 8_000  # training scenes with Stage A's latents kept ready; 32 kB each
SCENES_C = 24_000  # training scenes with their meaning and captions kept ready; 6 kB each
SCENES_OUTLINE = 6000  # training scenes whose outlines are taught to Stage B beforehand
OUTLINE_STEPS = 12_000
OUTLINE_BATCH = 4096  # single positions
OUTLINE_NOISE = 0.05  # on what is seen of colours, radius and kind
SCENES_IMAGE = 40_000  # training scenes with a small picture, their meaning and captions kept ready; 19 kB each
CAPTIONS = 6  # different captions of each training scene

CROP = 128  # Stage A is convolutional: crops cost a quarter of whole pictures and hold as many edges
CONDITION_NOISE = 0.03  # on Stage B's condition: at run time it comes from Stage C, which is not exact
MEANING_WEIGHT = 0.3  # how firmly the joint training holds the semantic encoder to what scenes mean
CAPTION_DROPOUT = 0.1  # share of empty captions: what guidance steers away from
EFFNET_DROPOUT = 0.05  # share of Stage B's conditions set to zero, for guidance likewise
