"""The process of one racer: `python -m cascade_bench.worker`, driven over standard input and output by `race`.

One JSON object a line. First comes the job; then `{"do": "load" | "call" | "answer"}`. Every line is answered by one:
`seconds` and what else was measured, or `skipped` with the reason, or `failed` with the error's last line.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from cascade_bench.jobs import Job


def memory() -> dict[str, float | None]:
    """Memory of this process in MiB, None where the system does not say.

    ``peak_mib`` is the most that was resident so far, ``own_mib`` what it has now without pages of files, which the
    system can take back. From /proc: what getrusage says of a new process includes its parent's peak.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    sizes = {name: int(rest.split()[0]) / 1024 for name, _, rest in (x.partition(":") for x in lines) if "kB" in rest}
    return {"peak_mib": sizes.get("VmHWM"), "own_mib": sizes.get("RssAnon")}


def serve(requests: TextIO, answers: TextIO, started: float) -> None:
    """Answers requests until there are no more."""
    first = json.loads(requests.readline())
    feeds_file, answer_file = first.pop("feeds_file"), first.pop("answer_file")
    job = Job(**{**first, "steps": tuple(first["steps"])})
    peer: Any = None

    def load() -> dict[str, Any]:
        nonlocal peer
        from cascade_bench.peers import make_peer

        with np.load(feeds_file) as saved:
            feeds = dict(saved)
        peer = make_peer(job, feeds)
        return {"seconds": time.time() - started}

    def call() -> dict[str, Any]:
        gc.collect()
        begun, on_processor = time.perf_counter(), time.process_time()
        peer.call()
        seconds, processor_s = time.perf_counter() - begun, time.process_time() - on_processor
        return {"seconds": seconds, "processor_s": processor_s, "extras": peer.extras()}

    def answer() -> dict[str, Any]:
        np.save(answer_file, peer.answer())
        return {}

    deeds = {"load": load, "call": call, "answer": answer}
    for line in requests:
        try:
            said = deeds[json.loads(line)["do"]]()
        except Exception as error:  # whatever a library raises is an entry in the table, not the end of the race
            key = "skipped" if type(error).__name__ == "SkipError" else "failed"
            lines = [x.strip() for x in str(error).splitlines() if x.strip()]
            said = {key: (lines[0] if lines else type(error).__name__)[:300]}
        print(json.dumps({**said, **memory()}), file=answers, flush=True)


def main() -> None:
    """Runs the process; libraries that print get standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    serve(sys.stdin, answers, float(os.environ["CASCADE_BENCH_STARTED"]))


if __name__ == "__main__":
    main()
