"""This checkout and another one, raced in turns: did a change cost time?

    git worktree add /tmp/before HEAD~10
    python benchmarks/against_tree.py /tmp/before --what stage_c.step,stage_b.step,picture,cold-start,import

Each checkout runs its own code over its own bundle, in processes of its own, which are called in turns as in
`cascade-bench`. Both get the same tensors and threads. A ratio is this checkout's time over the other's in the same
turn: above 1 is slower than the other. Its interval says how far the median moves if the turns are drawn anew. The
same is said of processor time, which other work on the machine disturbs less; threads that wait by spinning take it too
(``--threads 1`` has none).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cascade_bench import report, startup
from cascade_bench.jobs import OURS, PICTURE, TASKS, Job, draw
from cascade_bench.prepare import export
from cascade_bench.processes import environment, run_command
from cascade_bench.race import Racer, RacerError, answer_of, relative_error, start
from cascade_rt import CascadeError
from cascade_rt.bundle import find_bundle
from cascade_rt.errors import RequestError
from cascade_rt.paths import cache_dir
from cascade_rt.stages import ENGINES, PRECISIONS, Size

HERE = Path(__file__).resolve().parents[1]
SHIPPED = Path("engines/tiny/cascade_tiny/bundle")
IMPORTS = {"import cascade_rt": "import cascade_rt", "import CascadePipeline": "from cascade_rt import CascadePipeline"}
ENGINE_TASKS = (*TASKS, PICTURE)
WHAT = (*ENGINE_TASKS, "cold-start", "import")
SIDES = ("this", "other")
SETTLE = 0.1
"""Seconds between calls: threads of the last racer spin on for a while."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One line of the result; None is "not measured". Times in seconds.

    Attributes:
        what: an engine, ``picture``, ``cold-start``, or an import statement.
        size: of the cascade.
        provider: that ran both.
        precision: of both.
        batch: rows of the network's batch; of a picture, pictures.
        pixels: side of the picture.
        turns: how often each was called.
        this_s: median of this checkout.
        other_s: median of the other one.
        ratio: median over the turns of this one's time over the other's.
        low: the ratio's 95 % interval.
        high: likewise.
        best_ratio: the quickest call of this one over the quickest of the other.
        processor_ratio: as ``ratio``, of the time that threads ran on processors; None where a worker does not say.
        processor_low: its 95 % interval.
        processor_high: likewise.
        difference: relative L2 of what they made; 0 is the same numbers.
        skipped: why there is nothing else.
    """

    what: str
    size: str
    provider: str
    precision: str
    batch: int | None = None
    pixels: int | None = None
    turns: int | None = None
    this_s: float | None = None
    other_s: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    best_ratio: float | None = None
    processor_ratio: float | None = None
    processor_low: float | None = None
    processor_high: float | None = None
    difference: float | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Taken:
    """What a call or a process took.

    Attributes:
        seconds: from its beginning to its end.
        processor_s: that its threads ran on processors; None where the worker of that checkout does not say.
    """

    seconds: float
    processor_s: float | None


def figures(this: Sequence[Taken], other: Sequence[Taken]) -> dict[str, Any]:
    """The fields of `Compared` for two lists, one entry a turn."""
    one, two = (np.array([taken.seconds for taken in side]) for side in (this, other))
    ratio, low, high = median_ratio(one, two)
    found: dict[str, Any] = {
        "turns": len(this),
        "this_s": float(np.median(one)),
        "other_s": float(np.median(two)),
        "ratio": ratio,
        "low": low,
        "high": high,
        "best_ratio": float(one.min() / two.min()),
    }
    one, two = (np.array([taken.processor_s or 0.0 for taken in side]) for side in (this, other))
    if (one > 0).all() and (two > 0).all():
        ratio, low, high = median_ratio(one, two)
        found |= {"processor_ratio": ratio, "processor_low": low, "processor_high": high}
    return found


def median_ratio(this: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float, float]:
    """The median over the turns of one time over the other, and its 95 % interval by resampling."""
    ratios = this / other
    rng = np.random.default_rng(0)
    again = np.median(ratios[rng.integers(0, len(ratios), (2000, len(ratios)))], axis=1)
    low, high = np.percentile(again, (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


def prepare(arguments: argparse.Namespace, checkout: Path) -> Path:
    """A checkout's bundle: its shipped one, or random weights exported by its own exporter, kept from run to run."""
    if arguments.size == "tiny" and arguments.precision == "fp32":
        return checkout / SHIPPED
    commit = (report.commit(checkout) or checkout.name).rstrip("+")
    bundle: Path = arguments.work.resolve() / f"{arguments.size}-{arguments.precision}-{commit}"
    wanted = {s for what in arguments.what if what in ENGINE_TASKS for s in stages_of(what)}
    for stage in sorted(wanted):
        marker = bundle.with_name(f"{bundle.name}.{stage}")  # the other checkout's manifest may be of another format
        if not marker.exists():
            export(bundle, arguments.size, arguments.precision, stage, environment=environment(2, checkout))
            marker.touch()
    return bundle


def stages_of(what: str) -> tuple[str, ...]:
    """The stages that a task needs, in ``cascade-export``'s words."""
    return ("text", "c", "b", "a") if what == PICTURE else (ENGINES[what].stage,)


def race_calls(job: Callable[[str], Job], checkouts: Mapping[str, Path], turns: int, limit: float) -> dict[str, Any]:
    """Load both and call them in turns.

    Args:
        job: side -> what its racer runs.
        checkouts: side -> whose code.
        turns: timed calls of each.
        limit: seconds that a load or a call may take.

    Returns:
        Fields of `Compared`.
    """
    with tempfile.TemporaryDirectory(prefix="cascade-bench-") as name:
        folder = Path(name)
        asked = job("this")
        feeds = {} if asked.what == PICTURE else draw(find_bundle(asked.bundle), asked.what, asked.batch, asked.pixels)
        np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]
        racers: dict[str, Racer] = {}
        taken: dict[str, list[Taken]] = {side: [] for side in checkouts}
        try:
            for side, checkout in checkouts.items():
                racers[side] = start(job(side), folder / "feeds.npz", folder, limit, checkout)
            for turn in tqdm(range(turns), desc=asked.what, leave=False, disable=None):
                for side in SIDES[:: 1 if turn % 2 else -1]:
                    time.sleep(SETTLE)
                    seconds = racers[side].call(limit)
                    taken[side].append(Taken(seconds, racers[side].processor_s))
            answers = [answer for racer in racers.values() for answer in answer_of(racer, limit).values()]
            return figures(taken["this"], taken["other"]) | {"difference": difference(answers)}
        except RacerError as error:
            at = SIDES[len(racers)] if len(racers) < len(SIDES) else "one"
            return {"skipped": f"{at} checkout: {error}"}
        finally:
            for racer in racers.values():
                racer.stop()


def difference(answers: list[NDArray[np.float32]]) -> float | None:
    """How far two answers are apart; None where the answer stays on the device."""
    return relative_error(*answers) if len(answers) == len(SIDES) else None


def race_starts(starts: Mapping[str, startup.Start], turns: int, folder: Path, label: str) -> dict[str, Any]:
    """Start processes of both in turns; fields of `Compared`."""
    with tqdm(total=turns + 1, desc=label, leave=False, disable=None) as bar:
        seconds, failed = startup.time_starts(starts, turns, folder, bar)
    if failed:
        return {"skipped": "; ".join(f"{side} checkout: {reason}" for side, reason in failed.items())}
    this, other = ([Taken(*pair) for pair in seconds[side]] for side in SIDES)
    return figures(this, other)


def compare(arguments: argparse.Namespace) -> list[Compared]:
    """Every line that was asked for."""
    checkouts = {"this": HERE, "other": arguments.other.resolve()}
    entries = {side: run_command(checkout) for side, checkout in checkouts.items()}
    bundles = {side: prepare(arguments, checkout) for side, checkout in checkouts.items()}
    told = {side: environment(arguments.threads, checkout) for side, checkout in checkouts.items()}
    made = []

    def line(what: str, found: dict[str, Any], **shape: int) -> None:
        blank = {"what": what, "size": arguments.size, "provider": arguments.provider, "precision": arguments.precision}
        made.append(Compared(**(blank | shape | found)))
        print(row(made[-1]), file=sys.stderr)

    for what in arguments.what:
        if what in ENGINE_TASKS:
            batch = arguments.batch or (2 if what.startswith("stage_c") else 1)
            pixels = arguments.pixels or (256 if arguments.size == "tiny" else 1024)

            def job(side: str, what: str = what, batch: int = batch, pixels: int = pixels) -> Job:
                return Job(
                    what=what,
                    peer=OURS,
                    provider=arguments.provider,
                    precision=arguments.precision,
                    size=cast("Size", arguments.size),
                    batch=batch,
                    pixels=pixels,
                    steps=(20, 10),
                    bundle=str(bundles[side]),
                    threads=arguments.threads,
                )

            line(what, race_calls(job, checkouts, arguments.turns, arguments.limit), batch=batch, pixels=pixels)
            continue
        with tempfile.TemporaryDirectory(prefix="cascade-bench-") as name:
            folder = Path(name)
            if what == "cold-start":
                starts = {
                    side: startup.picture_start(entries[side], bundles[side], folder / f"{side}.png", told[side])
                    for side in SIDES
                }
                line(what, race_starts(starts, arguments.starts, folder, what))
            else:
                for label, code in IMPORTS.items():
                    starts = {side: startup.import_start(code, told[side]) for side in SIDES}
                    line(label, race_starts(starts, arguments.starts, folder, label))
    return made


HEADINGS = ("what", "this", "other", "this / other (95 %)", "quickest", "processor time (95 %)", "difference")


def row(line: Compared) -> str:
    """A line of the Markdown table."""
    name = " ".join(filter(None, (line.what, line.size, line.precision, line.provider)))
    if line.ratio is None:
        return f"| {name} | skipped: {line.skipped} |  |  |  |  |  |"
    ratio = f"{line.ratio:.3f} ({line.low:.3f} - {line.high:.3f})"
    processor = ""
    if line.processor_ratio is not None:
        processor = f"{line.processor_ratio:.3f} ({line.processor_low:.3f} - {line.processor_high:.3f})"
    apart = "" if line.difference is None else f"{line.difference:.1e}"
    this, other = report.seconds_text(line.this_s), report.seconds_text(line.other_s)
    return f"| {name} | {this} | {other} | {ratio} | {line.best_ratio:.3f} | {processor} | {apart} |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER", help="folder of the other checkout")
    parser.add_argument("--what", default="stage_c.step,stage_b.step,picture,cold-start,import", help=", ".join(WHAT))
    parser.add_argument("--size", choices=("tiny", "small", "big"), default="tiny")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    parser.add_argument("--provider", default="cpu", help="that runs both (default: cpu)")
    parser.add_argument("--batch", type=int, help="rows of the network (default: 2 for Stage C, else 1)")
    parser.add_argument("--pixels", type=int, help="side of the picture (default: 256 for tiny, else 1024)")
    parser.add_argument("--turns", type=int, default=100, help="timed calls of each (default: 100)")
    parser.add_argument("--starts", type=int, default=20, help="timed starts of each (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="within an operator (default: 2)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a load or a call may take (default: 600)")
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench", metavar="DIR", help="for exported bundles")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args(argv)
    arguments.what = [name for name in arguments.what.split(",") if name]
    if unknown := [name for name in arguments.what if name not in WHAT]:
        parser.error(f"--what {unknown[0]} is not known; accepted: {', '.join(WHAT)}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    arguments = parse(argv)
    try:
        made = compare(arguments)
    except CascadeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    result = {
        "machine": report.machine(arguments.threads),
        "versions": report.versions(),
        "commit": report.commit(HERE),
        "other_commit": report.commit(arguments.other),
        "rows": [asdict(line) for line in made],
    }
    if arguments.json:
        report.write_json(result, arguments.json)
    print("\n".join([f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|", *map(row, made)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
