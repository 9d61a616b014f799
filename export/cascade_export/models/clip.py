"""The CLIP encoders, from transformers: they are a well-kept library's, and only their outputs are ours to choose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def build_text_encoder(config: dict[str, Any]) -> nn.Module:
    """``CLIPTextModelWithProjection`` of a ``config.json``; eager attention traces to plain matrix products."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    made = CLIPTextConfig.from_dict(config)
    model: nn.Module = CLIPTextModelWithProjection._from_config(
        made, attn_implementation="eager", dtype=torch.get_default_dtype()
    )
    return model


def build_image_encoder(config: dict[str, Any]) -> nn.Module:
    """``CLIPVisionModelWithProjection`` of a ``config.json``."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    made = CLIPVisionConfig.from_dict(config)
    model: nn.Module = CLIPVisionModelWithProjection._from_config(
        made, attn_implementation="eager", dtype=torch.get_default_dtype()
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
