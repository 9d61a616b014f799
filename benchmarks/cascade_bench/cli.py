"""``cascade-bench``: what to race, and who."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from cascade_rt.backends import PROVIDERS, engine_runtime, resolve_provider
from cascade_rt.commands import CommandParser, run_command
from cascade_rt.errors import EngineError, RequestError
from cascade_rt.paths import cache_dir
from cascade_rt.stages import PRECISIONS, Size, StageName

ENGINES_OF = {
    "text": ("text_encoder",),
    "c": ("stage_c.context", "stage_c.step"),
    "b": ("stage_b.context", "stage_b.step"),
    "a": ("stage_a.decode",),
    "picture": ("picture",),
    "host": ("prior_loop",),
}
STARTUP = ("cold-start", "import")
WHAT = (*ENGINES_OF, *STARTUP)
_NEEDS: dict[str, tuple[StageName, ...]] = {
    "text": ("text",),
    "c": ("c",),
    "b": ("b",),
    "a": ("a",),
    "picture": ("text", "c", "b", "a"),
    "host": ("c",),
}

EXAMPLES = """examples:
  cascade-bench --stage c --stage picture                   tiny, fp32, on the CPU
  cascade-bench --stage c --size small --precision fp32,bf16 --peer eager,compile --json result.json --plot result.png
  cascade-bench --stage c --stage b --size big --precision bf16 --provider cuda,tensorrt
"""


def names(accepted: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument that is a list of names with commas between."""

    def parse(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        for name in found:
            if name not in accepted:
                raise argparse.ArgumentTypeError(f"{name!r} is not accepted; accepted: {', '.join(accepted)}")
        return found

    return parse


def numbers(low: int, high: int) -> Callable[[str], list[int]]:
    """An argument that is a list of whole numbers with commas between."""

    def parse(text: str) -> list[int]:
        found = []
        for part in text.split(","):
            if not part.strip().isdigit() or not low <= int(part) <= high:
                raise argparse.ArgumentTypeError(f"{part!r} is not accepted; a whole number from {low} to {high}")
            found.append(int(part))
        return found

    return parse


def make_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser("cascade-bench", "Race cascade-rt against PyTorch on the same weights and inputs.", EXAMPLES)
    add = parser.add_argument
    add("--stage", action="append", choices=WHAT, help="what to race; repeatable (default: text, c, b, a, picture)")
    add("--size", choices=("tiny", "small", "big"), default="tiny", help="of the cascade (default: tiny)")
    add(
        "--peer",
        type=names(("eager", "compile", "compile-max-autotune", "none")),
        default=["eager"],
        help="who races against cascade-rt: eager, compile, compile-max-autotune, none (default: eager)",
    )
    add(
        "--provider",
        type=names(tuple(PROVIDERS)),
        default=["cpu"],
        help=f"where cascade-rt runs: {', '.join(PROVIDERS)} (default: cpu)",
    )
    add(
        "--precision",
        type=names(tuple(PRECISIONS)),
        default=["fp32"],
        help=f"of everyone: {', '.join(PRECISIONS)}; int8, which PyTorch does not have, is compared with its bf16 or "
        "fp32 where that is named too (default: fp32)",
    )
    add("--batch", type=numbers(1, 32), help="rows of the network's batch (default: 2 for Stage C, else 1)")
    add("--pixels", type=numbers(64, 4096), help="side of the picture (default: 256 for tiny, else 1024)")
    add("--steps", type=numbers(1, 1000), default=[20, 10], help="of a picture: Stage C, Stage B (default: 20,10)")
    add("--repeat", type=int, default=5, metavar="N", help="timed calls of each (default: 5)")
    add("--threads", type=int, default=os.cpu_count() or 1, metavar="N", help="of everyone (default: all cores)")
    add("--limit", type=float, default=600.0, metavar="S", help="seconds a load or a call may take (default: 600)")
    add("--work", type=Path, default=cache_dir() / "bench", metavar="DIR", help="where exported bundles are kept")
    add("--json", type=Path, metavar="FILE", help="write the result there")
    add("--plot", type=Path, metavar="FILE", help="draw the result there (PNG or SVG)")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuses what cannot be run, before anything is.

    Raises:
        RequestError: with the next command.
    """
    for module, needed in (("psutil", True), ("matplotlib", arguments.plot is not None)):
        if needed and importlib.util.find_spec(module) is None:
            raise RequestError(f"{module} is not installed; install it with: pip install 'cascade-rt[bench]'")
    for name, least in (("repeat", 1), ("threads", 1), ("limit", 1)):
        if getattr(arguments, name) < least:
            raise RequestError(f"--{name} {getattr(arguments, name)} is not accepted; at least {least}")
    if len(arguments.steps) != 2:
        raise RequestError("--steps takes two numbers, of Stage C and of Stage B, for example 20,10")
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path is not None and path.is_dir():
            raise RequestError(f"--{name} {path} is a folder; name a file")


def race(arguments: argparse.Namespace) -> None:
    """Runs the race and reports it."""
    check(arguments)
    from cascade_bench import report, startup
    from cascade_bench.prepare import Export, prepare
    from cascade_bench.race import Row
    from cascade_bench.race import run as run_race
    from cascade_bench.roofline import ask
    from cascade_rt.bundle import find_bundle

    facts: dict[str, Any] = {
        "machine": report.machine(arguments.threads),
        "versions": report.versions(),
        "commit": report.commit(),
    }
    wanted = arguments.stage or ["text", "c", "b", "a", "picture"]
    engines = [stage for stage in wanted if stage in ENGINES_OF]
    runtimes = tuple(engine_runtime(p) for p in arguments.provider if engine_runtime(p) != "onnx" and _at_hand(p))
    bundles: dict[str, Path] = {}
    exports: list[Export] = []
    rows: list[Row] = []

    def write(so_far: list[Row]) -> None:
        if arguments.json:
            report.write_json(report.document(so_far, facts), arguments.json)

    stages = list(dict.fromkeys(s for stage in engines for s in _NEEDS[stage]))
    for precision in dict.fromkeys(arguments.precision):
        bundles[precision], made = prepare(arguments.work, arguments.size, precision, stages, runtimes)
        exports += made
    facts["exports"] = [asdict(export) for export in exports]
    jobs = make_jobs(arguments, engines, {p: str(b) for p, b in bundles.items()})
    if jobs:
        devices = list(dict.fromkeys(job.device for job in jobs))
        roofs, work = ask(jobs, devices, arguments.threads)
        facts["roofline"] = {device: asdict(roof) for device, roof in roofs.items()}
        rows = run_race(jobs, roofs, work, arguments.repeat, arguments.limit, arguments.quiet, write)
    if "import" in wanted:
        rows += startup.imports(arguments.repeat, arguments.quiet)
        facts["installed_mib"] = startup.installed_mib("onnxruntime")
    if "cold-start" in wanted:
        rows += startup.cold_start(find_bundle(None), arguments.repeat, arguments.threads, arguments.quiet)
    result = report.document(rows, facts)
    write(rows)
    if arguments.plot:
        report.plot(result["rows"], arguments.plot)
    print(report.table(result["rows"]))


def _at_hand(provider: str) -> bool:
    """Whether engine files for it are worth building; its rows say why not otherwise."""
    try:
        resolve_provider(provider)
    except EngineError:
        return False
    return True


def make_jobs(arguments: argparse.Namespace, engines: Sequence[str], bundles: Mapping[str, str]) -> list[Any]:
    """Every racer of every task; PyTorch before ours, so that a row's rival is loaded when memory is short."""
    from cascade_bench.jobs import CONTEXTS, HOST, OURS, Job, device_of

    size = cast("Size", arguments.size)
    pixels = arguments.pixels or [256 if size == "tiny" else 1024]
    devices = list(dict.fromkeys(device_of(p) for p in arguments.provider))
    peers = [p for p in arguments.peer if p != "none"]
    jobs: list[Job] = []
    for stage in engines:
        for what in ENGINES_OF[stage]:
            for batch in arguments.batch or [2 if what.startswith("stage_c") or what == HOST else 1]:
                for side in pixels:
                    for precision, bundle in bundles.items():
                        alone = what in CONTEXTS or what == HOST or PRECISIONS[precision].linear != "plain"
                        rivals = [] if alone else peers
                        racers = [(peer, device) for device in devices for peer in rivals]
                        racers += [(OURS, provider) for provider in arguments.provider]
                        jobs += [
                            Job(
                                what=what,
                                peer=peer,
                                provider=provider,
                                precision=precision,
                                size=size,
                                batch=batch,
                                pixels=side,
                                steps=(arguments.steps[0], arguments.steps[1]),
                                bundle=bundle,
                                threads=arguments.threads,
                            )
                            for peer, provider in racers
                        ]
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cascade-bench``; returns the exit code: a skipped row is a result, not a failure."""

    def command() -> None:
        race(make_parser().parse_args(argv))
        sys.stdout.flush()

    return run_command(command)
