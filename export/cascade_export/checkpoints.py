"""Checkpoints of every kind, opened by what a user types. Only safetensors is read."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from cascade_rt.bundle import Bundle, default_bundle_path
from cascade_rt.errors import CheckpointError, MissingCheckpointError, RequestError, plain, shown
from cascade_rt.files import name_of, said_by
from cascade_rt.manifest import MANIFEST
from cascade_rt.stages import Size

from . import presets
from .catalog import COMPONENTS, check_config
from .folders import TOKENIZER_FOLDERS, FolderCheckpoint, open_folder, read_facts
from .models import TextEncoderConfig
from .networks import Checkpoint, CheckpointFacts, Network, TokenizerSource, check_no_pickle
from .official import DECODER_REPO, OFFICIAL_LICENCE, OFFICIAL_REPOS, PRIOR_REPO
from .originals import split_single_file
from .tokenizer import MOST_BYTES, byte_tokenizer, check_tokenizer
from .weights import StoredSource

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
        BundleError: it is a bundle that cannot be read.
        RequestError: ``random:`` is not followed by a seed.
    """
    if place is None:
        return BundleCheckpoint(default_bundle_path()) if size == "tiny" else HubCheckpoint(size=size or "big")
    kind, _, seed = place.partition(":")
    if kind == RANDOM:
        return RandomCheckpoint(size or "big", _seed(place, seed))
    path, mode = _looked_up(place)
    check_no_pickle(path)
    if mode is not None and stat.S_ISDIR(mode):
        return BundleCheckpoint(path) if os.path.lexists(path / MANIFEST) else open_folder(path, size)
    if mode is not None:
        return FileCheckpoint(path)
    if place.count("/") == 1 and not place.startswith((".", "/", "~", "-")):
        return HubCheckpoint(size=size or "big", repo=place)
    raise MissingCheckpointError(f"there is no checkpoint at {name_of(place)}; {_ACCEPTED}")


_ACCEPTED = "--checkpoint takes a diffusers folder, a .safetensors file, a hub id or random:SEED"


def _looked_up(place: str) -> tuple[Path, int | None]:
    """The path that a user typed, and its mode; None where there is no such file.

    Raises:
        MissingCheckpointError: the path cannot be one.
    """
    try:
        path = Path(place).expanduser()
        try:
            return path, path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return path, None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no such user
        raise MissingCheckpointError(
            f"there is no checkpoint at {name_of(place)}: {said_by(error)}; {_ACCEPTED}"
        ) from None


def _seed(place: str, seed: str) -> int:
    if not seed and ":" not in place:
        return 0
    if not (seed.isascii() and seed.isdigit() and len(seed) < 20 and int(seed) < 2**63):
        raise RequestError(
            f"--checkpoint {shown(place)} is not accepted; write random or random:SEED with a seed from 0 to 2**63 - 1",
            field="--checkpoint",
            value=place,
            accepted="random or random:SEED with a seed from 0 to 2**63 - 1",
        )
    return int(seed)


@dataclass(frozen=True)
class RandomCheckpoint:
    """Seeded weights of the official shapes: latency work needs no download. Their pictures are noise."""

    size: Size
    seed: int

    @property
    def facts(self) -> CheckpointFacts:
        """What it says of the cascade as a whole."""
        side = 256 if self.size == "tiny" else 1024
        return CheckpointFacts(
            source=f"{RANDOM}:{self.seed}",
            name=f"cascade-{self.size} (random weights)",
            size=self.size,
            licence="none (random numbers)",
            height=side,
            width=side,
        )

    def network(self, name: str) -> Network | None:
        """The network of a component."""
        config = presets.config_of(self.size, name)
        return None if config is None else Network(config=config, weights=None, seed=self.seed)

    def tokenizer(self) -> TokenizerSource | None:
        """The shipped one for tiny, whose vocabulary is small; else bytes: CLIP's vocabulary needs a download."""
        if self.size == "tiny":
            return BundleCheckpoint(default_bundle_path()).tokenizer()
        config = presets.CLIP_G
        return byte_tokenizer(
            config["bos_token_id"], config["eos_token_id"], config["max_position_embeddings"], config["pad_token_id"]
        )


class BundleCheckpoint:
    """A bundle is a checkpoint too: its weights keep their keys, and its manifest holds the configs."""

    def __init__(self, path: Path) -> None:
        """Open a bundle.

        Raises:
            BundleError: it cannot be read.
        """
        self.path = path
        self._bundle = Bundle(path)

    @property
    def facts(self) -> CheckpointFacts:
        """What it says of the cascade as a whole."""
        manifest = self._bundle.manifest
        model = manifest.model
        return CheckpointFacts(
            source=model.source,
            name=model.name,
            size=model.size,
            licence=model.licence,
            revision=model.revision,
            height=model.height,
            width=model.width,
            resolution_multiple=model.resolution_multiple,
            latent_dim_scale=model.latent_dim_scale,
            default_sampler=model.default_sampler,
            sampling=manifest.sampling,
            default_preset=model.default_preset,
            presets=manifest.presets,
            previews=manifest.previews,
        )

    def network(self, name: str) -> Network | None:
        """The network of a component."""
        model = self._bundle.manifest.models.get(name)
        if model is None:
            return None
        if model.weights is None:
            raise CheckpointError(
                f"the bundle {name_of(self.path)} holds {name} only as TensorRT engine files, which cannot be exported "
                "again; name the checkpoint that they came from with --checkpoint "
                f"({plain(model.source or self._bundle.manifest.model.source)})"
            )
        check_config(name, model.config, name_of(self.path / MANIFEST))
        return Network(
            config=dict(model.config),
            weights=StoredSource(self._bundle.file(model.weights)),
            prediction_type=model.prediction_type or "epsilon",
            loras=model.loras,
        )

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer."""
        manifest = self._bundle.manifest
        if manifest.tokenizer is None or "text_encoder" not in manifest.models:
            return None
        path = self._bundle.file(manifest.tokenizer.file)
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{name_of(path)} has more than {MOST_BYTES} bytes; a tokenizer.json has fewer")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{name_of(path)} is no UTF-8 text: {error}") from None
        source = TokenizerSource(text, manifest.tokenizer.max_length, manifest.tokenizer.pad_id)
        config = TextEncoderConfig.from_dict(manifest.models["text_encoder"].config, name_of(self.path / MANIFEST))
        check_tokenizer(source, config, name_of(path))
        return source


class FileCheckpoint:
    """One original ``.safetensors`` file, or ComfyUI's all-in-one files."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            CheckpointError: see `split_single_file`.
        """
        self._path = path
        self._parts = split_single_file(path)

    @property
    def facts(self) -> CheckpointFacts:
        """What it says of the cascade as a whole."""
        return CheckpointFacts(source=plain(self._path.name))

    def network(self, name: str) -> Network | None:
        """The network of a component."""
        return self._parts.get(name)

    def tokenizer(self) -> TokenizerSource | None:
        """Single files hold no tokenizer."""
        return None


@dataclass(kw_only=True)
class HubCheckpoint:
    """The official weights, or another repository in diffusers' layout.

    The hub is asked once for each repository which revision and files there are; files are fetched a component at a
    time.
    """

    size: Size
    repo: str | None = None
    _revisions: dict[str, str] = field(default_factory=dict, init=False)
    _folders: dict[tuple[str, ...], FolderCheckpoint] = field(default_factory=dict, init=False)

    @property
    def facts(self) -> CheckpointFacts:
        """What it says of the cascade as a whole; another repository than the official ones is asked for it."""
        if self.repo is not None:
            revision = self._revision(self.repo)
            folder = self._fetch(self.repo, [])
            return read_facts(folder, self.size, source=self.repo, licence=_licence(self.repo), revision=revision)
        return CheckpointFacts(
            source=DECODER_REPO,
            name=f"stable-cascade-{self.size}",
            size=self.size,
            licence=OFFICIAL_LICENCE,
            height=1024,
            width=1024,
        )

    def network(self, name: str) -> Network | None:
        """The network of a component."""
        row = COMPONENTS[name]
        folders = [*row.folders, *row.lite_folders]
        if self.repo is None and row.lite_folders:
            folders = [*row.lite_folders] if self.size == "small" else [row.folders[0]]
        patterns = [f"{folder}/*" for folder in folders]
        if name in ("effnet", "previewer"):
            patterns += [f"{stem}.safetensors" for stem in row.root_files]
        repo = self.repo or (PRIOR_REPO if name in ("stage_c", "image_encoder") else DECODER_REPO)
        return self._folder(repo, patterns).network(name)

    def tokenizer(self) -> TokenizerSource | None:
        """The tokenizer."""
        patterns = [f"{folder}/*" for folder in (*TOKENIZER_FOLDERS, *COMPONENTS["text_encoder"].folders)]
        return self._folder(self.repo or DECODER_REPO, patterns).tokenizer()

    def _folder(self, repo: str, patterns: list[str]) -> FolderCheckpoint:
        key = (repo, *patterns)
        if key not in self._folders:
            folder, revision = self._fetch(repo, patterns), self._revision(repo)
            self._folders[key] = open_folder(folder, self.size, source=repo, licence=_licence(repo), revision=revision)
        return self._folders[key]

    def _revision(self, repo: str) -> str:
        """The commit that is exported: one for the whole export, whatever is pushed meanwhile."""
        if repo not in self._revisions:
            from huggingface_hub import HfApi

            try:
                self._revisions[repo] = str(HfApi().model_info(repo, timeout=HUB_SECONDS).sha)
            except Exception as error:  # the hub client raises many unrelated types; all mean "not reached"
                raise _not_given(repo, error) from error
        return self._revisions[repo]

    def _fetch(self, repo: str, patterns: list[str]) -> Path:
        """The folder of a repository's files that fit ``patterns``, and of what it says of itself."""
        from huggingface_hub import snapshot_download

        revision = self._revision(repo)
        wanted = [*patterns, "model_index.json", "scheduler/*", "prior_scheduler/*"]
        try:
            # the full-precision files are taken where there are both; pickles never
            path = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=["*.bin", "*.bf16.*"],
                etag_timeout=HUB_SECONDS,
            )
        except Exception as error:  # as above: all mean "not fetched"
            raise _not_given(repo, error) from error
        return Path(path)


def _licence(repo: str) -> str | None:
    """The licence of a repository's weights; None: what the repository itself says."""
    return OFFICIAL_LICENCE if repo in OFFICIAL_REPOS else None


def _not_given(repo: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the hub did not give {name_of(repo)} ({type(error).__name__}); where it cannot be reached, download the "
        "files and name them with --checkpoint PATH, or use --checkpoint random:0 for latency work"
    )
