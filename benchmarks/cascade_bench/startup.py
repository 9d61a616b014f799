"""What is timed from outside: how long Python takes to import, and from starting a process to a PNG on disk.

The other side of the race to a PNG is the shortest honest script of diffusers, with the same weights in its own format.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tqdm import tqdm

from cascade_bench.jobs import OURS, PROMPT
from cascade_bench.race import Row
from cascade_rt.bundle import Bundle
from cascade_rt.errors import CascadeError

_IMPORTS = {
    (OURS, "import cascade_rt"): "import cascade_rt",
    (OURS, "import CascadePipeline"): "from cascade_rt import CascadePipeline",
    ("eager", "import StableCascadeCombinedPipeline"): "from diffusers import StableCascadeCombinedPipeline",
}
_PACKAGES = ("cascade_rt", "cascade_export", "cascade_tiny", "cascade_bench")
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


def imports(repeats: int, quiet: bool) -> list[Row]:
    """Seconds of an import statement in a fresh interpreter, files in the system's cache."""
    commands = {key: [sys.executable, "-c", _TIMED.format(code=code)] for key, code in _IMPORTS.items()}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in commands}
    failed: dict[tuple[str, str], str] = {}
    for _ in tqdm(range(repeats + 1), desc="imports", disable=True if quiet else None, leave=False):
        for key, command in commands.items():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                failed[key] = (done.stderr.strip().splitlines() or ["it failed"])[-1]
            else:
                seconds[key].append(float(done.stdout.strip().splitlines()[-1]))
    rows = []
    for (peer, what), seen in seconds.items():
        row = Row(what, "", peer, "cpu", "fp32")
        if (peer, what) in failed:
            rows.append(replace(row, skipped=failed[peer, what]))
        else:
            rows.append(_timed(row, seen[1:]))  # the first fills the system's cache
    return rows


def cold_start(bundle: Bundle, repeats: int, threads: int, quiet: bool) -> list[Row]:
    """Seconds from starting a process to a PNG on disk, tiny, 20 + 10 steps, fp32 on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory(prefix="cascade-bench-") as name:
        folder = Path(name)
        ours = Row("cold_start", "tiny", OURS, "cpu", "fp32", 1, 256, (20, 10), threads)
        theirs = replace(ours, peer="eager")
        entry = "from cascade_rt.commands import main_run; raise SystemExit(main_run())"
        commands = {
            OURS: [
                *(sys.executable, "-c", entry, PROMPT, "--bundle", str(bundle.path), "--seed", "0"),
                *("--provider", "cpu", "--sampler", "diffusers", "-o", str(folder / "ours.png")),
            ],
            "eager": [
                *(sys.executable, "-c", _THEIR_SCRIPT, str(folder / "checkpoint"), PROMPT, str(folder / "theirs.png"))
            ],
        }
        failed: dict[str, str] = {}
        try:
            _save(bundle, folder / "checkpoint")
        except Exception as error:  # a missing library is an entry in the table
            failed["eager"] = str(error)
        seconds: dict[str, list[float]] = {OURS: [], "eager": []}
        for _ in tqdm(range(repeats + 1), desc="cold start", disable=True if quiet else None, leave=False):
            for peer, command in commands.items():
                if peer in failed:
                    continue
                taken, reason = _whole_process(command, environment, folder / "said")
                seconds[peer].append(taken)
                if reason is not None:
                    failed[peer] = reason
        rows = []
        for row in (ours, theirs):
            if row.peer in failed:
                rows.append(replace(row, skipped=failed[row.peer]))
            else:
                rows.append(_timed(row, seconds[row.peer][1:]))
    medians = {row.peer: row.median_s for row in rows}
    return [
        replace(row, ratio_to_eager=medians["eager"] / row.median_s if medians["eager"] and row.median_s else None)
        for row in rows
    ]


def _whole_process(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, str | None]:
    """Seconds, and why it failed, if it did."""
    with log.open("w") as said:
        started = time.perf_counter()
        code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=said, check=False).returncode
        seconds = time.perf_counter() - started
    return seconds, (log.read_text().strip().splitlines() or ["it failed"])[-1] if code else None


def _save(bundle: Bundle, folder: Path) -> None:
    from cascade_bench.peers import save_torch_pipeline

    save_torch_pipeline(bundle, folder)


def _timed(row: Row, seconds: list[float]) -> Row:
    p10, median, p90 = (float(x) for x in np.percentile(seconds, (10, 50, 90)))
    return replace(row, repeats=len(seconds), median_s=median, p10_s=p10, p90_s=p90)


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
