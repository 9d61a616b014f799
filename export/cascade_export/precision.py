"""What makes half precision right.

What stays float32 whatever an engine's precision is stated in the modules themselves, once: engine inputs and outputs,
the timestep path, every LayerNorm's accumulation, the GRN's reduction. This file decides the one thing that depends on
the weights: by which powers of two the residual stream of a denoiser is kept divided, so that fp16 holds it.

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
from cascade_rt.sampling import PredictionType, denoise_step, make_schedule
from cascade_rt.text import PromptTokenizer, PromptTruncatedWarning, TokenizerRecord

from .components import Checkpoint
from .loading import load_fp32, plain_json, weights_of
from .models import Denoiser, DenoiserConfig, StreamScales
from .models.blocks import Attention, AttnBlock, GlobalResponseNorm, ResBlock, TimestepBlock
from .models.clip import encode_text
from .weights import TensorSource

FP16_MAX = 65504.0
HEADROOM = 4.0
"""Prompts that were not scanned may go further: scanned values stay below ``FP16_MAX / HEADROOM``."""

SCAN_STEPS = 6
SCAN_PROMPTS = (
    "a photo of an astronaut riding a horse on the moon, dramatic light, highly detailed",
    "a large red circle at the left on a blue background",
)
SCAN_BATCH = len(SCAN_PROMPTS)


@dataclass(frozen=True)
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
    side = max(16, 4 * module.config.granularity)
    rng = np.random.default_rng(seed)
    shape = (SCAN_BATCH, module.config.in_channels, side, side)
    latents = rng.standard_normal(shape, dtype=np.float32)
    schedule = make_schedule("original", SCAN_STEPS, prediction_type, shift=2.0)
    with _recorded(module) as seen, torch.inference_mode():
        for step in range(len(schedule)):
            ratio = torch.full((SCAN_BATCH,), float(schedule.ratios[step]))
            prediction = module(torch.from_numpy(latents), ratio, **conditions).numpy()
            noise = rng.standard_normal(shape, dtype=np.float32)
            latents = denoise_step(schedule, step, latents, prediction, noise)
            # with weights that were never trained a loop runs away; what a network sees has about unit size
            latents /= max(1.0, float(np.abs(latents).max()) / 8)
    levels = range(module.config.levels)
    found = Activations(
        tuple(seen[f"down {i}"] for i in levels),
        tuple(seen[f"up {i}"] for i in levels),
        max(seen["inner"], *(seen[f"skip {i}"] for i in levels)),
    )
    if not math.isfinite(max(*found.down, *found.up, found.inner)):
        raise ExportError("the weights overflow in fp32 already; the checkpoint is damaged")
    return found


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


def scan_record(activations: Activations, scales: StreamScales) -> dict[str, Any]:
    """What the manifest says of the choice."""
    return {
        "down": list(scales.down),
        "up": list(scales.up),
        "largest_down": [round(x, 3) for x in activations.down],
        "largest_up": [round(x, 3) for x in activations.up],
        "largest_inner": round(activations.inner, 3),
    }


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


def prompt_conditions(config: DenoiserConfig, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Conditions for a scan: of `SCAN_PROMPTS` where the checkpoint can encode them, else seeded ones."""
    conditions = seeded_conditions(config)
    component, tokenizer = checkpoint.component("text_encoder"), checkpoint.tokenizer()
    if component is None or component.weights is None or tokenizer is None:
        return conditions
    own = plain_json(component.config)
    encoder = load_fp32("text_encoder", own, weights_of("text_encoder", own, component))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncatedWarning)
        path = Path(folder) / "tokenizer.json"
        path.write_text(tokenizer.text, encoding="utf-8")
        record = TokenizerRecord(path.name, tokenizer.max_length, tokenizer.pad_id)
        ids, mask = (torch.from_numpy(x) for x in PromptTokenizer(path, record)(SCAN_PROMPTS))
    with torch.inference_mode():
        hidden, pooled = encode_text(encoder, ids, mask)
    conditions["clip_text_pooled"] = pooled
    if "clip_text" in conditions:
        conditions["clip_text"] = hidden
    return conditions


def fit_scales(
    name: str, config: dict[str, Any], source: TensorSource, prediction_type: PredictionType, checkpoint: Checkpoint
) -> tuple[StreamScales, dict[str, Any]]:
    """Scan a denoiser of a checkpoint and choose its factors.

    Args:
        name: ``stage_c`` or ``stage_b``.
        config: its config.
        source: its tensors.
        prediction_type: what it predicts.
        checkpoint: where prompts can be encoded, if anywhere.

    Returns:
        The factors, and the manifest's record of the scan.

    Raises:
        ExportError: it overflows where no factor reaches.
    """
    conditions = prompt_conditions(DenoiserConfig.from_dict(config), checkpoint)
    module = load_fp32(name, config, source)
    assert isinstance(module, Denoiser)
    seen = scan(module, conditions, prediction_type)
    scales = choose_scales(seen)
    return scales, scan_record(seen, scales)


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
