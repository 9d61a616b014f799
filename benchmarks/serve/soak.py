"""A thousand clients at once for ten minutes: half of them leave at random, a quarter send bad input.

    python benchmarks/serve/soak.py --clients 1000 --minutes 10 --json benchmarks/results/serve_soak.json

Of four clients one sends bad input, two leave after a random time, and one waits for its picture. Nothing may hang,
every picture must be the one that the pipeline draws alone (to 1/255), every other answer a clear refusal (never 5xx
but 503), and the server's memory flat: it is noted every few seconds, and a line is fitted to the last two thirds of
the time. Clients that are told to wait (429, 503) wait as they are told. Then the server is stopped by SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from cascade_rt import CascadePipeline, LoopSettings, Request

KINDS = ("bad", "leaving", "leaving", "patient")
JOBS = 24
BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b'{"prompt": 3}',
    b'{"prompt": "a star", "size": "1x1"}',
    b'{"prompt": "a star", "model": "../x"}',
    b'{"prompt": "a star", "seed": -1}',
    b'{"prompt": "a star", "init_image": "AAAA"}',
    b"[" * 50_000,
    b" " * 2_000_000,
    b'{"prompt": "\xff"}',
)
SAMPLE_SECONDS = 2.0
ANSWER_SECONDS = 300.0
STOP_SECONDS = 60.0
PREVIEWS = 2


@dataclass(frozen=True)
class Job:
    """A request, and the picture that answers it.

    Attributes:
        body: of the request.
        pixels: ``[H, W, 3]`` integers.
    """

    body: dict[str, Any]
    pixels: NDArray[np.int64]


@dataclass
class Seen:
    """What became of the clients' requests.

    Attributes:
        outcomes: how often, by kind of client and answer.
        pictures: that were compared.
        wrong: what should not have happened.
        memory: of the server now and then: seconds, MiB resident, MiB of them that are no files, open files, threads.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[float, float, float, int, int]] = field(default_factory=list)


def make_jobs() -> list[Job]:
    """Requests of several sizes and step counts, and their pictures, drawn one at a time."""
    chance, made = random.Random(0), []
    with CascadePipeline.from_pretrained() as pipe:
        pipe.set_progress_bar_config(disable=True)
        for index in range(JOBS):
            steps, decoder_steps = chance.randint(1, 12), chance.randint(1, 5)
            width, height = chance.choice(((256, 256), (256, 256), (256, 256), (320, 192), (128, 128)))
            request = Request(
                prompt=f"a star {index}",
                width=width,
                height=height,
                seeds=(index,),
                prior=LoopSettings(num_inference_steps=steps),
                decoder=LoopSettings(num_inference_steps=decoder_steps),
            )
            body = {"prompt": request.prompt, "seed": index, "size": f"{width}x{height}"}
            body |= {"num_inference_steps": steps, "decoder_num_inference_steps": decoder_steps}
            made.append(Job(body, np.asarray(pipe.run(request).images[0]).astype(np.int64)))
    return made


def check(job: Job, text: str, seen: Seen) -> None:
    """Compare an answer with the picture that the pipeline drew."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(np.int64)
    seen.pictures += 1
    if pixels.shape != job.pixels.shape or np.abs(pixels - job.pixels).max() > 1:
        seen.wrong.append("another picture")


async def good(http: httpx2.AsyncClient, chance: random.Random, seen: Seen, jobs: Sequence[Job], kind: str) -> None:
    """Ask for a picture, and check it; a client that leaves does so after a random time."""
    job, streams = chance.choice(jobs), chance.random() < 0.25
    body = {**job.body, "stream": True, "partial_images": PREVIEWS} if streams else job.body
    patience = chance.uniform(0.05, 5.0) if kind == "leaving" else ANSWER_SECONDS
    try:
        answer = await asyncio.wait_for(http.post("/v1/images/generations", json=body), patience)
    except asyncio.TimeoutError:
        seen.outcomes[f"{kind}: {'left' if kind == 'leaving' else 'hung'}"] += 1
        if kind != "leaving":
            seen.wrong.append("no answer")
        return
    seen.outcomes[f"{kind}: {answer.status_code}"] += 1
    if answer.status_code in (429, 503):
        await asyncio.sleep(float(answer.headers["retry-after"]) * chance.uniform(0.5, 1.5))
    elif answer.status_code != 200:
        seen.wrong.append(f"{answer.status_code} {answer.text[:200]}")
    elif streams:
        last = answer.text.rstrip().rpartition("data: ")[2]
        check(job, json.loads(last)["b64_json"], seen)
    else:
        check(job, answer.json()["data"][0]["b64_json"], seen)


async def bad(http: httpx2.AsyncClient, chance: random.Random, seen: Seen) -> None:
    """Send what is no request."""
    content = chance.choice(BAD_BODIES)
    answer = await http.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
    seen.outcomes[f"bad: {answer.status_code}"] += 1
    if not 400 <= answer.status_code < 500:  # 408: this process was too busy to send two megabytes in time
        seen.wrong.append(f"{content[:40]!r}: {answer.status_code} {answer.text[:200]}")
    await asyncio.sleep(chance.uniform(0, 5))


async def client(url: str, number: int, end: float, seen: Seen, jobs: Sequence[Job]) -> None:
    """One client, again and again until the end."""
    chance, kind = random.Random(number), KINDS[number % len(KINDS)]
    await asyncio.sleep(chance.uniform(0, 5))
    async with httpx2.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, verify=False) as http:
        while time.monotonic() < end:
            try:
                await (bad(http, chance, seen) if kind == "bad" else good(http, chance, seen, jobs, kind))
            except httpx2.TransportError as error:
                seen.wrong.append(repr(error))
                await asyncio.sleep(1)


async def watch(server: psutil.Process, end: float, seen: Seen) -> None:
    """Note the server's memory, files and threads."""
    started = time.monotonic()
    while (now := time.monotonic()) < end:
        memory = server.memory_info()
        mib = [round(size / 2**20, 1) for size in (memory.rss, memory.rss - memory.shared)]
        seen.memory.append((round(now - started, 1), mib[0], mib[1], server.num_fds(), server.num_threads()))
        await asyncio.sleep(SAMPLE_SECONDS)


async def settled(url: str) -> float:
    """Seconds until nothing is drawn any more, after everybody left."""
    started = time.monotonic()
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        while "cascade_pictures_in_work 0.0" not in (await http.get("/metrics")).text:
            if time.monotonic() - started > STOP_SECONDS:
                raise RuntimeError("pictures are drawn that nobody waits for")
            await asyncio.sleep(0.05)
    return time.monotonic() - started


async def run(server: psutil.Process, url: str, clients: int, seconds: float, jobs: Sequence[Job]) -> dict[str, Any]:
    """All clients at once."""
    seen, end = Seen(), time.monotonic() + seconds
    before = server.memory_info().rss / 2**20
    watching = asyncio.create_task(watch(server, end, seen))
    await asyncio.gather(*(client(url, number, end, seen, jobs) for number in range(clients)))
    await watching
    times, resident, own, files, threads = (np.array(column) for column in zip(*seen.memory, strict=True))
    late = times > times[-1] / 3
    return {
        "clients": clients,
        "seconds": seconds,
        "outcomes": dict(sorted(seen.outcomes.items())),
        "pictures_compared": seen.pictures,
        "wrong": Counter(seen.wrong).most_common(10),
        "settled_s": round(await settled(url), 3),
        "memory_mib": {
            "before": round(before, 1),
            "at_a_third": float(resident[late][0]),
            "last": float(resident[-1]),
            "most": float(resident.max()),
            "most_without_files": float(own.max()),
            "slope_per_minute": round(float(np.polyfit(times[late], resident[late], 1)[0]) * 60, 3),
        },
        "open_files": {"most": int(files.max()), "last": int(files[-1])},
        "threads": {"most": int(threads.max()), "last": int(threads[-1])},
        "samples": seen.memory[:: max(1, len(seen.memory) // 60)],
    }


def main() -> int:
    """Run, and say whether anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--server", nargs="*", default=[], help="further flags of cascade-serve, without their dashes")
    args = parser.parse_args()
    jobs, load = make_jobs(), os.getloadavg()[0]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "cascade_rt.serve.cli",
        "--port",
        str(port),
        *(f"--{flag}" for flag in args.server),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                if httpx2.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            time.sleep(0.2)
        found = asyncio.run(run(psutil.Process(process.pid), url, args.clients, args.minutes * 60, jobs))
        started = time.monotonic()
        process.terminate()
        found["exit_code"] = process.wait(STOP_SECONDS)
        found["stopped_s"] = round(time.monotonic() - started, 3)
    finally:
        process.kill()
    found = {"machine": {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]}, **found}
    print(json.dumps({name: value for name, value in found.items() if name != "samples"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")
    return 1 if found["wrong"] or found["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
