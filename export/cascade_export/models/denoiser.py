"""Stage C and Stage B: one network, two configurations.

The forward pass is split where the loop splits it. `Denoiser.context` holds everything that depends on the prompt or
the schedule but not on the latents, and runs once a picture; `Denoiser.step` is what runs in every step.
Matches: ``diffusers/models/unets/unet_stable_cascade.py``, ``StableCascade/modules/stage_c.py`` and ``stage_b.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import (
    AttnBlock,
    Conv2d,
    ConvTranspose2d,
    Divisible,
    LayerNorm,
    Linear,
    Pointwise,
    ResBlock,
    TimestepBlock,
    layer_norm,
    shrink,
)
from .denoiser_config import RES, TIME, DenoiserConfig


class Context(NamedTuple):
    """What one prompt and one schedule mean to a denoiser; the same for every step.

    Attributes:
        modulation: ``[steps, M]``: scale and shift of every TimestepBlock for every timestep of the schedule.
        kv: for each level with attention ``[B, blocks, 2, T, inner]``: keys and values of the condition tokens.
        condition_map: ``[B, H, W, C]``, Stage B only: the effnet and pixel maps, added after the embedding.
        control: ``[B, n, H, W, C]``, Stage C with a ControlNet only: what is added to the stream in front of each of
            the config's ``control_blocks``, divided as the stream is there.
    """

    modulation: Tensor
    kv: tuple[Tensor, ...]
    condition_map: Tensor | None
    control: Tensor | None = None


class Control(NamedTuple):
    """What a ControlNet adds to a Stage C; the same for every step.

    Attributes:
        residuals: ``[B, n, h, w, C]``: a residual for each of ``blocks``. Where h and w are not the stream's size they
            are resized (bilinear, corners aligned); the host resizes them before a graph gets them.
        blocks: for each residual the index of the residual block in front of which it is added to the stream. Blocks
            are counted in the order of execution: down, then up; a block that is executed twice counts twice.
    """

    residuals: Tensor
    blocks: tuple[int, ...]


class StreamScales(NamedTuple):
    """What the residual stream is divided by in each level: powers of two, so that no bit of a weight is lost.

    Attributes:
        down: for each level on the way down, the first (largest) first.
        up: for each level on the way up, the deepest first, as in diffusers' lists.
    """

    down: tuple[float, ...]
    up: tuple[float, ...]


class _Half(NamedTuple):
    """The way down or up: level changes are ``late`` places before the level that they lead to."""

    late: int
    scales: tuple[float, ...]
    stacks: nn.ModuleList
    changes: nn.ModuleList
    repeats: nn.ModuleList


class Rescale(nn.Module):
    """A level change without a strided convolution: 1 x 1 convolution and, where switched on, bilinear resampling.

    Only configs with ``switch_level`` have it; the published Stage C switches it off, so it is a plain projection.
    """

    def __init__(self, in_channels: int, out_channels: int, scale: float | None, up: bool) -> None:
        super().__init__()
        self.scale = scale
        # diffusers keeps the projection at index 0 on the way down and at index 1 on the way up
        projection = Pointwise(in_channels, out_channels)
        self.blocks = nn.ModuleList([nn.Identity(), projection] if up else [projection, nn.Identity()])
        self.up = up

    @property
    def projection(self) -> Pointwise:
        """The 1 x 1 convolution."""
        projection = self.blocks[1 if self.up else 0]
        assert isinstance(projection, Pointwise)
        return projection

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.blocks[1](self._resample(x))  # type: ignore[no-any-return]
        return self._resample(self.blocks[0](x))

    def _resample(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return x
        y = F.interpolate(x.float().permute(0, 3, 1, 2), scale_factor=self.scale, mode="bilinear", align_corners=True)
        return y.permute(0, 2, 3, 1).to(x.dtype)


class Denoiser(nn.Module):
    """Stage C (text -> 16 x h x w latents) or Stage B (those -> 4 x H/4 x W/4 latents)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        widths, patch = config.block_out_channels, config.patch_size
        if config.effnet_in_channels is not None:
            self.effnet_mapper = _map_to(config.effnet_in_channels, widths[0])
        if config.pixel_mapper_in_channels is not None:
            self.pixels_mapper = _map_to(config.pixel_mapper_in_channels, widths[0])
        tokens = config.conditioning_dim * config.clip_seq
        self.clip_txt_pooled_mapper = Linear(config.clip_text_pooled_in_channels, tokens)
        if config.clip_text_in_channels is not None:
            self.clip_txt_mapper = Linear(config.clip_text_in_channels, config.conditioning_dim)
        if config.clip_image_in_channels is not None:
            self.clip_img_mapper = Linear(config.clip_image_in_channels, tokens)
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch), Pointwise(config.in_channels * patch**2, widths[0]), LayerNorm()
        )
        self.down_blocks, self.down_downscalers = nn.ModuleList(), nn.ModuleList()
        self.down_repeat_mappers = nn.ModuleList()
        self.up_blocks, self.up_upscalers = nn.ModuleList(), nn.ModuleList()
        self.up_repeat_mappers = nn.ModuleList()
        for level in range(config.levels):
            self.down_downscalers.append(self._level_change(level, up=False) if level else nn.Identity())
            self.down_blocks.append(self._blocks(level, up=False))
            self.down_repeat_mappers.append(_repeats(widths[level], config.down_blocks_repeat_mappers[level]))
        for level in reversed(range(config.levels)):
            self.up_upscalers.append(self._level_change(level, up=True) if level else nn.Identity())
            self.up_blocks.append(self._blocks(level, up=True))
            self.up_repeat_mappers.append(_repeats(widths[level], config.up_blocks_repeat_mappers[::-1][level]))
        self.clf = nn.Sequential(
            LayerNorm(), Pointwise(widths[0], config.out_channels * patch**2), nn.PixelShuffle(patch)
        )
        self._stream_scales = StreamScales((1.0,) * config.levels, (1.0,) * config.levels)

    def _blocks(self, level: int, up: bool) -> nn.ModuleList:
        c, width = self.config, self.config.block_out_channels[level]
        layers = c.up_num_layers_per_block[::-1][level] if up else c.down_num_layers_per_block[level]
        blocks = nn.ModuleList()
        for layer in range(layers):
            for position, kind in enumerate(c.block_types_per_layer[level]):
                if kind == RES:
                    has_skip = up and level < c.levels - 1 and layer == position == 0
                    skip = width if has_skip else 0
                    blocks.append(ResBlock(width, skip, c.kernel_size, c.dropout[level]))
                elif kind == TIME:
                    blocks.append(TimestepBlock(width, c.timestep_ratio_embedding_dim, c.timestep_conditioning_type))
                else:
                    heads = c.num_attention_heads[level]
                    blocks.append(AttnBlock(width, c.conditioning_dim, heads, c.self_attn[level]))
        return blocks

    def _level_change(self, level: int, up: bool) -> nn.Sequential:
        outer, inner = self.config.block_out_channels[level - 1], self.config.block_out_channels[level]
        source, target = (inner, outer) if up else (outer, inner)
        change: nn.Module
        if self.config.switch_level is not None:
            scale = (2.0 if up else 0.5) if self.config.switch_level[level - 1] else None
            change = Rescale(source, target, scale, up)
        elif up:
            change = ConvTranspose2d(source, target, kernel_size=2, stride=2)
        else:
            change = Conv2d(source, target, kernel_size=2, stride=2)
        return nn.Sequential(LayerNorm(), change)

    @property
    def stream_scales(self) -> StreamScales:
        """What the residual stream is divided by in each level; ones unless it was set."""
        return self._stream_scales

    @stream_scales.setter
    def stream_scales(self, scales: StreamScales) -> None:
        for late, half, stacks, changes, repeats in self._halves(scales):
            if len(half) != self.config.levels or any(k < 1 or math.log2(k) % 1 for k in half):
                raise ValueError(f"stream scales {half} must be {self.config.levels} powers of two, none below 1")
            for index, scale in enumerate(half):
                for block in stacks[index].children():
                    assert isinstance(block, ResBlock | TimestepBlock | AttnBlock)
                    block.set_stream_scale(scale)
                for mapper in repeats[index].children():
                    assert isinstance(mapper, Pointwise)
                    mapper.stream_scale = scale
                # a level change begins with a norm of the level that it leaves
                leaving = index + 1 - late
                if leaving < self.config.levels and isinstance(change := changes[leaving], nn.Sequential):
                    _norm_of(change).stream_scale = scale
        _norm_of(self.clf).stream_scale = scales.up[-1]
        self._stream_scales = scales

    def divisible(self) -> dict[tuple[str, ...], Divisible]:
        """Parameters that may be stored divided, now that the stream is, by their keys in the state dict."""
        found: list[Divisible] = []
        for late, half, stacks, changes, repeats in self._halves(self.stream_scales):
            for index, scale in enumerate(half):
                for block in stacks[index].children():
                    assert isinstance(block, ResBlock | TimestepBlock | AttnBlock)
                    found += block.divisible()
                found += [Divisible(mapper, "bias_scale", ("bias",), scale) for mapper in repeats[index].children()]
                if index >= late and isinstance(change := changes[index - late], nn.Sequential):
                    found.append(Divisible(_change_of(change), "stored_scale", ("weight", "bias"), scale))
        names = {module: f"{name}." for name, module in self.named_modules()}
        keys = {tuple(names[row.module] + parameter for parameter in row.parameters): row for row in found}
        return {parameters: row for parameters, row in keys.items() if row.most > 1}

    def _halves(self, scales: StreamScales) -> Iterator[_Half]:
        yield _Half(0, scales.down, self.down_blocks, self.down_downscalers, self.down_repeat_mappers)
        yield _Half(1, scales.up, self.up_blocks, self.up_upscalers, self.up_repeat_mappers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the wide activations are kept."""
        return self.clip_txt_pooled_mapper.weight.dtype

    def context(
        self,
        timestep_embedding: Tensor,
        clip_text_pooled: Tensor,
        clip_text: Tensor | None = None,
        clip_img: Tensor | None = None,
        effnet: Tensor | None = None,
        residuals: Tensor | None = None,
    ) -> Context:
        """Everything that does not depend on the latents.

        Args:
            timestep_embedding: ``[steps, D]`` float32, `timestep_embedding` of the schedule's ratios.
            clip_text_pooled: ``[B, 1, P]`` float32.
            clip_text: Stage C: ``[B, L, E]`` float32, last hidden state of the text encoder.
            clip_img: Stage C: ``[B, n, I]`` float32, image embeddings; zeros where there is no image.
            effnet: Stage B: ``[B, 16, H / patch, W / patch]`` float32: Stage C's latents, already resized
                (bilinear, corners aligned) to the grid on which the network works. The host resizes, so that no
                graph needs a Resize, which engines lack in bfloat16.
            residuals: Stage C: ``[B, n, H, W, C]`` float32: of a ControlNet, one for each of the config's
                ``control_blocks``, on the grid on which the network works.

        Returns:
            The context, in the dtype of the weights.

        Raises:
            ValueError: ``residuals`` do not fit the network.
        """
        condition = self._condition_tokens(clip_text_pooled, clip_text, clip_img)
        kv = tuple(
            torch.stack([block.condition_kv(condition) for block in blocks], dim=1)
            for blocks in self._attention_blocks().values()
        )
        zero = _embedding_of_zero(timestep_embedding)
        table = [block.modulation(timestep_embedding, zero) for block in self._timestep_blocks()]
        # a network without TimestepBlocks still has a table, of no columns
        modulation = torch.cat([timestep_embedding[:, :0], *table], dim=-1).to(self.dtype)
        control = None
        if residuals is not None:
            blocks = self.config.control_blocks
            control = torch.stack(self._divided(Control(residuals, blocks)), dim=1).to(self.dtype)
        return Context(modulation, kv, self._condition_map(effnet), control)

    @property
    def executed_res_blocks(self) -> int:
        """How many residual blocks one call executes; a block that is repeated counts each time."""
        return len(self._executed())

    def _executed(self) -> list[ResBlock]:
        """The residual blocks in the order of execution; a block that is repeated stands there each time."""
        found: list[ResBlock] = []
        halves = ((self.down_blocks, self.down_repeat_mappers), (self.up_blocks, self.up_repeat_mappers))
        for stacks, repeats in halves:
            for stack, mappers in zip(stacks, repeats, strict=True):
                assert isinstance(mappers, nn.ModuleList)
                found += [b for b in stack.children() if isinstance(b, ResBlock)] * (len(mappers) + 1)
        return found

    def step(self, latents: Tensor, step: Tensor, context: Context) -> Tensor:
        """One denoising step: the network's prediction for ``latents``, each sample at its own row of the table.

        Args:
            latents: ``[B, C, H, W]`` float32; H and W multiples of ``config.granularity``.
            step: ``[B]`` int64: for each sample the row of ``context.modulation``.
            context: from `context`.

        Returns:
            ``[B, C_out, H, W]`` float32.
        """
        added: dict[int, Tensor] = {}
        if context.control is not None:
            parts = [part.squeeze(1) for part in context.control.split(1, dim=1)]  # one Split, as of the tables
            added = dict(zip(self.config.control_blocks, parts, strict=True))
        return self._denoise(latents, context.modulation.index_select(0, step), context, added)

    def forward(
        self,
        sample: Tensor,
        timestep_ratio: Tensor,
        clip_text_pooled: Tensor,
        clip_text: Tensor | None = None,
        clip_img: Tensor | None = None,
        effnet: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """The whole network, with diffusers' argument names: context and step in one call.

        Args:
            sample: ``[B, C, H, W]`` latents.
            timestep_ratio: ``[B]`` float32 in [0, 1]; every sample may have its own.
            clip_text_pooled: ``[B, 1, P]``.
            clip_text: Stage C: ``[B, L, E]``.
            clip_img: Stage C: ``[B, n, I]``.
            effnet: Stage B: ``[B, 16, h, w]`` of any size; resized here.
            control: residuals of a ControlNet, of any size, for any blocks.

        Returns:
            Prediction ``[B, C_out, H, W]`` float32.

        Raises:
            ValueError: ``control`` does not fit the network.
        """
        if effnet is not None:
            size = [s // self.config.patch_size for s in sample.shape[-2:]]
            effnet = F.interpolate(effnet.float(), size=size, mode="bilinear", align_corners=True)
        embedding = timestep_embedding(timestep_ratio, self.config.timestep_ratio_embedding_dim)
        context = self.context(embedding, clip_text_pooled, clip_text, clip_img, effnet)
        added = {} if control is None else dict(zip(control.blocks, self._divided(control), strict=True))
        return self._denoise(sample, context.modulation, context, added)

    def _divided(self, control: Control) -> list[Tensor]:
        """A ControlNet's residuals, each divided as the stream is in front of its block.

        Raises:
            ValueError: they do not fit the network.
        """
        blocks = self._executed()
        count = control.residuals.shape[1]
        if count != len(control.blocks):
            raise ValueError(f"control has {count} residuals for {len(control.blocks)} blocks")
        if beyond := [index for index in control.blocks if not 0 <= index < len(blocks)]:
            raise ValueError(f"control names residual block {beyond[0]}; this network executes {len(blocks)}, from 0")
        parts = zip(control.blocks, control.residuals.unbind(1), strict=True)
        return [shrink(part, blocks[index].stream_scale) for index, part in parts]

    def _denoise(self, latents: Tensor, modulation: Tensor, context: Context, added: Mapping[int, Tensor]) -> Tensor:
        """The network; ``added`` goes onto the stream in front of the executed residual block of that index."""
        executed = itertools.count()  # residual blocks so far
        scales = self.stream_scales
        unshuffle, project, norm = self.embedding
        x = norm(project(unshuffle(latents.to(self.dtype)).permute(0, 2, 3, 1)))
        x = shrink(x, scales.down[0])
        if context.condition_map is not None:
            x = x + context.condition_map
        time_blocks, attn_blocks = self._timestep_blocks(), self._attention_blocks()
        # one Split for all of them: a Split and two Slices each are a hundred small nodes
        halves = iter(modulation[:, None, None].split([b.channels for b in time_blocks for _ in range(2)], dim=-1))
        rows = dict(zip(time_blocks, zip(halves, halves, strict=True), strict=True))
        kvs: dict[AttnBlock, tuple[Tensor, Tensor]] = {}
        for blocks, level_kv in zip(attn_blocks.values(), context.kv, strict=True):
            # one Split a level: unbinding would be a Slice for every part
            parts = iter([part.squeeze(1) for part in level_kv.flatten(1, 2).split(1, dim=1)])
            kvs |= zip(blocks, zip(parts, parts, strict=True), strict=True)

        def run(x: Tensor, blocks: nn.Module, repeats: nn.Module, skip: Tensor | None = None) -> Tensor:
            assert isinstance(blocks, nn.ModuleList)
            assert isinstance(repeats, nn.ModuleList)
            for turn in range(len(repeats) + 1):
                for position, block in enumerate(blocks):
                    if isinstance(block, ResBlock):
                        if (residual := added.get(next(executed))) is not None:
                            x = x + _resized(residual, x).to(x.dtype)
                        x = block(x, skip if position == 0 else None)
                    elif isinstance(block, TimestepBlock):
                        x = block(x, *rows[block])
                    elif isinstance(block, AttnBlock):
                        x = block(x, kvs[block])
                if turn < len(repeats):
                    x = repeats[turn](x)
            return x

        skips: list[Tensor] = []
        levels = range(self.config.levels)
        for i in levels:
            if i:  # the norm in front of a level change has taken the last level's factor out
                x = shrink(self.down_downscalers[i](x), scales.down[i] / _stored_scale(self.down_downscalers[i]))
            x = run(x, self.down_blocks[i], self.down_repeat_mappers[i])
            # a skip goes into a Linear unnormalised, so it is handed on in its true size
            skips.append(shrink(x, 1 / scales.down[i]))
        x = shrink(x, scales.up[0] / scales.down[-1])
        for i in levels:
            skip = skips[-1 - i] if i else None  # the deepest level goes straight on
            x = run(x, self.up_blocks[i], self.up_repeat_mappers[i], skip)
            if i < self.config.levels - 1:
                x = shrink(self.up_upscalers[i](x), scales.up[i + 1] / _stored_scale(self.up_upscalers[i]))
        norm, project, shuffle = self.clf
        # float32 first: ONNX Runtime's CUDA provider has no DepthToSpace in bfloat16
        y: Tensor = shuffle(project(norm(x)).permute(0, 3, 1, 2).float())
        return y

    def _condition_tokens(self, pooled: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor:
        def tokens(mapper: nn.Linear, x: Tensor) -> Tensor:
            y: Tensor = mapper(x.to(self.dtype)).unflatten(-1, (self.config.clip_seq, -1))
            return y.flatten(1, 2)

        condition = tokens(self.clip_txt_pooled_mapper, pooled)
        if self.config.is_prior:
            if text is None or image is None:
                raise ValueError("a Stage C needs clip_text and clip_img beside clip_text_pooled")
            text = self.clip_txt_mapper(text.to(self.dtype))
            condition = torch.cat([text, condition, tokens(self.clip_img_mapper, image)], dim=1)
        return layer_norm(condition)

    def _condition_map(self, effnet: Tensor | None) -> Tensor | None:
        if (effnet is None) != (self.config.effnet_in_channels is None):
            raise ValueError("effnet is needed by a Stage B and by nothing else")
        if effnet is None:
            return None
        result: Tensor = self.effnet_mapper(effnet.to(self.dtype).permute(0, 2, 3, 1))
        if self.config.pixel_mapper_in_channels is not None:
            # inference always passes zero pixels, and the map of a constant picture is constant: one vector
            zero = effnet.new_zeros(1, 1, 1, self.config.pixel_mapper_in_channels, dtype=self.dtype)
            result = result + self.pixels_mapper(zero)
        return shrink(result, self.stream_scales.down[0])

    def _timestep_blocks(self) -> list[TimestepBlock]:
        stacks = (*self.down_blocks, *self.up_blocks)
        return [block for stack in stacks for block in stack.children() if isinstance(block, TimestepBlock)]

    def _attention_blocks(self) -> dict[int, list[AttnBlock]]:
        """``{level: attention blocks, down before up}`` for the levels that have any."""
        found: dict[int, list[AttnBlock]] = {}
        for level in self.config.attention_levels:
            stacks = (self.down_blocks[level], self.up_blocks[self.config.levels - 1 - level])
            found[level] = [block for stack in stacks for block in stack.children() if isinstance(block, AttnBlock)]
        return found


def timestep_embedding(timestep_ratio: Tensor, dim: int, max_positions: int = 10000) -> Tensor:
    """Sinusoidal embedding of timestep ratios, in float32 as the authors compute it.

    Args:
        timestep_ratio: ``[N]`` float32 in [0, 1]. Half precision is refused: ``r * 10000`` in bfloat16 is off by 40.
        dim: width of the embedding.
        max_positions: scale of the ratio and largest period.

    Returns:
        ``[N, dim]`` float32: sines, cosines, and a zero column if ``dim`` is odd.
    """
    if timestep_ratio.dtype != torch.float32:
        raise TypeError(f"timestep_ratio must be float32, not {timestep_ratio.dtype}")
    half = dim // 2
    exponents = torch.arange(half, device=timestep_ratio.device).float()
    frequencies = exponents.mul(-math.log(max_positions) / (half - 1)).exp()
    angles = (timestep_ratio * max_positions)[:, None] * frequencies[None, :]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def _resized(residual: Tensor, x: Tensor) -> Tensor:
    """A ControlNet's residual ``[B, h, w, C]`` at the size of the stream ``[B, H, W, C]``."""
    if residual.shape[1:3] == x.shape[1:3]:
        return residual
    planes = residual.float().permute(0, 3, 1, 2)
    return F.interpolate(planes, size=x.shape[1:3], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)


def _embedding_of_zero(like: Tensor) -> Tensor:
    """`timestep_embedding` of ratio 0, ``[1, D]``: zeros for the sines, ones for the cosines."""
    dim = like.shape[-1]
    half = dim // 2
    row = [0.0] * half + [1.0] * half + [0.0] * (dim % 2)
    return torch.tensor([row], dtype=torch.float32, device=like.device)


def _map_to(in_channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(Pointwise(in_channels, width * 4), nn.GELU(), Pointwise(width * 4, width), LayerNorm())


def _repeats(width: int, repeat: int) -> nn.ModuleList:
    return nn.ModuleList([Pointwise(width, width) for _ in range(repeat - 1)])


def _norm_of(part: nn.Sequential) -> LayerNorm:
    norm = part[0]
    assert isinstance(norm, LayerNorm)
    return norm


def _change_of(part: nn.Sequential) -> Conv2d | ConvTranspose2d | Pointwise:
    """The convolution of a level change."""
    change = part[1]
    if isinstance(change, Rescale):
        return change.projection
    assert isinstance(change, Conv2d | ConvTranspose2d)
    return change


def _stored_scale(part: nn.Module) -> float:
    """What the weights of a level change are stored divided by."""
    return _change_of(part).stored_scale if isinstance(part, nn.Sequential) else 1.0
