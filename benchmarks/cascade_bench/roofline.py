"""What the machine can do at best, and what a task asks of it at least.

`python -m cascade_bench.roofline` measures in a process of its own: a large matrix product in each precision, and a
large copy. A task's work is counted on the network without weights (`torch.utils.flop_counter`): of a denoiser, its
hot step, without what is the same for all steps. The best possible time is the longer of products and bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from cascade_bench.jobs import CONTEXTS, STEPS, TASKS, Feeds, Job, context_feeds, draw, step_feeds
from cascade_rt.stages import ITEM_SIZE, PRECISIONS, EngineSpec

_SIDE = {"cpu": 3072, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True)
class Roof:
    """One device's limits.

    Attributes:
        flops: precision -> floating-point operations a second of a matrix product.
        bytes: bytes read and written a second by a copy.
    """

    flops: Mapping[str, float]
    bytes: float


@dataclass(frozen=True)
class Work:
    """What a task asks for: operations, and weights to be read."""

    flops: float
    parameters: float

    def seconds(self, roof: Roof, precision: str) -> float | None:
        """The least time it can take; None if the machine was not measured in this precision."""
        if precision not in roof.flops:
            return None
        row = PRECISIONS[precision]
        size = 1 if row.linear != "plain" else ITEM_SIZE[row.weights]
        return max(self.flops / roof.flops[precision], self.parameters * size / roof.bytes)


def measure(device: str, threads: int, precisions: list[str]) -> Roof:
    """Measures a device; needs torch."""
    import torch

    torch.set_num_threads(threads)

    def best(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(6):  # the first is the warm-up, and never the best
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    side = _SIDE[device]
    flops = {}
    for precision in precisions:
        if PRECISIONS[precision].linear == "fp8":  # no such product in PyTorch for CPUs: its roof stays unknown
            continue
        a = torch.randn(side, side, device=device)
        if PRECISIONS[precision].linear in ("int8", "int8-static"):  # as if all products were in 8 bits
            narrow = (a * 32).to(torch.int8)
            work: Callable[[], object] = partial(torch._int_mm, narrow, narrow)
        else:
            a = a.to(getattr(torch, PRECISIONS[precision].compute))
            work = partial(torch.mm, a, a, out=torch.empty_like(a))
        flops[precision] = 2 * side**3 / best(work)
    source = torch.ones(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Roof(flops, 2 * len(source) / best(lambda: target.copy_(source)))


def count(job: Job) -> Work | None:
    """Counts a task; None where there is no single network to count."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cascade_export.catalog import build_model, call_of
    from cascade_rt.bundle import find_bundle

    if job.what not in TASKS:
        return None
    bundle = find_bundle(job.bundle)
    spec = bundle.engine(job.what, "onnx").spec
    drawn = draw(bundle, job.what, job.batch, job.pixels)
    with torch.device("meta"):
        module = build_model(spec.model, bundle.manifest.models[spec.model].config)

    def sizes(feeds: Feeds) -> dict[str, Any]:
        return {n: torch.empty(x.shape, dtype=torch.from_numpy(x).dtype, device="meta") for n, x in feeds.items()}

    def counted(engine: EngineSpec, feeds: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        counter = FlopCounterMode(display=False)
        with counter, torch.inference_mode():
            made = call_of(engine)(module, feeds)
        return counter.get_total_flops(), {t.name: x for t, x in zip(engine.outputs, made, strict=True)}

    if job.what not in (*STEPS, *CONTEXTS):
        flops, _ = counted(spec, sizes(drawn))
        return Work(flops, sum(p.numel() for p in module.parameters()))
    context = bundle.engine(f"{spec.model}.context", "onnx").spec
    flops, constants = counted(context, sizes(context_feeds(bundle, spec.model, drawn)))
    if job.what in CONTEXTS:
        return Work(flops, 0.0)
    flops, _ = counted(spec, sizes(step_feeds(drawn)) | constants)
    return Work(flops, sum(p.numel() for name, p in module.named_parameters() if in_step(name)))


def in_step(parameter: str) -> bool:
    """Whether a denoiser's step reads a parameter: what maps conditions and timesteps belongs to the context."""
    return "mapper" not in parameter or "repeat" in parameter


def ask(jobs: list[Job], devices: list[str], threads: int) -> tuple[dict[str, Roof], list[Work | None]]:
    """Measures and counts in a fresh process; empty and None where torch is missing or fails, which is printed."""
    request = {"jobs": [asdict(job) for job in jobs], "devices": devices, "threads": threads}
    done = subprocess.run(
        [sys.executable, "-m", "cascade_bench.roofline"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(f"no roofline: {reason}", file=sys.stderr)
        return {}, [None] * len(jobs)
    said = json.loads(done.stdout.strip().splitlines()[-1])
    roofs = {device: Roof(**roof) for device, roof in said["roofs"].items()}
    return roofs, [Work(**work) if work else None for work in said["work"]]


def main() -> None:
    """Answers one request on standard input."""
    request = json.loads(sys.stdin.read())
    jobs = [Job(**{**job, "steps": tuple(job["steps"])}) for job in request["jobs"]]
    roofs = {}
    for device in request["devices"]:
        wanted = {job.precision for job in jobs if job.device == device}
        # fp16 products are emulated on CPUs: no roof for anything
        precisions = sorted(wanted - ({"fp16"} if device == "cpu" else set()))
        roofs[device] = asdict(measure(device, request["threads"], precisions))
    work = []
    for job in jobs:
        counted = count(job)
        work.append(asdict(counted) if counted else None)
    print(json.dumps({"roofs": roofs, "work": work}))


if __name__ == "__main__":
    main()
