"""Checkpoint -> bundle, as a line of values.

plan_export(checkpoint, request, old) -> jobs    what will be made, and under which names
make(job) -> made                                graphs and weights in a folder of their own
check(made) -> figures                           each engine against fp32 PyTorch
describe(plan, made) -> manifest
build_engine_files(made) -> built                TensorRT's files, from the graphs
Staging.commit(manifest)                         the bundle's place is taken
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace as with_fields
from torch import Tensor, nn
from tqdm import tqdm

import cascade_rt
from cascade_rt.backends import Engine, EngineOptions, Value, open_engine, resolve_provider, runs
from cascade_rt.bundle import Bundle, file_record
from cascade_rt.commands import check_interrupt
from cascade_rt.errors import EngineError
from cascade_rt.manifest import EngineRecord, FileRecord, Manifest, QuantisedRecord, TokenizerRecord, Verification
from cascade_rt.profiles import check_shapes
from cascade_rt.sampling import make_schedule
from cascade_rt.sizes import grids_of
from cascade_rt.stages import PRECISIONS, Precision
from cascade_rt.stored import Kind

from .catalog import COMPONENTS
from .describe import Made, cascade_facts, describe, with_engine_files, without_stale_engine_files
from .engine_files import Built, Graph, build_engine_files, fitted
from .interrupts import uninterrupted
from .job import ExportRequest, Report
from .loading import load_fp32
from .models import Denoiser, encode_text
from .names import engine_file_name
from .networks import Checkpoint, TokenizerSource
from .plan_export import ExportPlan, Job, model_record, plan_export
from .precision import Fit, Prompts, conditions_of, encode_prompts, fit, prompt_ids, run_loop
from .quantise import FORMS, Scan, products_of, scan_products, to_8_bits
from .staging import Staging, link, locked, place_of, read_existing, say_on_stderr
from .targets import BuildTarget, check_precision
from .trace import TORCH_DTYPE, save, trace
from .twin import write_fp32_twin
from .verify import verify_engines, verify_loop
from .weights import StoredSource
from .weights_file import write_weights

TOKENIZER_FILE = "tokenizer.json"
_AS_WRITTEN = EngineOptions(provider_options={"session.disable_quant_qdq": "1"})
"""ONNX Runtime fuses products whose operands come from 8 bits: those of E4M3 into an operator for integers."""
FP32_ARITHMETIC = "cpu, in fp32 arithmetic over the {} weights"


def export(
    checkpoint: Checkpoint,
    request: ExportRequest,
    report: Report = lambda line: None,
    notify: Report = say_on_stderr,
) -> Bundle:
    """Export stages into a bundle, which is made or added to.

    Args:
        checkpoint: where weights come from.
        request: what to export.
        report: gets one line for each thing that was done.
        notify: gets a line if the export must wait for another one into the same place.

    Returns:
        The finished bundle.

    Raises:
        RequestError: an engine is there already, or the checkpoint lacks a stage that was named.
        CheckpointError: the checkpoint is damaged or of another architecture.
        ExportError: what came out differs from PyTorch.
        OutputError: the bundle cannot be written.
    """
    for target in request.engine_files:
        check_precision(target, request.precision)
    place = place_of(request.out)
    with locked(place, notify):
        existing = read_existing(place, request.out, request.overwrite)
        plan = plan_export(checkpoint, request, existing.manifest, place, report)
        _check_files(plan, place)
        if request.engine_files:
            check_shapes([spec for job in plan.jobs for spec in job.specs], request.shapes)
        prompts = _prompts(plan, request, checkpoint)
        with Staging(place) as staging:
            made = [_made(job, plan, request, place, staging.folder, prompts, report) for job in plan.jobs]
            manifest = describe(plan, made, request.keeps_graphs)
            manifest = without_stale_engine_files(manifest, made, report)
            if request.engine_files:
                built = _build(request, made, manifest, staging.folder, report)
                manifest = with_engine_files(manifest, built)
            staging.commit(manifest, existing.files)
    return Bundle(request.out)


def _check_files(plan: ExportPlan, place: Path) -> None:
    """Refuse to add to a bundle whose files are damaged.

    Raises:
        BundleError: with the file.
    """
    names = {file for record in plan.kept for file in record.files}
    if names:
        bundle = Bundle(place)
        for name in sorted(names):
            bundle.file(name)


def _prompts(plan: ExportPlan, request: ExportRequest, checkpoint: Checkpoint) -> Prompts | None:
    """Encoded prompts for the loops of denoisers; the text encoder need not lie in memory beside them."""
    wanted = any(job.is_denoiser and _needs_module(job, request) for job in plan.jobs)
    return encode_prompts(checkpoint) if wanted else None


def _needs_module(job: Job, request: ExportRequest) -> bool:
    return not job.own and (request.verify or _is_fitted(job))


def _is_fitted(job: Job) -> bool:
    """Whether a scan decides how the component fits its precision."""
    return (job.is_denoiser and job.precision.compute == "float16") or _is_scanned(job)


def _is_scanned(job: Job) -> bool:
    """Whether a scan decides which linear layers are computed in 8 bits."""
    form = FORMS.get(job.precision.linear)
    return form is not None and form.inputs != "wide"


def _made(
    job: Job,
    plan: ExportPlan,
    request: ExportRequest,
    place: Path,
    bundle_folder: Path,
    prompts: Prompts | None,
    report: Report,
) -> Made:
    """Make and check one component, and say how it went. Graphs that are only built from do not enter the bundle."""
    if job.own:
        report(f"{job.stage}: the bundle's own {job.precision.name} graphs")
        return _own(job, plan, place)
    started = time.perf_counter()
    reference = load_reference(job, prompts) if _needs_module(job, request) else None
    fit16, scanned = _fit16(job, reference), _scanned(job, reference)
    folder = bundle_folder
    if not request.keeps_graphs:
        folder = bundle_folder / "graphs"
        folder.mkdir(exist_ok=True)
    made = make(job, plan, folder, place, fit16, scanned, request.quiet)
    if job.tokenizer is not None:
        tokenizer, file = write_tokenizer(job.tokenizer, bundle_folder)
        made = replace(made, tokenizer=tokenizer, files={**made.files, tokenizer.file: file})
    size = sum(made.files[name].bytes for name in {w for r in made.records for w in r.weights}) / 2**20
    line = f"{job.stage}: made in {time.perf_counter() - started:.1f} s, {size:.1f} MiB of weights"
    if fit16 is not None:
        line += f", stream divided by {list(fit16.scales.down)} down and {list(fit16.scales.up)} up"
        line += f", {len(fit16.divided)} weights stored divided" if fit16.divided else ""
    if (narrow := made.model.quantised.get(job.precision.name)) is not None:
        line += f", {narrow.layers} layers in 8 bits (up to {narrow.largest_error:.1e} from exact)"
        line += f", {len(narrow.wide)} kept wide" if narrow.wide else ""
    if request.verify:
        assert reference is not None
        checked = time.perf_counter()
        figures = check(made, plan, place, reference, request.quiet)
        records = [with_fields(r, verification=figures[r.name]) for r in made.records]
        made = replace(made, records=tuple(records))
        line += f", verified in {time.perf_counter() - checked:.1f} s"
        for record in made.records:
            found = figures[record.name]
            line += f"\n  {record.name}: {found.rel_l2:.1e} from fp32 PyTorch"
            if found.loop is not None:
                line += f"; after a loop of {found.loop.steps} steps {found.loop.rel_l2:.1e}"
    report(line)
    return made


def _fit16(job: Job, reference: Reference | None) -> Fit | None:
    """How a denoiser fits fp16; None for everything else."""
    if reference is None or job.precision.compute != "float16" or not isinstance(reference.module, Denoiser):
        return None
    return fit(reference.module, reference.conditions, job.network.prediction_type)


def _scanned(job: Job, reference: Reference | None) -> Scan | None:
    """What 8 bits would make of a component's linear layers; None where it is exported in another precision."""
    if reference is None or not _is_scanned(job):
        return None
    module = reference.module

    def run() -> None:
        if isinstance(module, Denoiser):
            conditions = dict(reference.conditions)
            if "effnet" in conditions:  # the second row is what guidance steers away from
                conditions["effnet"] = torch.cat([conditions["effnet"][:1], torch.zeros_like(conditions["effnet"][1:])])
            run_loop(module, conditions, job.network.prediction_type)
            return
        if job.tokenizer is not None:
            encode_text(module, *prompt_ids(job.tokenizer))
        rng = np.random.default_rng(0)
        for spec in job.specs:
            feeds = COMPONENTS[job.model].samples(spec, job.config, rng)
            COMPONENTS[job.model].calls[spec.name](module, {n: torch.from_numpy(x) for n, x in feeds.items()})

    return scan_products(module, run, FORMS[job.precision.linear])


# -- make


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What engines are compared with.

    Attributes:
        module: the component in fp32, with its weights; it is loaded once an export.
        conditions: of a denoiser: inputs of `Denoiser.forward` beside sample and ratio, for two prompts.
    """

    module: nn.Module
    conditions: Mapping[str, Tensor]


def load_reference(job: Job, prompts: Prompts | None) -> Reference:
    """The component in fp32."""
    module = load_fp32(job.model, job.config, job.source)
    conditions = conditions_of(module.config, prompts) if isinstance(module, Denoiser) else {}
    return Reference(module=module, conditions=conditions)


def make(
    job: Job, plan: ExportPlan, folder: Path, place: Path, fit16: Fit | None, scanned: Scan | None, quiet: bool
) -> Made:
    """Trace a component's engines and write graphs and weights.

    Args:
        job: what to make.
        plan: of the export.
        folder: to write to.
        place: of the bundle that is added to.
        fit16: how a denoiser fits fp16.
        scanned: of a component in 8 bits: what decides which layers are computed so, and how their inputs are scaled.
        quiet: no progress bar.

    Raises:
        CheckpointError: a weight holds NaN or infinity, also after conversion.
        ExportError: a graph does not come out as the table says.
    """
    dtype, graphs = TORCH_DTYPE[job.precision.weights], {}
    for spec in job.specs:
        with _bar(1, f"trace {spec.name}", quiet) as bar:
            prepare = fit16.apply if fit16 else lambda module: None
            graphs[spec.name] = uninterrupted(partial(trace, spec, job.config, job.precision, prepare))
            bar.update(1)
    quantised: set[str] = set()
    narrow: dict[str, QuantisedRecord] = {}
    kind: Kind = "I8"
    if (form := FORMS.get(job.precision.linear)) is not None:
        quantised, kind = products_of(graphs, job.specs), form.kind
        if scanned:
            narrow[job.precision.name] = scanned.record(quantised, form)
            quantised -= narrow[job.precision.name].wide.keys()
        scales = scanned.scales if scanned else {}
        graphs = {name: to_8_bits(graph, quantised, form, scales) for name, graph in graphs.items()}
    names = {weight for graph in graphs.values() for weight in graph.weights}
    for there in (StoredSource(place / file) for file in job.beside):
        # the file can then come out as the one that is there
        if names <= there.shapes.keys() <= job.source.shapes.keys() and quantised == names & there.quantised.keys():
            names, quantised = set(there.shapes), set(there.quantised)
    size = sum(int(np.prod(job.source.shapes[n])) * (1 if n in quantised else dtype.itemsize) for n in names)
    with _bar(size, f"write {job.weights}", quiet, unit="B", unit_scale=True) as bar:
        divided = fit16.divided if fit16 else {}
        written = write_weights(folder / job.weights, names, job.source, dtype, divided, bar.update, quantised, kind)
    weights = job.weights
    for file in job.beside:
        if plan.old is not None and plan.old.files[file] == written.record:  # the same weights are not stored twice
            (folder / weights).unlink()
            link(place / file, folder / file)
            weights = file
    files: dict[str, FileRecord] = {weights: written.record}
    records = []
    for spec in job.specs:
        file = job.graphs[spec.name]
        save(graphs[spec.name], folder / file, weights, written.places, dtype)
        files[file] = file_record(folder / file)
        record = EngineRecord.of(
            spec, precision=job.precision, runtime="onnx", file=file, weights=(weights,), tools=_tools()
        )
        records.append(record)
    model = with_fields(
        model_record(plan.facts, job.network, job.config, weights),
        prediction_type=job.prediction_type,
        stream_scales=fit16.record if fit16 else None,
        quantised=narrow,
    )
    return Made(job=job, folder=folder, records=tuple(records), model=model, files=files)


def _own(job: Job, plan: ExportPlan, place: Path) -> Made:
    """The bundle's own graphs."""
    assert plan.old is not None
    files = {file: plan.old.files[file] for record in job.own for file in record.files}
    return Made(job=job, folder=place, records=job.own, model=plan.old.models[job.model], files=files)


def write_tokenizer(tokenizer: TokenizerSource, folder: Path) -> tuple[TokenizerRecord, FileRecord]:
    """Copy a tokenizer into a folder."""
    path = folder / TOKENIZER_FILE
    path.write_text(tokenizer.text, encoding="utf-8")
    record = TokenizerRecord(file=TOKENIZER_FILE, max_length=tokenizer.max_length, pad_id=tokenizer.pad_id)
    return record, file_record(path)


def _tools() -> dict[str, str]:
    names = ("torch", "onnx", "onnxscript", "onnxruntime")
    return {"cascade-rt": cascade_rt.__version__, **{name: version(name) for name in names}}


# -- check


def check(made: Made, plan: ExportPlan, place: Path, reference: Reference, quiet: bool) -> dict[str, Verification]:
    """Compare a component's engines, as they lie in their folder, with fp32 PyTorch.

    Args:
        made: by `make`.
        plan: of the export.
        place: of the bundle, where engines lie that stay and run together with those that were made.
        reference: from `load_reference`.
        quiet: no progress bar.

    Returns:
        Engine name -> figures.

    Raises:
        ExportError: an engine is further from PyTorch than its precision explains.
    """
    job, module = made.job, reference.module
    provider = bf16_provider(job.precision) if job.precision.compute == "bfloat16" else resolve_provider("cpu")
    pairs = [*((record, made.folder) for record in made.records), *((record, place) for record in job.shared)]
    specs = [record.spec for record, _ in pairs]
    with ExitStack() as opened:
        engines = {record.name: opened.enter_context(_open(record, folder, provider)) for record, folder in pairs}

        def run(name: str, feeds: Mapping[str, Value]) -> Mapping[str, Value]:
            host = {n: v for n, v in feeds.items() if isinstance(v, np.ndarray)}
            context = {n: v for n, v in feeds.items() if not isinstance(v, np.ndarray)}
            return engines[name].bind(context)(host)

        by = provider or FP32_ARITHMETIC.format(job.precision.name)
        figures = verify_engines(specs, job.config, module, run, job.precision, by)
        if isinstance(module, Denoiser):
            models = {**(plan.old.models if plan.old else {}), job.model: made.model}
            facts, sampling = cascade_facts(plan.facts, plan.old, models, {job.model})
            sampler = facts.default_sampler
            preset = sampling[sampler]
            defaults = preset.prior if job.model == "stage_c" else preset.decoder
            schedule = make_schedule(
                sampler,
                defaults.num_inference_steps,
                job.network.prediction_type,
                shift=defaults.shift,
                scaler=defaults.scaler,
                s=defaults.s,
            )
            with _bar(2 * len(schedule), f"verify {job.model}'s loop", quiet) as bar:
                loop = verify_loop(
                    specs,
                    module,
                    run,
                    job.precision,
                    schedule,
                    sampler,
                    defaults,
                    reference.conditions,
                    progress=bar.update,
                )
            step = f"{job.model}.step"
            figures[step] = with_fields(figures[step], loop=loop)
    return figures


def _open(record: EngineRecord, folder: Path, provider: str | None) -> Engine:
    """Load a graph; without a provider, its fp32 twin."""
    path = folder / record.file
    if provider is not None:
        return open_engine(record, path, provider, EngineOptions())
    wide = {
        kind: tuple(with_fields(t, dtype="float32") if t.dtype == "bfloat16" else t for t in getattr(record, kind))
        for kind in ("inputs", "outputs")
    }
    twin = folder / f".{record.file}.twin"
    write_fp32_twin(path, twin)
    try:
        return open_engine(with_fields(record, precision=PRECISIONS["fp32"], **wide), twin, "cpu", _AS_WRITTEN)
    finally:
        twin.unlink()


def bf16_provider(precision: Precision) -> str | None:
    """The provider that can run a precision with bf16 arithmetic on this machine, None if none can."""
    for provider in ("cuda", "openvino"):
        try:
            if runs(resolve_provider(provider), precision):
                return provider
        except EngineError:
            continue
    return None


# -- engine files


def _build(
    request: ExportRequest, made: Sequence[Made], manifest: Manifest, folder: Path, report: Report
) -> list[Built]:
    """Build the engine files of everything that was made, for every target."""
    graphs = [
        Graph(
            record=record,
            folder=part.folder,
            hashes=(part.files[record.file].sha256, tuple(part.files[name].sha256 for name in record.weights)),
        )
        for part in made
        for record in part.records
    ]
    everything = with_fields(manifest, engines=(*manifest.engines, *(graph.record for graph in graphs)))
    chosen = fitted(graphs, request.shapes, manifest.model, grids_of(everything))
    taken = set(manifest.files)

    def name(record: EngineRecord, target: BuildTarget) -> str:
        return engine_file_name(record.spec, record.precision, target, taken)

    return [
        built
        for target in request.engine_files
        for built in build_engine_files(chosen, target, name, folder, request.quiet, report)
    ]


@contextmanager
def _bar(total: int, what: str, quiet: bool, **options: Any) -> Iterator[Any]:
    with tqdm(total=total, desc=what, leave=False, disable=True if quiet else None, **options) as bar:
        yield bar
    check_interrupt()
