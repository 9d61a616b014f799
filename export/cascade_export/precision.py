"""What makes half precision right.

What stays float32 whatever an engine's precision is stated in the modules themselves, once: engine inputs and outputs,
the timestep path, every LayerNorm's accumulation, the GRN's reduction. This file decides what depends on the weights:
by which powers of two the residual stream of a denoiser is kept divided, so that fp16 holds it, and which weights are
stored divided, because fp16 does not hold them and the stream is divided behind them.

The published 3.6B Stage C cannot run in fp16 as it is: its stream outgrows 65,504 in the last up block. The factors
are found by running the fp32 module and looking, so they fit fine-tunes and merged LoRAs as well as the official file.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cascade_rt.errors import ExportError
from cascade_rt.loop import Denoising
from cascade_rt.manifest import StreamScalesRecord, TokenizerRecord
from cascade_rt.noise import PictureNoise
from cascade_rt.sampling import PredictionType, make_schedule
from cascade_rt.text import PromptTokenizer, PromptTruncatedWarning

from .loading import load_fp32, plain_json, weights_of
from .models import Denoiser, DenoiserConfig, StreamScales, encode_text
from .models.blocks import Attention, AttnBlock, GlobalResponseNorm, ResBlock, TimestepBlock
from .networks import Checkpoint, TokenizerSource
from .verify import predict_by_module

FP16_MAX = 65504.0
HEADROOM = 4.0
"""Prompts that were not scanned may go further: scanned values stay below ``FP16_MAX / HEADROOM``."""

SCAN_STEPS = 6
SCAN_PROMPTS = (
    "a photo of an astronaut riding a horse on the moon, dramatic light, highly detailed",
    "a large red circle at the left on a blue background",
)
SCAN_BATCH = len(SCAN_PROMPTS)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The largest absolute values that a scan saw.

    Attributes:
        down: in the stream of each level on the way down, also behind its depthwise convolutions and in what its
            blocks add; divided by the level's factor.
        up: likewise on the way up, the deepest level first.
        inner: where no factor reaches: first Linear of the MLPs, queries, keys and values, skip connections.
    """

    down: tuple[float, ...]
    up: tuple[float, ...]
    inner: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a denoiser is made to fit fp16.

    Attributes:
        scales: powers of two that the residual stream is kept divided by.
        divided: key of a weight -> power of two that it is stored divided by.
        seen: the activations that decided the scales.
    """

    scales: StreamScales
    divided: Mapping[str, float]
    seen: Activations

    def apply(self, module: nn.Module) -> None:
        """Have a module divide as its weights will be stored."""
        assert isinstance(module, Denoiser)
        module.stream_scales = self.scales
        for keys, row in module.divisible().items():
            if (stored := self.divided.get(keys[0])) is not None:
                setattr(row.module, row.attribute, stored)

    @property
    def record(self) -> StreamScalesRecord:
        """What the manifest says of it."""
        return StreamScalesRecord(
            down=self.scales.down,
            up=self.scales.up,
            largest_down=tuple(round(x, 3) for x in self.seen.down),
            largest_up=tuple(round(x, 3) for x in self.seen.up),
            largest_inner=round(self.seen.inner, 3),
        )


def fit(module: Denoiser, conditions: Mapping[str, Tensor], prediction_type: PredictionType) -> Fit:
    """Look at a denoiser at work and decide how it fits fp16.

    Args:
        module: fp32, with its weights, unscaled.
        conditions: inputs of `Denoiser.forward` beside sample and ratio, for `SCAN_BATCH` pictures.
        prediction_type: what the module predicts.

    Raises:
        ExportError: it overflows where no factor reaches, or in fp32 already.
    """
    seen = scan(module, conditions, prediction_type)
    scales = choose_scales(seen)
    return Fit(scales=scales, divided=divisions(module, scales), seen=seen)


def scan(
    module: Denoiser, conditions: Mapping[str, Tensor], prediction_type: PredictionType, seed: int = 0
) -> Activations:
    """Run a loop from noise in fp32 and record the largest activations.

    Args:
        module: fp32, with its weights, unscaled.
        conditions: inputs of `Denoiser.forward` beside sample and ratio, for `SCAN_BATCH` pictures.
        prediction_type: what the module predicts.
        seed: of the latents.

    Raises:
        ExportError: fp32 itself overflows, so the weights are damaged.
    """
    with _recorded(module) as seen:
        run_loop(module, conditions, prediction_type, seed)
    levels = range(module.config.levels)
    found = Activations(
        down=tuple(seen[f"down {i}"] for i in levels),
        up=tuple(seen[f"up {i}"] for i in levels),
        inner=max(seen["inner"], *(seen[f"skip {i}"] for i in levels)),
    )
    if not math.isfinite(max(*found.down, *found.up, found.inner)):
        raise ExportError("the weights overflow in fp32 already; the checkpoint is damaged")
    return found


def run_loop(
    module: Denoiser, conditions: Mapping[str, Tensor], prediction_type: PredictionType, seed: int = 0
) -> None:
    """Have a denoiser see what it sees in a loop, from noise to a picture; arguments and errors are those of `scan`."""
    side = max(16, 4 * module.config.granularity)
    noise = PictureNoise("torch-cpu", (seed,), SCAN_BATCH)
    latents = noise.normal((SCAN_BATCH, module.config.in_channels, side, side))
    schedule = make_schedule("original", SCAN_STEPS, prediction_type, shift=2.0)
    predict = predict_by_module(module, schedule, conditions)
    loop = Denoising(schedule=schedule, latents=latents, noise=noise, name="fp32 PyTorch")
    while not loop.done:
        prediction = predict(*loop.inputs())
        if not np.isfinite(prediction).all():
            raise ExportError("the weights overflow in fp32 already; the checkpoint is damaged")
        latents = loop.advance(prediction).latents
        # with weights that were never trained a loop runs away; what a network sees has about unit size
        loop.replace_latents(latents / max(1.0, float(np.abs(latents).max()) / 8))


def choose_scales(activations: Activations) -> StreamScales:
    """The smallest powers of two that keep every level's stream below fp16's end, with headroom.

    Raises:
        ExportError: something is too large where no factor reaches.
    """
    limit = FP16_MAX / HEADROOM
    if activations.inner > limit:
        raise ExportError(
            f"this checkpoint still overflows fp16 inside its blocks (values of {activations.inner:.0f} where up to "
            f"{limit:.0f} are safe), where rescaling does not reach; use --precision bf16 or fp32"
        )

    def factor(value: float) -> float:
        return 2.0 ** max(0, math.ceil(math.log2(max(value, 1.0) / limit)))

    return StreamScales(tuple(map(factor, activations.down)), tuple(map(factor, activations.up)))


def divisions(module: Denoiser, scales: StreamScales) -> dict[str, float]:
    """Which weights are stored divided: those that fp16 does not hold, by the smallest power of two that helps.

    Args:
        module: fp32, with its weights.
        scales: what the stream is divided by; no weight is divided by more.

    Returns:
        Key of a weight -> power of two. Weights that fp16 holds are not in it.
    """
    with torch.device("meta"):
        scaled = Denoiser(module.config)
    scaled.stream_scales = scales
    weights = module.state_dict()
    found: dict[str, float] = {}
    for keys, row in scaled.divisible().items():
        largest = max(float(weights[key].abs().max()) for key in keys)
        if largest > FP16_MAX:
            found |= dict.fromkeys(keys, min(row.most, 2.0 ** math.ceil(math.log2(largest / FP16_MAX))))
    return found


def seeded_conditions(config: DenoiserConfig, seed: int = 0) -> dict[str, Tensor]:
    """Conditions for a scan where the checkpoint has no text encoder: of the size that CLIP's have."""
    c, g = config, torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(SCAN_BATCH, *shape, generator=g)

    conditions = {"clip_text_pooled": draw(1, c.clip_text_pooled_in_channels)}
    if c.clip_text_in_channels is not None and c.clip_image_in_channels is not None:
        conditions["clip_text"] = draw(77, c.clip_text_in_channels)
        conditions["clip_img"] = torch.zeros(SCAN_BATCH, 1, c.clip_image_in_channels)
    if c.effnet_in_channels is not None:
        conditions["effnet"] = draw(c.effnet_in_channels, 6, 6)
    return conditions


@dataclass(frozen=True)
class Prompts:
    """`SCAN_PROMPTS`, encoded.

    Attributes:
        hidden: ``[SCAN_BATCH, L, E]``.
        pooled: ``[SCAN_BATCH, 1, P]``.
    """

    hidden: Tensor
    pooled: Tensor


def encode_prompts(checkpoint: Checkpoint) -> Prompts | None:
    """The embeddings of `SCAN_PROMPTS`; None where the checkpoint cannot encode texts."""
    network, tokenizer = checkpoint.network("text_encoder"), checkpoint.tokenizer()
    if network is None or network.weights is None or tokenizer is None:
        return None
    config = plain_json(network.config)
    encoder = load_fp32("text_encoder", config, weights_of("text_encoder", config, network)).eval()
    with torch.inference_mode():
        return Prompts(*encode_text(encoder, *prompt_ids(tokenizer)))


def prompt_ids(tokenizer: TokenizerSource) -> tuple[Tensor, Tensor]:
    """The tokens of `SCAN_PROMPTS` and their mask, both ``[SCAN_BATCH, L]`` int64."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncatedWarning)
        path = Path(folder) / "tokenizer.json"
        path.write_text(tokenizer.text, encoding="utf-8")
        record = TokenizerRecord(file=path.name, max_length=tokenizer.max_length, pad_id=tokenizer.pad_id)
        ids, mask = (torch.from_numpy(x) for x in PromptTokenizer(path, record)(SCAN_PROMPTS))
    return ids, mask


def conditions_of(config: DenoiserConfig, prompts: Prompts | None) -> dict[str, Tensor]:
    """Conditions of a denoiser for `SCAN_BATCH` pictures: of prompts where there are any that fit, else seeded ones."""
    conditions = seeded_conditions(config)
    if prompts is None or prompts.pooled.shape[-1] != config.clip_text_pooled_in_channels:
        return conditions
    conditions["clip_text_pooled"] = prompts.pooled
    if "clip_text" in conditions:
        conditions["clip_text"] = prompts.hidden
    return conditions


@contextmanager
def _recorded(module: Denoiser) -> Iterator[dict[str, float]]:
    """Record the largest absolute values of every place that half precision has to hold."""
    seen: dict[str, float] = defaultdict(float)
    handles = []

    def note(place: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen[place] = max(seen[place], float(output.abs().max()))

    def watch(part: nn.Module, place: str) -> None:
        handles.append(part.register_forward_hook(partial(note, place)))

    last = module.config.levels - 1
    for way, stacks, changes in (
        ("down", module.down_blocks, module.down_downscalers),
        ("up", module.up_blocks, module.up_upscalers),
    ):
        for index, stack in enumerate(stacks):
            place = f"{way} {index}"
            for block in stack.children():
                watch(block, place)
                for part in block.modules():
                    if isinstance(part, GlobalResponseNorm | Attention):
                        watch(part, place)  # what the block adds, where the factor is taken
                if isinstance(block, ResBlock):
                    watch(block.depthwise, place)
                    watch(block.channelwise[0], "inner")
                elif isinstance(block, AttnBlock):
                    for linear in (block.attention.to_q, block.attention.to_k, block.attention.to_v):
                        watch(linear, "inner")
                else:
                    assert isinstance(block, TimestepBlock)
            if way == "down" and index < last:
                watch(list(stack.children())[-1], f"skip {index}")
        for change in changes:
            if isinstance(change, nn.Sequential):
                watch(change, "inner")
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
