"""The sizes of a picture at every stage of a cascade."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import check_pixels
from .errors import BundleError
from .manifest import EngineRecord, Manifest, ModelFacts
from .sampling import SamplerName
from .stages import AxisRange, EngineSpec, TensorSpec


@dataclass(frozen=True)
class Sizes:
    """The sizes of one picture at every stage, each (height, width).

    Attributes:
        prior: Stage C's latents.
        decoder: Stage B's latents.
        picture: what is returned: the decoded picture, cropped to the request.
    """

    prior: tuple[int, int]
    decoder: tuple[int, int]
    picture: tuple[int, int]


def plan_sizes(facts: ModelFacts, grids: tuple[int, int], sampler: SamplerName, height: Any, width: Any) -> Sizes:
    """Sizes of all stages for a requested picture.

    Stage C's latents are the request over ``resolution_multiple``, rounded up, as in both sources. Stage B's must
    divide evenly through its levels. diffusers takes their size from Stage C's and lets levels of odd size be
    resampled, where it does not fail; the ``diffusers`` sampler here follows it where they divide evenly. Otherwise
    the size comes from the pixels, as in the authors' code, rounded up, and the picture is cropped.

    Args:
        facts: compressions of the cascade.
        grids: what height and width of Stage C's and of Stage B's latents must be multiples of.
        sampler: whose sizes to follow.
        height: requested pixels.
        width: requested pixels.

    Raises:
        RequestError: a size that is not accepted.
    """
    axes = [
        _plan_axis(facts, grids, sampler, check_pixels(name, size))
        for name, size in (("height", height), ("width", width))
    ]
    prior, decoder, picture = ((axes[0][i], axes[1][i]) for i in range(3))
    return Sizes(prior, decoder, picture)


def _plan_axis(facts: ModelFacts, grids: tuple[int, int], sampler: SamplerName, pixels: int) -> tuple[int, int, int]:
    prior = round_up(math.ceil(pixels / facts.resolution_multiple), grids[0])
    decoder = int(prior * facts.latent_dim_scale)
    agree = abs(facts.latent_dim_scale * facts.compression / facts.resolution_multiple - 1) < 0.02
    if not agree:  # a decoder with a scale of its own: what it makes of the prior's latents is the picture
        return prior, round_up(decoder, grids[1]), decoder * facts.compression
    if sampler != "diffusers" or decoder % grids[1]:
        decoder = round_up(math.ceil(pixels / facts.compression), grids[1])
    return prior, decoder, min(pixels, decoder * facts.compression)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below ``size``."""
    return -(-size // multiple) * multiple


def decoder_size(image_embeddings: tuple[int, int], facts: ModelFacts, multiple: int) -> tuple[int, int]:
    """Height and width of Stage B's latents for image embeddings of that height and width."""
    height, width = (round_up(int(side * facts.latent_dim_scale), multiple) for side in image_embeddings)
    return height, width


def grids_of(manifest: Manifest) -> tuple[int, int]:
    """What Stage C's and Stage B's latents must be multiples of; 1 where the bundle has no such engine."""
    found = []
    for name in ("stage_c.step", "stage_b.step"):
        records = manifest.records(name)
        found.append(range_of(records[0], "height").multiple if records else 1)
    return found[0], found[1]


def range_of(engine: EngineRecord | EngineSpec, name: str) -> AxisRange:
    """The accepted sizes of a named axis of an engine.

    Raises:
        BundleError: the manifest has none.
    """
    if name not in engine.ranges:
        raise BundleError(
            f"the manifest has no range of {name} for {engine.name}; build the bundle again with cascade-export"
        )
    return engine.ranges[name]


def shape_of(spec: EngineSpec, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor of an engine, for named sizes.

    Raises:
        BundleError: the manifest has no such tensor, or its axes do not follow from these sizes.
    """
    tensor = tensor_of(spec, name)
    try:
        return tensor.shape(sizes)
    except (KeyError, ValueError):
        told = ", ".join(f"{key} {size}" for key, size in sizes.items())
        raise BundleError(
            f"the manifest's engine {spec.name} has {name} with the axes {list(tensor.axes)}, which have no size for "
            f"{told}; build the bundle again with cascade-export"
        ) from None


def tensor_of(spec: EngineSpec, name: str) -> TensorSpec:
    """A tensor of an engine.

    Raises:
        BundleError: the manifest has none of that name.
    """
    found = next((tensor for tensor in spec.tensors if tensor.name == name), None)
    if found is None:
        raise BundleError(
            f"the manifest's engine {spec.name} has no tensor {name}; build the bundle again with cascade-export"
        )
    return found
