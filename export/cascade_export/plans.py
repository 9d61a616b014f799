"""The plans of an export: which, from which graphs, and what becomes of those that are out of date."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from cascade_rt.bundle import ModelFacts
from cascade_rt.shapes import narrow
from cascade_rt.stages import StageName, engines_of

from .request import ExportRequest, Report
from .staging import Contents
from .tensorrt import Progress, build_plan


def build_plans(
    request: ExportRequest,
    stages: Sequence[StageName],
    facts: ModelFacts,
    graphs: Contents,
    bundle: Contents,
    report: Report,
) -> None:
    """Build the plans of stages into a bundle.

    Args:
        request: targets and shapes.
        stages: what was exported.
        facts: picture size and compressions.
        graphs: where graphs lie that were made now.
        bundle: what the plans go into; graphs that were not made now lie here.
        report: gets a line for every plan.

    Raises:
        RequestError: the shapes do not fit; before the first build.
        ExportError: a plan cannot be built.
    """
    found = {}
    for name in [spec.name for stage in stages for spec in engines_of(stage)]:
        place = graphs if graphs.graph(name) else bundle
        if record := place.graph(name):
            found[name] = place, record
    decoder = graphs.graph("stage_b.step") or bundle.graph("stage_b.step")
    granularity = decoder.spec.ranges["height"].multiple if decoder else 1
    narrowed = narrow([record.spec for _, record in found.values()], request.shapes, facts, granularity)
    for target in request.plans:
        for name, (place, graph) in found.items():
            file = target.file(name)
            hashes = place.files[graph.file]["sha256"], [place.files[w]["sha256"] for w in graph.weights]
            bundle.remove(file)
            with _bar(file, request.quiet) as show:
                plan = build_plan(target, graph, place.folder, hashes, narrowed[name], bundle.folder / file, show)
            bundle.add_file(file)
            bundle.engines[plan.record.key] = plan.record
            size = bundle.files[file]["bytes"] / 2**20
            memory = "" if plan.peak_mib is None else f"; the builder took {plan.peak_mib} MiB"
            report(f"{file}: built in {plan.seconds:.1f} s, {size:.1f} MiB{memory}; not verified on a GPU")


def drop_stale_plans(bundle: Contents, stages: Sequence[StageName], report: Report) -> None:
    """Leave out plans of graphs that have been replaced by others."""
    replaced = {spec.name for stage in stages for spec in engines_of(stage)}
    for key, plan in list(bundle.engines.items()):
        graph = bundle.graph(plan.spec.name)
        if plan.target is None or graph is None or plan.spec.name not in replaced:
            continue
        hashes = [bundle.files[file]["sha256"] for file in graph.files]
        if [plan.target["graph_sha256"], *plan.target["weights_sha256"]] != hashes:
            del bundle.engines[key]
            bundle.remove(plan.file)
            report(f"{plan.file}: left out, it was built from the graph that has been replaced")


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Progress]:
    """A bar that shows the builder's phases one after the other."""
    with tqdm(desc=f"build {what}", leave=False, disable=True if quiet else None) as bar:

        def show(phase: str, step: int, of: int) -> None:
            bar.total, bar.n = of, step
            bar.set_description(f"build {what}: {phase}")

        yield show
