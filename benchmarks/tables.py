"""Write the tables of results from their JSON: ``results/*.md``, and those between two marks in the READMEs.

    python benchmarks/tables.py --write

A test calls `tables` and fails where a file says something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cascade_bench.jobs import OURS
from cascade_bench.report import seconds_text, table
from cpp_start import page as start_page

HERE = Path(__file__).parent
BEGIN = "<!-- table: python benchmarks/tables.py --write -->\n"
END = "<!-- end of table -->"
FEATURES_BEGIN = "<!-- features: python benchmarks/tables.py --write -->\n"
FEATURES = "features_tiny_cpu"
"""The result of ``features.py`` that is shown."""
CPP_BEGIN = "<!-- cpp: python benchmarks/tables.py --write -->\n"
CPP = "cpp_start"
"""The result of ``cpp_start.py`` that is shown."""
NAMES = {
    "stage_c.step": "Stage C, a step",
    "stage_b.step": "Stage B, a step",
    "stage_a.decode": "Stage A",
    "text_encoder": "text encoder",
    "picture": "a whole picture",
    "cold_start": "from the start of a process to a picture on disk",
}
SHOWN: tuple[tuple[str, ...], ...] = (
    ("race_tiny_cpu", "stage_c.step"),
    ("race_tiny_cpu", "stage_b.step"),
    ("race_tiny_cpu", "stage_a.decode"),
    ("race_tiny_cpu", "picture"),
    ("race_tiny_bf16_cpu", "stage_a.decode"),
    ("race_tiny_bf16_cpu", "picture"),
    ("startup", "cold_start"),
    ("race_small_fp32_cpu", "stage_c.step"),
    ("race_small_bf16_cpu", "stage_c.step"),
    ("race_small_int8_cpu", "stage_c.step", "int8"),
    ("race_small_decoder_bf16_cpu", "stage_b.step"),
    ("race_small_decoder_bf16_cpu", "stage_a.decode"),
    ("race_small_picture_cpu", "picture"),
    ("race_small_picture_20_10_cpu", "picture"),
    ("race_big_bf16_cpu", "stage_c.step"),
    ("race_big_decoder_bf16_cpu", "stage_b.step"),
)
"""(file, what), or (file, what, our precision), of README's table; of several of ours the fastest is shown."""
FIRST: tuple[tuple[str, ...], ...] = (
    ("race_tiny_cpu", "picture"),
    ("startup", "cold_start"),
    ("race_small_bf16_cpu", "stage_c.step"),
    ("race_small_int8_cpu", "stage_c.step", "int8"),
    ("race_small_picture_20_10_cpu", "picture"),
    ("race_big_bf16_cpu", "stage_c.step"),
    ("race_tiny_bf16_cpu", "stage_a.decode"),
)
"""The same for the first page of the project."""
HEADINGS = (
    "what",
    "precision, px",
    "eager",
    "compiled",
    "ours",
    "x eager",
    "x compiled",
    "error: ours, eager",
    "memory",
)


def races() -> dict[str, dict[str, Any]]:
    """Name -> a result of ``cascade-bench``, which has rows of `Row`."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}
    return {name: d for name, d in found.items() if d.get("rows") and "ratio_to_eager" in d["rows"][0]}


def own_page(name: str, result: Mapping[str, Any]) -> str:
    """The page of one result."""
    machine = result["machine"]
    gpu = machine["gpu"] or "no GPU"
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return "\n".join(
        [
            f"# {name}\n",
            f"Written by `python benchmarks/tables.py --write` from [{name}.json]({name}.json).\n",
            f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"{gpu}; load average before: {machine['load_before']}. Commit {result['commit']}. {versions}.\n",
            table(result["rows"]),
            "",
            *_installed(result.get("installed_mib", {})),
        ]
    )


def _installed(sizes: Mapping[str, float]) -> Iterator[str]:
    """What the runtime takes on the disk with all that it needs, the largest first."""
    if not sizes:
        return
    yield f"Installed with `[onnxruntime]`, {sum(sizes.values()):.0f} MiB in all:\n"
    yield "| package | MiB |\n| --- | --- |"
    yield from (f"| {name} | {size:.1f} |" for name, size in sorted(sizes.items(), key=lambda row: -row[1]))
    yield ""


def summary(results: Mapping[str, Mapping[str, Any]], shown: Iterable[tuple[str, ...]], place: str) -> str:
    """A table with a line for each of ``shown``; the fastest time of a line is bold.

    Args:
        results: by name.
        shown: (file, what), or (file, what, our precision).
        place: of `results/`, as links have it.
    """
    lines = [f"| {' | '.join(HEADINGS)} |", f"|{' --- |' * len(HEADINGS)}"]
    lines += [_line(f"{place}/{name}.md", what, results[name]["rows"], *which) for name, what, *which in shown]
    return "\n".join(lines) + "\n"


def _line(page: str, what: str, rows: list[dict[str, Any]], precision: str | None = None) -> str:
    timed = [row for row in rows if row["what"] == what and row["median_s"] is not None]
    own = [row for row in timed if row["peer"] == OURS and precision in (None, row["precision"])]
    ours = min(own, key=lambda row: row["median_s"])
    eager = next(row for row in timed if row["peer"] == "eager")
    compiled = next((row for row in timed if row["peer"] == "compile"), None)
    fastest = min((row for row in (eager, compiled, ours) if row), key=lambda row: row["median_s"])
    times = [_time(row, fastest) for row in (eager, compiled, ours)]
    ratios = [f"{row['median_s'] / ours['median_s']:.2f}" if row else "" for row in (eager, compiled)]
    theirs = "" if eager["precision"] == ours["precision"] else f" (theirs {eager['precision']})"
    shape = f"{ours['precision']}{theirs}, {ours['pixels']}"
    steps = f", {ours['steps'][0]} + {ours['steps'][1]} steps" if what == "picture" and ours.get("steps") else ""
    provider = "ONNX Runtime" if ours["provider"] == "cpu" else "OpenVINO"
    errors = f"{_error(ours)}, {_error(eager)}"
    memory = f"{ours['peak_mib'] / eager['peak_mib']:.2f} x" if ours["peak_mib"] else ""
    cells = (f"`{ours['size']}`: [{NAMES[what]}]({page}){steps}", shape, times[0], times[1])
    return f"| {' | '.join((*cells, f'{times[2]} ({provider})', *ratios, errors, memory))} |"


def _time(row: Mapping[str, Any] | None, fastest: Mapping[str, Any]) -> str:
    if row is None:
        return "not measured"
    text = seconds_text(row["median_s"])
    return f"**{text}**" if row is fastest else text


def _error(row: Mapping[str, Any]) -> str:
    if row["precision"] == "fp32" and row["peer"] != OURS:
        return "reference"
    return "not measured" if row["rel_error"] is None else f"{row['rel_error']:.0e}"


def feature_table(result: Mapping[str, Any]) -> str:
    """What each feature costs, a line each."""
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, provider `{result['provider']}`, "
        f"{result['rows'][0]['repeats']} turns; load average before: {machine['load_before']}.\n",
        "| what | time | x plain (p10 to p90) | processor time, x plain |\n| --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        if row["skipped"]:
            lines.append(f"| {row['what']} | not measured: {row['skipped']} | | |")
            continue
        ratio = f"{row['median_ratio']:.2f} ({row['p10_ratio']:.2f} to {row['p90_ratio']:.2f})"
        lines.append(
            f"| {row['what']} | {seconds_text(row['median_s'])} | {ratio} | {row['median_processor_ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _with_table(text: str, begin: str, made: str) -> str:
    """A page with a table in the place of the one behind a mark."""
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{made}{END}{rest.partition(END)[2]}"


def tables() -> Iterator[tuple[Path, str]]:
    """Every file that is written from JSON, and what it must say."""
    results = races()
    for name, result in results.items():
        yield HERE / "results" / f"{name}.md", own_page(name, result)
    for readme, shown, place in (
        (HERE / "README.md", SHOWN, "results"),
        (HERE.parent / "README.md", FIRST, "benchmarks/results"),
    ):
        page = _with_table(readme.read_text(), BEGIN, summary(results, shown, place))
        if FEATURES_BEGIN in page:
            costs = json.loads((HERE / "results" / f"{FEATURES}.json").read_text())
            page = _with_table(page, FEATURES_BEGIN, feature_table(costs))
        if CPP_BEGIN in page:
            starts = json.loads((HERE / "results" / f"{CPP}.json").read_text())
            page = _with_table(page, CPP_BEGIN, start_page(starts))
        yield readme, page


def main() -> int:
    """Entry point: 1 where a file says something else and ``--write`` was not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write them instead of comparing")
    args = parser.parse_args()
    wrong = [path for path, text in tables() if not path.is_file() or path.read_text() != text]
    if args.write:
        for path, text in list(tables()):
            path.write_text(text)
        wrong = []
    for path in wrong:
        print(f"{path} is not what its JSON says; type: python benchmarks/tables.py --write", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
