"""An engine bundle on disk: ``cascade.json``, engines, weights, tokenizer.

The dataclasses here are the manifest: the exporter fills them, the runtime reads them, and
``engines/cascade.schema.json`` publishes them for embedders.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import shlex
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import BundleError, BundleNotFoundError
from .sampling import PREDICTION_TYPES, SAMPLERS, PredictionType, SamplerName
from .stages import ENGINES, AxisRange, EngineSpec, Precision, TensorSpec
from .text import PromptTokenizer, TokenizerRecord

FORMAT_VERSION = 1
MANIFEST = "cascade.json"
HUB_FETCH_SECONDS = 10


@dataclass(frozen=True)
class LoopDefaults:
    """How one stage is sampled when the caller does not say."""

    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    shift: float = 1.0
    scaler: float = 1.0
    s: float = 0.008


@dataclass(frozen=True)
class SamplerPreset:
    """One sampler's defaults.

    Attributes:
        prior: Stage C.
        decoder: Stage B.
        latent_scale: Stage A decodes Stage B's latents times this (0.43 for the authors, 0.3764 for diffusers).
    """

    prior: LoopDefaults
    decoder: LoopDefaults
    latent_scale: float


@dataclass(frozen=True)
class ModelFacts:
    """What holds for the cascade as a whole.

    Attributes:
        name: for people.
        size: ``big``, ``small``, ``tiny`` or ``custom``.
        source: checkpoint id or file name; never a path of the exporting machine.
        revision: commit of the source, where there is one.
        licence: of the weights.
        height: default picture height in pixels.
        width: default picture width in pixels.
        resolution_multiple: pixels a Stage C latent stands for.
        latent_dim_scale: Stage B latents for one Stage C latent.
        compression: pixels a Stage B latent stands for.
        default_sampler: preset that is used when the caller names none.
    """

    name: str
    size: str
    source: str
    licence: str
    height: int
    width: int
    revision: str | None = None
    resolution_multiple: float = 42.67
    latent_dim_scale: float = 10.67
    compression: int = 4
    default_sampler: SamplerName = "original"


@dataclass(frozen=True)
class ModelRecord:
    """One component of the checkpoint: its config (enough to build it again), weights file and prediction type.

    ``weights`` is None where the bundle holds only plans of it: a plan contains the weights.
    ``stream_scales``, of fp16 denoisers: by which powers of two the residual stream is kept divided in each level
    (``down``, ``up``), and the largest values that decided it. ``source``, ``licence`` and ``revision`` are those of
    the checkpoint that this component came from: several calls may build one bundle from several. ``loras`` are the
    files that were folded into it, each ``NAME`` or ``NAME:SCALE``.
    """

    config: Mapping[str, Any]
    weights: str | None
    prediction_type: PredictionType | None = None
    stream_scales: Mapping[str, Any] | None = None
    source: str = ""
    licence: str = ""
    revision: str | None = None
    loras: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineRecord:
    """One engine file.

    Attributes:
        spec: its resolved row of `stages.ENGINES`.
        file: graph or plan, inside the bundle.
        runtime: ``onnx``, ``tensorrt`` or ``tensorrt-rtx``.
        precision: of the wide activations and the weights.
        weights: files that the graph points into.
        opset: ONNX opset, None for a plan.
        tools: versions of what made it.
        verification: figures against fp32 PyTorch; None if the export was told not to verify. That of a step has
            ``loop``, the figures of a whole denoising loop.
        target: what a plan was built for and from: ``sm`` (list of int), ``version`` of the runtime, ``profile``
            (input -> min, opt, max), ``flags``, ``graph_sha256``, ``weights_sha256``; None for a graph.
    """

    spec: EngineSpec
    file: str
    runtime: str
    precision: Precision
    weights: tuple[str, ...]
    opset: int | None
    tools: Mapping[str, str]
    verification: Mapping[str, Any] | None = None
    target: Mapping[str, Any] | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that the engine needs."""
        return (self.file, *self.weights)

    @property
    def sm(self) -> tuple[int, ...]:
        """Compute capabilities that a plan runs on, 89 for 8.9; empty for a graph."""
        return tuple(self.target["sm"]) if self.target else ()

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """What a bundle holds at most one of."""
        return self.spec.name, self.runtime, self.sm


@dataclass(frozen=True)
class Manifest:
    """``cascade.json``.

    ``engines`` maps a name to its records: a graph and plans of several GPUs may lie side by side, the graph first.
    """

    model: ModelFacts
    sampling: Mapping[str, SamplerPreset]
    models: Mapping[str, ModelRecord] = field(default_factory=dict)
    engines: Mapping[str, tuple[EngineRecord, ...]] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokenizer: TokenizerRecord | None = None

    @property
    def records(self) -> tuple[EngineRecord, ...]:
        """Every engine record."""
        return tuple(record for records in self.engines.values() for record in records)

    def to_json(self) -> str:
        """The text of ``cascade.json``."""
        engines = []
        for record in self.records:
            row = {f.name: getattr(record, f.name) for f in fields(record) if f.name != "spec"}
            spec = record.spec
            row |= {
                "name": spec.name,
                "inputs": [t.to_json() for t in spec.inputs],
                "outputs": [t.to_json() for t in spec.outputs],
                "ranges": {axis: asdict(limits) for axis, limits in spec.ranges.items()},
            }
            engines.append(row)
        document = {
            "format_version": FORMAT_VERSION,
            "model": asdict(self.model),
            "sampling": {name: asdict(preset) for name, preset in self.sampling.items()},
            "tokenizer": self.tokenizer.to_json() if self.tokenizer else None,
            "models": {name: asdict(model) for name, model in self.models.items()},
            "engines": engines,
            "files": self.files,
        }
        return json.dumps(document, indent=1, sort_keys=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read ``cascade.json``.

        Raises:
            BundleError: it is no JSON, of a newer format, or lacks or mistypes something.
        """
        try:
            document = json.loads(text)
            version = document["format_version"]
            if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
                raise BundleError(
                    f"{where} has bundle format {version!r}; this cascade-rt reads up to {FORMAT_VERSION}. "
                    "Upgrade with: pip install -U cascade-rt"
                )
            engines = group(_engine_record(row) for row in document["engines"])
            tokenizer = document["tokenizer"]
            made = cls(
                ModelFacts(**document["model"]),
                {name: _preset(preset) for name, preset in document["sampling"].items()},
                {name: _model_record(model) for name, model in document["models"].items()},
                engines,
                document["files"],
                TokenizerRecord(**tokenizer) if tokenizer else None,
            )
            made._validate(where)
        except BundleError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{where} is not a readable bundle manifest: {_reason(error)}") from error
        return made

    def _validate(self, where: str) -> None:
        """Refuse what a damaged or hostile manifest may say.

        Raises:
            BundleError: with what is wrong.
            TypeError: a value is of another kind than its field.
        """
        for name, file in self.files.items():
            _inside(name, where)
            _require(isinstance(file["sha256"], str) and isinstance(file["bytes"], int), f"the record of {name}")
        facts = self.model
        _require(all(isinstance(x, str) for x in (facts.name, facts.size, facts.source, facts.licence)), "model")
        for number in (facts.height, facts.width, facts.resolution_multiple, facts.latent_dim_scale, facts.compression):
            _require(isinstance(number, int | float) and number > 0, "a size in model")
        for preset in self.sampling.values():
            for loop in (preset.prior, preset.decoder):
                _require(all(isinstance(x, int | float) for x in astuple(loop)) and loop.shift > 0, "sampling")
            _require(isinstance(preset.latent_scale, int | float), "latent_scale")
        for model in self.models.values():
            _require(isinstance(model.config, dict), "a model's config")
        for record in self.records:
            axes = {a for t in (*record.spec.inputs, *record.spec.outputs) for a in t.axes if isinstance(a, str)}
            _require(axes <= record.spec.ranges.keys(), f"the ranges of {record.spec.name}")
        keys = [record.key for record in self.records]
        if len(set(keys)) < len(keys):
            name, runtime, _ = next(key for key in keys if keys.count(key) > 1)
            raise BundleError(f"{where} lists the {runtime} engine {name} twice for the same GPU")
        needed = {file for record in self.records for file in record.files}
        needed |= {model.weights for model in self.models.values() if model.weights is not None}
        needed |= {self.tokenizer.file} if self.tokenizer else set()
        if missing := sorted(needed - set(self.files)):
            raise BundleError(f"{where} names {missing[0]!r} but lists no hash for it")
        if self.model.default_sampler not in self.sampling or not set(self.sampling) <= set(SAMPLERS):
            raise BundleError(f"{where} has sampler presets {sorted(self.sampling)}; known are {', '.join(SAMPLERS)}")
        for name, model in self.models.items():
            if model.prediction_type not in (None, *PREDICTION_TYPES):
                raise BundleError(f"{where}: {name} has an unknown prediction type {model.prediction_type!r}")


def _require(fine: bool, what: str) -> None:
    if not fine:
        raise TypeError(f"{what} is not as the format has it")


def group(records: Iterable[EngineRecord]) -> dict[str, tuple[EngineRecord, ...]]:
    """Records by engine name, graphs before plans."""
    found: dict[str, list[EngineRecord]] = {}
    for record in records:
        found.setdefault(record.spec.name, []).append(record)
    return {name: tuple(sorted(rows, key=lambda r: (r.runtime != "onnx", r.key))) for name, rows in found.items()}


def _model_record(row: dict[str, Any]) -> ModelRecord:
    loras = row.get("loras", [])
    _require(isinstance(loras, list) and all(isinstance(lora, str) for lora in loras), "loras")
    return ModelRecord(**{**row, "loras": tuple(loras)})


def _engine_record(row: dict[str, Any]) -> EngineRecord:
    name = row["name"]
    if name not in ENGINES:
        raise BundleError(f"the manifest names an unknown engine {name!r}; known are {', '.join(ENGINES)}")
    known = ENGINES[name]
    spec = EngineSpec(
        name,
        known.stage,
        known.model,
        tuple(TensorSpec.from_json(t) for t in row["inputs"]),
        tuple(TensorSpec.from_json(t) for t in row["outputs"]),
        {axis: AxisRange(**limits) for axis, limits in row["ranges"].items()},
    )
    rest = {f.name: row[f.name] for f in fields(EngineRecord) if f.name != "spec"}
    rest["weights"] = tuple(rest["weights"])
    return EngineRecord(spec, **rest)


def _preset(row: dict[str, Any]) -> SamplerPreset:
    return SamplerPreset(LoopDefaults(**row["prior"]), LoopDefaults(**row["decoder"]), row["latent_scale"])


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)


def _inside(name: str, where: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise BundleError(f"{where} names {name!r}, which lies outside the bundle; only plain relative names are read")


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """The manifest's record of a file."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


class Bundle:
    """A bundle that lies on this machine."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            BundleNotFoundError: there is no bundle there.
            BundleError: its manifest cannot be read, or is of a newer format.
        """
        self.path = path
        manifest = path / MANIFEST
        try:
            text = manifest.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise BundleNotFoundError(
                f"there is no bundle at {path} (no {MANIFEST}); make one with: "
                f"cascade-export --stage all --size tiny --out {path}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{manifest} cannot be read: {error}") from error
        self.manifest = Manifest.from_json(text, str(manifest))
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
            BundleError: it is missing, leads out of the bundle, or is not what the manifest says.
        """
        path = self.path / name
        with self._checking[name]:
            if name not in self._checked:
                self._check(path, self.manifest.files[name])
                self._checked.add(name)
        return path

    def _check(self, path: Path, record: Mapping[str, Any]) -> None:
        try:
            if not path.resolve(strict=True).is_relative_to(self.path.resolve()):
                raise BundleError(f"{path} is a link that leads out of the bundle; put the file itself there")
            size = path.stat().st_size
        except FileNotFoundError:
            raise BundleError(f"{path} is missing from the bundle; {self._rebuild()}") from None
        if size != record["bytes"]:
            raise BundleError(f"{path} has {size} bytes, the manifest says {record['bytes']}; {self._rebuild()}")
        if sha256_of(path) != record["sha256"]:
            raise BundleError(f"{path} is damaged: its hash is not the manifest's; {self._rebuild()}")

    def engine(self, name: str, runtime: str | None = None, sm: int | None = None) -> EngineRecord:
        """The record of an engine.

        Args:
            name: of the engine.
            runtime: ``onnx``, ``tensorrt`` or ``tensorrt-rtx``; None: whichever there is, a graph first.
            sm: compute capability of the GPU that it is for, 89 for 8.9; None: any.

        Raises:
            BundleError: the bundle does not have it.
        """
        records = self.manifest.engines.get(name, ())
        fitting = [r for r in records if runtime in (None, r.runtime)]
        if chosen := [r for r in fitting if sm is None or sm in r.sm]:
            return chosen[0]
        if fitting:
            built = ", ".join(f"SM {number}" for number in sorted({n for r in fitting for n in r.sm}))
            raise BundleError(
                f"the bundle {self.path} has the {runtime} engine {name} for {built}; this GPU is SM {sm}. "
                f"Add it with: {self.command(name, runtime, sm)}"
            )
        kind = f"{runtime} engine" if records else "engine"
        there = f" (it has {', '.join(sorted({r.runtime for r in records}))})" if records else ""
        raise BundleError(
            f"the bundle {self.path} has no {kind} {name}{there}; add it with: {self.command(name, runtime, sm)}"
        )

    def command(self, name: str, runtime: str | None = None, sm: int | None = None) -> str:
        """The command that makes an engine of this bundle."""
        model = self.manifest.models.get(ENGINES[name].model)
        # plans are built from the graphs that are here, which hold the LoRA files already
        anew = model is not None and (runtime in (None, "onnx") or model.weights is None)
        parts = [f"cascade-export --stage {ENGINES[name].stage}", self._origin(model.loras if model and anew else ())]
        if runtime not in (None, "onnx"):
            parts.append(f"--target {runtime}")
            if runtime == "tensorrt-rtx" and sm is not None:
                parts.append(f"--sm {sm}")
        return " ".join([*filter(None, parts), f"--out {self.path}"])

    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer.

        Raises:
            BundleError: the bundle has none, or it is damaged.
        """
        record = self.manifest.tokenizer
        if record is None:
            raise BundleError(
                f"the bundle {self.path} has no tokenizer; add it with: {self.command('text_encoder')} --overwrite"
            )
        return PromptTokenizer(self.file(record.file), record)

    def _rebuild(self) -> str:
        loras = dict.fromkeys(lora for model in self.manifest.models.values() for lora in model.loras)
        origin = self._origin(loras)
        return f"build the bundle again with: cascade-export --stage all {origin} --overwrite --out {self.path}"

    def _origin(self, loras: Iterable[str]) -> str:
        """The words of a command that say where weights come from."""
        size, source = self.manifest.model.size, self.manifest.model.source
        checkpoint = f"--size {size}" if size != "custom" else f"--checkpoint {source}"
        return " ".join([checkpoint, *(f"--lora {shlex.quote(lora)}" for lora in loras)])


def default_bundle_path() -> Path:
    """Where the bundle lies that is shipped in the package."""
    return Path(str(importlib.resources.files("cascade_tiny"))) / "bundle"


def find_bundle(place: str | os.PathLike[str] | None) -> Bundle:
    """Open a bundle by path or hub id; None is the shipped default.

    Raises:
        BundleNotFoundError: it is neither a folder with a bundle nor a hub id that can be fetched.
    """
    if place is None:
        return Bundle(default_bundle_path())
    path = Path(place)
    text = os.fspath(place)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")):
        return Bundle(path.expanduser())
    return Bundle(_fetch(text))


def _fetch(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise BundleNotFoundError(
            f"there is no folder {hub_id}; to fetch it as a hub id: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(hub_id, etag_timeout=HUB_FETCH_SECONDS))
    except Exception as error:  # the hub client raises many unrelated types; all mean "not fetched"
        raise BundleNotFoundError(
            f"there is no folder {hub_id}, and the hub did not give it ({type(error).__name__}); "
            "pass the path of a bundle"
        ) from error
