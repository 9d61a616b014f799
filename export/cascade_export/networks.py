"""What every kind of checkpoint answers with: networks, a tokenizer, and what it says of the cascade as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cascade_rt.errors import MissingCheckpointError
from cascade_rt.files import name_of
from cascade_rt.manifest import Preset, PresetName, PreviewFactors, PreviewName, SamplerDefaults
from cascade_rt.sampling import PredictionType, SamplerName

from .weights import TensorSource

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_no_pickle(path: Path) -> None:
    """Refuse a file by its name, whether or not it is there.

    Raises:
        MissingCheckpointError: it is a pickle.
    """
    if path.suffix in PICKLES:
        raise MissingCheckpointError(
            f"{name_of(path.name)} is a pickle, which can run code when it is read; only .safetensors is read. "
            "Convert it with safetensors.torch.save_file, or download the .safetensors variant"
        )


@dataclass(frozen=True, kw_only=True)
class Network:
    """The weights of one component of a checkpoint, and the config that says what they are.

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


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The config of diffusers' ``DDPMWuerstchenScheduler``, and our own key: what the network predicts.

    Attributes:
        scaler: warps the ratios.
        s: offset of the cosine schedule.
        prediction_type: of the network that it samples.
    """

    scaler: float = 1.0
    s: float = 0.008
    prediction_type: PredictionType = "epsilon"


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What a checkpoint says of the cascade as a whole; None where it says nothing.

    Attributes:
        source: hub id or file name, for the manifest; never a path of this machine.
        name: for people.
        size: ``big``, ``small``, ``tiny`` or ``custom``.
        licence: of the weights.
        revision: commit of the source.
        height: default picture height in pixels.
        width: default picture width in pixels.
        resolution_multiple: pixels a Stage C latent stands for.
        latent_dim_scale: Stage B latents for one Stage C latent.
        prior_scheduler: Stage C's.
        decoder_scheduler: Stage B's.
        default_sampler: preset that is used when a request names none.
        sampling: defaults of the samplers that the checkpoint carries; None: `presets.default_sampling`.
        default_preset: trade of quality against time that is used when a request names none.
        presets: trades of quality against time; None: `presets.default_presets`.
        previews: latents to colours; None: `presets.PUBLISHED_PREVIEWS`.
    """

    source: str
    name: str | None = None
    size: str | None = None
    licence: str | None = None
    revision: str | None = None
    height: int | None = None
    width: int | None = None
    resolution_multiple: float = 42.67
    latent_dim_scale: float = 10.67
    prior_scheduler: SchedulerConfig = SchedulerConfig()
    decoder_scheduler: SchedulerConfig = SchedulerConfig()
    default_sampler: SamplerName | None = None
    sampling: Mapping[SamplerName, SamplerDefaults] | None = None
    default_preset: PresetName = "quality"
    presets: Mapping[PresetName, Preset] | None = None
    previews: Mapping[PreviewName, PreviewFactors] | None = None


class Checkpoint(Protocol):
    """A place that weights come from."""

    @property
    def facts(self) -> CheckpointFacts:
        """What it says of the cascade as a whole."""
        ...

    def network(self, name: str) -> Network | None:
        """The network of a component, or None if the checkpoint has none.

        Raises:
            CheckpointError: it has one that cannot be read.
        """
        ...

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer, or None if the checkpoint has none.

        Raises:
            CheckpointError: it has one that cannot be read.
        """
        ...
