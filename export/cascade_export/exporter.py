"""Checkpoint -> bundle: trace, stream weights, verify, build plans, and only then take the bundle's place."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import cascade_rt
from cascade_rt.backends import Engine, Value, open_engine, resolve_provider
from cascade_rt.backends.ort import OrtEngine
from cascade_rt.bundle import (
    MANIFEST,
    Bundle,
    EngineRecord,
    Manifest,
    ModelFacts,
    ModelRecord,
    SamplerPreset,
    group,
)
from cascade_rt.commands import check_interrupt
from cascade_rt.errors import CheckpointError, EngineError, RequestError
from cascade_rt.sampling import make_schedule
from cascade_rt.stages import ENGINES, EngineSpec, StageName, engines_of
from cascade_rt.text import TokenizerRecord

from . import presets
from .checkpoints import BundleCheckpoint
from .components import Checkpoint, Component, Facts
from .graphs import dims_of
from .loading import load_fp32, plain_json, weights_of
from .models import Denoiser, DenoiserConfig, StageAConfig, StreamScales
from .plans import build_plans, drop_stale_plans
from .precision import fit_scales, prompt_conditions
from .request import ExportRequest, Report
from .staging import Contents, Staging
from .tensorrt import check_precision
from .trace import OPSET, WEIGHT_DTYPE, Traced, save, trace
from .twin import write_fp32_twin
from .verify import RunEngine, verify_loop, verify_stage
from .weights import TensorSource, write_safetensors

TOKENIZER_FILE = "tokenizer.json"


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
    request = _present(checkpoint, request, report)
    old = _existing(request)
    for target in request.plans:
        check_precision(target, request.precision)
    with Staging(request.out, old, request.stages) as staging:
        builder = _Builder(checkpoint, request, staging.path, old, report)
        for stage in request.stages:
            builder.add(stage)
        builder.build_plans()
        builder.finish()
        staging.commit()
    return Bundle(request.out)


def _present(checkpoint: Checkpoint, request: ExportRequest, report: Report) -> ExportRequest:
    """The request without stages that the checkpoint does not have, where it asks for everything."""
    if not request.skip_absent:
        return request
    there = tuple(s for s in request.stages if checkpoint.component(engines_of(s)[0].model) is not None)
    for stage in request.stages:
        if stage not in there:
            report(f"{stage}: not in this checkpoint, left out")
    return replace(request, stages=there)


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
    keys = {record.key for record in manifest.records}
    for target in request.targets:
        there = {s for s in request.stages for e in engines_of(s) if (e.name, target.runtime, target.sm) in keys}
        if there and not request.overwrite:
            raise RequestError(
                f"{request.out} already has stage {', '.join(sorted(there))} for {target}; "
                "add --overwrite to replace it, or choose another --out"
            )
    return manifest


class _Builder:
    """Fills a staging folder and its manifest, stage by stage.

    Graphs that are only built from stay out of the bundle, in a folder of their own: a plan holds its weights, and
    keeping both would double the disk that a bundle needs. What a plan came from is named by its record's hashes.
    """

    def __init__(
        self, checkpoint: Checkpoint, request: ExportRequest, folder: Path, old: Manifest | None, report: Report
    ) -> None:
        self._checkpoint = checkpoint
        self._request = request
        self._report = report
        self._bundle = Contents(
            folder,
            dict(old.models) if old else {},
            {record.key: record for record in old.records} if old else {},
            dict(old.files) if old else {},
        )
        self._graphs = self._bundle if request.keeps_graphs else Contents(folder / ".graphs", {}, {}, {})
        self._graphs.folder.mkdir(exist_ok=True)
        self._tokenizer: TokenizerRecord | None = old.tokenizer if old else None
        self._old = old
        self._done: set[StageName] = set()

    def add(self, stage: StageName) -> None:
        """Export a stage's graphs."""
        name = engines_of(stage)[0].model
        if self._reuse(stage):
            self._report(f"{stage}: the bundle's own {self._request.precision} graphs")
            self._done.add(stage)
            return
        component = self._checkpoint.component(name)
        if component is None:
            raise RequestError(
                f"the checkpoint {self._checkpoint.facts.source} has no {name}; --stage {stage} needs one that has it"
            )
        self._check_loras(name, component)
        precision = self._request.precision
        config = plain_json(component.config)
        if stage == "text" and not self._add_tokenizer():
            return
        specs = [s.resolve(self._dims(s.name, config), precision) for s in engines_of(stage)]
        source = weights_of(name, config, component)
        started = time.perf_counter()
        scales, scanned = None, None
        if precision == "fp16" and name in ("stage_c", "stage_b"):
            scales, scanned = fit_scales(name, config, source, component.prediction_type, self._checkpoint)
        graphs = self._trace(specs, config, scales)
        traced = time.perf_counter()
        used = sorted({w for graph in graphs.values() for w in graph.weights})
        made = self._graphs
        file = f"{name}.safetensors"
        dtype = WEIGHT_DTYPE[precision]
        made.remove(file)
        size = sum(torch.Size(source.shapes[n]).numel() for n in used) * torch.empty(0, dtype=dtype).element_size()
        with _bar(size, f"write {file}", self._request.quiet, unit="B", unit_scale=True) as bar:
            places = write_safetensors(made.folder / file, used, source, dtype, bar.update)
        made.add_file(file)
        facts, prediction = self._checkpoint.facts, component.prediction_type if stage in ("b", "c") else None
        made.models[name] = ModelRecord(
            config, file, prediction, scanned, facts.source, _licence(facts), facts.revision, component.loras
        )
        for spec in specs:
            graph = f"{spec.name}.onnx"
            made.remove(graph)
            save(graphs[spec.name], made.folder / graph, file, places, dtype)
            made.add_file(graph)
            record = EngineRecord(spec, graph, "onnx", precision, (file,), OPSET[precision], _tools())
            made.engines[record.key] = record
        written = time.perf_counter()
        self._done.add(stage)
        line = f"{stage}: traced in {traced - started:.1f} s"
        line += f", {size / 2**20:.1f} MiB of weights in {written - traced:.1f} s"
        if scanned is not None:
            line += f", stream divided by {scanned['down']} down and {scanned['up']} up"
        if self._request.verify:
            figures = self._verify(specs, config, source)
            line += f", verified in {time.perf_counter() - written:.1f} s"
            for engine, found in figures.items():
                line += f"\n  {engine}: {found['rel_l2']:.1e} from fp32 PyTorch"
                if (loop := found.get("loop")) is not None:
                    line += f"; after a loop of {loop['steps']} steps {loop['rel_l2']:.1e}"
        self._report(line)

    def _check_loras(self, name: str, component: Component) -> None:
        """Refuse plans with other LoRA files than the graphs beside which they would lie.

        Raises:
            RequestError: the bundle's graphs of the model hold others.
        """
        kept = self._bundle.models.get(name)
        if self._request.keeps_graphs or kept is None or kept.weights is None or kept.loras == component.loras:
            return
        there, asked = (", ".join(loras) or "no LoRA" for loras in (kept.loras, component.loras))
        raise RequestError(
            f"{self._request.out} holds {name} with {there}, and its plans would have {asked}; "
            "add --target onnx --overwrite to replace its graphs too, or choose another --out"
        )

    def _trace(self, specs: list[EngineSpec], config: dict[str, Any], scales: StreamScales | None) -> dict[str, Traced]:
        graphs = {}
        for spec in specs:
            with _bar(1, f"trace {spec.name}", self._request.quiet) as bar:
                graphs[spec.name] = trace(spec, config, self._request.precision, scales)
                bar.update(1)
        return graphs

    def _verify(self, specs: list[EngineSpec], config: dict[str, Any], source: TensorSource) -> dict[str, Any]:
        """Compare the stage's engines, as they lie in the folder, with fp32 PyTorch."""
        denoiser = specs[0].model in ("stage_b", "stage_c")
        # before the denoiser is loaded: the text encoder need not lie beside it
        conditions = prompt_conditions(DenoiserConfig.from_dict(config), self._checkpoint) if denoiser else {}
        module = load_fp32(specs[0].model, config, source)
        precision = self._request.precision
        provider = bf16_provider() if precision == "bf16" else resolve_provider("cpu")
        engines = {spec.name: self._open(spec, config, provider) for spec in specs}

        def run(name: str, feeds: Mapping[str, Value]) -> dict[str, Value]:
            host = {n: v for n, v in feeds.items() if isinstance(v, np.ndarray)}
            context = {n: v for n, v in feeds.items() if not isinstance(v, np.ndarray)}
            return engines[name].bind(context)(host)

        try:
            figures = verify_stage(specs, module, run, precision)
            if isinstance(module, Denoiser):
                figures[f"{specs[0].model}.step"]["loop"] = self._verify_loop(specs, module, run, conditions)
        finally:
            for engine in engines.values():
                engine.close()
        by = provider or "cpu, in fp32 arithmetic over the bf16 weights"
        for name, row in figures.items():
            key = (name, "onnx", ())
            self._graphs.engines[key] = replace(self._graphs.engines[key], verification={"provider": by, **row})
        return figures

    def _verify_loop(
        self, specs: list[EngineSpec], module: Denoiser, run: RunEngine, conditions: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Compare a whole loop, as the bundle's default sampler runs it, with one of fp32 PyTorch."""
        name = specs[0].model
        facts, sampling = self._facts()
        sampler, prediction_type = facts.default_sampler, self._graphs.models[name].prediction_type
        assert prediction_type is not None
        defaults = sampling[sampler].prior if name == "stage_c" else sampling[sampler].decoder
        schedule = make_schedule(
            sampler,
            defaults.num_inference_steps,
            prediction_type,
            shift=defaults.shift,
            scaler=defaults.scaler,
            s=defaults.s,
        )
        with _bar(2 * len(schedule), f"verify {name}'s loop", self._request.quiet) as bar:
            figures = verify_loop(
                specs, module, run, self._request.precision, schedule, defaults, conditions, progress=bar.update
            )
        return {"sampler": sampler, **figures}

    def _open(self, spec: EngineSpec, config: dict[str, Any], provider: str | None) -> Engine:
        """Load an engine as it lies in the folder; without a provider, its fp32 twin."""
        if provider is not None:
            self._write_manifest(self._graphs)
            return open_engine(Bundle(self._graphs.folder), spec.name, provider)
        record = self._graphs.engines[(spec.name, "onnx", ())]
        wide = ENGINES[spec.name].resolve(self._dims(spec.name, config), "fp32")
        twin = self._graphs.folder / f".{spec.name}.twin.onnx"
        write_fp32_twin(self._graphs.folder / record.file, twin)
        try:
            return OrtEngine(replace(record, spec=wide, precision="fp32"), twin, "cpu")
        finally:
            twin.unlink()

    def _dims(self, engine: str, config: dict[str, Any]) -> dict[str, int]:
        """`dims_of`; a prompt has the tokenizer's length, which may be less than the positions of the encoder."""
        length = {"max_length": self._tokenizer.max_length} if engine == "text_encoder" and self._tokenizer else {}
        return dims_of(engine, config) | length

    def _add_tokenizer(self) -> bool:
        """Copy the tokenizer; False where there is none and everything was asked for.

        Raises:
            RequestError: there is none, and the text stage was named.
        """
        tokenizer = self._checkpoint.tokenizer()
        if tokenizer is None and self._request.skip_absent:
            self._report("text: this checkpoint has a text encoder but no tokenizer, left out")
            return False
        if tokenizer is None:
            raise RequestError(
                f"the checkpoint {self._checkpoint.facts.source} has a text encoder but no tokenizer; "
                "export --stage text from a diffusers folder"
            )
        self._bundle.remove(TOKENIZER_FILE)
        (self._bundle.folder / TOKENIZER_FILE).write_text(tokenizer.text, encoding="utf-8")
        self._bundle.add_file(TOKENIZER_FILE)
        self._tokenizer = TokenizerRecord(TOKENIZER_FILE, tokenizer.max_length, tokenizer.pad_id)
        return True

    def _reuse(self, stage: StageName) -> bool:
        """Whether the bundle's own graphs of a stage are what its plans shall be built from."""
        checkpoint, precision = self._checkpoint, self._request.precision
        if self._request.keeps_graphs or not isinstance(checkpoint, BundleCheckpoint):
            return False
        found = [self._bundle.graph(spec.name) for spec in engines_of(stage)]
        same = checkpoint.path.resolve() == self._request.out.resolve()
        return same and all(record is not None and record.precision == precision for record in found)

    def build_plans(self) -> None:
        """Build the plans of every stage that was exported."""
        stages = [stage for stage in self._request.stages if stage in self._done]
        if self._request.keeps_graphs:
            drop_stale_plans(self._bundle, stages, self._report)
        if not self._request.plans:
            return
        model, _ = self._facts()
        build_plans(self._request, stages, model, self._graphs, self._bundle, self._report)
        if self._graphs is not self._bundle:
            for name, record in self._graphs.models.items():
                kept = self._bundle.models.get(name)
                self._bundle.models[name] = replace(record, weights=kept.weights if kept else None)

    def finish(self) -> None:
        """Write the manifest.

        Raises:
            CheckpointError: no stage was exported.
        """
        if not self._done:
            raise CheckpointError(f"{self._checkpoint.facts.source} holds none of the stages that were asked for")
        self._write_manifest(self._bundle)
        if self._graphs is not self._bundle:
            shutil.rmtree(self._graphs.folder)

    def _facts(self) -> tuple[ModelFacts, Mapping[str, SamplerPreset]]:
        """What the manifest says of the cascade as a whole."""
        stage_a = self._graphs.models.get("stage_a") or self._bundle.models.get("stage_a")
        facts = self._checkpoint.facts
        scale = StageAConfig.from_dict(dict(stage_a.config)).scale_factor if stage_a else presets.DIFFUSERS_LATENT_SCALE
        sampling = facts.sampling or presets.default_sampling(scale, facts.prior_schedule, facts.decoder_schedule)
        side = 256 if facts.size == "tiny" else 1024
        model = ModelFacts(
            name=facts.name or facts.source,
            size=facts.size or "custom",
            source=facts.source,
            licence=_licence(facts),
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
        models = {**self._bundle.models, **self._graphs.models}.values()
        model = replace(model, licence="; ".join(dict.fromkeys(m.licence for m in models)) or model.licence)
        if stage_a:
            model = replace(model, compression=StageAConfig.from_dict(dict(stage_a.config)).compression)
        return model, sampling

    def _write_manifest(self, contents: Contents) -> None:
        files = {name: contents.files[name] for name in sorted(contents.files)}
        tokenizer = self._tokenizer if contents is self._bundle else None
        manifest = Manifest(*self._facts(), contents.models, group(contents.engines.values()), files, tokenizer)
        path = contents.folder / MANIFEST
        path.unlink(missing_ok=True)
        path.write_text(manifest.to_json(), encoding="utf-8")

    def _merge(self, old: SamplerPreset, new: SamplerPreset) -> SamplerPreset:
        return SamplerPreset(
            new.prior if "c" in self._done else old.prior,
            new.decoder if "b" in self._done else old.decoder,
            new.latent_scale if "a" in self._done else old.latent_scale,
        )


def _licence(facts: Facts) -> str:
    return facts.licence or "that of the checkpoint, which does not say"


def bf16_provider() -> str | None:
    """The provider that can run bf16 engines on this machine, None if none can."""
    for provider in ("cuda", "openvino"):
        try:
            return resolve_provider(provider)
        except EngineError:
            continue
    return None


def _tools() -> dict[str, str]:
    names = ("torch", "onnx", "onnxscript", "onnxruntime")
    return {"cascade-rt": cascade_rt.__version__, **{name: version(name) for name in names}}


@contextmanager
def _bar(total: int, what: str, quiet: bool, **options: Any) -> Iterator[Any]:
    with tqdm(total=total, desc=what, leave=False, disable=True if quiet else None, **options) as bar:
        yield bar
    check_interrupt()
