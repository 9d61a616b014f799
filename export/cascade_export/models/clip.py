"""The CLIP encoders, from transformers: the networks are that library's; their configs and outputs are chosen here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from msgspec import Meta
from torch import Tensor, nn

from .config import Channels, Epsilon, Layers, Words, read_config

Activation = Literal["gelu", "quick_gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]
TokenId = Annotated[int, Meta(ge=0, le=1 << 20)]


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Architecture of a text encoder, in the words of transformers' ``CLIPTextConfig``, and with its defaults."""

    vocab_size: Words = 49408
    hidden_size: Channels = 512
    intermediate_size: Channels = 2048
    projection_dim: Channels = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Channels = 8
    max_position_embeddings: Annotated[int, Meta(ge=2, le=4096)] = 77
    hidden_act: Annotated[str, Meta(max_length=40)] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    pad_token_id: TokenId = 1
    eos_token_id: TokenId = 49407

    def check(self) -> None:
        """Refuse fields that contradict each other.

        Raises:
            ValueError: the heads do not divide the width, or a token lies outside the vocabulary.
        """
        _check_transformer(self.hidden_size, self.num_attention_heads, self.hidden_act)
        for name, value in (("pad_token_id", self.pad_token_id), ("eos_token_id", self.eos_token_id)):
            if value >= self.vocab_size:
                raise ValueError(f"{name} {value} lies outside the vocabulary, whose vocab_size is {self.vocab_size}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "the config of text_encoder") -> TextEncoderConfig:
        """Read transformers' ``config.json``.

        Raises:
            CheckpointError: it does not describe a text encoder.
        """
        return read_config(cls, config, where)


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """Architecture of an image encoder, in the words of transformers' ``CLIPVisionConfig``, and with its defaults."""

    hidden_size: Channels = 768
    intermediate_size: Channels = 3072
    projection_dim: Channels = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Channels = 12
    image_size: Annotated[int, Meta(ge=1, le=4096)] = 224
    patch_size: Annotated[int, Meta(ge=1, le=4096)] = 32
    hidden_act: Annotated[str, Meta(max_length=40)] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    def check(self) -> None:
        """Refuse fields that contradict each other.

        Raises:
            ValueError: the heads do not divide the width, or a patch is larger than the picture.
        """
        _check_transformer(self.hidden_size, self.num_attention_heads, self.hidden_act)
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "the config of image_encoder") -> ImageEncoderConfig:
        """Read transformers' ``config.json``.

        Raises:
            CheckpointError: it does not describe an image encoder.
        """
        return read_config(cls, config, where)


def _check_transformer(width: int, heads: int, activation: str) -> None:
    if width % heads:
        raise ValueError(f"num_attention_heads {heads} does not divide hidden_size {width}")
    if activation not in get_args(Activation):
        raise ValueError(f"hidden_act {activation!r} is not known; known are {', '.join(get_args(Activation))}")


def build_text_encoder(config: TextEncoderConfig) -> nn.Module:
    """``CLIPTextModelWithProjection``; eager attention traces to plain matrix products."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model: nn.Module = CLIPTextModelWithProjection._from_config(
        CLIPTextConfig(**asdict(config), bos_token_id=None),
        attn_implementation="eager",
        dtype=torch.get_default_dtype(),
    )
    return model


def build_image_encoder(config: ImageEncoderConfig) -> nn.Module:
    """``CLIPVisionModelWithProjection``."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model: nn.Module = CLIPVisionModelWithProjection._from_config(
        CLIPVisionConfig(**asdict(config)), attn_implementation="eager", dtype=torch.get_default_dtype()
    )
    model.get_submodule("vision_model.embeddings.position_embedding").__class__ = _AllPositions
    return model


class _AllPositions(nn.Embedding):
    """Looks up every position, in order: the ids are a buffer, which has no value while weights are fake."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, ARG002 - the signature of nn.Embedding
        return self.weight[None]


def encode_text(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Stable Cascade's text conditions.

    Args:
        model: from `build_text_encoder`.
        input_ids: ``[B, L]`` int64.
        attention_mask: ``[B, L]`` int64; padding is masked, as in diffusers.

    Returns:
        The last layer *before* the final norm ``[B, L, E]`` and the projected state ``[B, 1, P]``, both float32.
    """
    # positions are passed in because the module's buffer of them has no value while weights are fake
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    out = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, output_hidden_states=True)
    return out.hidden_states[-1].float(), out.text_embeds[:, None].float()


def encode_image(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Projected image embedding: ``[B, 3, S, S]`` CLIP-normalised float32 -> ``[B, 1, I]`` float32."""
    dtype = next(model.parameters()).dtype
    embeds: Tensor = model(pixel_values=pixel_values.to(dtype)).image_embeds
    return embeds[:, None].float()
