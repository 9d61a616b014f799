"""What an export will make, under which names, and what of the old bundle stays. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_rt.errors import CheckpointError, RequestError
from cascade_rt.files import name_of
from cascade_rt.manifest import EngineKey, EngineRecord, Manifest, ModelRecord
from cascade_rt.sampling import PredictionType
from cascade_rt.stages import ENGINES, EngineSpec, Precision, StageName, engines_of

from .catalog import COMPONENTS, CONTROL
from .checkpoints import BundleCheckpoint
from .job import ExportRequest, Report
from .loading import plain_json, weights_of
from .models import DenoiserConfig
from .models.controlnet import PUBLISHED_BLOCKS
from .names import graph_name, weights_name
from .networks import Checkpoint, CheckpointFacts, Network, TokenizerSource
from .official import UNKNOWN_LICENCE
from .targets import ONNX, BuildTarget
from .weights import TensorSource


@dataclass(frozen=True, kw_only=True)
class Job:
    """One component to be made.

    Attributes:
        stage: the word for it on the command line.
        model: the component's name.
        network: of the checkpoint.
        config: of the component, as JSON has it.
        source: its tensors, checked against the config.
        specs: engines to be made, resolved.
        precision: of them.
        graphs: engine -> name of its file.
        weights: name of the weights file.
        shared: graphs of the bundle that stay and run together with those to be made.
        beside: weights files of the component in the same precision that stay.
        own: graphs of the bundle that engine files shall be built from; empty: they are made.
        tokenizer: of a text encoder.
    """

    stage: StageName
    model: str
    network: Network
    config: dict[str, Any]
    source: TensorSource
    specs: tuple[EngineSpec, ...]
    precision: Precision
    graphs: Mapping[str, str]
    weights: str
    shared: tuple[EngineRecord, ...]
    beside: tuple[str, ...]
    own: tuple[EngineRecord, ...]
    tokenizer: TokenizerSource | None

    @property
    def is_denoiser(self) -> bool:
        """Whether its engines are a context and a step."""
        return COMPONENTS[self.model].calls.keys() == {f"{self.model}.context", f"{self.model}.step"}

    @property
    def prediction_type(self) -> PredictionType | None:
        """What a denoiser predicts; None for other components."""
        return self.network.prediction_type if self.is_denoiser else None


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What an export will do.

    Attributes:
        facts: of the checkpoint.
        old: manifest of the bundle that is added to.
        kept: its engines that stay.
        jobs: one a stage.
    """

    facts: CheckpointFacts
    old: Manifest | None
    kept: tuple[EngineRecord, ...]
    jobs: tuple[Job, ...]


def plan_export(
    checkpoint: Checkpoint, request: ExportRequest, old: Manifest | None, place: Path, report: Report
) -> ExportPlan:
    """Decide what will be made and what stays.

    Args:
        checkpoint: where weights come from.
        request: what to export.
        old: manifest of the bundle that is added to.
        place: of the bundle, without links.
        report: gets a line for what is left out.

    Raises:
        RequestError: an engine is there already, or the checkpoint lacks a stage that was named.
        CheckpointError: the checkpoint is damaged, of another architecture, or has none of the stages.
    """
    facts = checkpoint.facts
    same_place = isinstance(checkpoint, BundleCheckpoint) and checkpoint.path.resolve() == place
    kept = old.engines if old else ()
    jobs: list[Job] = []
    absent: list[StageName] = []
    for stage in request.stages:
        network = _network(checkpoint, facts, stage, request)
        if network is None:
            absent.append(stage)
            continue
        tokenizer = _tokenizer(checkpoint, facts, stage, request, report)
        if stage == "text" and tokenizer is None:
            continue
        config = _with_control(plain_json(network.config), stage, request, old)
        specs = _resolved(stage, config, request, tokenizer)
        shared = _shared(specs, request, kept)
        specs = [spec for spec in specs if spec.name not in {record.name for record in shared}]
        own = _own_graphs(specs, request, kept) if same_place else ()
        kept = _without_replaced(stage, specs, request, kept)
        model = specs[0].model
        if old is not None and not own:
            new = model_record(facts, network, config, None)
            kept = _without_other_networks(model, new, request, old, kept, same_place, report)
        taken = {file for record in kept for file in record.files}
        job = Job(
            stage=stage,
            model=model,
            network=network,
            config=config,
            source=weights_of(model, config, network),
            specs=tuple(specs),
            precision=request.precision,
            graphs={spec.name: graph_name(spec, request.precision, taken) for spec in specs},
            weights=weights_name(model, specs, request.precision, taken),
            shared=shared,
            beside=_weights_beside(model, request.precision, kept),
            own=own,
            tokenizer=tokenizer,
        )
        jobs.append(job)
    if absent:
        report(f"not in this checkpoint, left out: {', '.join(absent)}")
    if not jobs:
        raise CheckpointError(f"{facts.source} holds none of the stages that were asked for")
    return ExportPlan(facts=facts, old=old, kept=kept, jobs=tuple(jobs))


def model_record(facts: CheckpointFacts, network: Network, config: dict[str, Any], weights: str | None) -> ModelRecord:
    """What the manifest says of a component; of a denoiser, its prediction type is added by the caller."""
    return ModelRecord(
        config=config,
        weights=weights,
        source=facts.source,
        licence=licence_of(facts),
        revision=facts.revision,
        loras=network.loras,
    )


def licence_of(facts: CheckpointFacts) -> str:
    """The licence of a checkpoint's weights, for the manifest."""
    return facts.licence or UNKNOWN_LICENCE


def _network(
    checkpoint: Checkpoint, facts: CheckpointFacts, stage: StageName, request: ExportRequest
) -> Network | None:
    """The network of a stage; None where it is left out."""
    model = engines_of(stage)[0].model
    network = checkpoint.network(model)
    if network is None and not request.skip_absent:
        raise RequestError(f"the checkpoint {facts.source} has no {model}; --stage {stage} needs one that has it")
    return network


def _tokenizer(
    checkpoint: Checkpoint, facts: CheckpointFacts, stage: StageName, request: ExportRequest, report: Report
) -> TokenizerSource | None:
    """The tokenizer, for the text stage alone; None where the stage is left out."""
    if stage != "text":
        return None
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None and request.skip_absent:
        report("text: this checkpoint has a text encoder but no tokenizer, left out")
    elif tokenizer is None:
        raise RequestError(
            f"the checkpoint {facts.source} has a text encoder but no tokenizer; "
            "export --stage text from a diffusers folder"
        )
    return tokenizer


def _with_control(
    config: dict[str, Any], stage: StageName, request: ExportRequest, old: Manifest | None
) -> dict[str, Any]:
    """Stage C's config with the blocks that take a ControlNet's residuals, where they are known or asked for.

    Raises:
        RequestError: they are needed, and nobody names them.
        CheckpointError: the network has no such blocks.
    """
    if stage != "c":
        return config
    before = old.models.get("stage_c") if old else None
    blocks = (
        request.control_blocks
        or config.get("control_blocks")
        or (before.config if before else {}).get("control_blocks")
    )
    if not blocks and CONTROL in request.features:
        executed = DenoiserConfig.from_dict(config).executed_res_blocks
        if executed <= PUBLISHED_BLOCKS[-1]:
            raise RequestError(
                f"this Stage C executes {executed} residual blocks, and the published ControlNets are for "
                f"{PUBLISHED_BLOCKS[-1] + 1}; name the blocks that take residuals with --control-blocks"
            )
        blocks = PUBLISHED_BLOCKS
    if not blocks:
        return config
    made = config | {"control_blocks": list(blocks)}
    DenoiserConfig.from_dict(made, "--control-blocks" if request.control_blocks else "the config of stage_c")
    return made


def _resolved(
    stage: StageName, config: dict[str, Any], request: ExportRequest, tokenizer: TokenizerSource | None
) -> list[EngineSpec]:
    """The engines of a stage for a config, each with those of the features that it has tensors for."""
    rows = engines_of(stage)
    dims = COMPONENTS[rows[0].model].dims(config)
    if tokenizer is not None:  # a prompt has the tokenizer's length, which may be less than the encoder's positions
        dims = dims | {"max_length": tokenizer.max_length}
    known = {row.name: {tensor.feature for tensor in row.tensors} for row in rows}
    return [row.resolve(dims, request.precision, known[row.name] & set(request.features)) for row in rows]


def key_of(spec: EngineSpec, precision: Precision, target: BuildTarget = ONNX) -> EngineKey:
    """What a bundle holds at most one of."""
    return EngineKey(spec.name, spec.features, precision.name, target.runtime, target.sm)


def _shared(
    specs: Sequence[EngineSpec], request: ExportRequest, kept: Sequence[EngineRecord]
) -> tuple[EngineRecord, ...]:
    """Graphs that stay as they are because they have none of the features that are asked for."""
    if not any(spec.features for spec in specs):
        return ()
    plain = {key_of(spec, request.precision) for spec in specs if not spec.features}
    return tuple(record for record in kept if record.key in plain)


def _weights_beside(model: str, precision: Precision, kept: Sequence[EngineRecord]) -> tuple[str, ...]:
    """Weights files of a component's graphs in the same precision: with other features they may hold the same."""
    graphs = [record for record in kept if ENGINES[record.name].model == model and record.runtime == "onnx"]
    return tuple(dict.fromkeys(name for record in graphs if record.precision == precision for name in record.weights))


def _own_graphs(
    specs: Sequence[EngineSpec], request: ExportRequest, kept: Sequence[EngineRecord]
) -> tuple[EngineRecord, ...]:
    """The bundle's own graphs of a stage, where engine files alone are asked for and can be built from them."""
    there = {record.key: record for record in kept}
    found = [there.get(key_of(spec, request.precision)) for spec in specs]
    return () if request.keeps_graphs or None in found else tuple(record for record in found if record is not None)


def _without_replaced(
    stage: StageName, specs: Sequence[EngineSpec], request: ExportRequest, kept: Sequence[EngineRecord]
) -> tuple[EngineRecord, ...]:
    """The engines that are there but for those that will be made.

    Raises:
        RequestError: one is there already and may not be replaced.
    """
    wanted = {key_of(spec, request.precision, target): target for spec in specs for target in request.targets}
    taken = [record.key for record in kept if record.key in wanted]
    if taken and not request.overwrite:
        raise RequestError(
            f"{name_of(request.out)} already has stage {stage} for {wanted[taken[0]]} in {request.precision.name}; "
            "add --overwrite to replace it, or choose another --out"
        )
    return tuple(record for record in kept if record.key not in wanted)


def _without_other_networks(
    model: str,
    new: ModelRecord,
    request: ExportRequest,
    old: Manifest,
    kept: tuple[EngineRecord, ...],
    same_place: bool,
    report: Report,
) -> tuple[EngineRecord, ...]:
    """The engines but for those of another network of the same component: a bundle holds one.

    Raises:
        RequestError: they may not be replaced.
    """
    before = old.models.get(model)
    others = [record for record in kept if ENGINES[record.name].model == model]
    if before is None or not others or _same_network(before, new, same_place):
        return kept
    there, asked = _origin_of(before), _origin_of(new)
    graphs_stay = not request.keeps_graphs and any(record.runtime == "onnx" for record in others)
    if graphs_stay or not request.overwrite:
        made, flags = ("its engine files", "--target onnx --overwrite") if graphs_stay else ("this", "--overwrite")
        raise RequestError(
            f"{name_of(request.out)} holds {model} {there}, and {made} would be {asked}; "
            f"add {flags} to replace it, or choose another --out"
        )
    for record in others:
        report(f"{record.file}: left out, it is {there}, and the bundle now holds {model} {asked}")
    return tuple(record for record in kept if record not in others)


def _same_network(before: ModelRecord, new: ModelRecord, same_place: bool) -> bool:
    same_source = same_place or (before.source, before.revision) == (new.source, new.revision)
    ours, theirs = before.config.get("control_blocks"), new.config.get("control_blocks")
    same_blocks = not ours or not theirs or list(ours) == list(theirs)
    configs = [{k: v for k, v in row.config.items() if k != "control_blocks"} for row in (before, new)]
    return same_source and same_blocks and configs[0] == configs[1] and before.loras == new.loras


def _origin_of(record: ModelRecord) -> str:
    loras = f"with {', '.join(record.loras)}" if record.loras else "with no LoRA"
    revision = f" at {record.revision}" if record.revision else ""
    return f"of {record.source}{revision} {loras}"
