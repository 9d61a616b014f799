"""Folders that ``save_pretrained`` of diffusers' pipelines and models writes, and folders of original files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cascade_rt.bundle import LoopDefaults, SamplerPreset
from cascade_rt.errors import CheckpointError
from cascade_rt.sampling import PREDICTION_TYPES
from cascade_rt.stages import Size

from . import presets
from .components import PICKLES, Component, Facts, ScheduleFacts, TokenizerSource
from .originals import split_single_file
from .weights import SafetensorsSource

FOLDERS: dict[str, tuple[str, ...]] = {
    "stage_c": ("prior", "prior_prior"),
    "stage_b": ("decoder",),
    "stage_a": ("vqgan",),
    "text_encoder": ("text_encoder", "prior_text_encoder"),
    "image_encoder": ("image_encoder", "prior_image_encoder"),
    "effnet": ("effnet",),
    "previewer": ("previewer",),
}
"""Where diffusers' prior, decoder and combined pipelines save each component (effnet and previewer: ours)."""

LITE_FOLDERS = {"stage_c": "prior_lite", "stage_b": "decoder_lite"}
ROOT_FILES = {
    "stage_c": "stage_c",
    "stage_b": "stage_b",
    "stage_a": "stage_a",
    "effnet": "effnet_encoder",
    "previewer": "previewer",
}
CLASS_NAMES = {"PaellaVQModel": "stage_a", "SemanticEncoder": "effnet", "Previewer": "previewer"}
TOKENIZER_FOLDERS = ("tokenizer", "prior_tokenizer")


@dataclass
class FolderCheckpoint:
    """What ``save_pretrained`` of diffusers' pipelines writes, or the folder of one model, or original files."""

    path: Path
    size: Size | None
    source: str | None = None
    licence: str | None = None
    revision: str | None = None
    _schedules: dict[str, ScheduleFacts] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Read what the folder says of itself.

        Raises:
            CheckpointError: there is nothing in it that is a part of a cascade.
        """
        self._index = _read_json(self.path / "model_index.json") or {}
        decoder = _read_schedule(self.path / "scheduler")
        self._schedules = {
            "stage_b": decoder or ScheduleFacts(),
            # a combined pipeline keeps the prior's beside the decoder's
            "stage_c": _read_schedule(self.path / "prior_scheduler") or decoder or ScheduleFacts(),
        }
        self._refuse_two_text_encoders()
        if not any(self._find(name) for name in FOLDERS):
            pickles = [p.name for p in sorted(self.path.rglob("*")) if p.suffix in PICKLES]
            also = f"; {pickles[0]} is a pickle, which can run code when read, and is not opened" if pickles else ""
            known = sorted({f for folders in FOLDERS.values() for f in folders})
            raise CheckpointError(f"{self.path} holds no part of a cascade (none of {', '.join(known)}){also}")

    @property
    def facts(self) -> Facts:
        """What holds for the cascade as a whole."""
        ours = self._index.get("cascade_rt", {})
        return Facts(
            source=self.source or self.path.resolve().name,
            name=ours.get("name"),
            size=ours.get("size") or self.size,
            licence=self.licence or ours.get("licence"),
            revision=self.revision,
            height=ours.get("height"),
            width=ours.get("width"),
            resolution_multiple=self._index.get("resolution_multiple", 42.67),
            latent_dim_scale=self._index.get("latent_dim_scale", 10.67),
            prior_schedule=self._schedules["stage_c"],
            decoder_schedule=self._schedules["stage_b"],
            default_sampler=ours.get("sampling", {}).get("sampler"),
            sampling=_sampling(ours["sampling"], self._stage_a_scale()) if "sampling" in ours else None,
        )

    def component(self, name: str) -> Component | None:
        """A network."""
        place = self._find(name)
        if place is None:
            return None
        if place.is_file():
            part = split_single_file(SafetensorsSource([place]), place).get(name)
            return None if part is None else Component(*part)
        config = _read_json(place / "config.json")
        if config is None:
            raise CheckpointError(f"{place} has no config.json; it says what architecture the weights are")
        prediction = self._schedules.get(name, ScheduleFacts()).prediction_type
        return Component(config, SafetensorsSource(_weight_files(place)), prediction)

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer, turned into one ``tokenizer.json`` where it is in CLIP's older two files."""
        for name in TOKENIZER_FOLDERS:
            folder = self.path / name
            if folder.is_dir():
                return _read_tokenizer(folder, _read_json((self._find("text_encoder") or folder) / "config.json") or {})
        return None

    def _find(self, name: str) -> Path | None:
        folders = FOLDERS[name]
        if self.size == "small" and name in LITE_FOLDERS:
            folders = (LITE_FOLDERS[name], *folders)
        for folder in folders:
            if (self.path / folder).is_dir():
                return self.path / folder
        if _component_of(_read_json(self.path / "config.json") or {}) == name:
            return self.path
        if name in ROOT_FILES:
            stem = ROOT_FILES[name] + ("_lite" if self.size == "small" and name in LITE_FOLDERS else "")
            for variant in (stem, f"{stem}_bf16"):
                if (self.path / f"{variant}.safetensors").is_file():
                    return self.path / f"{variant}.safetensors"
        return None

    def _stage_a_scale(self) -> float:
        place = self._find("stage_a")
        config = (_read_json(place / "config.json") if place and place.is_dir() else None) or {}
        return float(config.get("scale_factor", presets.DIFFUSERS_LATENT_SCALE))

    def _refuse_two_text_encoders(self) -> None:
        """A combined pipeline stores the text encoder twice; a bundle has one, so they must be the same."""
        both = [self.path / folder for folder in FOLDERS["text_encoder"]]
        if not all(p.is_dir() for p in both):
            return
        first, second = (SafetensorsSource(_weight_files(p)) for p in both)
        same = first.shapes == second.shapes and all(
            bool((first.read(n) == second.read(n)).all()) for n in list(first.shapes)
        )
        if not same:
            raise CheckpointError(
                f"{self.path} has two different text encoders (text_encoder, prior_text_encoder); a bundle has one. "
                "Export the prior and the decoder from checkpoints of their own, into two bundles"
            )


def _read_schedule(folder: Path) -> ScheduleFacts | None:
    """A scheduler folder, None if there is none.

    Raises:
        CheckpointError: a scheduler of another class, or values that are none.
    """
    config = _read_json(folder / "scheduler_config.json")
    if config is None:
        return None
    kind = config.get("_class_name", "DDPMWuerstchenScheduler")
    if kind != "DDPMWuerstchenScheduler":
        raise CheckpointError(f"{folder} is a {kind}; Stable Cascade is sampled with a DDPMWuerstchenScheduler")
    scaler, s = config.get("scaler", 1.0), config.get("s", 0.008)
    if not all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < 100 for x in (scaler, s)):
        raise CheckpointError(f"{folder} has scaler {scaler!r} and s {s!r}; positive numbers are needed")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise CheckpointError(f"{folder} has prediction_type {prediction!r}; known are {', '.join(PREDICTION_TYPES)}")
    return ScheduleFacts(float(scaler), float(s), prediction)


def _component_of(config: Mapping[str, Any]) -> str | None:
    """Which component a bare model folder is, from its config."""
    name = config.get("_class_name")
    if name == "StableCascadeUNet":
        return "stage_b" if config.get("effnet_in_channels") else "stage_c"
    if name in CLASS_NAMES:
        return CLASS_NAMES[name]
    architecture = (config.get("architectures") or [""])[0]
    return {"CLIPTextModelWithProjection": "text_encoder", "CLIPVisionModelWithProjection": "image_encoder"}.get(
        architecture
    )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model: shards by their index, else the one file, full precision first.

    Raises:
        CheckpointError: there is none.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        for variant in ("", ".fp32", ".bf16", ".fp16"):
            index = _read_json(folder / f"{stem}.safetensors.index{variant}.json")
            if index is not None:
                return _shards(folder, index)
            if (path := folder / f"{stem}{variant}.safetensors").exists():
                return [path]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{folder} has only {pickles[0]}, a pickle, which can run code when it is read; only .safetensors is. "
            "Save it again with save_pretrained(safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} has no weights (diffusion_pytorch_model.safetensors or model.safetensors)")


def _shards(folder: Path, index: Mapping[str, Any]) -> list[Path]:
    """The files that a shard index names.

    Raises:
        CheckpointError: it names none, or one that lies elsewhere.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"the shard index in {folder} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise CheckpointError(
                f"the shard index in {folder} names {name!r}, which is no .safetensors file beside it"
            )
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _read_tokenizer(folder: Path, text_config: Mapping[str, Any]) -> TokenizerSource:
    config = _read_json(folder / "tokenizer_config.json") or {}
    if (folder / "tokenizer.json").is_file() and "model_max_length" not in config:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return TokenizerSource(text, text_config["max_position_embeddings"], text_config["pad_token_id"])
    from transformers import CLIPTokenizerFast

    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    except Exception as error:  # transformers raises many unrelated types for damaged files
        raise CheckpointError(f"{folder} is not a readable CLIP tokenizer: {error}") from error
    length = min(tokenizer.model_max_length, text_config.get("max_position_embeddings", 77))
    return TokenizerSource(tokenizer.backend_tokenizer.to_str(), length, tokenizer.pad_token_id)


def _sampling(row: Mapping[str, Any], latent_scale: float) -> dict[str, SamplerPreset]:
    """Sampling settings that a checkpoint carries: our defaults with its steps and scales."""
    made = {}
    for name, preset in presets.default_sampling(latent_scale).items():
        own = row.get(name, {})

        def loop(base: LoopDefaults, steps: str, scale: str, own: Mapping[str, Any] = own) -> LoopDefaults:
            values = {"num_inference_steps": own.get(steps), "guidance_scale": own.get(scale)}
            return replace(base, **{k: v for k, v in values.items() if v is not None})

        made[name] = SamplerPreset(
            loop(preset.prior, "prior_num_inference_steps", "prior_guidance_scale"),
            loop(preset.decoder, "num_inference_steps", "decoder_guidance_scale"),
            preset.latent_scale,
        )
    return made
