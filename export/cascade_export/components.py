"""What every kind of checkpoint answers with: networks, a tokenizer, and facts about the cascade.

A component is one of `models.MODELS`: ``stage_c``, ``stage_b``, ``stage_a``, ``text_encoder``, ``image_encoder``,
``effnet``, ``previewer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cascade_rt.bundle import SamplerPreset
from cascade_rt.errors import MissingCheckpointError
from cascade_rt.sampling import PredictionType, SamplerName

from .weights import TensorSource

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickle(path: Path) -> None:
    """Refuse a file by its name, whether or not it is there.

    Raises:
        MissingCheckpointError: it is a pickle.
    """
    if path.suffix in PICKLES:
        raise MissingCheckpointError(
            f"{path.name} is a pickle, which can run code when it is read; only .safetensors is. "
            "Convert it with safetensors.torch.save_file, or download the .safetensors variant"
        )


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint.

    Attributes:
        config: diffusers' or transformers' ``config.json``.
        weights: its tensors under our keys; None: make seeded ones of the right shapes.
        prediction_type: of a denoiser.
        seed: of weights that are made.
        loras: LoRA files that the weights contain.
    """

    config: dict[str, Any]
    weights: TensorSource | None
    prediction_type: PredictionType = "epsilon"
    seed: int = 0
    loras: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer to be copied into a bundle.

    Attributes:
        text: of ``tokenizer.json``.
        max_length: tokens of the text encoder.
        pad_id: id that fills a prompt up.
    """

    text: str
    max_length: int
    pad_id: int


@dataclass(frozen=True)
class ScheduleFacts:
    """A stage's scheduler config: diffusers' ``DDPMWuerstchenScheduler``, and ours: what the network predicts."""

    scaler: float = 1.0
    s: float = 0.008
    prediction_type: PredictionType = "epsilon"


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says of the cascade as a whole; None where it says nothing."""

    source: str
    name: str | None = None
    size: str | None = None
    licence: str | None = None
    revision: str | None = None
    height: int | None = None
    width: int | None = None
    resolution_multiple: float = 42.67
    latent_dim_scale: float = 10.67
    prior_schedule: ScheduleFacts = ScheduleFacts()
    decoder_schedule: ScheduleFacts = ScheduleFacts()
    default_sampler: SamplerName | None = None
    sampling: Mapping[str, SamplerPreset] | None = None


class Checkpoint(Protocol):
    """A place that weights come from."""

    @property
    def facts(self) -> Facts:
        """What holds for the cascade as a whole."""
        ...

    def component(self, name: str) -> Component | None:
        """A network, or None if the checkpoint has none of that name."""
        ...

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer, or None if the checkpoint has none."""
        ...
