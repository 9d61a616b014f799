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

from cascade_bench.jobs import Job

_SIDE = {"cpu": 3072, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


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
        return max(self.flops / roof.flops[precision], self.parameters * _BYTES[precision] / roof.bytes)


def measure(device: str, threads: int, precisions: list[str]) -> Roof:
    """Measures a device; needs torch."""
    import torch

    torch.set_num_threads(threads)
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

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
        a = torch.randn(side, side, device=device).to(dtypes[precision])
        flops[precision] = 2 * side**3 / best(partial(torch.mm, a, a, out=torch.empty_like(a)))
    source = torch.ones(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Roof(flops, 2 * len(source) / best(lambda: target.copy_(source)))


def count(job: Job) -> Work | None:
    """Counts a task; None where there is no single network to count."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cascade_bench.jobs import TASKS, draw
    from cascade_export.graphs import CALLS
    from cascade_export.models import build_model
    from cascade_rt.bundle import find_bundle

    if job.what not in TASKS:
        return None
    bundle = find_bundle(job.bundle)
    component = job.what.partition(".")[0]
    feeds = draw(bundle, job.what, job.batch, job.pixels)
    with torch.device("meta"):
        module = build_model(component, dict(bundle.manifest.models[component].config))
    sizes = {name: torch.empty(x.shape, dtype=torch.from_numpy(x).dtype, device="meta") for name, x in feeds.items()}
    if component in ("stage_c", "stage_b"):
        return _count_denoiser(job.what, module, sizes)
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        CALLS[job.what](module, sizes)
    return Work(counter.get_total_flops(), sum(p.numel() for p in module.parameters()))


def _count_denoiser(what: str, module: Any, sizes: dict[str, Any]) -> Work:
    import torch
    import torch.nn.functional as F
    from torch.utils.flop_counter import FlopCounterMode

    latents, ratio = sizes.pop("latents"), sizes.pop("ratio")
    if "effnet" in sizes:
        grid = [s // module.config.patch_size for s in latents.shape[2:]]
        sizes["effnet"] = F.interpolate(sizes["effnet"], size=grid)
    embedding = torch.empty(1, module.config.timestep_ratio_embedding_dim, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        context = module.context(timestep_embedding=embedding, **sizes)
    if not what.endswith("step"):
        return Work(counter.get_total_flops(), 0.0)
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        module.step(latents, torch.zeros(1, dtype=torch.int64, device="meta"), context)
    del ratio
    # mappers, and keys and values of conditions, belong to the context
    hot = sum(p.numel() for n, p in module.named_parameters() if "mapper" not in n or "repeat" in n)
    return Work(counter.get_total_flops(), hot)


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
