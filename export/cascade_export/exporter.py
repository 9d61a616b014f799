"""Checkpoint -> bundle: trace, stream weights, verify, and only then take the bundle's place."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import cascade_rt
from cascade_rt.backends import Value, open_engine, resolve_provider
from cascade_rt.bundle import (
    MANIFEST,
    Bundle,
    EngineRecord,
    Manifest,
    ModelFacts,
    ModelRecord,
    SamplerPreset,
    file_record,
    group,
)
from cascade_rt.errors import CheckpointError, EngineError, OutputError, RequestError
from cascade_rt.stages import EngineSpec, Precision, StageName, engines_of
from cascade_rt.text import TokenizerRecord

from . import presets
from .components import Checkpoint, Component
from .graphs import dims_of
from .models import StageAConfig, build_model
from .trace import OPSET, WEIGHT_DTYPE, save, trace
from .verify import verify_stage
from .weights import RandomSource, TensorSource, check_architecture, write_safetensors

TOKENIZER_FILE = "tokenizer.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        stages: in any order.
        precision: of weights and wide activations.
        out: the bundle.
        skip_absent: leave out stages that the checkpoint does not have (for ``--stage all``).
        verify: compare with fp32 PyTorch before the bundle takes its place.
        overwrite: replace engines that are there.
        quiet: no progress bar.
    """

    stages: tuple[StageName, ...]
    precision: Precision
    out: Path
    skip_absent: bool = False
    verify: bool = True
    overwrite: bool = False
    quiet: bool = False


def export(checkpoint: Checkpoint, request: ExportRequest, report: Report = lambda line: None) -> Bundle:
    """Export stages into a bundle, which is made or added to.

    Args:
        checkpoint: where weights come from.
        request: what to export.
        report: gets one line for each thing that was done.

    Returns:
        The finished bundle.

    Raises:
        RequestError: an engine is there already, or the checkpoint lacks a stage that was named.
        CheckpointError: the checkpoint is damaged or of another architecture.
        ExportError: what came out differs from PyTorch.
        OutputError: the bundle cannot be written.
    """
    old = _existing(request)
    if request.verify:
        _verifier(request.precision)  # refuse before the work is done, not after
    with _Staging(request.out, old) as staging:
        builder = _Builder(checkpoint, request, staging.path, old, report)
        for stage in request.stages:
            builder.add(stage)
        builder.finish()
        staging.commit()
    return Bundle(request.out)


def _existing(request: ExportRequest) -> Manifest | None:
    """The manifest of a bundle that is added to.

    Raises:
        RequestError: something else is in the way, or an engine is there and may not be replaced.
    """
    if not request.out.exists():
        return None
    if not (request.out / MANIFEST).is_file():
        if request.out.is_dir() and not any(request.out.iterdir()):
            return None
        raise RequestError(f"{request.out} exists and is no bundle; choose another --out")
    manifest = Bundle(request.out).manifest
    there = sorted({s for s in request.stages for spec in engines_of(s) if spec.name in manifest.engines})
    if there and not request.overwrite:
        raise RequestError(
            f"{request.out} already has stage {', '.join(there)}; add --overwrite to replace it, "
            "or choose another --out"
        )
    return manifest


class _Staging:
    """A folder beside the bundle's place, renamed to it in the end and removed if anything goes wrong."""

    def __init__(self, out: Path, old: Manifest | None) -> None:
        self._out = out
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
            self.path.chmod(0o755)
        except OSError as error:
            raise OutputError(f"{out.parent} cannot be written to: {error.strerror or error}") from error
        for name in old.files if old else ():
            _link(out / name, self.path / name)

    def __enter__(self) -> _Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"{self._out} cannot be written: {error.strerror or error}") from error

    def commit(self) -> None:
        """Take the bundle's place."""
        aside = self.path.with_name(self.path.name + ".old")
        if self._out.exists():
            self._out.replace(aside)
        try:
            self.path.replace(self._out)
        except BaseException:
            if aside.exists():
                aside.replace(self._out)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """The same file in another folder: linked where the file system can, else copied."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class _Builder:
    """Fills a staging folder and its manifest, stage by stage."""

    def __init__(
        self, checkpoint: Checkpoint, request: ExportRequest, folder: Path, old: Manifest | None, report: Report
    ) -> None:
        self._checkpoint = checkpoint
        self._request = request
        self._folder = folder
        self._report = report
        self._models: dict[str, ModelRecord] = dict(old.models) if old else {}
        self._engines: dict[str, EngineRecord] = {r.spec.name: r for r in old.records} if old else {}
        self._files: dict[str, Mapping[str, Any]] = dict(old.files) if old else {}
        self._tokenizer: TokenizerRecord | None = old.tokenizer if old else None
        self._old = old
        self._done: set[StageName] = set()

    def add(self, stage: StageName) -> None:
        """Export a stage into the folder."""
        name = engines_of(stage)[0].model
        component = self._checkpoint.component(name)
        if component is None:
            if self._request.skip_absent:
                self._report(f"{stage}: not in this checkpoint, left out")
                return
            raise RequestError(
                f"the checkpoint {self._checkpoint.facts.source} has no {name}; --stage {stage} needs one that has it"
            )
        precision = self._request.precision
        config = _plain_json(component.config)
        specs = [s.resolve(dims_of(s.name, config), precision) for s in engines_of(stage)]
        started = time.perf_counter()
        graphs = {}
        for spec in specs:
            with _bar(1, f"trace {spec.name}", self._request.quiet) as bar:
                graphs[spec.name] = trace(spec, config, precision)
                bar.update(1)
        traced = time.perf_counter()
        source = _weights_of(name, config, component)
        used = sorted({w for graph in graphs.values() for w in graph.weights})
        file = f"{name}.safetensors"
        dtype = WEIGHT_DTYPE[precision]
        self._remove(file)
        size = sum(torch.Size(source.shapes[n]).numel() for n in used) * torch.empty(0, dtype=dtype).element_size()
        with _bar(size, f"write {file}", self._request.quiet, unit="B", unit_scale=True) as bar:
            places = write_safetensors(self._folder / file, used, source, dtype, bar.update)
        self._files[file] = file_record(self._folder / file)
        prediction = component.prediction_type if stage in ("b", "c") else None
        self._models[name] = ModelRecord(config, file, prediction)
        for spec in specs:
            graph = f"{spec.name}.onnx"
            self._remove(graph)
            save(graphs[spec.name], self._folder / graph, file, places, dtype)
            self._files[graph] = file_record(self._folder / graph)
            self._engines[spec.name] = EngineRecord(spec, graph, "onnx", precision, (file,), OPSET[precision], _tools())
        if stage == "text":
            self._add_tokenizer()
        written = time.perf_counter()
        self._done.add(stage)
        line = f"{stage}: traced in {traced - started:.1f} s"
        line += f", {size / 2**20:.1f} MiB of weights in {written - traced:.1f} s"
        if self._request.verify:
            figures = self._verify(specs, config, source)
            line += f", verified in {time.perf_counter() - written:.1f} s"
            line += "".join(f"\n  {n}: {f['rel_l2']:.1e} from fp32 PyTorch" for n, f in figures.items())
        self._report(line)

    def _verify(self, specs: list[EngineSpec], config: dict[str, Any], source: TensorSource) -> dict[str, Any]:
        """Compare the stage's engines, as they lie in the folder, with fp32 PyTorch."""
        module = _load_fp32(specs[0].model, config, source)
        provider = _verifier(self._request.precision)
        self._write_manifest()
        bundle = Bundle(self._folder)
        engines = {spec.name: open_engine(bundle, spec.name, provider) for spec in specs}

        def run(name: str, feeds: Mapping[str, Value]) -> dict[str, Value]:
            host = {n: v for n, v in feeds.items() if isinstance(v, np.ndarray)}
            context = {n: v for n, v in feeds.items() if not isinstance(v, np.ndarray)}
            return engines[name].bind(context)(host)

        try:
            figures = verify_stage(specs, module, run, self._request.precision)
        finally:
            for engine in engines.values():
                engine.close()
        for name, row in figures.items():
            self._engines[name] = replace(self._engines[name], verification={"provider": provider, **row})
        return figures

    def _add_tokenizer(self) -> None:
        tokenizer = self._checkpoint.tokenizer()
        if tokenizer is None:
            raise RequestError(
                f"the checkpoint {self._checkpoint.facts.source} has a text encoder but no tokenizer; "
                "export --stage text from a diffusers folder"
            )
        self._remove(TOKENIZER_FILE)
        (self._folder / TOKENIZER_FILE).write_text(tokenizer.text, encoding="utf-8")
        self._files[TOKENIZER_FILE] = file_record(self._folder / TOKENIZER_FILE)
        self._tokenizer = TokenizerRecord(TOKENIZER_FILE, tokenizer.max_length, tokenizer.pad_id)

    def finish(self) -> None:
        """Write the manifest.

        Raises:
            CheckpointError: no stage was exported.
        """
        if not self._done:
            raise CheckpointError(f"{self._checkpoint.facts.source} holds none of the stages that were asked for")
        self._write_manifest()

    def _write_manifest(self) -> None:
        stage_a = self._models.get("stage_a")
        facts = self._checkpoint.facts
        scale = StageAConfig.from_dict(dict(stage_a.config)).scale_factor if stage_a else presets.DIFFUSERS_LATENT_SCALE
        sampling = facts.sampling or presets.default_sampling(scale, facts.scaler, facts.s)
        side = 256 if facts.size == "tiny" else 1024
        model = ModelFacts(
            name=facts.name or facts.source,
            size=facts.size or "custom",
            source=facts.source,
            licence=facts.licence or "that of the checkpoint, which does not say",
            height=facts.height or side,
            width=facts.width or side,
            revision=facts.revision,
            resolution_multiple=facts.resolution_multiple,
            latent_dim_scale=facts.latent_dim_scale,
            default_sampler=facts.default_sampler or "original",
        )
        if self._old is not None:  # each fact comes from the checkpoint of the stage that it belongs to
            kept = self._old.model
            if "c" in self._done:
                kept = replace(kept, resolution_multiple=model.resolution_multiple)
            if "b" in self._done:
                kept = replace(kept, latent_dim_scale=model.latent_dim_scale)
            model = kept
            sampling = {name: self._merge(self._old.sampling[name], preset) for name, preset in sampling.items()}
        if stage_a:
            model = replace(model, compression=StageAConfig.from_dict(dict(stage_a.config)).compression)
        files = {name: self._files[name] for name in sorted(self._files)}
        manifest = Manifest(model, sampling, self._models, group(self._engines.values()), files, self._tokenizer)
        self._remove(MANIFEST)
        (self._folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")

    def _merge(self, old: SamplerPreset, new: SamplerPreset) -> SamplerPreset:
        return SamplerPreset(
            new.prior if "c" in self._done else old.prior,
            new.decoder if "b" in self._done else old.decoder,
            new.latent_scale if "a" in self._done else old.latent_scale,
        )

    def _remove(self, name: str) -> None:
        """Unlink before writing: the file may be a link to the old bundle's."""
        (self._folder / name).unlink(missing_ok=True)


def _verifier(precision: Precision) -> str:
    """The provider that can run a precision on this machine.

    Raises:
        RequestError: none can.
    """
    if precision != "bf16":
        return resolve_provider("cpu")
    for provider in ("cuda", "openvino"):
        try:
            return resolve_provider(provider)
        except EngineError:
            continue
    raise RequestError(
        "nothing on this machine runs bf16 engines (ONNX Runtime's CPU provider cannot, and there is no OpenVINO or "
        "CUDA device), so they cannot be verified; add --no-verify, which the manifest records, or use --precision fp32"
    )


def _weights_of(name: str, config: dict[str, Any], component: Component) -> TensorSource:
    """The component's tensors, checked against the architecture that its config describes."""
    with torch.device("meta"):
        module = build_model(name, config)
    wanted = {n: tuple(t.shape) for n, t in module.state_dict().items()}
    if component.weights is None:
        return RandomSource(wanted, component.seed)
    check_architecture(name, wanted, component.weights)
    return component.weights


def _load_fp32(name: str, config: dict[str, Any], source: TensorSource) -> nn.Module:
    """The module in fp32 with its weights."""
    module = build_model(name, config)
    state = {n: source.read(n).float() for n in module.state_dict() if n in source.shapes}
    module.load_state_dict(state, strict=False)
    return module


def _plain_json(value: Any) -> Any:
    """Config values as JSON has them; transformers adds keys that are no part of an architecture."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {k: _plain_json(v) for k, v in value.items() if not str(k).startswith("_name_or_path")}
    if isinstance(value, list | tuple):
        return [_plain_json(v) for v in value]
    return value


def _tools() -> dict[str, str]:
    names = ("torch", "onnx", "onnxscript", "onnxruntime")
    return {"cascade-rt": cascade_rt.__version__, **{name: version(name) for name in names}}


@contextmanager
def _bar(total: int, what: str, quiet: bool, **options: Any) -> Iterator[Any]:
    with tqdm(total=total, desc=what, leave=False, disable=True if quiet else None, **options) as bar:
        yield bar
