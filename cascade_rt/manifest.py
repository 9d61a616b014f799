"""What ``cascade.json`` says: values without a disk.

The exporter fills them, the runtime reads them, and ``engines/cascade.schema.json``, generated from them, publishes
them for embedders. `Manifest.from_json` validates everything before anything is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct, to_builtins

from .errors import BundleError, plain, shown
from .sampling import PredictionType, SamplerName
from .schema import parse_json, validated
from .stages import ENGINES, AxisRange, EngineSpec, Precision, TensorSpec, axis_of

FORMAT_VERSION: Literal[2] = 2
MANIFEST = "cascade.json"

Runtime = Literal["onnx", "tensorrt", "tensorrt-rtx"]
Text = Annotated[str, Meta(max_length=2000)]
FileName = Annotated[str, Meta(min_length=1, max_length=200)]
Count = Annotated[int, Meta(ge=1, le=100_000)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 45)]
Figure = Annotated[float, Meta(ge=-1e12, le=1e12)]
Positive = Annotated[float, Meta(gt=0, le=1e6)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Sm = Annotated[int, Meta(ge=10, le=999)]
ModelName = Annotated[str, Meta(pattern="^[a-z0-9_]{1,40}$")]


class Record(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the manifest."""


class LoopDefaults(Record, frozen=True, kw_only=True):
    """How one stage is sampled when the request does not say.

    Attributes:
        num_inference_steps: network calls.
        guidance_scale: classifier-free guidance; up to 1 is none.
        guidance_rescale: rho of `sampling.guide`.
        shift: of the log-SNR, sampler ``original``.
        scaler: warps the ratios, sampler ``diffusers``.
        s: offset of the cosine schedule.
    """

    num_inference_steps: Annotated[int, Meta(ge=1, le=1000)]
    guidance_scale: Annotated[float, Meta(ge=-1000, le=1000)]
    guidance_rescale: Annotated[float, Meta(ge=0, le=1)] = 0.0
    shift: Annotated[float, Meta(gt=0, le=100)] = 1.0
    scaler: Annotated[float, Meta(gt=0, le=100)] = 1.0
    s: Annotated[float, Meta(gt=0, le=100)] = 0.008


class SamplerDefaults(Record, frozen=True, kw_only=True):
    """One sampler's defaults.

    Attributes:
        prior: Stage C.
        decoder: Stage B.
        latent_scale: Stage A decodes Stage B's latents times this (0.43 for the authors, 0.3764 for diffusers).
    """

    prior: LoopDefaults
    decoder: LoopDefaults
    latent_scale: Annotated[float, Meta(ge=-1e6, le=1e6)]


class LoopOverrides(Record, frozen=True, kw_only=True):
    """What a preset changes of a stage's sampling; None: nothing.

    Attributes:
        num_inference_steps: network calls.
        guidance_scale: classifier-free guidance.
        guidance_start: share of the steps before which there is no guidance.
        guidance_end: share of the steps from which on there is none.
    """

    num_inference_steps: Annotated[int, Meta(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[float, Meta(ge=-1000, le=1000)] | None = None
    guidance_start: Annotated[float, Meta(ge=0, le=1)] = 0.0
    guidance_end: Annotated[float, Meta(ge=0, le=1)] = 1.0


class Preset(Record, frozen=True, kw_only=True):
    """A trade of quality against time, over the defaults of the sampler.

    Attributes:
        prior: Stage C.
        decoder: Stage B.
    """

    prior: LoopOverrides = LoopOverrides()
    decoder: LoopOverrides = LoopOverrides()


Factor = Annotated[float, Meta(ge=-1000, le=1000)]
Rgb = tuple[Factor, Factor, Factor]


class PreviewFactors(Record, frozen=True, kw_only=True):
    """Latents to colours by one matrix, the cheap preview: RGB in 0..1 is ``latents . factors + offset``.

    Attributes:
        factors: red, green and blue of every latent channel.
        offset: red, green and blue of zero latents.
    """

    factors: Annotated[tuple[Rgb, ...], Meta(min_length=1, max_length=64)]
    offset: Rgb


PreviewName = Literal["prior", "decoder"]
PresetName = Literal["quality", "balanced", "fast"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)


class ModelFacts(Record, frozen=True, kw_only=True):
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
        default_sampler: whose defaults are used when the request names none.
        default_preset: preset that is used when the request names none.
    """

    name: Text
    size: Literal["tiny", "small", "big", "custom"]
    source: Text
    licence: Text
    height: Annotated[int, Meta(ge=64, le=4096)]
    width: Annotated[int, Meta(ge=64, le=4096)]
    revision: Text | None = None
    resolution_multiple: Annotated[float, Meta(ge=1, le=1024)] = 42.67
    latent_dim_scale: Annotated[float, Meta(ge=0.1, le=1024)] = 10.67
    compression: Annotated[int, Meta(ge=1, le=64)] = 4
    default_sampler: SamplerName = "original"
    default_preset: PresetName = "quality"


class TokenizerRecord(Record, frozen=True, kw_only=True):
    """The tokenizer.

    Attributes:
        file: ``tokenizer.json`` inside the bundle.
        max_length: tokens the text encoder takes, start and end tokens included.
        pad_id: id that fills a prompt up to ``max_length``.
    """

    file: FileName
    max_length: Annotated[int, Meta(ge=2, le=4096)]
    pad_id: Annotated[int, Meta(ge=0, le=2**31 - 1)]


class StreamScalesRecord(Record, frozen=True, kw_only=True):
    """fp16 denoisers: by which powers of two the residual stream is kept divided, and what decided it.

    Attributes:
        down: for each level on the way down.
        up: for each level on the way up, the deepest first.
        largest_down: largest activations seen on the way down.
        largest_up: and on the way up.
        largest_inner: largest activation where no factor reaches.
    """

    down: tuple[Positive, ...]
    up: tuple[Positive, ...]
    largest_down: tuple[Figure, ...]
    largest_up: tuple[Figure, ...]
    largest_inner: Figure


class QuantisedRecord(Record, frozen=True, kw_only=True):
    """Linear layers of a component in a precision of 8 bits.

    Attributes:
        layers: how many are computed in 8 bits.
        largest_error: of their products, relative, as the export's scan saw it.
        wide: layers that stay in the compute dtype because of that scan: the weight's name -> the reason.
    """

    layers: Annotated[int, Meta(ge=0, le=1_000_000)]
    largest_error: Figure
    wide: dict[Text, Text] = {}


class ModelRecord(Record, frozen=True, kw_only=True):
    """One component of the checkpoint: enough to build it again.

    Attributes:
        config: diffusers' or transformers' ``config.json``.
        weights: its file; None where the bundle holds only TensorRT engine files of it, which contain the weights.
        prediction_type: of a denoiser.
        stream_scales: of an fp16 denoiser.
        quantised: of a component with engines in 8 bits, by the name of the precision.
        source: checkpoint that this component came from: several calls may build one bundle from several.
        licence: of its weights.
        revision: of its checkpoint.
        loras: files that were folded into it, each ``NAME`` or ``NAME:SCALE``.
    """

    config: dict[str, Any]
    weights: FileName | None
    prediction_type: PredictionType | None = None
    stream_scales: StreamScalesRecord | None = None
    quantised: dict[Text, QuantisedRecord] = {}
    source: Text = ""
    licence: Text = ""
    revision: Text | None = None
    loras: tuple[Text, ...] = ()


class Figures(Record, frozen=True, kw_only=True):
    """How far a tensor is from its reference, in float64.

    Attributes:
        rel_l2: norm of the difference over the norm of the reference.
        max_abs: largest difference.
        cosine: cosine similarity.
        psnr: dB at peak 1, for pixels only.
    """

    rel_l2: Figure
    max_abs: Figure
    cosine: Figure
    psnr: Figure | None = None


class LoopFigures(Figures, frozen=True, kw_only=True):
    """Figures of the end of a whole denoising loop.

    Attributes:
        sampler: whose.
        steps: network calls.
        guidance_scale: of the loop.
    """

    sampler: SamplerName
    steps: Count
    guidance_scale: Figure


class Verification(Figures, frozen=True, kw_only=True):
    """Figures of an engine against fp32 PyTorch.

    Attributes:
        provider: that ran it.
        reference: what it was compared with.
        tensor: the output with the largest relative error.
        loop: of a step engine: a whole loop.
    """

    provider: Text
    reference: Text
    tensor: Text
    loop: LoopFigures | None = None


class Target(Record, frozen=True, kw_only=True):
    """What a TensorRT engine file was built for, and from.

    Attributes:
        sm: compute capabilities that it runs on, 89 for 8.9.
        version: of the runtime that built it, the only one that loads it.
        profile: smallest, tuned and largest shape of every input with a free axis.
        flags: of the builder.
        graph_sha256: of the graph.
        weights_sha256: of its weights files.
    """

    sm: Annotated[tuple[Sm, ...], Meta(min_length=1, max_length=32)]
    version: Text
    profile: dict[str, tuple[tuple[int, ...], ...]]
    flags: tuple[Text, ...]
    graph_sha256: Sha256
    weights_sha256: tuple[Sha256, ...]


@dataclass(frozen=True)
class EngineKey:
    """What a bundle holds at most one of."""

    name: str
    features: tuple[str, ...]
    precision: str
    runtime: Runtime
    sm: tuple[int, ...]

    def __str__(self) -> str:
        words = [self.name, *(f"with {feature}" for feature in self.features), self.precision, self.runtime]
        return " ".join([*words, *(f"sm{number}" for number in self.sm)])


class EngineRecord(Record, frozen=True, kw_only=True):
    """One engine file.

    Attributes:
        name: of `stages.ENGINES`.
        features: that it was made with, sorted.
        precision: its recipe.
        runtime: ``onnx`` for graphs, else what runs the TensorRT engine file.
        file: inside the bundle.
        weights: files that the graph points into.
        inputs: its tensors, as `EngineSpec`.
        outputs: likewise.
        ranges: accepted sizes of the names in the axes.
        tools: versions of what made it.
        verification: None if the export was told not to verify.
        target: of a TensorRT engine file; None for a graph.
    """

    name: Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,40}(\.[a-z0-9_]{1,40})?$")]
    features: tuple[Annotated[str, Meta(pattern="^[a-z0-9_]{1,20}$")], ...] = ()
    precision: Precision
    runtime: Runtime
    file: FileName
    weights: tuple[FileName, ...]
    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=200)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=200)]
    ranges: dict[str, AxisRange]
    tools: dict[str, Text]
    verification: Verification | None = None
    target: Target | None = None

    @classmethod
    def of(cls, spec: EngineSpec, **fields: Any) -> EngineRecord:
        """The record of a resolved engine; ``fields`` are those that the spec does not hold."""
        return cls(
            name=spec.name,
            features=spec.features,
            inputs=spec.inputs,
            outputs=spec.outputs,
            ranges=dict(spec.ranges),
            **fields,
        )

    @property
    def spec(self) -> EngineSpec:
        """Its tensors, as a row of the table."""
        row = ENGINES[self.name]
        return EngineSpec(
            name=self.name,
            stage=row.stage,
            model=row.model,
            inputs=self.inputs,
            outputs=self.outputs,
            ranges=self.ranges,
            features=self.features,
        )

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that the engine needs."""
        return (self.file, *self.weights)

    @property
    def sm(self) -> tuple[int, ...]:
        """Compute capabilities that it runs on; empty for a graph."""
        return self.target.sm if self.target else ()

    @property
    def key(self) -> EngineKey:
        """What a bundle holds at most one of."""
        return EngineKey(self.name, self.features, self.precision.name, self.runtime, self.sm)


class FileRecord(Record, frozen=True, kw_only=True):
    """Size and hash of a file of the bundle."""

    sha256: Sha256
    bytes: Bytes


class Manifest(Record, frozen=True, kw_only=True):
    """``cascade.json``.

    Attributes:
        format_version: 2.
        model: the cascade as a whole.
        sampling: defaults of every sampler.
        previews: of Stage C's (``prior``) and Stage B's (``decoder``) latents; where there are none, only a previewer
            engine shows Stage C's.
        presets: trades of quality against time; ``quality`` changes nothing and need not be listed.
        tokenizer: None where there is none.
        models: components of the checkpoint.
        engines: a graph and TensorRT engine files may lie side by side; several precisions and features too. Where
            several would do, the first is taken.
        files: every file that is named above, and nothing else.
    """

    format_version: Literal[2] = FORMAT_VERSION
    model: ModelFacts
    sampling: dict[SamplerName, SamplerDefaults]
    presets: dict[PresetName, Preset] = {}
    previews: dict[PreviewName, PreviewFactors] = {}
    tokenizer: TokenizerRecord | None = None
    models: dict[ModelName, ModelRecord] = {}
    engines: tuple[EngineRecord, ...] = ()
    files: dict[FileName, FileRecord] = {}

    def records(self, name: str, runtime: Runtime | None = None, features: Iterable[str] = ()) -> list[EngineRecord]:
        """The records of an engine, in the manifest's order.

        Args:
            name: of the engine.
            runtime: None: graphs first, then others.
            features: exactly these.
        """
        wanted = tuple(sorted(set(features)))
        found = [r for r in self.engines if r.name == name and r.features == wanted and runtime in (None, r.runtime)]
        return sorted(found, key=lambda record: record.runtime != "onnx")

    def to_json(self) -> str:
        """The text of ``cascade.json``."""
        return json.dumps(to_builtins(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: bytes | str, where: str) -> Manifest:
        """Read ``cascade.json``.

        Args:
            data: its text.
            where: its path, for messages.

        Raises:
            BundleError: it is no JSON, of another format, or a key is missing, unknown or not as the format has it.
        """
        document = parse_json(data, where, BundleError)
        if not isinstance(document, dict) or "format_version" not in document:
            raise BundleError(f"{plain(where)} is no bundle manifest: it has no format_version", field="format_version")
        version = document["format_version"]
        if version != FORMAT_VERSION or isinstance(version, bool | float):
            raise BundleError(f"{plain(where)} {_other_format(version, document, where)}", field="format_version")
        made = validated(document, cls, where, BundleError)
        made.check(where)
        return made

    def check(self, where: str) -> None:
        """Refuse what contradicts itself.

        Raises:
            BundleError: with the key's path.
        """
        for name in self.files:
            _check_inside(name, where)
        if self.model.default_sampler not in self.sampling:
            raise _contradiction(where, "model.default_sampler", self.model.default_sampler, "a key of sampling")
        if self.model.default_preset not in self.presets and self.model.default_preset != "quality":
            raise _contradiction(where, "model.default_preset", self.model.default_preset, "a key of presets")
        named = [(f"engines[{i}].files", file) for i, r in enumerate(self.engines) for file in r.files]
        named += [(f"models['{n}'].weights", m.weights) for n, m in self.models.items() if m.weights is not None]
        named += [("tokenizer.file", self.tokenizer.file)] if self.tokenizer else []
        for path, file in named:
            if file not in self.files:
                raise _contradiction(where, path, file, "a key of files, which has its hash")
        keys: set[EngineKey] = set()
        for index, record in enumerate(self.engines):
            _check_engine(record, f"engines[{index}]", where)
            if record.key in keys:
                raise BundleError(f"{plain(where)} lists the engine {record.key} twice", field=f"engines[{index}]")
            keys.add(record.key)


def _check_engine(record: EngineRecord, path: str, where: str) -> None:
    if record.name not in ENGINES:
        raise _contradiction(where, f"{path}.name", record.name, f"one of {', '.join(ENGINES)}")
    if record.features != tuple(sorted(set(record.features))):
        raise _contradiction(where, f"{path}.features", record.features, "sorted, each once")
    if (record.target is None) != (record.runtime == "onnx"):
        raise _contradiction(where, f"{path}.target", None, f"there exactly for TensorRT; this is {record.runtime}")
    ranks = {tensor.name: len(tensor.axes) for tensor in ENGINES[record.name].tensors}
    for kind, tensors in (("inputs", record.inputs), ("outputs", record.outputs)):
        if len({t.name for t in tensors}) < len(tensors):
            raise _contradiction(where, f"{path}.{kind}", [t.name for t in tensors], "names that differ")
        for index, tensor in enumerate(tensors):
            for axis in (a for a in tensor.axes if isinstance(a, str)):
                try:
                    unknown = [name for name in axis_of(axis).names if name not in record.ranges]
                except ValueError as error:
                    raise _contradiction(where, f"{path}.{kind}[{index}].axes", axis, f"a formula ({error})") from None
                if unknown:
                    place = f"{path}.{kind}[{index}].axes"
                    raise _contradiction(where, place, axis, f"of names in ranges, which has no {unknown[0]}")
            if (rank := ranks.get(tensor.name, len(tensor.axes))) != len(tensor.axes):
                raise _contradiction(where, f"{path}.{kind}[{index}].axes", tensor.axes, f"a list of {rank} entries")
            if tensor.dtype == "compute":
                raise _contradiction(where, f"{path}.{kind}[{index}].dtype", "compute", "resolved")
    _check_sizes_are_given(record, path, where)


def _check_sizes_are_given(record: EngineRecord, path: str, where: str) -> None:
    """Refuse formulas of sizes that no input tells: shapes of outputs are computed from those of inputs."""
    formulas = [axis_of(axis) for tensor in record.inputs for axis in tensor.axes if isinstance(axis, str)]
    given = {name for formula in formulas if len(formula.terms) == 1 for name in formula.names}
    for kind, tensors in (("inputs", record.inputs), ("outputs", record.outputs)):
        for index, tensor in enumerate(tensors):
            for axis in (a for a in tensor.axes if isinstance(a, str)):
                if unknown := [name for name in axis_of(axis).names if name not in given]:
                    place = f"{path}.{kind}[{index}].axes"
                    raise _contradiction(where, place, axis, f"of sizes that inputs give, and none gives {unknown[0]}")


def _contradiction(where: str, path: str, value: Any, accepted: str) -> BundleError:
    return BundleError(
        f"{plain(where)}: {path}: {shown(value)} is not accepted; it must be {accepted}",
        field=path,
        value=value,
        accepted=accepted,
    )


def _check_inside(name: str, where: str) -> None:
    path = PurePosixPath(name)
    parts_fine = path.parts and not any(part in ("..", ".") for part in name.split("/"))
    if path.is_absolute() or not parts_fine or not name.isprintable() or re.search(r'[\\:*?"<>|]', name):
        raise _contradiction(where, "files", name, "a plain relative name inside the bundle")


def _other_format(version: Any, document: dict[str, Any], where: str) -> str:
    """What to do about a bundle of another format."""
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
        upgrade = "Upgrade with: pip install -U cascade-rt"
        return f"has bundle format {shown(version)}; this cascade-rt reads {FORMAT_VERSION}. {upgrade}"
    if not (isinstance(version, int) and not isinstance(version, bool) and version == 1):
        return f"has bundle format {shown(version)}; this cascade-rt reads {FORMAT_VERSION}"
    model = document.get("model")
    size, source = (model.get("size"), model.get("source")) if isinstance(model, dict) else (None, None)
    checkpoint = f"--size {size}" if size in ("tiny", "small", "big") else f"--checkpoint {plain(str(source))[:200]}"
    out = where.removesuffix(f"/{MANIFEST}")
    return (
        f"has bundle format 1, which this cascade-rt does not read; it reads {FORMAT_VERSION}. Make it anew with: "
        f"cascade-export --stage all {checkpoint} --overwrite --out {plain(out)}"
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of ``cascade.json``, as ``engines/cascade.schema.json`` publishes it."""
    schema: dict[str, Any] = msgspec.json.schema(Manifest)
    title = f"cascade-rt engine bundle manifest ({MANIFEST}), format {FORMAT_VERSION}"
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "cascade.schema.json", "title": title}
    return head | schema
