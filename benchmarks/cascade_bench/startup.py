"""What is timed from outside: how long Python takes to import, and from starting a process to a PNG on disk.

The other side of the race to a PNG is the shortest honest script of diffusers, with the same weights in its own format.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

from cascade_bench.jobs import OURS, PROMPT
from cascade_bench.processes import environment
from cascade_bench.race import Row
from cascade_rt.bundle import Bundle
from cascade_rt.errors import CascadeError

T = TypeVar("T")

_IMPORTS = {
    (OURS, "import cascade_rt"): "import cascade_rt",
    (OURS, "import CascadePipeline"): "from cascade_rt import CascadePipeline",
    ("eager", "import StableCascadeCombinedPipeline"): "from diffusers import StableCascadeCombinedPipeline",
}
_PACKAGES = ("cascade_rt", "cascade_export", "cascade_tiny", "cascade_bench")
_OUR_ENTRY = [sys.executable, "-c", "from cascade_rt.entry import main_run; raise SystemExit(main_run())"]
_TIMED = "import time; t = time.perf_counter()\n{code}\nprint(time.perf_counter() - t)"
_THEIR_SCRIPT = """
import sys
import diffusers
from diffusers import StableCascadeCombinedPipeline
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
diffusers.PaellaVQModel = PaellaVQModel  # model_index.json names it there, and it is there no more
pipe = StableCascadeCombinedPipeline.from_pretrained(sys.argv[1])
options = dict(width=256, height=256, prior_num_inference_steps=20, num_inference_steps=10, prior_guidance_scale=1.2)
pipe(sys.argv[2], **options, decoder_guidance_scale=0.0).images[0].save(sys.argv[3])
"""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A command whose process is timed.

    Attributes:
        command: its words.
        environment: of the process.
        says_seconds: its last line on standard output is what counts; else the time of the whole process.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    says_seconds: bool = False


def time_starts(
    starts: Mapping[T, Start], repeats: int, folder: Path, bar: Any
) -> tuple[dict[T, list[tuple[float, float]]], dict[T, str]]:
    """Start processes in turns.

    Args:
        starts: what to start.
        repeats: timed starts of each; one before them fills the system's cache and is not counted.
        folder: where they are started, and where what they print is kept.
        bar: a progress bar, which gets an update a turn.

    Returns:
        (Seconds, seconds of processor time) of every start, and for those that failed the last line that they printed.
    """
    seconds: dict[T, list[tuple[float, float]]] = {key: [] for key in starts}
    failed: dict[T, str] = {}
    for turn in range(repeats + 1):
        for key, start in list(starts.items())[:: 1 if turn % 2 else -1]:
            if key in failed:
                continue
            taken, reason = _timed_start(start, folder)
            if reason is not None:
                failed[key] = reason
            elif turn:
                seconds[key].append(taken)
        bar.update()
    return seconds, failed


def _timed_start(start: Start, folder: Path) -> tuple[tuple[float, float], str | None]:
    """Seconds and seconds of processor time, and why it failed, if it did."""
    with (folder / "output").open("w+") as output, (folder / "errors").open("w+") as errors:
        before = _processor_s()
        started = time.perf_counter()
        done = subprocess.run(
            start.command, env=dict(start.environment), cwd=folder, stdout=output, stderr=errors, check=False
        )
        seconds = time.perf_counter() - started
        processor_s = _processor_s() - before
        if done.returncode:
            errors.seek(0)
            return (seconds, processor_s), (errors.read().strip().splitlines() or ["it failed"])[-1]
        if start.says_seconds:
            output.seek(0)
            seconds = float(output.read().strip().splitlines()[-1])
    return (seconds, processor_s), None


def _processor_s() -> float:
    """Processor time of the processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def import_start(code: str, environment: Mapping[str, str]) -> Start:
    """A fresh interpreter that times an import statement."""
    command = [sys.executable, "-c", _TIMED.format(code=code)]
    return Start(command=command, environment=environment, says_seconds=True)


def picture_start(entry: Sequence[str], bundle: Path, picture: Path, environment: Mapping[str, str]) -> Start:
    """``cascade-run``, from starting the process to a PNG on disk."""
    words = [PROMPT, "--bundle", str(bundle), "--seed", "0", "--provider", "cpu", "--sampler", "diffusers"]
    return Start(command=[*entry, *words, "-o", str(picture)], environment=environment)


def imports(repeats: int, quiet: bool) -> list[Row]:
    """Seconds of an import statement in a fresh interpreter, files in the system's cache."""
    with tempfile.TemporaryDirectory(prefix="cascade-bench-") as name, _bar(repeats, "imports", quiet) as bar:
        folder = Path(name)
        told = environment(os.cpu_count() or 1)
        starts = {key: import_start(code, told) for key, code in _IMPORTS.items()}
        seconds, failed = time_starts(starts, repeats, folder, bar)
    return [
        _row(
            Row(what=what, size="", peer=peer, provider="cpu", precision="fp32"),
            [whole for whole, _ in seconds[peer, what]],
            failed.get((peer, what)),
        )
        for peer, what in _IMPORTS
    ]


def cold_start(bundle: Bundle, repeats: int, threads: int, quiet: bool) -> list[Row]:
    """Seconds from starting a process to a PNG on disk, tiny, 20 + 10 steps, fp32 on the CPU."""
    with tempfile.TemporaryDirectory(prefix="cascade-bench-") as name, _bar(repeats, "cold start", quiet) as bar:
        folder = Path(name)
        told = environment(threads)
        checkpoint = folder / "checkpoint"
        starts = {OURS: picture_start(_OUR_ENTRY, bundle.path, folder / "ours.png", told)}
        failed: dict[str, str] = {}
        try:
            _save(bundle, checkpoint)
            theirs = [sys.executable, "-c", _THEIR_SCRIPT, str(checkpoint), PROMPT, str(folder / "theirs.png")]
            starts["eager"] = Start(command=theirs, environment=told)
        except Exception as error:  # a missing library is an entry in the table
            failed["eager"] = str(error)
        seconds, not_started = time_starts(starts, repeats, folder, bar)
    failed |= not_started
    blank = Row(
        what="cold_start",
        size="tiny",
        peer=OURS,
        provider="cpu",
        precision="fp32",
        batch=1,
        pixels=256,
        steps=(20, 10),
        threads=threads,
    )
    rows = [
        _row(replace(blank, peer=peer), [whole for whole, _ in seconds.get(peer, [])], failed.get(peer))
        for peer in (OURS, "eager")
    ]
    medians = {row.peer: row.median_s for row in rows}
    return [
        replace(row, ratio_to_eager=medians["eager"] / row.median_s if medians["eager"] and row.median_s else None)
        for row in rows
    ]


def _bar(repeats: int, what: str, quiet: bool) -> Any:
    return tqdm(total=repeats + 1, desc=what, disable=True if quiet else None, leave=False)


def _row(row: Row, seconds: Sequence[float], failed: str | None) -> Row:
    """A row with its times, or with the reason why there are none."""
    if failed is not None:
        return replace(row, skipped=failed)
    p10, median, p90 = (float(x) for x in np.percentile(seconds, (10, 50, 90)))
    return replace(row, repeats=len(seconds), median_s=median, p10_s=p10, p90_s=p90)


def _save(bundle: Bundle, folder: Path) -> None:
    from cascade_bench.peers import save_torch_pipeline

    save_torch_pipeline(bundle, folder)


def _folder(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CascadeError(f"the package {package} of this distribution cannot be found; install it again")
    return spec.submodule_search_locations[0]


def installed_mib(extra: str) -> dict[str, float]:
    """MiB on disk of this package and all that one of its extras brings, by package."""
    sizes: dict[str, float] = {}
    waiting = [(OURS, extra)]
    while waiting:
        name, wanted = waiting.pop()
        name = canonicalize_name(name)
        if name in sizes:
            continue
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        files = [Path(str(f.locate())) for f in found.files or () if f.suffix != ".pyc"]
        if name == OURS:  # in an editable installation its files lie elsewhere
            files = [f for package in _PACKAGES for f in Path(_folder(package)).rglob("*") if f.suffix != ".pyc"]
        sizes[name] = sum(f.stat().st_size for f in files if f.is_file()) / 2**20
        for text in found.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                waiting.append((requirement.name, ""))
    return sizes
