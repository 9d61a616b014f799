"""One racer and its task, and the tensors that every racer of a task is given. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rt.backends import PROVIDERS
from cascade_rt.bundle import Bundle
from cascade_rt.request import plan_sizes
from cascade_rt.stages import Size

OURS = "cascade-rt"
TORCH_PEERS = ("eager", "compile", "compile-max-autotune")
PEERS = (OURS, *TORCH_PEERS)

STEPS = ("stage_c.step", "stage_b.step")
CONTEXTS = ("stage_c.context", "stage_b.context")
TASKS = ("text_encoder", "stage_c.context", "stage_c.step", "stage_b.context", "stage_b.step", "stage_a.decode")
PICTURE, HOST = "picture", "prior_loop"

RATIO = 0.7  # of the schedule: noise and picture both show
PROMPT = "a large red circle at the left on a blue background"
SEED = 0


def device_of(provider: str) -> str:
    """``cpu`` or ``cuda``, PyTorch's words, for a provider."""
    return PROVIDERS[provider].device


@dataclass(frozen=True)
class Job:
    """Who runs what.

    Attributes:
        what: an engine's name, `PICTURE`, or `HOST` (Stage C's loop, whose host share is wanted).
        peer: one of `PEERS`.
        provider: ``cpu``, ``cuda`` and so on; of PyTorch, its device.
        precision: of the weights and the wide activations.
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
    engines = bundle.manifest.engines
    grids = [
        engines[name][0].spec.ranges["height"].multiple if name in engines else 1
        for name in ("stage_c.step", "stage_b.step")
    ]
    sizes = plan_sizes(bundle.manifest.model, (grids[0], grids[1]), "diffusers", pixels, pixels)
    return sizes.prior[0], sizes.decoder[0]


def draw(bundle: Bundle, what: str, batch: int, pixels: int) -> dict[str, NDArray[Any]]:
    """The tensors of a task as the loop would draw them; the same for every racer.

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
        length = int(bundle.engine(what, "onnx").spec.inputs[0].axes[1])
        ids = rng.integers(3, config["vocab_size"] - 3, (batch, length))
        ids[:, -1] = config["eos_token_id"]
        return {"input_ids": ids.astype(np.int64), "attention_mask": np.ones((batch, length), np.int64)}
    if what == "stage_a.decode":
        channels = int(bundle.engine(what, "onnx").spec.inputs[0].axes[1])
        return {"latents": normal(batch, channels, decoder, decoder)}
    stage = what.partition(".")[0] if what != HOST else "stage_c"
    config = models[stage].config
    pooled = int(config["clip_text_pooled_in_channels"])
    feeds = {"ratio": np.full(batch, RATIO, np.float32), "clip_text_pooled": normal(batch, 1, pooled)}
    if stage == "stage_b":
        feeds["latents"] = normal(batch, int(config["in_channels"]), decoder, decoder)
        feeds["effnet"] = normal(batch, int(config["effnet_in_channels"]), prior, prior)
        return feeds
    tokens = bundle.engine("stage_c.context", "onnx").spec.ranges["tokens"].opt
    if bundle.manifest.tokenizer is not None:
        tokens = bundle.manifest.tokenizer.max_length
    feeds["latents"] = normal(batch, int(config["in_channels"]), prior, prior)
    feeds["clip_text"] = normal(batch, tokens, int(config["clip_text_in_channels"]))
    feeds["clip_img"] = np.zeros((batch, 1, int(config["clip_image_in_channels"])), np.float32)
    return feeds
