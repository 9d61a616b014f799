"""Load on cascade-serve and its peers, in one run: pictures a second, and how long clients wait.

    python benchmarks/serve/load.py --seconds 20 --rounds 2 --json benchmarks/results/serve_tiny_cpu.json

Every server runs the shipped bundle. Capacity: as many clients as `CLOSED_CLIENTS` ask again and again. Then clients
arrive at random times (Poisson), whether or not earlier ones were answered, at 0.5, 0.8 and 1.2 of the capacity that
cascade-serve had in the same round; the plain diffusers server gets these shares of its own. Servers take turns, and a
round has all loads, so that what else the machine does meets all of them; ``cpu_s_per_picture``, the processor time of
the server alone, is the steadier figure on a machine that does other things. Three in four requests want 20 steps of
Stage C, the others 10 or 30. The profile is what a row of an engine call takes, by the number of rows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

HERE = Path(__file__).parent
SHARES = (0.5, 0.8, 1.2)
CLOSED_CLIENTS = 24
START_SECONDS = 180
PROMPTS = ("a red circle", "a blue star", "a green square above a red circle", "a yellow star on a white background")
SERVERS = {
    "ours": ["-m", "cascade_rt.serve.cli", "--queue", "50000", "--port"],
    "ours, one picture a call": ["-m", "cascade_rt.serve.cli", "--max-batch", "1", "--queue", "50000", "--port"],
    "lock-step batches": [str(HERE / "peers.py"), "lockstep"],
    "diffusers and FastAPI": [str(HERE / "peers.py"), "eager"],
}
FIRST, EAGER = "ours", "diffusers and FastAPI"


@dataclass
class Window:
    """What clients saw of one server in a while.

    Attributes:
        seconds: how long it was.
        waits: seconds from the time at which a client arrived to its answer.
        unfinished: seconds that those waited who were not answered when the window closed.
        refused: answers that were no picture.
        cpu: seconds of processor time that the server took.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    waits: list[float] = field(default_factory=list)
    unfinished: list[float] = field(default_factory=list)
    refused: int = 0

    def add(self, other: Window) -> None:
        """Count another window to this one."""
        self.seconds += other.seconds
        self.cpu += other.cpu
        self.waits += other.waits
        self.unfinished += other.unfinished
        self.refused += other.refused

    def row(self) -> dict[str, Any]:
        """Pictures a second, and percentiles of the waits; the unfinished count with what they waited so far."""
        waits = sorted([*self.waits, *self.unfinished])
        percentiles = {f"p{p}_s": round(float(np.percentile(waits, p)), 4) if waits else None for p in (50, 95, 99)}
        return {
            "pictures_per_s": round(len(self.waits) / self.seconds, 3),
            **percentiles,
            "cpu_s_per_picture": round(self.cpu / len(self.waits), 4) if self.waits else None,
            "answered": len(self.waits),
            "unfinished": len(self.unfinished),
            "refused": self.refused,
        }


def body(chance: random.Random) -> dict[str, Any]:
    """What a client asks for."""
    steps = chance.choices((10, 20, 30), (1, 6, 1))[0]
    prompt = chance.choice(PROMPTS)
    return {"prompt": prompt, "seed": chance.randrange(2**32), "num_inference_steps": steps, "output_format": "jpeg"}


@dataclass
class Server:
    """A server that runs."""

    url: str
    process: psutil.Process

    def cpu(self) -> float:
        """Seconds of processor time that it took so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


async def ask(http: httpx2.AsyncClient, url: str, chance: random.Random, seen: Window, since: float) -> None:
    """One request; its wait counts from ``since``."""
    try:
        answer = await http.post(f"{url}/v1/images/generations", json=body(chance))
    except asyncio.CancelledError:
        seen.unfinished.append(time.perf_counter() - since)
        raise
    if answer.status_code == 200:
        seen.waits.append(time.perf_counter() - since)
    else:
        seen.refused += 1


async def closed(url: str, seconds: float, chance: random.Random) -> Window:
    """Clients that ask again and again."""
    seen, end = Window(), time.perf_counter() + seconds
    async with client() as http:

        async def one() -> None:
            while time.perf_counter() < end:
                await ask(http, url, chance, seen, time.perf_counter())

        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(CLOSED_CLIENTS)))
        seen.seconds = time.perf_counter() - started
    return seen


async def poisson(url: str, rate: float, seconds: float, chance: random.Random) -> Window:
    """Clients that arrive at random times, ``rate`` a second, whether or not others wait."""
    seen, started = Window(), time.perf_counter()
    arrival, tasks = started, []
    async with client() as http:
        while (arrival := arrival + chance.expovariate(rate)) < started + seconds:
            await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(http, url, chance, seen, arrival)))
        await asyncio.sleep(max(0.0, started + seconds - time.perf_counter()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    seen.seconds = time.perf_counter() - started
    return seen


def client() -> httpx2.AsyncClient:
    """A client without bounds of its own."""
    return httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None))


@contextmanager
def server(command: Sequence[str]) -> Iterator[Server]:
    """A server in a process of its own, once it is ready.

    Raises:
        RuntimeError: it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            try:
                if httpx2.get(f"{url}/health/ready", timeout=5).status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{' '.join(command)} did not start")
            time.sleep(0.2)
        yield Server(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


async def measure(servers: dict[str, Server], seconds: float, rounds: int) -> list[dict[str, Any]]:
    """Rows of all servers, which take turns."""
    whole = {name: Window() for name in servers}
    loaded = {(name, share): Window() for share in SHARES for name in servers}
    rates: dict[tuple[str, float], list[float]] = {key: [] for key in loaded}
    for turn in range(rounds):
        capacity: dict[str, float] = {}
        for name, one in servers.items():
            window = await watched(one, closed(one.url, seconds, random.Random(turn)))
            capacity[name] = len(window.waits) / window.seconds
            whole[name].add(window)
            tell(f"capacity, {name}: {window.row()}")
        for share in SHARES:
            for name, one in servers.items():
                rate = share * capacity[name if name == EAGER else FIRST]
                window = await watched(one, poisson(one.url, rate, seconds, random.Random(100 + turn)))
                loaded[name, share].add(window)
                rates[name, share].append(round(rate, 3))
                tell(f"{share} of capacity, {name}: {window.row()}")
                await settle(one.url)
    rows = [
        {"what": "capacity", "server": name, "share": None, "rates_per_s": None, **window.row()}
        for name, window in whole.items()
    ]
    for (name, share), window in loaded.items():
        given = rates[name, share]
        rows.append({"what": "poisson", "server": name, "share": share, "rates_per_s": given, **window.row()})
    return rows


async def profile(one: Server) -> dict[str, dict[str, float]]:
    """By engine: calls, rows of a call, and milliseconds of a call and of a row, since the server began."""
    async with client() as http:
        text = (await http.get(f"{one.url}/metrics")).text
    found: dict[str, dict[str, float]] = {}
    for what in ("seconds", "rows"):
        for kind in ("sum", "count"):
            for engine, value in re.findall(rf'cascade_call_{what}_{kind}{{engine="([^"]+)"}} (\S+)', text):
                found.setdefault(engine, {})[f"{what}_{kind}"] = float(value)
    return {
        engine: {
            "calls": sums["rows_count"],
            "rows_a_call": round(sums["rows_sum"] / sums["rows_count"], 2),
            "ms_a_call": round(1e3 * sums["seconds_sum"] / sums["seconds_count"], 2),
            "ms_a_row": round(1e3 * sums["seconds_sum"] / sums["rows_sum"], 2),
        }
        for engine, sums in sorted(found.items())
    }


async def watched(one: Server, window: Coroutine[Any, Any, Window]) -> Window:
    """A window with the processor time that the server took in it."""
    before = one.cpu()
    seen = await window
    seen.cpu = one.cpu() - before
    return seen


async def settle(url: str) -> None:
    """Wait until a server has let go of everybody who left."""
    async with client() as http:
        await http.post(f"{url}/v1/images/generations", json={**body(random.Random(0)), "num_inference_steps": 1})


def tell(text: str) -> None:
    """Say how it goes."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What it ran on."""
    load = os.getloadavg()[0]
    return {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine(), "load_before": load}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The waits by load, and the capacities."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    names = list(dict.fromkeys(row["server"] for row in rows))
    capacities = [
        next(r["pictures_per_s"] for r in rows if r["what"] == "capacity" and r["server"] == n) for n in names
    ]
    left.barh(names, capacities)
    left.set_xlabel("pictures a second, 24 clients")
    left.invert_yaxis()
    for name in names:
        mine = [row for row in rows if row["what"] == "poisson" and row["server"] == name]
        right.plot([row["share"] for row in mine], [row["p95_s"] for row in mine], marker="o", label=name)
    right.set_xlabel("load, share of capacity")
    right.set_ylabel("95 % of clients wait at most, s")
    right.set_yscale("log")
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of every window")
    parser.add_argument("--rounds", type=int, default=2, help="windows of every server at every load")
    parser.add_argument("--servers", nargs="*", default=list(SERVERS), choices=list(SERVERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    facts = machine()
    with ExitStack() as stack:
        servers = {name: stack.enter_context(server(SERVERS[name])) for name in args.servers}
        rows = asyncio.run(measure(servers, args.seconds, args.rounds))
        profiles = {name: asyncio.run(profile(one)) for name, one in servers.items() if name.startswith(FIRST)}
    found = {
        "machine": {**facts, "load_after": os.getloadavg()[0]},
        "seconds": args.seconds,
        "rounds": args.rounds,
        "rows": rows,
        "profile": profiles,
    }
    for row in rows:
        print(json.dumps(row))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
