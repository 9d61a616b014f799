"""Folders that ``save_pretrained`` of diffusers' pipelines and models writes, and folders of original files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from msgspec import Meta, Struct, field
from msgspec.structs import replace

from cascade_rt.errors import CheckpointError, plain, shown
from cascade_rt.files import MIB, name_of, read_bounded
from cascade_rt.manifest import LoopDefaults, Preset, PresetName, PreviewFactors, PreviewName, SamplerDefaults
from cascade_rt.sampling import PREDICTION_TYPES, SamplerName
from cascade_rt.schema import parse_json, validated
from cascade_rt.stages import Size

from . import presets
from .catalog import COMPONENTS, Component, check_config
from .models import StageAConfig, TextEncoderConfig
from .networks import PICKLES, CheckpointFacts, Network, SchedulerConfig, TokenizerSource
from .originals import split_single_file
from .tokenizer import read_tokenizer
from .weights import COUNTERS, SafetensorsSource

TOKENIZER_FOLDERS = ("tokenizer", "prior_tokenizer")
SCHEDULER = "DDPMWuerstchenScheduler"
MOST_JSON_BYTES = 32 * MIB
"""A shard index of a hundred thousand tensors has less."""

T = TypeVar("T")
_Text = Annotated[str, Meta(max_length=2000)]
_Steps = Annotated[int, Meta(ge=1, le=1000)]
_Scale = Annotated[float, Meta(ge=-1000, le=1000)]
_Side = Annotated[int, Meta(ge=64, le=4096)]


class _OurDefaults(Struct, frozen=True, kw_only=True):
    """Steps and scales of one sampler, as a checkpoint carries them."""

    prior_num_inference_steps: _Steps | None = None
    prior_guidance_scale: _Scale | None = None
    num_inference_steps: _Steps | None = None
    decoder_guidance_scale: _Scale | None = None


class _OurSampling(Struct, frozen=True, kw_only=True):
    """Which sampler a checkpoint was made for, and with which settings."""

    sampler: SamplerName | None = None
    original: _OurDefaults = _OurDefaults()
    diffusers: _OurDefaults = _OurDefaults()
    lcm: _OurDefaults = _OurDefaults()


class _OurSection(Struct, frozen=True, kw_only=True):
    """The section ``cascade_rt`` of ``model_index.json``, which a checkpoint may carry."""

    name: _Text | None = None
    size: Literal["tiny", "small", "big", "custom"] | None = None
    licence: _Text | None = None
    height: _Side | None = None
    width: _Side | None = None
    sampling: _OurSampling | None = None
    default_preset: PresetName = "quality"
    presets: dict[PresetName, Preset] | None = None
    previews: dict[PreviewName, PreviewFactors] | None = None


class _ModelIndex(Struct, frozen=True, kw_only=True):
    """What is used of a pipeline's ``model_index.json``."""

    resolution_multiple: Annotated[float, Meta(ge=1, le=1024)] = 42.67
    latent_dim_scale: Annotated[float, Meta(ge=0.1, le=1024)] = 10.67
    cascade_rt: _OurSection = _OurSection()


class _SchedulerFile(Struct, frozen=True, kw_only=True):
    """What is used of ``scheduler_config.json``; ``prediction_type`` is our own key."""

    class_name: _Text = field(name="_class_name", default=SCHEDULER)
    scaler: Annotated[float, Meta(gt=0, le=100)] = 1.0
    s: Annotated[float, Meta(gt=0, le=100)] = 0.008
    prediction_type: _Text = "epsilon"


class _ShardIndex(Struct, frozen=True, kw_only=True):
    """What is used of ``….safetensors.index.json``."""

    weight_map: Annotated[dict[str, Annotated[str, Meta(max_length=255)]], Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class FolderCheckpoint:
    """What ``save_pretrained`` of diffusers' pipelines writes, or the folder of one model, or original files.

    Use `open_folder`, which checks what the folder says of itself.
    """

    path: Path
    size: Size | None
    facts: CheckpointFacts

    def network(self, name: str) -> Network | None:
        """The network of a component."""
        row = COMPONENTS[name]
        place = _find(self.path, self.size, row)
        if place is None:
            if self.size != "small" and _find(self.path, "small", row) is not None:
                raise CheckpointError(f"{name_of(self.path)} holds only the small {name}; add --size small")
            return None
        if place.is_file():
            part = split_single_file(place).get(name)
            if part is None:
                raise CheckpointError(f"{name_of(place)} holds no {name}, as its name says")
            return part
        config = _read_json(place / "config.json")
        if config is None:
            raise CheckpointError(f"{name_of(place)} has no config.json; it says what architecture the weights are")
        check_config(name, config, name_of(place / "config.json"))
        schedulers = {"stage_c": self.facts.prior_scheduler, "stage_b": self.facts.decoder_scheduler}
        prediction = schedulers.get(name, presets.PLAIN_SCHEDULER).prediction_type
        return Network(config=config, weights=SafetensorsSource(_weight_files(place)), prediction_type=prediction)

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer; a checkpoint without a text encoder has none."""
        encoder = _find(self.path, self.size, COMPONENTS["text_encoder"])
        folder = next((self.path / n for n in TOKENIZER_FOLDERS if (self.path / n).is_dir()), None)
        if encoder is None or folder is None:
            return None
        where = encoder / "config.json"
        return read_tokenizer(folder, TextEncoderConfig.from_dict(_read_json(where) or {}, name_of(where)))


def open_folder(
    path: Path,
    size: Size | None,
    *,
    source: str | None = None,
    licence: str | None = None,
    revision: str | None = None,
) -> FolderCheckpoint:
    """Open a folder, and read what it says of itself.

    Args:
        path: the folder.
        size: ``small`` prefers folders and files of the small networks, where both lie there.
        source: what the manifest says that the weights came from; None: the folder's name.
        licence: of the weights; None: what the folder says.
        revision: commit of the source.

    Raises:
        CheckpointError: nothing in it is a part of a cascade, or what it says cannot be read.
    """
    if not any(_find(path, size, row) for row in COMPONENTS.values()):
        raise CheckpointError(_nothing_in(path, size))
    _check_text_encoders(path)
    facts = read_facts(path, size, source=source, licence=licence, revision=revision)
    return FolderCheckpoint(path=path, size=size, facts=facts)


def read_facts(
    path: Path,
    size: Size | None,
    *,
    source: str | None = None,
    licence: str | None = None,
    revision: str | None = None,
) -> CheckpointFacts:
    """What a folder says of the cascade as a whole; arguments as of `open_folder`.

    Raises:
        CheckpointError: what it says cannot be read.
    """
    where = path / "model_index.json"
    index = validated(_read_json(where) or {}, _ModelIndex, name_of(where), CheckpointError)
    ours = index.cascade_rt
    decoder = _read_scheduler(path / "scheduler") or presets.PLAIN_SCHEDULER
    return CheckpointFacts(
        source=source or plain(path.resolve().name),
        name=ours.name,
        size=ours.size or size,
        licence=licence or ours.licence,
        revision=revision,
        height=ours.height,
        width=ours.width,
        resolution_multiple=index.resolution_multiple,
        latent_dim_scale=index.latent_dim_scale,
        # a combined pipeline keeps the prior's beside the decoder's
        prior_scheduler=_read_scheduler(path / "prior_scheduler") or decoder,
        decoder_scheduler=decoder,
        default_sampler=ours.sampling.sampler if ours.sampling else None,
        sampling=_defaults_of(ours.sampling, _latent_scale(path)) if ours.sampling else None,
        default_preset=ours.default_preset,
        presets=ours.presets,
        previews=ours.previews,
    )


def _find(path: Path, size: Size | None, row: Component) -> Path | None:
    """The folder or single file of a component."""
    small = size == "small"
    folders = (*row.lite_folders, *row.folders) if small else row.folders
    for folder in folders:
        if (path / folder).is_dir():
            return path / folder
    if row.is_config(_read_json(path / "config.json") or {}):
        return path
    for stem in row.lite_root_files if small and row.lite_root_files else row.root_files:
        if (path / f"{stem}.safetensors").is_file():
            return path / f"{stem}.safetensors"
    return None


def _nothing_in(path: Path, size: Size | None) -> str:
    """The message of a folder without a part of a cascade."""
    if size != "small" and any(_find(path, "small", row) for row in COMPONENTS.values()):
        return f"{name_of(path)} holds only the small networks of a cascade; add --size small"
    pickles = [entry.name for entry in sorted(path.iterdir()) if entry.suffix in PICKLES]
    files = [entry.name for entry in sorted(path.iterdir()) if entry.suffix == ".safetensors"]
    more = f"; {name_of(pickles[0])} is a pickle, which can run code when read, and is not opened" if pickles else ""
    if files:
        more += f"; to read {name_of(files[0])}, name the file itself: --checkpoint {name_of(path / files[0])}"
    known = sorted({folder for row in COMPONENTS.values() for folder in row.folders})
    return f"{name_of(path)} holds no part of a cascade (none of {', '.join(known)}){more}"


def _latent_scale(path: Path) -> float:
    """Stage A's factor, where the folder has a Stage A with a config."""
    place = _find(path, None, COMPONENTS["stage_a"])
    config = _read_json(place / "config.json") if place is not None and place.is_dir() else None
    return StageAConfig.from_dict(config, name_of(path)).scale_factor if config else presets.DIFFUSERS_LATENT_SCALE


def _check_text_encoders(path: Path) -> None:
    """A combined pipeline stores the text encoder twice; a bundle has one, so they must be the same.

    Raises:
        CheckpointError: they differ.
    """
    both = [path / folder for folder in COMPONENTS["text_encoder"].folders]
    if not all(place.is_dir() for place in both):
        return
    first, second = (SafetensorsSource(_weight_files(place)) for place in both)
    names = [name for name in first.shapes if not name.endswith(COUNTERS)]
    if first.shapes != second.shapes or not all(torch.equal(first.read(name), second.read(name)) for name in names):
        raise CheckpointError(
            f"{name_of(path)} has two different text encoders ({' and '.join(p.name for p in both)}); a bundle has "
            "one. Export the prior and the decoder from checkpoints of their own, into two bundles"
        )


def _read_scheduler(folder: Path) -> SchedulerConfig | None:
    """A scheduler folder, None if there is none.

    Raises:
        CheckpointError: a scheduler of another class, or values that are none.
    """
    path = folder / "scheduler_config.json"
    document = _read_json(path)
    if document is None:
        return None
    read = validated(document, _SchedulerFile, name_of(path), CheckpointError)
    if read.class_name != SCHEDULER:
        raise CheckpointError(
            f"{name_of(path)} is of a {shown(read.class_name)}; Stable Cascade is sampled with a {SCHEDULER}"
        )
    prediction = next((known for known in PREDICTION_TYPES if known == read.prediction_type), None)
    if prediction is None:
        raise CheckpointError(
            f"{name_of(path)} has prediction_type {shown(read.prediction_type)}; known are "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    return SchedulerConfig(scaler=read.scaler, s=read.s, prediction_type=prediction)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model: shards by their index, else the one file, full precision first.

    Raises:
        CheckpointError: there is none.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp32", ".bf16", ".fp16"):
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if (document := _read_json(index)) is not None:
                return _shards(index, document)
            if (path := folder / f"{stem}{variant}.safetensors").exists():
                return [path]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    pickles = [entry.name for entry in sorted(folder.iterdir()) if entry.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{name_of(folder)} has only {name_of(pickles[0])}, a pickle, which can run code when it is read; only "
            ".safetensors is read. Save it again with save_pretrained(safe_serialization=True)"
        )
    raise CheckpointError(
        f"{name_of(folder)} has no weights (diffusion_pytorch_model.safetensors or model.safetensors)"
    )


def _shards(index: Path, document: Mapping[str, Any]) -> list[Path]:
    """The files that a shard index names.

    Raises:
        CheckpointError: it names none, or one that lies elsewhere.
    """
    names = sorted(set(validated(dict(document), _ShardIndex, name_of(index), CheckpointError).weight_map.values()))
    for name in names:
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise CheckpointError(
                f"{name_of(index)}: weight_map names {shown(name)}, which is no .safetensors file beside it"
            )
    return [index.parent / name for name in names]


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None if there is no such file.

    Raises:
        CheckpointError: it is no regular file, too large, or no JSON object.
    """
    try:
        data = read_bounded(path, MOST_JSON_BYTES, CheckpointError)
    except (FileNotFoundError, NotADirectoryError):
        return None
    document = parse_json(data, name_of(path), CheckpointError)
    if not isinstance(document, dict):
        raise CheckpointError(f"{name_of(path)} holds a {type(document).__name__}, not a JSON object")
    return document


def _defaults_of(ours: _OurSampling, latent_scale: float) -> dict[SamplerName, SamplerDefaults]:
    """Sampling settings that a checkpoint carries: our defaults with its steps and scales."""
    own: dict[SamplerName, _OurDefaults] = {
        "original": ours.original,
        "diffusers": ours.diffusers,
        "lcm": ours.lcm,
    }
    return {
        name: SamplerDefaults(
            prior=_with(defaults.prior, own[name].prior_num_inference_steps, own[name].prior_guidance_scale),
            decoder=_with(defaults.decoder, own[name].num_inference_steps, own[name].decoder_guidance_scale),
            latent_scale=defaults.latent_scale,
        )
        for name, defaults in presets.default_sampling(latent_scale).items()
    }


def _with(base: LoopDefaults, steps: int | None, scale: float | None) -> LoopDefaults:
    changes = {"num_inference_steps": steps, "guidance_scale": scale}
    return replace(base, **{name: value for name, value in changes.items() if value is not None})
