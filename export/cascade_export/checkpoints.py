"""Checkpoints of every format -> config and tensors of each component, under this package's names.

A component is one of `models.MODELS`: ``stage_c``, ``stage_b``, ``stage_a``, ``text_encoder``, ``image_encoder``,
``effnet``, ``previewer``. Only safetensors is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from cascade_rt.bundle import Bundle, LoopDefaults, SamplerPreset, default_bundle_path
from cascade_rt.errors import CheckpointError, MissingCheckpointError, RequestError
from cascade_rt.sampling import PREDICTION_TYPES, PredictionType, SamplerName
from cascade_rt.stages import Size

from . import presets
from .originals import split_single_file
from .weights import SafetensorsSource, TensorSource

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
RANDOM = "random"
HUB_SECONDS = 10


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint.

    Attributes:
        config: diffusers' or transformers' ``config.json``.
        weights: its tensors under our keys; None: make seeded ones of the right shapes.
        prediction_type: of a denoiser.
        seed: of weights that are made.
    """

    config: dict[str, Any]
    weights: TensorSource | None
    prediction_type: PredictionType = "epsilon"
    seed: int = 0


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
    scaler: float = 1.0
    s: float = 0.008
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


def open_checkpoint(place: str | None, size: Size | None) -> Checkpoint:
    """Open a checkpoint.

    Args:
        place: a folder, a ``.safetensors`` file, a bundle, a hub id, ``random[:SEED]``, or None for the official
            weights of ``size``.
        size: ``big``, ``small`` or ``tiny``.

    Raises:
        CheckpointError: it is not there, or not of a kind that is read.
    """
    if place is None:
        if size == "tiny":
            return BundleCheckpoint(default_bundle_path())
        return HubCheckpoint(size or "big")
    kind, _, seed = place.partition(":")
    if kind == RANDOM:
        return RandomCheckpoint(size or "big", _seed(place, seed))
    path = Path(place).expanduser()
    if path.suffix in PICKLES:
        raise MissingCheckpointError(
            f"{path.name} is a pickle, which can run code when it is read; only .safetensors is. "
            "Convert it with safetensors.torch.save_file, or download the .safetensors variant"
        )
    if (path / "cascade.json").is_file():
        return BundleCheckpoint(path)
    if path.is_dir():
        return FolderCheckpoint(path, size)
    if path.is_file():
        return FileCheckpoint(path)
    if place.count("/") == 1 and not place.startswith((".", "/", "~")):
        return HubCheckpoint(size or "big", place)
    raise MissingCheckpointError(
        f"there is no checkpoint at {place}; --checkpoint takes a diffusers folder, a .safetensors file, a hub id or "
        "random:SEED"
    )


def _seed(place: str, seed: str) -> int:
    if not seed:
        return 0
    if not seed.isdigit() or int(seed) >= 2**63:
        raise RequestError(f"{place!r} is not accepted; write random or random:SEED with a seed from 0 to 2**63 - 1")
    return int(seed)


@dataclass(frozen=True)
class RandomCheckpoint:
    """Seeded weights of the official shapes: latency work needs no download. Pictures are noise by construction."""

    size: Size
    seed: int

    @property
    def facts(self) -> Facts:
        """What holds for the cascade as a whole."""
        side = 256 if self.size == "tiny" else 1024
        return Facts(
            source=f"random:{self.seed}",
            name=f"cascade-{self.size} (random weights)",
            size=self.size,
            licence="none (random numbers)",
            height=side,
            width=side,
        )

    def component(self, name: str) -> Component | None:
        """A network."""
        config = presets.config_of(self.size, name)
        return None if config is None else Component(config, None, seed=self.seed)

    def tokenizer(self) -> TokenizerSource | None:
        """A byte tokenizer: with random weights any vocabulary is as good as CLIP's, which needs a download."""
        config = presets.config_of(self.size, "text_encoder")
        return None if config is None else byte_tokenizer(config)


def byte_tokenizer(config: Mapping[str, Any]) -> TokenizerSource:
    """A tokenizer of 256 bytes and CLIP's start and end tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    begin, end = config["bos_token_id"], config["eos_token_id"]
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<|startoftext|>": begin, "<|endoftext|>": end}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|startoftext|>", "<|endoftext|>")])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", begin), ("<|endoftext|>", end)],
    )
    return TokenizerSource(tokenizer.to_str(), config["max_position_embeddings"], config["pad_token_id"])


class BundleCheckpoint:
    """A bundle is a checkpoint too: its weights keep their keys, and its manifest holds the configs."""

    def __init__(self, path: Path) -> None:
        self._bundle = Bundle(path)

    @property
    def facts(self) -> Facts:
        """What holds for the cascade as a whole."""
        manifest = self._bundle.manifest
        m = manifest.model
        return Facts(
            source=m.source,
            name=m.name,
            size=m.size,
            licence=m.licence,
            revision=m.revision,
            height=m.height,
            width=m.width,
            resolution_multiple=m.resolution_multiple,
            latent_dim_scale=m.latent_dim_scale,
            default_sampler=m.default_sampler,
            sampling=manifest.sampling,
        )

    def component(self, name: str) -> Component | None:
        """A network."""
        model = self._bundle.manifest.models.get(name)
        if model is None:
            return None
        if model.weights is None:
            raise CheckpointError(
                f"the bundle {self._bundle.path} holds {name} only as TensorRT plans, which cannot be exported again; "
                f"name the checkpoint that they came from with --checkpoint ({self._bundle.manifest.model.source})"
            )
        weights = SafetensorsSource([self._bundle.file(model.weights)])
        return Component(dict(model.config), weights, model.prediction_type or "epsilon")

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer."""
        record = self._bundle.manifest.tokenizer
        if record is None:
            return None
        text = self._bundle.file(record.file).read_text(encoding="utf-8")
        return TokenizerSource(text, record.max_length, record.pad_id)


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
SCHEDULER_FOLDERS = ("scheduler", "prior_scheduler")


@dataclass
class FolderCheckpoint:
    """What ``save_pretrained`` of diffusers' pipelines writes, or the folder of one model, or original files."""

    path: Path
    size: Size | None
    source: str | None = None
    licence: str | None = None
    revision: str | None = None
    _scheduler: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Read what the folder says of itself.

        Raises:
            CheckpointError: there is nothing in it that is a part of a cascade.
        """
        self._index = _read_json(self.path / "model_index.json") or {}
        for folder in SCHEDULER_FOLDERS:
            self._scheduler |= _read_json(self.path / folder / "scheduler_config.json") or {}
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
            size=ours.get("size"),
            licence=self.licence or ours.get("licence"),
            revision=self.revision,
            height=ours.get("height"),
            width=ours.get("width"),
            resolution_multiple=self._index.get("resolution_multiple", 42.67),
            latent_dim_scale=self._index.get("latent_dim_scale", 10.67),
            scaler=self._scheduler.get("scaler", 1.0),
            s=self._scheduler.get("s", 0.008),
            default_sampler=ours.get("sampling", {}).get("sampler"),
            sampling=_sampling(ours["sampling"], self._stage_a_scale()) if "sampling" in ours else None,
        )

    def component(self, name: str) -> Component | None:
        """A network."""
        place = self._find(name)
        if place is None:
            return None
        if place.is_file():
            return FileCheckpoint(place).component(name)
        config = _read_json(place / "config.json")
        if config is None:
            raise CheckpointError(f"{place} has no config.json; it says what architecture the weights are")
        prediction = self._scheduler.get("prediction_type", "epsilon")
        if prediction not in PREDICTION_TYPES:
            raise CheckpointError(
                f"the scheduler config has prediction_type {prediction!r}; known are {', '.join(PREDICTION_TYPES)}"
            )
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


class FileCheckpoint:
    """One original ``.safetensors`` file, or ComfyUI's all-in-one files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts = split_single_file(SafetensorsSource([path]), path)

    @property
    def facts(self) -> Facts:
        """What holds for the cascade as a whole."""
        return Facts(source=self._path.name)

    def component(self, name: str) -> Component | None:
        """A network."""
        if name not in self._parts:
            return None
        config, weights = self._parts[name]
        return Component(config, weights)

    def tokenizer(self) -> TokenizerSource | None:
        """Single files hold no tokenizer."""
        return None


@dataclass
class HubCheckpoint:
    """The official weights, or another repository in diffusers' layout; fetched a component at a time."""

    size: Size
    repo: str | None = None
    _folders: dict[str, FolderCheckpoint] = field(default_factory=dict, init=False)

    @property
    def facts(self) -> Facts:
        """What holds for the cascade as a whole."""
        if self.repo is not None:
            return Facts(source=self.repo)
        return Facts(
            source=presets.DECODER_REPO,
            name=f"stable-cascade-{self.size}",
            size=self.size,
            licence=presets.OFFICIAL_LICENCE,
            height=1024,
            width=1024,
        )

    def component(self, name: str) -> Component | None:
        """A network."""
        folders = [*FOLDERS[name], *([LITE_FOLDERS[name]] if name in LITE_FOLDERS else [])]
        patterns = [f"{folder}/*" for folder in folders]
        if self.repo is None and name in LITE_FOLDERS:
            patterns = [f"{LITE_FOLDERS[name] if self.size == 'small' else FOLDERS[name][0]}/*"]
        if name in ("effnet", "previewer"):
            patterns.append(f"{ROOT_FILES[name]}.safetensors")
        repo = self.repo or (presets.PRIOR_REPO if name in ("stage_c", "image_encoder") else presets.DECODER_REPO)
        return self._fetch(repo, patterns).component(name)

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer."""
        patterns = [f"{folder}/*" for folder in (*TOKENIZER_FOLDERS, *FOLDERS["text_encoder"])]
        return self._fetch(self.repo or presets.DECODER_REPO, patterns).tokenizer()

    def _fetch(self, repo: str, patterns: list[str]) -> FolderCheckpoint:
        from huggingface_hub import HfApi, snapshot_download

        try:
            revision = HfApi().model_info(repo, timeout=HUB_SECONDS).sha
            wanted = [*patterns, "model_index.json", "scheduler/*", "prior_scheduler/*"]
            # the full-precision files are taken where there are both; pickles never
            path = snapshot_download(
                repo, revision=revision, allow_patterns=wanted, ignore_patterns=["*.bin", "*.bf16.*"]
            )
        except Exception as error:  # the hub client raises many unrelated types; all mean "not fetched"
            raise CheckpointError(
                f"the hub did not give {repo} ({type(error).__name__}); where it cannot be reached, download the files "
                "and name them with --checkpoint PATH, or use --checkpoint random:0 for latency work"
            ) from error
        return FolderCheckpoint(Path(path), self.size, repo, presets.OFFICIAL_LICENCE, revision)


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
                return [folder / name for name in sorted(set(index["weight_map"].values()))]
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
