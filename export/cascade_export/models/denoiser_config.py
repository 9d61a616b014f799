"""What Stage C and Stage B are made of: diffusers' ``config.json`` of either, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from cascade_rt.errors import CheckpointError

RES, TIME, ATTN = BLOCK_TYPES = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


@dataclass(frozen=True)
class DenoiserConfig:
    """Architecture of a denoiser, in diffusers' ``StableCascadeUNet`` words (its ``config.json``).

    ``up_*`` lists are given deepest level first, as in every published config.
    """

    in_channels: int = 16
    out_channels: int = 16
    timestep_ratio_embedding_dim: int = 64
    patch_size: int = 1
    conditioning_dim: int = 2048
    block_out_channels: tuple[int, ...] = (2048, 2048)
    num_attention_heads: tuple[int, ...] = (32, 32)
    down_num_layers_per_block: tuple[int, ...] = (8, 24)
    up_num_layers_per_block: tuple[int, ...] = (24, 8)
    down_blocks_repeat_mappers: tuple[int, ...] = (1, 1)
    up_blocks_repeat_mappers: tuple[int, ...] = (1, 1)
    block_types_per_layer: tuple[tuple[str, ...], ...] = (BLOCK_TYPES, BLOCK_TYPES)
    clip_text_in_channels: int | None = None
    clip_text_pooled_in_channels: int = 1280
    clip_image_in_channels: int | None = None
    clip_seq: int = 4
    effnet_in_channels: int | None = None
    pixel_mapper_in_channels: int | None = None
    kernel_size: int = 3
    dropout: tuple[float, ...] = (0.1, 0.1)
    self_attn: tuple[bool, ...] = (True, True)
    timestep_conditioning_type: tuple[str, ...] = ("sca", "crp")
    switch_level: tuple[bool, ...] | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> DenoiserConfig:
        """Read diffusers' ``config.json``; scalars that diffusers broadcasts over the levels are broadcast here.

        Raises:
            CheckpointError: an unknown block type, lists of unequal length, or a field of the wrong kind.
        """
        known = {f.name for f in fields(cls)}
        values = {k: _freeze(v) for k, v in config.items() if k in known}
        try:
            levels = len(values.get("block_out_channels", cls.block_out_channels))
            for name in ("dropout", "self_attn"):
                value = values.get(name, getattr(cls, name)[0])
                values[name] = value if isinstance(value, tuple) else (value,) * levels
            made = cls(**values)
            made._validate()
        except TypeError as error:
            raise CheckpointError(f"this denoiser config cannot be read: {error}") from error
        return made

    def _validate(self) -> None:
        levels = len(self.block_out_channels)
        per_level = (
            "num_attention_heads",
            "down_num_layers_per_block",
            "up_num_layers_per_block",
            "down_blocks_repeat_mappers",
            "up_blocks_repeat_mappers",
            "block_types_per_layer",
            "dropout",
            "self_attn",
        )
        for name in per_level:
            if len(getattr(self, name)) != levels:
                raise CheckpointError(
                    f"config field {name} has {len(getattr(self, name))} entries, but block_out_channels has {levels}"
                )
        if self.switch_level is not None and len(self.switch_level) != levels - 1:
            raise CheckpointError(
                f"config field switch_level has {len(self.switch_level)} entries; {levels} levels need {levels - 1}"
            )
        for level, types in enumerate(self.block_types_per_layer):
            for name in types:
                if name not in BLOCK_TYPES:
                    raise CheckpointError(
                        f"config field block_types_per_layer names an unknown block {name!r}; "
                        f"known are {', '.join(BLOCK_TYPES)}"
                    )
            if ATTN in types and not 0 < self.num_attention_heads[level] <= self.block_out_channels[level]:
                raise CheckpointError(
                    f"level {level} has attention blocks but num_attention_heads is {self.num_attention_heads[level]}"
                )
            if level < levels - 1 and types[:1] != (RES,):
                raise CheckpointError(f"level {level} begins with {types[:1]}; the skip connection needs a {RES} there")
        sizes = (self.in_channels, self.out_channels, self.patch_size, self.conditioning_dim, self.clip_seq)
        if not all(isinstance(x, int) and x > 0 for x in (*sizes, *self.block_out_channels, self.kernel_size)):
            raise CheckpointError(f"a size in the denoiser config is no positive integer: {self}")
        if self.kernel_size % 2 == 0:
            raise CheckpointError(f"kernel_size {self.kernel_size} is even; the residual blocks need an odd one")

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def is_prior(self) -> bool:
        """Whether this is a Stage C: conditioned on text tokens and image embeddings."""
        return self.clip_text_in_channels is not None

    @property
    def granularity(self) -> int:
        """Height and width of the latents must be multiples of this for every level to divide evenly."""
        halvings = self.levels - 1 if self.switch_level is None else sum(self.switch_level)
        return int(self.patch_size * 2**halvings)

    @property
    def modulation_size(self) -> int:
        """Columns of the modulation table: ``2 * channels`` for every TimestepBlock, in execution order."""
        return sum(
            2 * width * types.count(TIME) * (down + up)
            for width, types, down, up in zip(
                self.block_out_channels,
                self.block_types_per_layer,
                self.down_num_layers_per_block,
                self.up_num_layers_per_block[::-1],
                strict=True,
            )
        )

    @property
    def attention_levels(self) -> dict[int, tuple[int, int]]:
        """``{level: (number of attention blocks, width of their keys)}`` for the levels that have attention."""
        found = {}
        for level, types in enumerate(self.block_types_per_layer):
            layers = self.down_num_layers_per_block[level] + self.up_num_layers_per_block[::-1][level]
            if count := types.count(ATTN) * layers:
                heads = self.num_attention_heads[level]
                found[level] = (count, self.block_out_channels[level] // heads * heads)
        return found


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value
