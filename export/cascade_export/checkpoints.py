"""Checkpoints of every kind, opened by what a user types. Only safetensors is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade_rt.bundle import Bundle, default_bundle_path
from cascade_rt.errors import CheckpointError, MissingCheckpointError, RequestError
from cascade_rt.stages import Size

from . import presets
from .components import Checkpoint, Component, Facts, TokenizerSource, refuse_pickle
from .folders import FOLDERS, LITE_FOLDERS, ROOT_FILES, TOKENIZER_FOLDERS, FolderCheckpoint
from .originals import split_single_file
from .weights import SafetensorsSource

RANDOM = "random"
HUB_SECONDS = 10


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
    refuse_pickle(path)
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
        """The shipped one for tiny, whose vocabulary is small; else bytes: CLIP's vocabulary needs a download."""
        if self.size == "tiny":
            return BundleCheckpoint(default_bundle_path()).tokenizer()
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
        self.path = path
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
        return Component(dict(model.config), weights, model.prediction_type or "epsilon", loras=model.loras)

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer."""
        record = self._bundle.manifest.tokenizer
        if record is None:
            return None
        text = self._bundle.file(record.file).read_text(encoding="utf-8")
        return TokenizerSource(text, record.max_length, record.pad_id)


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
