"""The race: every racer in a process of its own, all loaded, called in turns.

Only one process works at a time; the others wait for a line. Turns go round in an order that moves on by one each
time, so drift of the machine hits all alike. What does not fit into memory beside the others runs in a later group,
and its row says with which group it ran.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from tqdm import tqdm

from cascade_bench.jobs import HOST, OURS, PICTURE, Job, draw
from cascade_bench.prepare import bundle_folder
from cascade_bench.processes import environment
from cascade_bench.roofline import Roof, Work
from cascade_rt.bundle import find_bundle
from cascade_rt.stages import PRECISIONS

_SETTLE = 0.3  # seconds between turns: threads of the last racer spin on for a while
_WARM_CALLS = 2
# of the weights' bytes: how much a loaded racer may take; compilers keep packed copies
_ROOM = {OURS: 2.3, "eager": 1.6, "compile": 2.8, "compile-max-autotune": 2.8}
_FIXED_BYTES = 1.5e9


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the result; None is "not measured". Times in seconds, memory in MiB.

    ``ratio_to_eager`` is eager's median over this one's, both in the same precision on the same device: above 1 is
    faster. PyTorch has no int8: such rows are compared with eager bf16 where that races too, else with eager fp32.
    ``rel_error`` is relative L2 from eager fp32 on the same inputs and the fp32 weights. ``roofline_share`` is the best
    possible time over the median. ``peak_mib`` is the process's largest resident size, ``own_mib`` what it holds after
    its last call without pages of files, which the system can take back. ``host_share`` is the part of a loop that is
    not spent in engines.
    """

    what: str
    size: str
    peer: str
    provider: str
    precision: str
    batch: int | None = None
    pixels: int | None = None
    steps: tuple[int, int] | None = None
    threads: int | None = None
    repeats: int | None = None
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    ratio_to_eager: float | None = None
    peak_mib: float | None = None
    own_mib: float | None = None
    device_peak_mib: float | None = None
    load_s: float | None = None
    first_s: float | None = None
    rel_error: float | None = None
    roofline_share: float | None = None
    host_share: float | None = None
    group: int | None = None
    skipped: str | None = None


class RacerError(Exception):
    """A racer is out; the message is the reason."""


@dataclass(kw_only=True)
class Racer:
    """A running process and what it answered.

    Attributes:
        job: what it runs.
        process: of the worker.
        answer_file: where it puts what its last call made.
        load_s: from the start of the process until it could be called.
        first_s: its first call.
        peak_mib: largest resident size so far.
        own_mib: what it holds after its last call without pages of files.
        processor_s: of its last call, of all threads; None from a checkout whose worker does not say.
        seconds: of the calls that count.
        extras: other figures of its last call.
    """

    job: Job
    process: subprocess.Popen[str]
    answer_file: Path
    load_s: float
    first_s: float
    peak_mib: float | None
    own_mib: float | None
    processor_s: float | None = None
    seconds: list[float] = field(default_factory=list)
    extras: dict[str, float] = field(default_factory=dict)

    def call(self, limit: float) -> float:
        """One timed call."""
        said = _ask(self.process, "call", limit)
        self.peak_mib, self.own_mib, self.extras = said["peak_mib"], said["own_mib"], said["extras"]
        self.processor_s = said.get("processor_s")
        return float(said["seconds"])

    def stop(self) -> None:
        """Ends the process."""
        _end(self.process)


def _end(process: subprocess.Popen[str]) -> None:
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ask(process: subprocess.Popen[str], deed: str, limit: float) -> dict[str, Any]:
    """One request and its answer.

    Raises:
        RacerError: it was skipped, failed, died, or took too long.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps({"do": deed}) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died; its exit status says more below
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(limit):
            process.kill()
            raise RacerError(f"{deed} took more than {limit:.0f} s")
    line = process.stdout.readline()
    if not line:
        code = process.wait()
        because = ", out of memory perhaps" if code == -9 else ""
        raise RacerError(f"its process died in {deed} (exit status {code}{because})")
    said: dict[str, Any] = json.loads(line)
    for key in ("skipped", "failed"):
        if key in said:
            raise RacerError(said[key] if key == "skipped" else f"{deed} failed: {said[key]}")
    return said


def start(job: Job, feeds_file: Path, folder: Path, limit: float, checkout: Path | None = None) -> Racer:
    """Starts a racer: loads it and makes the first calls.

    Args:
        job: who runs what; its bundle by an absolute path where a checkout is given.
        feeds_file: the tensors of the task, as `draw` made them.
        folder: for what the racers leave behind; they are started there where a checkout is given.
        limit: seconds that a load or a call may take.
        checkout: whose code the racer runs; None is what is installed.

    Raises:
        RacerError: it cannot run.
    """
    answer_file = folder / f"answer-{time.monotonic_ns()}.npy"
    process = subprocess.Popen(
        [sys.executable, "-m", "cascade_bench.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=None if checkout is None else folder,
        env=environment(job.threads, checkout) | {"CASCADE_BENCH_STARTED": repr(time.time())},
    )
    try:
        assert process.stdin is not None
        task = asdict(job) | {"feeds_file": str(feeds_file), "answer_file": str(answer_file)}
        process.stdin.write(json.dumps(task) + "\n")
        load_s = float(_ask(process, "load", limit)["seconds"])
        first = _ask(process, "call", limit)
        first_s = float(first["seconds"])
        racer = Racer(
            job=job,
            process=process,
            answer_file=answer_file,
            load_s=load_s,
            first_s=first_s,
            peak_mib=first["peak_mib"],
            own_mib=first["own_mib"],
        )
        for _ in range(_WARM_CALLS - 1):
            racer.call(limit)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return racer


def run(
    jobs: Sequence[Job],
    roofs: dict[str, Roof],
    work: Sequence[Work | None],
    repeats: int,
    limit: float,
    quiet: bool,
    after_task: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Races jobs, task by task. Ctrl-C stops every process.

    Args:
        jobs: who runs what.
        roofs: per device.
        work: of each job, in the same order.
        repeats: timed calls of each.
        limit: seconds that a load or a call may take.
        quiet: no progress bar.
        after_task: is given all rows so far whenever a task is done: what comes after it may take too long.

    Returns:
        A row a job, in the jobs' order.
    """
    rows: dict[Job, Row] = {}
    asked = dict(zip(jobs, work, strict=True))
    bar = tqdm(total=len(jobs), desc="racers", unit="racer", disable=True if quiet else None, leave=False)
    with bar, tempfile.TemporaryDirectory(prefix="cascade-bench-") as folder:
        for task in dict.fromkeys(job.task for job in jobs):
            rivals = [job for job in jobs if job.task == task]
            rows |= _race_task(rivals, asked, roofs, repeats, limit, Path(folder), bar)
            after_task(list(rows.values()))
    return [rows[job] for job in jobs]


def _race_task(
    rivals: list[Job],
    work: dict[Job, Work | None],
    roofs: dict[str, Roof],
    repeats: int,
    limit: float,
    folder: Path,
    bar: Any,
) -> dict[Job, Row]:
    first = rivals[0]
    feeds_file = folder / "feeds.npz"
    bundle = find_bundle(first.bundle)
    feeds = {} if first.what == PICTURE else draw(bundle, first.what, first.batch, first.pixels)
    np.savez(feeds_file, **feeds)  # type: ignore[arg-type]
    rows = {job: _blank(job) for job in rivals}
    answers: dict[Job, NDArray[np.float32]] = {}
    waiting, group = list(rivals), 0
    while waiting:
        group += 1
        running: list[Racer] = []
        try:
            while waiting and (not running or _fits(waiting[0])):
                job = waiting.pop(0)
                bar.set_postfix_str(f"loading {job.label}")
                try:
                    running.append(start(job, feeds_file, folder, limit))
                except RacerError as error:
                    rows[job] = replace(rows[job], skipped=str(error))
                    bar.update()
            _take_turns(running, rows, repeats, limit, bar)
            for racer in running:
                if rows[racer.job].skipped is None:
                    rows[racer.job] = replace(figures(racer, work[racer.job], roofs), group=group)
                    answers |= answer_of(racer, limit)
                bar.update()
        finally:
            for racer in running:
                racer.stop()
    return _compare(rows, answers, feeds_file, folder, limit)


def _take_turns(running: list[Racer], rows: dict[Job, Row], repeats: int, limit: float, bar: Any) -> None:
    for turn in range(repeats):
        at = turn % max(1, len(running))
        for racer in running[at:] + running[:at]:
            if rows[racer.job].skipped is not None:
                continue
            bar.set_postfix_str(f"{racer.job.label} {turn + 1}/{repeats}")
            time.sleep(_SETTLE)
            try:
                racer.seconds.append(racer.call(limit))
            except RacerError as error:
                rows[racer.job] = replace(rows[racer.job], skipped=str(error))


def _fits(job: Job) -> bool:
    """Whether another racer may be loaded beside those that wait."""
    manifest = find_bundle(job.bundle).manifest
    names = {model.weights for model in manifest.models.values() if model.weights}
    component = job.what.partition(".")[0]
    if component in manifest.models:
        names = {manifest.models[component].weights or ""}
    weights = sum(manifest.files[name].bytes for name in names if name in manifest.files)
    return bool(psutil.virtual_memory().available > _ROOM[job.peer] * weights + _FIXED_BYTES)


def _blank(job: Job) -> Row:
    return Row(
        what=job.what,
        size=job.size,
        peer=job.peer,
        provider=job.provider,
        precision=job.precision,
        batch=job.batch,
        pixels=job.pixels,
        steps=job.steps if job.what in (PICTURE, HOST) else None,
        threads=job.threads,
    )


def figures(racer: Racer, work: Work | None, roofs: dict[str, Roof]) -> Row:
    """The row of a racer that has made its calls, without what takes a rival."""
    job = racer.job
    p10, median, p90 = (float(x) for x in np.percentile(racer.seconds, (10, 50, 90)))
    roof = roofs.get(job.device)
    best = work.seconds(roof, job.precision) if work and roof else None
    return replace(
        _blank(job),
        repeats=len(racer.seconds),
        median_s=median,
        p10_s=p10,
        p90_s=p90,
        peak_mib=racer.peak_mib,
        own_mib=racer.own_mib,
        device_peak_mib=racer.extras.get("device_peak_mib"),
        load_s=racer.load_s,
        first_s=racer.first_s,
        roofline_share=best / median if best else None,
        host_share=racer.extras.get("host_share"),
    )


def answer_of(racer: Racer, limit: float) -> dict[Job, NDArray[np.float32]]:
    """What a racer's last call made, under its job; nothing for a context, whose answer is not on the host."""
    try:
        _ask(racer.process, "answer", limit)
    except RacerError:
        return {}
    return {racer.job: np.load(racer.answer_file)}


def _is_reference(job: Job) -> bool:
    return job.peer == "eager" and job.precision == "fp32"


def _compare(
    rows: dict[Job, Row], answers: dict[Job, NDArray[np.float32]], feeds_file: Path, folder: Path, limit: float
) -> dict[Job, Row]:
    """Adds ratios and errors."""
    reference = next((answers[job] for job in answers if _is_reference(job)), None)
    if reference is None and answers and not any(_is_reference(job) for job in rows):
        reference = _reference(next(iter(answers)), feeds_file, folder, limit)
    for job, row in rows.items():
        rivals = [
            other.median_s
            for precision in rivals_of(job.precision)
            for rival, other in rows.items()
            if rival.peer == "eager" and rival.precision == precision and other.median_s and rival.device == job.device
        ]
        ratio = rivals[0] / row.median_s if rivals and row.median_s else None
        error = None
        skipped = row.skipped
        if job in answers and not np.isfinite(answers[job]).all():
            skipped = "its answer holds NaN or infinity"
        elif reference is not None and job in answers and not (_is_reference(job) and job.provider == "cpu"):
            error = relative_error(answers[job], reference)
        rows[job] = replace(row, ratio_to_eager=ratio, rel_error=error, skipped=skipped)
    return rows


def rivals_of(precision: str) -> tuple[str, ...]:
    """Precisions in which eager PyTorch is a row's rival, the first of them that races."""
    return (precision,) if PRECISIONS[precision].linear == "plain" else ("bf16", "fp32")


def _reference(job: Job, feeds_file: Path, folder: Path, limit: float) -> NDArray[np.float32] | None:
    """Eager fp32's answer where it does not race itself; None, and a line on standard error, where it cannot run."""
    bundle = Path(job.bundle)
    source = bundle if job.precision == "fp32" else bundle_folder(bundle.parent, job.size, "fp32")
    if not source.is_dir():
        print(
            f"no fp32 weights for {job.what}: its rows have no rel_error. Make them first with: "
            f"cascade-export --stage all --size {job.size} --precision fp32 --checkpoint random:0 --no-verify "
            f"--out {source}",
            file=sys.stderr,
        )
        return None
    try:
        eager = replace(job, peer="eager", precision="fp32", bundle=str(source), provider="cpu")
        racer = start(eager, feeds_file, folder, limit)
    except RacerError as error:
        print(f"no fp32 reference for {job.what}: {error}", file=sys.stderr)
        return None
    try:
        return answer_of(racer, limit).get(racer.job)
    finally:
        racer.stop()


def relative_error(made: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Relative L2 in float64.

    Raises:
        ValueError: the arrays differ in shape, or hold what is not finite.
    """
    a, b = made.astype(np.float64), reference.astype(np.float64)
    if a.shape != b.shape:
        raise ValueError(f"an answer of shape {a.shape} cannot be compared with one of {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("NaN or infinity cannot be compared")
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
