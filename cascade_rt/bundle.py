"""An engine bundle on disk: where its files lie, whether they are what the manifest says, and what makes them anew."""

from __future__ import annotations

import importlib.resources
import os
import shlex
import stat
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import BundleError, BundleNotFoundError, plain, refused
from .files import MIB, name_of, read_bounded, said_by, sha256_of
from .manifest import MANIFEST, EngineRecord, FileRecord, Manifest, Runtime
from .stages import ENGINES
from .text import PromptTokenizer

MAX_MANIFEST_BYTES = 16 * MIB
HUB_FETCH_SECONDS = 10


def file_record(path: Path) -> FileRecord:
    """The manifest's record of a file."""
    return FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size)


class Bundle:
    """A bundle that lies on this machine."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            BundleNotFoundError: there is no bundle there.
            BundleError: its manifest cannot be read, or is of another format.
        """
        self.path = path
        manifest = path / MANIFEST
        try:
            data = read_bounded(manifest, MAX_MANIFEST_BYTES, BundleError)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleNotFoundError(
                f"there is no bundle at {name_of(path)} (no {MANIFEST}); make one with: "
                f"cascade-export --stage all --size tiny {_out(path)}"
            ) from None
        self.manifest = Manifest.from_json(data, name_of(manifest))
        self._checked: set[str] = set()
        # two threads that load engines of one stage want the same weights, which need not be read twice
        self._checking = {name: threading.Lock() for name in self.manifest.files}

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.model.name

    def file(self, name: str) -> Path:
        """The path of a file of the bundle, once its size and hash are found right.

        Raises:
            BundleError: it is missing, leads out of the bundle, is no regular file, or is not what the manifest says.
        """
        path = self.path / name
        with self._checking[name]:
            if name not in self._checked:
                try:
                    self._check(path, self.manifest.files[name])
                except FileNotFoundError:
                    raise BundleError(f"{name_of(path)} is missing from the bundle; {self._rebuild()}") from None
                except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, in Python up to 3.12
                    raise BundleError(f"{name_of(path)} cannot be read: {said_by(error)}; {self._rebuild()}") from None
                self._checked.add(name)
        return path

    def _check(self, path: Path, record: FileRecord) -> None:
        file, folder = path.resolve(strict=True), self.path.resolve(strict=True)
        if not (file.is_relative_to(folder) or file.is_relative_to(_blobs(folder))):
            raise BundleError(f"{name_of(path)} is a link that leads out of the bundle; put the file itself there")
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{name_of(path)} is no regular file; {self._rebuild()}")
        if found.st_size != record.bytes:
            raise BundleError(
                f"{name_of(path)} has {found.st_size} bytes, the manifest says {record.bytes}; {self._rebuild()}"
            )
        if sha256_of(path) != record.sha256:
            raise BundleError(f"{name_of(path)} is damaged: its hash is not the manifest's; {self._rebuild()}")

    def engine(self, name: str, runtime: Runtime | None = None, features: Iterable[str] = ()) -> EngineRecord:
        """The first record of an engine, in the manifest's order; what a provider can run is the loader's affair.

        Args:
            name: of the engine.
            runtime: None: whichever there is, a graph first.
            features: exactly these.

        Raises:
            BundleError: the bundle does not have it.
        """
        if found := self.manifest.records(name, runtime, features):
            return found[0]
        raise self.missing(name, runtime, features)

    def missing(
        self, name: str, runtime: Runtime | None = None, features: Iterable[str] = (), sm: int | None = None
    ) -> BundleError:
        """The error of an engine that the bundle does not have, with the command that adds it; see `command`."""
        others = [record for record in self.manifest.engines if record.name == name]
        kind = f"{runtime} engine" if others and runtime else "engine"
        wanted = " ".join([name, *(f"with {feature}" for feature in sorted(set(features)))])
        there = dict.fromkeys(" with ".join([record.runtime, *record.features]) for record in others)
        having = f" (it has {', '.join(there)})" if others else ""
        return BundleError(
            f"the bundle {name_of(self.path)} has no {kind} {wanted}{having}; "
            f"add it with: {self.command(name, runtime, sm)}",
            field="engines",
            value=wanted,
        )

    def command(self, name: str, runtime: Runtime | None = None, sm: int | None = None) -> str:
        """The command that makes an engine of this bundle.

        Args:
            name: of the engine.
            runtime: of its engine file; None is a graph.
            sm: compute capability of the GPU that it is for, 89 for 8.9; None leaves it out.
        """
        if name not in ENGINES:
            raise refused("the engine", name, f"one of {', '.join(ENGINES)}")
        model = self.manifest.models.get(ENGINES[name].model)
        # engine files of TensorRT are built from the graphs that are here, which hold the LoRA files already
        anew = model is not None and (runtime in (None, "onnx") or model.weights is None)
        parts = [f"cascade-export --stage {ENGINES[name].stage}", self._origin(model.loras if model and anew else ())]
        if runtime not in (None, "onnx"):
            parts.append(f"--target {runtime}")
            if runtime == "tensorrt-rtx" and sm is not None:
                parts.append(f"--sm {sm}")
        return " ".join([*filter(None, parts), _out(self.path)])

    def tokenizer(self, words: Mapping[str, tuple[int, ...]] | None = None) -> PromptTokenizer:
        """The tokenizer.

        Args:
            words: taught words, each with the ids that stand for it; None: none.

        Raises:
            BundleError: the bundle has none, or it is damaged.
            RequestError: a word is in the vocabulary already.
        """
        record = self.manifest.tokenizer
        if record is None:
            command = self.command("text_encoder")
            raise BundleError(f"the bundle {name_of(self.path)} has no tokenizer; add it with: {command} --overwrite")
        return PromptTokenizer(self.file(record.file), record, words)

    def _rebuild(self) -> str:
        loras = dict.fromkeys(lora for model in self.manifest.models.values() for lora in model.loras)
        origin = self._origin(loras)
        return f"build the bundle again with: cascade-export --stage all {origin} --overwrite {_out(self.path)}"

    def _origin(self, loras: Iterable[str]) -> str:
        """The words of a command that say where weights come from."""
        size, source = self.manifest.model.size, self.manifest.model.source
        checkpoint = f"--size {size}" if size != "custom" else f"--checkpoint {shlex.quote(plain(source))}"
        return " ".join([checkpoint, *(f"--lora {shlex.quote(plain(lora))}" for lora in loras)])


def _out(path: Path) -> str:
    """The words of a command that name a bundle's folder. A name with a leading dash would be taken for an option."""
    text = plain(str(path))
    return f"--out={shlex.quote(text)}" if text.startswith("-") else f"--out {shlex.quote(text)}"


def _blobs(folder: Path) -> Path:
    """Where the hub's cache keeps the files of a snapshot, which is a folder of links; else the folder itself."""
    return folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder


def default_bundle_path() -> Path:
    """Where the bundle lies that is shipped in the package."""
    return Path(str(importlib.resources.files("cascade_tiny"))) / "bundle"


def find_bundle(place: str | os.PathLike[str] | None) -> Bundle:
    """Open a bundle by path or hub id; None is the shipped default.

    Raises:
        RequestError: neither a text nor a path.
        BundleNotFoundError: it is neither a folder with a bundle nor a hub id that can be fetched.
        BundleError: the bundle that lies there cannot be read.
    """
    if place is None:
        return Bundle(default_bundle_path())
    if not isinstance(place, str | os.PathLike) or not isinstance(text := os.fspath(place), str):
        raise refused("the bundle", place, "a path, the hub id of a bundle, or None")
    path = Path(text)
    if os.path.lexists(path) or text.count("/") != 1 or text.startswith((".", "/", "~", "-")):
        try:
            return Bundle(path.expanduser())
        except RuntimeError as error:  # of `expanduser`: no such user
            if isinstance(error, BundleError):
                raise
            raise BundleNotFoundError(f"there is no bundle at {name_of(path)}: {plain(str(error))}") from None
    return Bundle(_fetch(text))


def _fetch(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BundleNotFoundError(
            f"there is no folder {name_of(hub_id)}; to fetch it as a hub id: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(hub_id, etag_timeout=HUB_FETCH_SECONDS))
    except Exception as error:  # the hub client raises many unrelated types; all mean "not fetched"
        raise BundleNotFoundError(
            f"there is no folder {name_of(hub_id)}, and the hub did not give it ({type(error).__name__}); "
            "pass the path of a bundle; for a private one log in with: hf auth login"
        ) from error
