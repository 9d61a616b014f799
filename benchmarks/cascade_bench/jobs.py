"""One racer and its task, and the tensors that every racer of a task is given. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rt.backends import PROVIDERS
from cascade_rt.bundle import Bundle
from cascade_rt.image import resize_bilinear
from cascade_rt.sampling import timestep_embedding
from cascade_rt.sizes import grids_of, plan_sizes
from cascade_rt.stages import Size

Feeds = Mapping[str, NDArray[Any]]

OURS = "cascade-rt"
TORCH_PEERS = ("eager", "compile", "compile-max-autotune")
PEERS = (OURS, *TORCH_PEERS)

STEPS = ("stage_c.step", "stage_b.step")
CONTEXTS = ("stage_c.context", "stage_b.context")
TASKS = ("text_encoder", "stage_c.context", "stage_c.step", "stage_b.context", "stage_b.step", "stage_a.decode")
PICTURE, HOST = "picture", "prior_loop"

RATIO = 0.7
"""Timestep ratio of a denoiser's step: there the latents hold both noise and picture."""
PROMPT = "a large red circle at the left on a blue background"
SEED = 0


def device_of(provider: str) -> str:
    """``cpu`` or ``cuda``, PyTorch's words, for a provider."""
    return PROVIDERS[provider].device


@dataclass(frozen=True, kw_only=True)
class Job:
    """Who runs what.

    Attributes:
        what: an engine's name, `PICTURE`, or `HOST` (Stage C's loop, whose host share is wanted).
        peer: one of `PEERS`.
        provider: ``cpu``, ``cuda`` and so on; of PyTorch, its device.
        precision: a name of `stages.PRECISIONS`.
        size: ``tiny``, ``small`` or ``big``.
        batch: rows of the network's batch (guidance doubles it); of a picture, pictures.
        pixels: side of the picture.
        steps: (Stage C, Stage B) of a picture or a loop.
        bundle: folder with the weights in this precision.
        threads: within an operator, for everyone.
    """

    what: str
    peer: str
    provider: str
    precision: str
    size: Size
    batch: int
    pixels: int
    steps: tuple[int, int]
    bundle: str
    threads: int

    @property
    def label(self) -> str:
        """For progress bars and tables."""
        return f"{self.what} {self.peer} {self.provider} {self.precision}"

    @property
    def device(self) -> str:
        """Where it computes: its roofline, and its rival, are that device's."""
        return device_of(self.provider)

    @property
    def task(self) -> tuple[str, str, int, int, tuple[int, int]]:
        """What must be equal for two racers to be compared."""
        return self.what, self.size, self.batch, self.pixels, self.steps


def latent_sizes(bundle: Bundle, pixels: int) -> tuple[int, int]:
    """Sides of Stage C's and Stage B's latents for a square picture, as the pipeline plans them."""
    sizes = plan_sizes(bundle.manifest.model, grids_of(bundle.manifest), "diffusers", pixels, pixels)
    return sizes.prior[0], sizes.decoder[0]


def stage_of(what: str) -> str:
    """``stage_c`` or ``stage_b``, whose denoiser a task runs."""
    return "stage_c" if what == HOST else what.partition(".")[0]


def draw(bundle: Bundle, what: str, batch: int, pixels: int) -> dict[str, NDArray[Any]]:
    """The tensors of a task, of the sizes that the pipeline plans; the same for every racer.

    Args:
        bundle: whose sizes count.
        what: one of `TASKS`, or `HOST`.
        batch: rows.
        pixels: side of the picture.

    Returns:
        float32 and int64 arrays. Denoisers get ``latents``, ``ratio`` ``[B]`` and their conditions under diffusers'
        names; ``effnet`` has Stage C's size, as diffusers takes it.
    """
    rng = np.random.default_rng(SEED)
    prior, decoder = latent_sizes(bundle, pixels)
    models = bundle.manifest.models

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    if what == "text_encoder":
        config = models["text_encoder"].config
        shape = bundle.engine(what, "onnx").spec.tensor("input_ids").shape({"batch": batch})
        ids = rng.integers(3, config["vocab_size"] - 3, shape)
        ids[:, -1] = config["eos_token_id"]
        return {"input_ids": ids.astype(np.int64), "attention_mask": np.ones(shape, np.int64)}
    if what == "stage_a.decode":
        sizes = {"batch": batch, "height": decoder, "width": decoder}
        return {"latents": normal(*bundle.engine(what, "onnx").spec.tensor("latents").shape(sizes))}
    stage = stage_of(what)
    side = prior if stage == "stage_c" else decoder
    context = bundle.engine(f"{stage}.context", "onnx").spec
    sizes = {"batch": batch, "height": side, "width": side, "images": 1}
    if "tokens" in context.ranges:
        tokenizer = bundle.manifest.tokenizer
        sizes["tokens"] = context.ranges["tokens"].opt if tokenizer is None else tokenizer.max_length
    feeds: dict[str, NDArray[Any]] = {"ratio": np.full(batch, RATIO, np.float32)}
    feeds["latents"] = normal(batch, int(models[stage].config["in_channels"]), side, side)
    for tensor in context.inputs:
        if tensor.name == "effnet":
            feeds[tensor.name] = normal(*tensor.shape(sizes)[:2], prior, prior)
        elif tensor.name == "clip_img":
            feeds[tensor.name] = np.zeros(tensor.shape(sizes), np.float32)
        elif tensor.name != "timestep_embedding":
            feeds[tensor.name] = normal(*tensor.shape(sizes))
    return feeds


def context_feeds(bundle: Bundle, stage: str, feeds: Feeds) -> dict[str, NDArray[Any]]:
    """What a denoiser's context engine is given for drawn tensors: a schedule of one timestep, and the conditions.

    Args:
        bundle: whose engine it is.
        stage: ``stage_c`` or ``stage_b``.
        feeds: from `draw`.
    """
    spec = bundle.engine(f"{stage}.context", "onnx").spec
    rows, _, height, width = feeds["latents"].shape
    sizes = {"batch": rows, "height": height, "width": width}
    conditions = {name: array for name, array in feeds.items() if name not in ("latents", "ratio")}
    if "effnet" in conditions:
        resized = resize_bilinear(conditions["effnet"], *spec.tensor("effnet").shape(sizes)[2:])
        conditions["effnet"] = np.ascontiguousarray(resized)
    dim = spec.tensor("timestep_embedding").axes[1]
    assert isinstance(dim, int)  # its width is a number of the checkpoint
    return {"timestep_embedding": timestep_embedding(feeds["ratio"][:1], dim), **conditions}


def step_feeds(feeds: Feeds) -> dict[str, NDArray[Any]]:
    """What a denoiser's step engine is given beside its context: every row of the batch at the only timestep."""
    return {"latents": feeds["latents"], "step": np.zeros(len(feeds["latents"]), np.int64)}
