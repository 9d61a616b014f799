"""What Stage C and Stage B are made of: diffusers' ``config.json`` of either, checked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from cascade_rt.errors import shown
from cascade_rt.stages import LARGEST_SIZE

from .config import Channels, Layers, read_config

RES, TIME, ATTN = BLOCK_TYPES = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")

_Word = Annotated[str, Meta(max_length=60)]
_Repeats = Annotated[int, Meta(ge=1, le=64)]
_Heads = Annotated[int, Meta(ge=-1, le=4096)]
_Levels = Meta(min_length=1, max_length=8)
_MOST_BLOCKS = 2048


@dataclass(frozen=True)
class DenoiserConfig:
    """Architecture of a denoiser, in diffusers' ``StableCascadeUNet`` words (its ``config.json``).

    ``up_*`` lists are given deepest level first, as in every published config. Where the number of heads does not
    divide the width, an attention block is ``width // heads * heads`` wide inside, as in diffusers.

    ``control_blocks`` is ours: the residual blocks of a Stage C in front of which a ControlNet's residuals are added,
    counted in the order of execution (down, then up; a repeated block counts each time). Empty: it takes none.
    """

    in_channels: Channels = 16
    out_channels: Channels = 16
    timestep_ratio_embedding_dim: Annotated[int, Meta(ge=4, le=4096)] = 64
    patch_size: Annotated[int, Meta(ge=1, le=16)] = 1
    conditioning_dim: Channels = 2048
    block_out_channels: Annotated[tuple[Channels, ...], _Levels] = (2048, 2048)
    num_attention_heads: tuple[_Heads, ...] = (32, 32)
    down_num_layers_per_block: tuple[Layers, ...] = (8, 24)
    up_num_layers_per_block: tuple[Layers, ...] = (24, 8)
    down_blocks_repeat_mappers: tuple[_Repeats, ...] = (1, 1)
    up_blocks_repeat_mappers: tuple[_Repeats, ...] = (1, 1)
    block_types_per_layer: tuple[Annotated[tuple[_Word, ...], Meta(min_length=1, max_length=16)], ...] = (
        BLOCK_TYPES,
        BLOCK_TYPES,
    )
    clip_text_in_channels: Channels | None = None
    clip_text_pooled_in_channels: Channels = 1280
    clip_image_in_channels: Channels | None = None
    clip_seq: Annotated[int, Meta(ge=1, le=256)] = 4
    effnet_in_channels: Channels | None = None
    pixel_mapper_in_channels: Channels | None = None
    kernel_size: Annotated[int, Meta(ge=1, le=31)] = 3
    dropout: tuple[Annotated[float, Meta(ge=0, le=1)], ...] = (0.1, 0.1)
    self_attn: tuple[bool, ...] = (True, True)
    timestep_conditioning_type: Annotated[tuple[Annotated[str, Meta(pattern="^[a-z0-9]{1,20}$")], ...], _Levels] = (
        "sca",
        "crp",
    )
    switch_level: tuple[bool, ...] | None = None
    control_blocks: Annotated[tuple[Annotated[int, Meta(ge=0, le=4095)], ...], Meta(max_length=256)] = ()

    def check(self) -> None:
        """Refuse fields that contradict each other.

        Raises:
            ValueError: lists of unequal length, an unknown block type, or a network that cannot be built.
        """
        self._check_lengths()
        self._check_blocks()
        if self.in_channels != self.out_channels:
            raise ValueError(
                f"in_channels is {self.in_channels} and out_channels {self.out_channels}; both are the same"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} is even; the residual blocks need an odd one")
        if self.is_prior == (self.effnet_in_channels is not None):
            raise ValueError(
                f"clip_text_in_channels is {self.clip_text_in_channels} and effnet_in_channels "
                f"{self.effnet_in_channels}; a Stage C has the first, a Stage B the second"
            )
        if self.is_prior and self.clip_image_in_channels is None:
            raise ValueError("clip_image_in_channels is null; a Stage C needs the width of image embeddings")
        self._check_control()

    def _check_control(self) -> None:
        blocks = self.control_blocks
        if not blocks:
            return
        if any(later <= earlier for earlier, later in itertools.pairwise(blocks)):
            raise ValueError(f"control_blocks {list(blocks)} does not rise; each residual has its own block")
        if blocks[-1] >= self.executed_res_blocks:
            raise ValueError(
                f"control_blocks names residual block {blocks[-1]}; this network executes {self.executed_res_blocks}, "
                "counted from 0"
            )
        if not self.is_prior or self.granularity != self.patch_size or len(set(self.block_out_channels)) > 1:
            raise ValueError("control_blocks needs a Stage C whose levels have one size and one width")

    def _check_lengths(self) -> None:
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
            if len(getattr(self, name)) != self.levels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but block_out_channels has {self.levels}"
                )
        if self.switch_level is not None and len(self.switch_level) != self.levels - 1:
            raise ValueError(
                f"switch_level has {len(self.switch_level)} entries; {self.levels} levels need {self.levels - 1}"
            )
        if len(set(self.timestep_conditioning_type)) < len(self.timestep_conditioning_type):
            raise ValueError(f"timestep_conditioning_type {shown(self.timestep_conditioning_type)} names one twice")

    def _check_blocks(self) -> None:
        for level, types in enumerate(self.block_types_per_layer):
            if unknown := [name for name in types if name not in BLOCK_TYPES]:
                raise ValueError(
                    f"block_types_per_layer names an unknown block {shown(unknown[0])}; "
                    f"known are {', '.join(BLOCK_TYPES)}"
                )
            if ATTN in types and not 0 < self.num_attention_heads[level] <= self.block_out_channels[level]:
                raise ValueError(
                    f"level {level} has attention blocks but num_attention_heads is {self.num_attention_heads[level]}"
                )
            if level < self.levels - 1 and types[0] != RES:
                raise ValueError(f"level {level} begins with {types[0]}; the skip connection needs a {RES} there")
        pairs = zip(self.down_num_layers_per_block, self.up_num_layers_per_block[::-1], strict=True)
        blocks = sum(len(t) * (down + up) for t, (down, up) in zip(self.block_types_per_layer, pairs, strict=True))
        if blocks > _MOST_BLOCKS:
            raise ValueError(f"the layers have {blocks} blocks together; at most {_MOST_BLOCKS} are read")
        if not 0 < self.modulation_size <= LARGEST_SIZE:
            raise ValueError(f"block_types_per_layer gives a modulation table of {self.modulation_size} columns")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "the config of a denoiser") -> DenoiserConfig:
        """Read diffusers' ``config.json``; scalars that diffusers broadcasts over the levels are broadcast here.

        Raises:
            CheckpointError: it does not describe a denoiser.
        """
        values = dict(config)
        widths = values.get("block_out_channels", cls.block_out_channels)
        if isinstance(widths, list | tuple):
            for name in ("dropout", "self_attn"):
                value = values.get(name, getattr(cls, name)[0])
                if isinstance(value, bool | int | float):
                    values[name] = (value,) * len(widths)
        return read_config(cls, values, where)

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.block_out_channels)

    @property
    def is_prior(self) -> bool:
        """Whether this is a Stage C: conditioned on text tokens and image embeddings."""
        return self.clip_text_in_channels is not None

    @property
    def executed_res_blocks(self) -> int:
        """How many residual blocks one call executes; a block that is repeated counts each time."""
        ways = (
            (self.down_num_layers_per_block, self.down_blocks_repeat_mappers),
            (self.up_num_layers_per_block[::-1], self.up_blocks_repeat_mappers[::-1]),
        )
        return sum(
            types.count(RES) * layers[level] * repeats[level]
            for level, types in enumerate(self.block_types_per_layer)
            for layers, repeats in ways
        )

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
