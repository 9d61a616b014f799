"""A thousand clients at once, half of whom leave at random and a quarter of whom send bad input.

    python benchmarks/serve/chaos.py --clients 1000 --minutes 10 --json benchmarks/results/serve_chaos.json

Nothing may hang, every answer is a right picture or a clear refusal (never 5xx but 503), and the server's memory stays
flat: it is noted every few seconds. Clients that are told to wait (429, 503) wait as they are told.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

LEAVING, BAD = 0.5, 0.25
BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b'{"prompt": 3}',
    b'{"prompt": "a star", "size": "1x1"}',
    b'{"prompt": "a star", "model": "../x"}',
    b'{"prompt": "a star", "seed": -1}',
    b"[" * 50_000,
    b'{"prompt": "\xff"}',
)
SAMPLE_SECONDS = 2.0
ANSWER_SECONDS = 300.0


@dataclass
class Seen:
    """What became of the clients' requests.

    Attributes:
        outcomes: how often.
        wrong: what should not have happened.
        memory_mib: of the server, now and then.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


async def good(http: httpx2.AsyncClient, chance: random.Random, seen: Seen) -> None:
    """Ask for a picture, and check it; leave early where the dice say so."""
    body = {"prompt": "a star", "seed": chance.randrange(1000), "output_format": "jpeg"}
    body |= {"num_inference_steps": chance.randint(1, 20), "decoder_num_inference_steps": chance.randint(1, 5)}
    patience = chance.uniform(0.05, 5.0) if chance.random() < LEAVING else ANSWER_SECONDS
    try:
        answer = await asyncio.wait_for(http.post("/v1/images/generations", json=body), patience)
    except asyncio.TimeoutError:
        seen.outcomes["left" if patience < ANSWER_SECONDS else "hung"] += 1
        if patience == ANSWER_SECONDS:
            seen.wrong.append("no answer")
        return
    seen.outcomes[str(answer.status_code)] += 1
    if answer.status_code == 200:
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        if Image.open(io.BytesIO(data)).size != (256, 256):
            seen.wrong.append("a picture of another size")
    elif answer.status_code in (429, 503):
        await asyncio.sleep(float(answer.headers["retry-after"]) * chance.uniform(0.5, 1.5))
    else:
        seen.wrong.append(f"{answer.status_code} {answer.text[:200]}")


async def bad(http: httpx2.AsyncClient, chance: random.Random, seen: Seen) -> None:
    """Send what is no request."""
    content = chance.choice(BAD_BODIES)
    answer = await http.post("/v1/images/generations", content=content, headers={"content-type": "application/json"})
    seen.outcomes[str(answer.status_code)] += 1
    if answer.status_code not in (400, 404):
        seen.wrong.append(f"{content[:40]!r}: {answer.status_code} {answer.text[:200]}")
    await asyncio.sleep(chance.uniform(0, 5))


async def client(url: str, number: int, end: float, seen: Seen) -> None:
    """One client, again and again until the end."""
    chance = random.Random(number)
    await asyncio.sleep(chance.uniform(0, 5))
    async with httpx2.AsyncClient(base_url=url, timeout=None) as http:
        while time.monotonic() < end:
            try:
                await (bad if number % 4 == 0 else good)(http, chance, seen)
            except httpx2.TransportError as error:
                seen.wrong.append(repr(error))
                await asyncio.sleep(1)


async def watch(pid: int, end: float, seen: Seen) -> None:
    """Note the server's memory."""
    while time.monotonic() < end:
        status = Path(f"/proc/{pid}/status").read_text()
        seen.memory_mib.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
        await asyncio.sleep(SAMPLE_SECONDS)


async def settled(url: str) -> float:
    """Seconds until nothing is drawn any more, after everybody left."""
    started = time.monotonic()
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        while "cascade_pictures_in_work 0.0" not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.05)
    return time.monotonic() - started


async def run(url: str, pid: int, clients: int, seconds: float) -> dict[str, Any]:
    """All clients at once."""
    seen, end = Seen(), time.monotonic() + seconds
    watching = asyncio.create_task(watch(pid, end, seen))
    await asyncio.gather(*(client(url, number, end, seen) for number in range(clients)))
    await watching
    memory = seen.memory_mib
    return {
        "clients": clients,
        "seconds": seconds,
        "outcomes": dict(seen.outcomes),
        "wrong": Counter(seen.wrong).most_common(10),
        "settled_s": round(await settled(url), 3),
        "memory_mib": {
            "first": round(memory[0], 1),
            "at_a_third": round(memory[len(memory) // 3], 1),
            "last": round(memory[-1], 1),
            "most": round(max(memory), 1),
        },
    }


def main() -> int:
    """Run, and say whether anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "cascade_rt.serve.cli", "--port", str(port)], stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                if httpx2.get(f"{url}/health/ready").status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            time.sleep(0.2)
        found = asyncio.run(run(url, process.pid, args.clients, args.minutes * 60))
    finally:
        process.terminate()
        process.wait()
    found["exit_code"] = process.returncode
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["wrong"] or found["exit_code"] else 0


if __name__ == "__main__":
    sys.exit(main())
