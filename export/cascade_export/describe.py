"""What the manifest of an export says: of the cascade as a whole, of its components and of its engines."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from msgspec.structs import replace

from cascade_rt.manifest import (
    EngineRecord,
    FileRecord,
    Manifest,
    ModelFacts,
    ModelRecord,
    SamplerDefaults,
    TokenizerRecord,
)
from cascade_rt.sampling import SamplerName
from cascade_rt.stages import ENGINES

from . import presets
from .engine_files import Built
from .job import Report
from .models import StageAConfig
from .networks import CheckpointFacts
from .plan_export import ExportPlan, Job, key_of, licence_of
from .staging import named_files

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A component's graphs.

    Attributes:
        job: that made them.
        folder: where they lie.
        records: of them.
        model: of the component, its weights file included.
        files: the files in the folder.
        tokenizer: of a text encoder.
    """

    job: Job
    folder: Path
    records: tuple[EngineRecord, ...]
    model: ModelRecord
    files: Mapping[str, FileRecord]
    tokenizer: TokenizerRecord | None = None


def describe(plan: ExportPlan, made: Iterable[Made], keeps_graphs: bool) -> Manifest:
    """The manifest of what stays and what was made, without new engine files.

    Args:
        plan: of the export.
        made: by it.
        keeps_graphs: whether what was made goes into the bundle; otherwise engine files alone do.
    """
    made, old = list(made), plan.old
    graphs = [record for part in made if keeps_graphs for record in part.records]
    engines = _in_order((*plan.kept, *graphs), old)
    models = dict(old.models) if old else {}
    models = {name: row for name, row in models.items() if any(ENGINES[r.name].model == name for r in plan.kept)}
    for part in made:
        models[part.job.model] = _model(part, models.get(part.job.model), plan.kept, keeps_graphs)
    facts, sampling = cascade_facts(plan.facts, old, models, {part.job.model for part in made})
    tokenizer = next((part.tokenizer for part in made if part.tokenizer), old.tokenizer if old else None)
    files = dict(old.files) if old else {}
    for part in made:
        files |= part.files
    return Manifest(
        model=facts,
        sampling=sampling,
        presets=dict(chosen(plan.facts.presets, old.presets if old else None, presets.default_presets())),
        previews=dict(chosen(plan.facts.previews, old.previews if old else None, presets.PUBLISHED_PREVIEWS)),
        tokenizer=tokenizer,
        models=models,
        engines=engines,
        files={name: files[name] for name in sorted(named_files(engines, models.values(), tokenizer))},
    )


def _in_order(engines: Iterable[EngineRecord], old: Manifest | None) -> tuple[EngineRecord, ...]:
    """Records as the table has them, graphs first; what has been replaced keeps its place among its own kind."""
    before = [record.key for record in old.engines] if old else []
    rows = list(ENGINES)

    def rank(record: EngineRecord) -> tuple[int, bool, int]:
        place = before.index(record.key) if record.key in before else len(before)
        return rows.index(record.name), record.runtime != "onnx", place

    return tuple(sorted(engines, key=rank))


def _model(part: Made, before: ModelRecord | None, kept: Iterable[EngineRecord], keeps_graphs: bool) -> ModelRecord:
    """A component's record: where several precisions lie side by side, its weights file is the first one's."""
    graphs = [r for r in kept if ENGINES[r.name].model == part.job.model and r.runtime == "onnx"]
    stays = before is not None and before.weights is not None and any(before.weights in r.weights for r in graphs)
    halves = any(record.precision.compute == "float16" for record in graphs)
    names = {record.precision.name for record in kept if ENGINES[record.name].model == part.job.model}
    weights = part.model.weights if keeps_graphs else None
    scales, narrow = part.model.stream_scales, part.model.quantised
    if before is not None:  # of graphs that stay in another precision
        scales = before.stream_scales if halves and scales is None else scales
        narrow = {name: found for name, found in before.quantised.items() if name in names} | narrow
    file = before.weights if before is not None and stays else weights
    return replace(part.model, weights=file, stream_scales=scales, quantised=narrow)


def chosen(own: Mapping[K, V] | None, old: Mapping[K, V] | None, default: Mapping[K, V]) -> Mapping[K, V]:
    """What the bundle that is added to has already, else what the checkpoint carries, else the published cascade's."""
    if old is not None:
        return old
    return default if own is None else own


def cascade_facts(
    facts: CheckpointFacts,
    old: Manifest | None,
    models: Mapping[str, ModelRecord],
    made: Collection[str],
) -> tuple[ModelFacts, dict[SamplerName, SamplerDefaults]]:
    """What the manifest says of the cascade as a whole, and how it is sampled.

    Args:
        facts: of the checkpoint.
        old: manifest of the bundle that is added to: each fact comes from the checkpoint of the stage it belongs to.
        models: every component of the bundle.
        made: those of them that came from the checkpoint.
    """
    stage_a = models.get("stage_a")
    config = StageAConfig.from_dict(dict(stage_a.config)) if stage_a else None
    scale = config.scale_factor if config else presets.DIFFUSERS_LATENT_SCALE
    sampling: dict[SamplerName, SamplerDefaults] = dict(
        facts.sampling or presets.default_sampling(scale, facts.prior_scheduler, facts.decoder_scheduler)
    )
    side = 256 if facts.size == "tiny" else 1024
    model = ModelFacts(
        name=facts.name or facts.source,
        size=cast(Any, facts.size or "custom"),
        source=facts.source,
        licence=licence_of(facts),
        height=facts.height or side,
        width=facts.width or side,
        revision=facts.revision,
        resolution_multiple=facts.resolution_multiple,
        latent_dim_scale=facts.latent_dim_scale,
        default_sampler=facts.default_sampler or "original",
        default_preset=facts.default_preset,
    )
    if old is not None:
        kept = old.model
        if "stage_c" in made:
            kept = replace(kept, resolution_multiple=model.resolution_multiple)
        if "stage_b" in made:
            kept = replace(kept, latent_dim_scale=model.latent_dim_scale)
        model = kept
        sampling = {name: _merged(old.sampling.get(name, new), new, made) for name, new in sampling.items()}
    licences = dict.fromkeys(row.licence for row in models.values())
    compression = config.compression if config else model.compression
    return replace(model, licence="; ".join(licences) or model.licence, compression=compression), sampling


def _merged(old: SamplerDefaults, new: SamplerDefaults, made: Collection[str]) -> SamplerDefaults:
    return SamplerDefaults(
        prior=new.prior if "stage_c" in made else old.prior,
        decoder=new.decoder if "stage_b" in made else old.decoder,
        latent_scale=new.latent_scale if "stage_a" in made else old.latent_scale,
    )


def without_stale_engine_files(manifest: Manifest, made: Iterable[Made], report: Report) -> Manifest:
    """The manifest without engine files of graphs that have been replaced by others."""
    remade = {key_of(spec, part.job.precision) for part in made for spec in part.job.specs}
    graphs = {record.key: record for record in manifest.engines if record.runtime == "onnx"}
    stale = []
    for record in manifest.engines:
        key = key_of(record.spec, record.precision)
        if record.target is None or key not in remade or (graph := graphs.get(key)) is None:
            continue
        hashes = [manifest.files[file].sha256 for file in graph.files]
        if [record.target.graph_sha256, *record.target.weights_sha256] != hashes:
            stale.append(record)
            report(f"{record.file}: left out, it was built from the graph that has been replaced")
    return _with_engines(manifest, [record for record in manifest.engines if record not in stale], {})


def with_engine_files(manifest: Manifest, built: Iterable[Built]) -> Manifest:
    """The manifest with engine files that were built from graphs."""
    built = list(built)
    engines = _in_order((*manifest.engines, *(row.record for row in built)), manifest)
    return _with_engines(manifest, engines, {row.record.file: row.file for row in built})


def _with_engines(manifest: Manifest, engines: Iterable[EngineRecord], new: Mapping[str, FileRecord]) -> Manifest:
    engines, files = tuple(engines), manifest.files | dict(new)
    used = named_files(engines, manifest.models.values(), manifest.tokenizer)
    return replace(manifest, engines=engines, files={name: files[name] for name in sorted(used)})
